import itertools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tracked_config import Tracked

from blogjax.tasks.critics import ConstrainedCritic, constrain
from blogjax.train import mesh as meshes
from configs.gan_ring_2d import get_config
from experiments import gan_ring_2d as ring
from experiments.adversarial import clock, measures, plane
from experiments.launch.configs import ConfigError, flatten

ARMS = ("none", "clip", "sn", "gp", "gn", "gran", "direction")


@pytest.fixture
def one_device(monkeypatch):
    """For which tasks compile faster than for eight."""
    one = meshes.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(meshes, "make_mesh", lambda: one)


def test_variants_differ_in_values_only():
    assert len({tuple(flatten(get_config(v).to_dict())) for v in ("default", "full", "smoke")}) == 1
    assert get_config("full").train.seeds == (0, 1, 2)
    with pytest.raises(ValueError, match="there are default, full, smoke"):
        get_config("huge")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.batch_size", 12, r"batch of 12 does not divide"),
        ("data.evaluation", 12, r"batch of 12 does not divide"),
        ("data.points", 0, r"points must be in"),
        ("model.hidden", (4, 0), r"model.hidden needs widths of at least 1, got \[4, 0\]"),
        ("model.latent", 0, r"latent must be in"),
        ("model.slope", 1.0, r"slope must be in \[0, 1\)"),
        ("optim.loss", "minimax", r"loss='minimax' is unknown"),
        ("optim.critic_steps", 0, r"critic_steps must be in"),
        ("optim.b2", 1.0, r"b2 must be in"),
        ("arms.gn.learning_rate", 0.0, r"learning_rate must be in"),
        ("arms.clip.bound", -1.0, r"bound must be positive, got -1"),
        ("measure.share", 1.0, r"share must be in"),
        ("measure.fine", 1, r"fine must be in"),
        ("measure.rounds", 0, r"rounds must be in"),
        ("train.steps", 0, r"train.steps must be at least 1"),
        ("train.evaluate_every", 0, r"evaluate_every must be in"),
        ("train.seeds", (), r"train.seeds must be different numbers"),
    ],
)
def test_a_config_that_cannot_be_run_says_why(tmp_path, field, value, message):
    config = get_config("smoke")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        ring.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arm", "option", "message"),
    [
        ("sn", "weight", r"'sn' has no options weight"),
        ("direction", "lipschitz", r"'direction' has no options lipschitz"),
        ("wgan", "learning_rate", r"arms are none, clip, .* got .*wgan"),
    ],
)
def test_an_unknown_arm_or_option_is_refused(tmp_path, arm, option, message):
    config = get_config("smoke")
    config.arms[arm] = {**config.arms.get(arm, {}), option: 1.0}
    with pytest.raises(ConfigError, match=message):
        ring.run(config, tmp_path)


def _net(seed=0, widths=(2, 5, 4, 1)):
    """A leaky network in the layout of the critic's parameters, and in numpy."""
    rng = np.random.default_rng(seed)
    shapes, names = list(itertools.pairwise(widths)), ("dense_0", "dense_1", "out")
    params = {
        name: {"kernel": rng.normal(size=s), "bias": rng.normal(size=s[1])}
        for name, s in zip(names, shapes, strict=True)
    }

    def look(x):
        """Value and gradient at one point."""
        h, jacobian = x, np.eye(2)
        for name in names:
            h = h @ params[name]["kernel"] + params[name]["bias"]
            jacobian = jacobian @ params[name]["kernel"]
            if name != "out":
                leaky = np.where(h > 0, 1, 0.2)
                h, jacobian = h * leaky, jacobian * leaky
        return h[0], jacobian[:, 0]

    return params, look


def _plane(hidden=(5, 4)):
    config = get_config("smoke")
    config.model.hidden = hidden
    return ring.make_arms(config)


@pytest.mark.slow  # seconds of compiling
def test_the_direction_of_the_gradient_as_a_critic(x64):
    params, look = _net()
    critic = _plane()[1]["direction"][0]
    outputs = jax.jit(critic.score)
    x = np.random.default_rng(1).normal(size=(6, 2)) * 2
    expected = [g @ row / math.hypot(*g) for row, (_, g) in ((row, look(row)) for row in x)]
    np.testing.assert_allclose(outputs(params, x), expected, rtol=1e-12)
    total = jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(critic.score(p, x)), (0, 1)))
    slopes = np.asarray(total(params, x)[1][1])
    np.testing.assert_allclose(np.hypot(*slopes.T), 1, rtol=1e-12)
    value, gradients = total(jax.tree.map(np.zeros_like, params), x)
    assert value == 0 and all(not np.any(g) for g in jax.tree.leaves(gradients))


