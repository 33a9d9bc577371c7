import json
import math

import jax
import numpy as np
import pytest
from test_two_losses import descend, gradients_of, losses_of, weights_of
from tracked_config import Tracked

from configs.pareto_front_2d import get_config
from experiments import pareto_front_2d as pareto
from experiments.launch.configs import ConfigError, flatten
from experiments.multitask.walks import NAMES

INF = math.inf
ARMS = (*NAMES, "min_norm_float64")


def test_variants_differ_in_values_only():
    assert len({tuple(flatten(get_config(v).to_dict())) for v in ("default", "full", "smoke")}) == 1
    with pytest.raises(ValueError, match="there are default, full, smoke"):
        get_config("huge")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("starts.around", 0, r"around must be in \[1"),
        ("starts.deviation", -1.0, r"deviation must be in \[0, 10\)"),
        ("optim.learning_rate", 0.0, r"learning_rate must be in"),
        ("optim.eps", 1.0, r"eps must be in \[0, 1\)"),
        ("optim.cagrad_c", 1.0, r"cagrad_c must be in \[0, 1\), got 1"),
        ("plain.starts", 0, r"starts must be in \[1"),
        ("plain.learning_rate", 10.0, r"learning_rate must be in"),
        ("plain.steps", 0, r"steps must be in \[1"),
        ("measure.points", 6, r"measure.points, 6, must divide train.steps, 20"),
        ("measure.near", 0.0, r"near must be in"),
        ("train.steps", 0, r"steps must be in \[1"),
        ("train.seeds", (0, 0), r"train.seeds must be different numbers"),
        ("train.seeds", (), r"train.seeds must be different numbers"),
    ],
)
def test_a_config_that_cannot_be_run_says_why(tmp_path, field, value, message):
    config = get_config("smoke")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        pareto.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_starts_are_the_usual_ones_and_others_around_them():
    config = get_config()
    config.starts.update(around=2000, deviation=0.5)
    starts = pareto.make_starts(config, 3)
    usual = np.array([(-8.5, 7.5), (0, 0), (9, 9), (-7.5, -0.5), (9, -1)])
    np.testing.assert_array_equal(starts[:5], usual)
    drawn = starts[5:].reshape(2000, 5, 2)
    np.testing.assert_allclose(drawn.mean(axis=0), usual, atol=0.06)  # five deviations
    np.testing.assert_allclose(drawn.std(axis=0), 0.5, rtol=0.09)
    np.testing.assert_array_equal(pareto.make_starts(config, 3), starts)
    assert (pareto.make_starts(config, 4)[5:] != starts[5:]).all()


@pytest.mark.slow  # seconds of compiling
def test_the_figures_of_paths_by_hand():
    config = get_config()
    config.train.steps, config.measure.points = 30, 3
    middle = (0.0, -8.35514)  # of the front
    paths = np.array(
        [
            [(0, 0), middle, (0.75, -8.356), (-0.25, -8.355)],  # arrives in the first third
            [middle, (3.0, -4.0), (3.0, -4.0), (2.0, -3.0)],  # leaves it
            [(9.0, 9.0), (9.0, 8.0), (9.0, 7.0), (-6.0, -2.0)],  # never arrives
        ]
    )
    found = pareto.measure_paths(config, np.float32(paths))
    assert found["arrived"] == [10, 0, None]
    assert found["place"] == pytest.approx([0, 0, None])
    assert found["way"] == pytest.approx([1, 3, None])
    np.testing.assert_allclose(found["end"], paths[:, -1], rtol=1e-6)
    np.testing.assert_allclose(found["losses"], losses_of(*paths[:, -1].T), rtol=1e-6)
    np.testing.assert_allclose(found["distance"][1], 5.358, atol=0.01)
    for x, ratio in zip(paths[1:, -1], found["stationary"][1:], strict=True):
        g = gradients_of(x)
        shortest = np.linalg.norm(weights_of("min_norm", g) @ g)
        np.testing.assert_allclose(
            ratio, shortest / max(np.linalg.norm(g, axis=1)), rtol=1e-4, atol=1e-9
        )
    assert found["stationary"][0] < 1e-5 < found["stationary"][1]
    json.dumps(found)


