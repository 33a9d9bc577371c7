import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

from benchmarks import multitask, multitask_solves, multitask_steps
from benchmarks.peers import min_norm_solvers
from benchmarks.peers.multitask_torch import MGDA, PLAIN, UPGRAD, UPGRAD_ONE
from blogjax.multitask.min_norm import min_norm_weights

SOLVERS = {
    "frank_wolfe": min_norm_solvers.frank_wolfe,
    "projected_gradient": min_norm_solvers.projected_gradient,
    "slsqp": min_norm_solvers.slsqp,
    "jitted": jax.jit(multitask_solves.frank_wolfe),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_other_solvers_find_the_shortest_vector(name):
    """(1, 0) and (0, 2) by hand: 0.8 and 0.2; (1, 0), (-1, 1), (3, 0): 2/5 of both, squared 1/5."""
    found = SOLVERS[name](np.diag(np.array([1, 4], np.float32)))
    np.testing.assert_allclose(found, [0.8, 0.2], atol=2e-3)
    g = np.array([[1.0, 0.0], [-1.0, 1.0], [3.0, 0.0]], np.float32)
    found = np.asarray(SOLVERS[name](g @ g.T))
    # From equal weights the third's share falls as 1 / iterations.
    np.testing.assert_allclose(found, [0.6, 0.4, 0.0], atol=1e-2 if name == "jitted" else 2e-3)


def test_the_projection_is_a_shift_and_a_cut():
    for y in np.random.default_rng(0).normal(size=(20, 5)) * 2:
        shift = brentq(lambda t, y=y: np.maximum(y - t, 0).sum() - 1, y.min() - 1, y.max())
        np.testing.assert_allclose(min_norm_solvers.project(y), np.maximum(y - shift, 0), atol=1e-9)


@pytest.mark.parametrize("name", multitask_solves.FAMILIES)
def test_two_ways_to_the_optimum(name, monkeypatch):
    gradients = multitask_solves.family(name, 5, np.random.default_rng(1))
    assert gradients.shape == (5, 12) and gradients.dtype == np.float32
    tried = multitask_solves.optimum(gradients)
    monkeypatch.setattr(multitask_solves, "ENUMERATED", 0)
    square = np.square(gradients).sum(1).mean()
    assert abs(tried - multitask_solves.optimum(gradients)) < 1e-9 * square
    if name == "stationary":
        assert tried < 1e-12 * square
    elif name in ("normal", "conflicting"):
        assert tried > 1e-3 * square


def test_excess_is_of_what_lies_on_the_simplex():
    """(1, 0) and (0, 2): least 4/5, mean square 5/2. Equal weights: (1/2, 1), squared 5/4."""
    g = np.array([[1, 0], [0, 2]], np.float32)
    assert multitask_solves.optimum(g) == pytest.approx(0.8)
    assert multitask_solves.excess(np.array([3, 3]), g, 0.8) == pytest.approx(0.45 / 0.8)
    assert multitask_solves.excess(np.array([1, -1e-3]), g, 0.8) == pytest.approx(0.25)
    assert multitask_solves.excess(np.array([1, 1]), g, 0.0) == pytest.approx(1.25 / 2.5e-3)
    found = [np.array([0.5, 0.5]), np.array([np.nan, 1]), np.array([0.8, 0.2])]
    scored = multitask_solves.score(found, np.stack([g] * 3), [0.8] * 3)
    assert (scored["failed"], scored["greatest excess"]) == (1, pytest.approx(0.5625, abs=5e-3))


def test_ratios_of_solves_are_taken_repeat_for_repeat():
    seconds = {multitask_solves.OURS: [1e-5, 2e-5, 4e-5], multitask_solves.NO_OP: [1e-5] * 3,
               "other": [1e-4, 1e-4, 1e-4]}  # fmt: skip
    table = multitask_solves.rows(seconds, {"other": {"failed": 1}})
    assert table[multitask_solves.OURS]["over a no-op"] == [2.0, 1.5, 3.0]
    assert table["other"]["times ours"] == [5.0, 3.75, 7.5] and table["other"]["failed"] == 1
    assert table["other"]["us"][0] == 100.0


def toy(params, batch):
    """Gradients by the trunk, `h - b_k`, times `w_k`: of squares of distances."""
    squares = jnp.square(params["trunk"][None, :] - batch)
    return jnp.sum(squares, axis=1) * params["heads"] / 2


def test_steps_agree_with_numpy():
    rng = np.random.default_rng(2)
    theta, b = rng.normal(size=4).astype(np.float32), rng.normal(size=(3, 4)).astype(np.float32)
    params = {"trunk": theta, "heads": np.array([1.0, 2.0, 0.5], np.float32)}
    g = (theta - b) * params["heads"][:, None]
    steps = {
        multitask_steps.JACREV: multitask_steps.Step(toy, params, b, min_norm_weights, "jacrev"),
        multitask_steps.SEPARATE: multitask_steps.Separate(toy, params, b, min_norm_weights),
        multitask_steps.SUM: multitask_steps.Step(toy, params, b, None, None),
    }
    values = np.square(theta - b).sum(1) * params["heads"] / 2
    for name, step in steps.items():
        outcome = step.outcome()
        np.testing.assert_allclose(outcome[0], values, rtol=1e-5)
        assert step.facts["peak_bytes"] > 0
        assert all(s >= 0 for s in step.seconds(2))
        if name != multitask_steps.SUM:
            np.testing.assert_allclose(outcome[1], g @ g.T, rtol=1e-4, atol=1e-5)
            least = multitask_solves.optimum(g)
            assert abs(multitask_solves.excess(outcome[2], g, least)) < 1e-5
    assert max(multitask_steps.differences(steps).values()) < 1e-5


class Given:
    """A contender that takes no time."""

    def __init__(self, peak=0):
        self.facts = {"peak_bytes": peak}
        self.calls = 0

    def seconds(self, steps):
        self.calls += 1
        return (1.0, 2.0)


def test_a_long_case_ends_after_the_fewest_repeats():
    players = {"a": Given(), "b": Given()}
    seconds = multitask_steps.measure(players, 50, limit=0.0)
    assert {len(s) for s in seconds.values()} == {multitask_steps.FEWEST}
    assert players["a"].calls == 1 + multitask_steps.FEWEST


def step_table(ours, theirs, peak):
    names = {multitask_steps.SUM: 1.0, multitask_steps.JACREV: ours, multitask_steps.SCAN: 3.0,
             multitask_steps.SEPARATE: 4.0, multitask_steps.OURS_UPGRAD: ours, PLAIN: 2.0,
             MGDA: theirs, UPGRAD: theirs, UPGRAD_ONE: 0.75 * theirs}  # fmt: skip
    players = {name: Given(peak) for name in names}
    return multitask_steps.rows(players, {n: [(s, s), (s, s)] for n, s in names.items()})


def test_targets_are_read_from_the_tables():
    table = step_table(2.0, 5.0, 100)
    assert table[MGDA]["over the sum"][0] == 2.5 and table[MGDA]["times ours"][0] == 2.5
    assert table[multitask_steps.SEPARATE]["times ours"][0] == 2.0
    solve = {"over a no-op": [11.0, 10.0, 12.0], "greatest excess": 2e-7}
    tables = {("MLP", 2): table, ("MLP", 8): step_table(2.0, 5.0, 120)}
    found = multitask.targets({8: {multitask_solves.OURS: solve}}, tables)
    assert [(t["found"], t["met"]) for t in found.values()] == [
        (2e-7, True), (11.0, False), (2.5, True), (1.875, False), (2.5, True), (1.875, False),
        (1.2, False),
    ]  # fmt: skip


@pytest.mark.parametrize("quick", [True, False])
def test_a_quick_look_writes_nothing(quick, monkeypatch, tmp_path):
    solve = {"over a no-op": [5.0] * 3, "greatest excess": 1e-9}
    written, asked = [], []
    monkeypatch.setattr(multitask, "settle", lambda: 0.0)
    monkeypatch.setattr(multitask, "PACKAGES", ("no such package",))
    monkeypatch.setattr(multitask, "RESULTS", tmp_path)
    monkeypatch.setattr(multitask.solves, "run", lambda *a: {multitask_solves.OURS: solve})
    monkeypatch.setattr(multitask.solves, "show", lambda *a: None)
    monkeypatch.setattr(
        multitask, "case", lambda *a: asked.append(a) or step_table(1.0, 2.0, 100)
    )  # fmt: skip
    monkeypatch.setattr(multitask, "write", lambda *a: written.append(a))
    monkeypatch.setattr("sys.argv", ["multitask"] + ["--quick"] * quick)
    multitask.main()
    assert len(asked) == (4 if quick else 6)
    assert [name for name, _ in written] == ([] if quick else ["multitask"])