@pytest.mark.slow  # seconds of compiling
def test_the_critics_of_all_arms_are_of_one_leaky_network(x64):
    params, look = _net()
    made, arms = _plane()
    assert tuple(arms) == plane.ARMS == ARMS
    x = np.random.default_rng(1).normal(size=(6, 2)) * 2
    value = np.array([look(row)[0] for row in x])
    norm = np.array([math.hypot(*look(row)[1]) for row in x])
    options = {name: ring.options_of(get_config().arms[name]) for name in ARMS}
    assert options["gran"]["lipschitz"] == 1  # as the formula below has it
    for name in ("none", "clip", "gp"):
        np.testing.assert_allclose(arms[name][0].score(params, x), value, rtol=1e-12)
    np.testing.assert_allclose(
        arms["gn"][0].score(params, x), value / (norm + abs(value)), rtol=1e-12
    )
    np.testing.assert_allclose(
        arms["gran"][0].score(params, x), value * norm / (norm**2 + 0.1), rtol=1e-12
    )
    assert arms["clip"][0].project({"a": jnp.ones(1)})["a"] == options["clip"]["bound"]
    assert arms["gp"][0].penalty is not None and arms["sn"][0].reparametrize is not None
    assert [plane.bound_of(n, options[n]) for n in ARMS] == [None] * 4 + [1, 1, 1]
    assert plane.bound_of("gn", {"lipschitz": 3.0}) == 3
    assert made.latent == 2


def test_points_of_different_uses_have_nothing_in_common():
    made, _ = _plane()
    drawn = [
        plane.points(made.data, 50, seed, stream) for seed in (0, 1, 2) for stream in plane.STREAMS
    ]
    assert len(np.unique(np.concatenate(drawn), axis=0)) == 50 * 12
    assert abs(np.hypot(*drawn[0].T) - 2).max() < 0.5
    np.testing.assert_array_equal(plane.points(made.data, 9, 2, "fresh"), drawn[10][:9])


def test_modes_and_shares_by_hand():
    modes = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    samples = np.array([[0.3, 0.0], [0.0, 0.31], [4.1, 0.1], [4.0, 0.0], [np.nan, 0], [np.inf, 0]])
    shares = measures.mode_shares(np.float32(samples), modes, 0.3 + 1e-6)
    np.testing.assert_allclose(shares, [1 / 6, 2 / 6, 0])
    assert measures.modes_found(shares, 1 / 6) == 2 and measures.modes_found(shares, 0.2) == 1


def test_the_distance_is_in_the_plane_and_nan_where_samples_are_not_finite():
    x = np.random.default_rng(0).normal(size=(20, 2))
    np.testing.assert_allclose(measures.distance(x, x + [3, 4], 6), 5 / math.sqrt(2))
    assert math.isnan(measures.distance(np.array([[np.inf, 0.0]]), x, 6))


def test_the_surface_of_a_linear_critic():
    """GN of a linear critic in closed form, to the precision of float64."""
    a, b = np.float32([0.75, -1.5]), np.float32(0.25)
    critic = constrain(lambda params, x: x @ params["a"] + params["b"], "gn")
    found = measures.critic_surface(critic, {"a": a, "b": b}, {}, 2.0, side=9, lines=3, fine=33)
    n = math.hypot(*a)
    value = lambda x, y: a[0] * x + a[1] * y + b  # noqa: E731
    x, y = np.meshgrid(np.linspace(-2, 2, 9), np.linspace(-2, 2, 9))
    d = value(x, y)
    np.testing.assert_allclose(found.values, d / (n + abs(d)), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.slope, np.max(n / (n + abs(d))) ** 2, rtol=1e-12)
    x, y = np.meshgrid(np.linspace(-2, 2, 33), [-2, 0, 2])
    d = value(x, y)
    np.testing.assert_allclose(found.lines, d / (n + abs(d)), rtol=1e-12, atol=1e-14)
    assert found.spacing == 4 / 32 and found.values.dtype == np.float64


def test_the_surface_is_of_the_critic_after_its_state():
    critic = ConstrainedCritic(
        lambda params, x: x @ params, reparametrize=lambda params, state: (params / state, state)
    )
    found = measures.critic_surface(
        critic, np.float32([3, 4]), np.float32(2), 1.0, side=3, lines=1, fine=3
    )
    np.testing.assert_allclose(found.slope, 2.5)
    np.testing.assert_allclose(found.values[2, 2], 3.5)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 3.0]))