@pytest.mark.slow  # seconds of compiling
def test_the_least_mean():
    across = np.linspace(-11, 11, 1101)
    grid = losses_of(*np.meshgrid(across, across)).mean(axis=-1)
    np.testing.assert_allclose(pareto.least_mean(), grid.min(), atol=1e-4)


def _arm(**changed):
    """Figures of ten paths, five from the usual starts; all that the claims read."""
    rows = {
        "losses": [[-15.0, -15.2]] * 10, "distance": [0.01] * 10, "stationary": [1e-4] * 10,
        "place": [-2.0, 0.0, 2.0, -1.0, 3.0] * 2, "way": [0.01] * 10,
    }  # fmt: skip
    return rows | changed


def _measured(**changed):
    arms = {name: _arm() for name in ARMS} | {
        "mean": _arm(distance=[9, 0, 8, 0, 0, 9.5, 0, 7, 0, 0]),
        "min_norm": _arm(place=[-5, 0, 5, -6, 6, -9, 0, 0, 0, 9]),
        "pcgrad": _arm(place=[-2.0, 0.0, 2.0, -1.0, 3.0, -9, 0, 0, 0, 9]),
        "primary_auxiliary": _arm(place=[6.0] * 10),
        "mixed": _arm(place=[-6.0] * 9 + [4.0]),
    }
    for name, fields in changed.pop("arms", {}).items():
        arms[name] = arms[name] | fields
    rise = {"primary_auxiliary": 0.02, "half": 0.01, "alone": 2.0, "adam": 1.0}
    return {"arms": arms, "rise": rise | changed}


def test_the_claims_by_hand():
    config = get_config()
    config.measure.near = 0.02
    found = pareto.claims(config, [_measured()])
    values = [7, 0.01, 0.01, 0.01, 1e-4, 5, -15.1 - pareto.least_mean(), 0.01, 2, 0.01, 0.5]
    np.testing.assert_allclose([c.value for c in found], values, rtol=1e-6)
    assert [(c.low, c.high) for c in found] == [
        (1, INF), (-INF, 0.05), (-INF, 0.05), (-INF, 0.05), (-INF, 1e-3), (3.5, INF),
        (-INF, 0.05), (-INF, 0.05), (0, INF), (-INF, 0.05), (0.4, 0.6),
    ]  # fmt: skip
    assert {c.verdict for c in found} == {"holds"}
    far = [0.01] * 9 + [2.0]
    other = _measured(
        arms={
            "mean": {"distance": [9, 9, 0.2, 9, 9] * 2},
            "min_norm": {"distance": far, "place": [None] + [1.0] * 9},
            "gradient_normalized": {"distance": far},
            "upgrad": {"distance": far, "stationary": [0.1] + [0] * 9},
            "cagrad": {"losses": [[-15.0, -15.2]] * 9 + [[-10, -18]]},
            "min_norm_float64": {"way": far},
            "mixed": {"place": [-6.0] * 9 + [8.0]},
        },
        primary_auxiliary=1.0, half=1.0,
    )  # fmt: skip
    found = pareto.claims(config, [other])
    excess = -14 - pareto.least_mean()
    values = [0.2, 2, 2, 2, 0.1, np.nan, excess, 2, -2, 0.5, 1]
    np.testing.assert_allclose([c.value for c in found], values, rtol=1e-6)
    assert {c.verdict for c in found} == {"fails"}
    never = _measured(
        arms={"min_norm_float64": {"way": [None] * 10}, "mixed": {"place": [None] * 10},
              "pcgrad": {"place": [2.0] * 10}}, primary_auxiliary=0.0, alone=0.0,
    )  # fmt: skip
    values = [c.value for c in pareto.claims(config, [never])]
    np.testing.assert_array_equal(values[7:], [np.nan] * 4)
    assert values[5] == 0
    config.judge = False
    assert {c.verdict for c in pareto.claims(config, [other] * 2)} == {"not judged"}


def test_a_path_that_is_lost_fails_whatever_the_others_do():
    """NaN is neither the least nor the largest to Python, unless it comes first."""
    last = [0.01] * 9 + [math.nan]
    lost = _measured(
        arms={
            "mean": {"distance": [9, 0, 8, 0, 0, 9.5, 0, math.nan, 0, 0]},
            "min_norm": {"distance": last},
            "gradient_normalized": {"distance": last},
            "upgrad": {"distance": last, "stationary": last},
            "pcgrad": {"place": [1.0] * 4 + [None] * 6},
            "cagrad": {"losses": [[-15.0, -15.2]] * 9 + [[math.nan, 0]]},
            "min_norm_float64": {"way": last},
            "mixed": {"place": [*[-6.0] * 9, math.nan]},
        },
        primary_auxiliary=None,  # read back from JSON, which has no NaN
    )  # fmt: skip
    claims = pareto.claims(get_config(), [lost])
    assert np.isnan([c.value for c in claims]).all()
    assert {c.verdict for c in claims} == {"fails"}


@pytest.mark.slow  # fourteen programs to compile
def test_the_smoke_variant(tmp_path, monkeypatch):
    config = get_config("smoke").lock()
    tracked = Tracked(config)
    result = pareto.run(tracked, tmp_path)
    assert set(flatten(config.to_dict())) == tracked.read
    assert result.pictures == ["paths.png", "ends.png"]
    for name in result.pictures:
        assert 20_000 < (tmp_path / name).stat().st_size < 400_000
    assert [c.verdict for c in result.claims] == ["not judged"] * 11
    assert all(c.statement and c.source.startswith("https://") for c in result.claims)
    (measured,) = result.measured["by_seed"]
    assert tuple(measured["arms"]) == ARMS
    json.dumps(result.measured)
    # Adam after the combiner, written out in numpy, every fourth step.
    starts = pareto.make_starts(config, 0)
    names = {"mean": "mean", "min_norm": "min_norm", "min_norm_float64": "min_norm",
             "primary_auxiliary": "primary_auxiliary", "mixed": "mixed"}  # fmt: skip
    for name, combiner in names.items():
        paths = np.load(tmp_path / f"{name}.npz")["paths"]
        assert paths.shape == (10, 6, 2)
        assert paths.dtype == (np.float64 if "64" in name else np.float32)
        for i in (0, 3, 4, 7):
            expected = descend(combiner, starts[i], 20, rate=2e-3, adam=True)[::4]
            np.testing.assert_allclose(paths[i], expected, atol=1e-4, err_msg=name)
    # And plain steps.
    below = np.random.default_rng([0, 1]).uniform((-8, -8), (8, -1), (2, 2))
    for name, combiner, steps, rate, adam in (
        ("primary_auxiliary", "primary_auxiliary", 4, 0.1, False),
        ("half", "primary_auxiliary", 8, 0.05, False),
        ("alone", "first_only", 4, 0.1, False),
        ("adam", "primary_auxiliary", 20, 2e-3, True),
    ):
        rises = 0
        for start in below:
            path = descend(combiner, start, steps, rate=rate, adam=adam)
            rises += np.maximum(np.diff(losses_of(*path.T)[:, 1]), 0).sum()
        np.testing.assert_allclose(measured["rise"][name], rises, rtol=1e-4, atol=1e-7)
    # Read back, but for what is missing.
    before = np.load(tmp_path / "mixed.npz")["paths"]
    (tmp_path / "mixed.npz").unlink()
    walked, original = [], pareto.walk

    def walk(combiner, *args):
        walked.append(combiner.func.__name__)
        return original(combiner, *args)

    monkeypatch.setattr(pareto, "walk", walk)
    again = pareto.run(config, tmp_path)
    assert walked == ["mixed_weights"]
    np.testing.assert_array_equal(np.load(tmp_path / "mixed.npz")["paths"], before)
    np.testing.assert_equal([c.value for c in again.claims], [c.value for c in result.claims])
    assert not jax.config.jax_enable_x64