def test_jumps_are_found_and_slopes_are_not(seed, bound):
    """A piecewise linear function of full slope, with jumps put in."""
    rng = np.random.default_rng(seed)
    fine, count, h = 400, 5, 0.01
    slopes = rng.choice([-bound, bound, 0.0], size=(3, fine - 1))
    height = rng.uniform(0.5, 2, size=count) * rng.choice([-1, 1], count)
    steps = slopes * h
    where = rng.choice(3 * (fine - 1), count, replace=False)
    steps.flat[where] = height
    lines = np.cumsum(np.concatenate([rng.normal(size=(3, 1)), steps], axis=1), axis=1)
    found = measures.jumps(lines, h, bound)
    np.testing.assert_allclose(found["per_length"], count / (3 * (fine - 1) * h))
    np.testing.assert_allclose(found["largest"], abs(height).max())
    np.testing.assert_allclose(found["share"], abs(height).sum() / abs(steps).sum())


def test_a_critic_without_jumps_has_none():
    assert measures.jumps(np.ones((2, 5)), 0.1, 1.0) == {"per_length": 0, "largest": 0, "share": 0}
    straight = np.linspace(0, 1, 11)[None] + 1e3
    assert measures.jumps(straight, 0.1, 1.0)["per_length"] == 0


def test_the_clock_takes_turns(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(clock, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def program(name, cost):
        def call():
            order.append(name)
            now[0] += cost * (1 + order.count(name) // 100)
            return jnp.zeros(())

        return call

    found = clock.interleaved_times({"none": program("none", 2), "gn": program("gn", 5)}, 3, 4)
    assert found == {"none": [2, 2, 2], "gn": [5, 5, 5]}
    assert order == ["none", "gn"] + (["none"] * 4 + ["gn"] * 4) * 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One arm of the smoke variant, as `run` makes it."""
    one = meshes.make_mesh(devices=jax.devices()[:1])
    config, folder = get_config("smoke"), tmp_path_factory.mktemp("runs") / "gn"
    made, arms = ring.make_arms(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda: one)
        figures = ring.run_arm(config, folder, made, "gn", arms["gn"], 3)
    return config, folder, made, arms["gn"], figures


@pytest.mark.slow  # a run of its fixture
def test_an_arm_is_trained_measured_and_read_back(trained, monkeypatch):
    config, folder, made, arm, figures = trained
    shown = np.load(folder / "shown.npz")
    assert shown["values"].shape == (9, 9) and shown["samples"].shape == (100, 2)
    assert np.abs(shown["values"]).max() <= 1
    shares = measures.mode_shares(shown["samples"], made.data.modes, 0.3)
    np.testing.assert_allclose(figures["shares"], shares)
    assert figures["near"] == pytest.approx(shares.sum())
    assert figures["modes"] == (shares >= 0.02).sum()
    fresh = plane.points(made.data, 100, 3, "fresh")
    assert figures["w2"] == pytest.approx(measures.distance(shown["samples"], fresh, 3))
    assert 0 < figures["slope"] <= 1 == figures["bound"] and figures["skipped"] == 0
    assert figures["operations"] == json.loads((folder / "program.json").read_text())["flops"]
    assert figures["along"]["step"] == [2, 4] and len(figures["along"]["modes"]) == 2
    monkeypatch.setattr(ring, "train_arm", None)
    assert ring.run_arm(config, folder, made, "gn", arm, 3) == figures


@pytest.mark.slow  # seconds of compiling
def test_what_is_evaluated_along_training(trained):
    """Shares of samples near each mode, by the generator's parameters and the rows' keys."""
    config, _, made, (_, task), _ = trained
    state = types.SimpleNamespace(params={"generator": {}})
    modes = np.asarray(made.data.modes)
    placed = np.concatenate([modes[:3], modes[:1] + [0.0, 0.29], modes[1:2] + [0.31, 0.0]])
    batch = {"row": jnp.arange(5), "weight": jnp.ones(5), "x": jnp.zeros((5, 2))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plane.Plane, "generate", lambda *_: jnp.asarray(placed, jnp.float32))
        sums = task.evaluate(state, batch, jax.random.key(0))
    assert [float(sums[f"near_{i}"][0]) for i in range(8)] == [2, 1, 1, 0, 0, 0, 0, 0]
    assert all(float(count) == 5 for _, count in sums.values())
    assert config.measure.near * ring.NOISE == pytest.approx(0.3)


@pytest.mark.slow  # seconds of compiling
def test_the_rate_falls_to_zero_with_the_last_step():
    """Adam's first update is the rate, for any gradient; the second step of one has none left."""
    config = get_config("smoke")
    config.optim.critic_steps = 2
    made, _ = _plane((3,))
    critic = made.critic("none", {})
    task = plane.make_task(made, critic, config.optim, 0.25, 1, near=0.3)
    rows = {"row": jnp.arange(16), "weight": jnp.ones(16), "x": jnp.ones((16, 2))}
    step = jax.jit(task.step)
    start = task.init(jax.random.key(0))
    after, _ = step(start, rows, jax.random.key(1))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, start.params)
    largest = {name: max(jax.tree.leaves(tree)) for name, tree in moved.items()}
    np.testing.assert_allclose(largest["generator"], 0.25, rtol=1e-3)
    # The critic's second update has half the rate, and after (1 - 0.9) / (1 - 0.9^2) at most
    # 0.125 / sqrt(0.1 / 0.19).
    assert 0.26 < largest["critic"] < 0.25 + 0.173
    moments = after.opt_state["generator"][0]  # b1 is 0 and b2 0.9
    for mu, nu in zip(jax.tree.leaves(moments.mu), jax.tree.leaves(moments.nu), strict=True):
        np.testing.assert_allclose(nu, 0.1 * np.square(mu), rtol=1e-4)
    last, _ = step(after, rows, jax.random.key(2))
    for a, b in zip(jax.tree.leaves(last.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(a, b)


def _measured(**changed):
    arms = {
        "none": {"modes": 4, "w2": 0.5, "slope": 30.0},
        "clip": {"modes": 0, "w2": 9.0, "slope": 9.0},
        "sn": {"modes": 0, "w2": 9.0, "slope": 9.0},
        "gp": {"modes": 8, "w2": 0.2, "slope": 1.4},
        "gn": {"modes": 7, "w2": 0.3, "slope": 0.999, "bound": 1.0, "jumps": {"share": 0.4}},
        "gran": {"modes": 8, "w2": 0.25, "slope": 2.9, "bound": 3.0, "jumps": {"share": 0.3}},
        "direction": {"modes": 1, "w2": 1.2, "slope": 1.0, "bound": 1.0, "jumps": {"share": 0.9}},
    }
    for name, fields in changed.items():
        arms[name] |= fields
    return arms


def test_the_claims_by_hand():
    config = get_config("smoke")
    config.judge = True
    times = {
        "step": {"gp": 2.0, "gn": 3.0, "gran": 2.5},
        "generator": {"gp": 1.0, "gn": 1.5, "gran": 1.6},
    }
    found = ring.claims(config, [_measured()], [times])
    values = [7, 3, 5 / 3, 0, 1.4, 0.3, 4, 1.25, 1.25, 1.5]
    np.testing.assert_allclose([c.value for c in found], values, rtol=1e-12)
    inf = math.inf
    assert [(c.low, c.high) for c in found] == [
        (7, inf), (1, inf), (1, inf), (-inf, 1e-6), (1, inf), (0.1, inf), (2, inf), (1, inf),
        (1, inf), (1.2, inf),
    ]  # fmt: skip
    assert [c.verdict for c in found].count(
        "holds"
    ) == 6  # 7 of 7, 1.25 of 1 and times are too near
    other = _measured(
        gn={"modes": 3, "slope": 1.2, "w2": None, "jumps": {"share": 0.01}},
        gran={"w2": 0.1}, gp={"slope": 0.8}, direction={"w2": 0.2},
    )  # fmt: skip
    slow = {"step": {"gp": 4.0, "gn": 1.5, "gran": 2.5}, "generator": {"gp": 4, "gn": 2, "gran": 3}}
    found = ring.claims(config, [other], [slow])
    values = [3, -1, 0, 0.2, 0.8, 0.01, 0, 0.5, 0.375, 0.5]
    np.testing.assert_allclose([c.value for c in found], values, atol=1e-12)
    assert {c.verdict for c in found} == {"fails"}
    config.judge = False
    assert {c.verdict for c in ring.claims(config, [other] * 2, [slow] * 2)} == {"not judged"}


@pytest.mark.slow
def test_the_smoke_variant(tmp_path, one_device):
    config = get_config("smoke").lock()
    tracked = Tracked(config)
    result = ring.run(tracked, tmp_path)
    assert set(flatten(config.to_dict())) == tracked.read
    assert result.pictures == ["critics.png"]
    assert 20_000 < (tmp_path / "critics.png").stat().st_size < 600_000
    assert [c.verdict for c in result.claims] == ["not judged"] * 10
    assert all(c.statement and c.source.startswith("https://") for c in result.claims)
    (measured,), (times,) = result.measured["by_seed"], result.measured["times"]
    assert tuple(measured) == ARMS
    assert [measured[n]["jumps"] is None for n in ARMS] == [True] * 4 + [False] * 3
    assert measured["gn"]["slope"] <= 1 and measured["direction"]["slope"] == pytest.approx(1)
    for part in ("step", "generator", "milliseconds"):
        assert tuple(times[part]) == ARMS and all(v > 0 for v in times[part].values())
    assert times["step"]["none"] == times["generator"]["none"] == 1
    json.dumps(result.measured)
    before = (tmp_path / "gp" / "measured.json").read_text()
    (tmp_path / "gp" / "measured.json").unlink()  # as after a kill before measuring
    again = ring.run(config, tmp_path)
    assert (tmp_path / "gp" / "measured.json").read_text() == before
    assert [c.value for c in again.claims] == [c.value for c in result.claims]
