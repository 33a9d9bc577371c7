import json
import math

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats
from tracked_config import Tracked

from blogjax.data import digits
from blogjax.train import mesh as meshes
from configs.multitask_digits import get_config
from experiments import multitask_digits
from experiments.launch.configs import ConfigError, flatten
from experiments.multitask import trunk
from experiments.optimisers import arms


def run(config, folder):
    """On one device, for which tasks compile faster than for eight."""
    one = meshes.make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda: one)
        return multitask_digits.run(config, folder)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("smoke"), get_config("smoke").lock()
    tracked = Tracked(config)
    return folder, config, tracked, run(tracked, folder)


@pytest.mark.slow  # the run of the fixture compiles many programs
def test_the_folder_holds_what_a_run_promises(smoke):
    folder, config, tracked, result = smoke
    assert set(flatten(config.to_dict())) == tracked.read
    assert result.pictures == ["accuracy.png"]
    assert 10_000 < (folder / "accuracy.png").stat().st_size < 400_000
    assert [c.verdict for c in result.claims] == ["not judged"] * 11
    assert all(c.statement and c.source.startswith("https://") for c in result.claims)
    (seed,) = result.measured["by_seed"]
    for method in multitask_digits.METHODS:
        for scale in ("1x", "1000x"):
            assert (folder / f"{method}_{scale}" / "metrics.jsonl").stat().st_size > 0
            assert {split: set(f) for split, f in seed[method][scale].items()} == {
                "validation": set(trunk.NAMES), "test": set(trunk.NAMES)
            }  # fmt: skip
    json.dumps(result.measured)


@pytest.mark.slow  # the run of the fixture compiles many programs
def test_finished_arms_are_read_back_and_an_interrupted_one_goes_on(smoke, monkeypatch):
    folder, config, _, result = smoke
    stored = folder / "prior_1000x" / "measured.json"
    before = stored.read_text()
    stored.unlink()  # as after a kill between training and measuring
    trained = []

    def fit(*args, workdir, **kwargs):
        trained.append(workdir)
        return original(*args, workdir=workdir, **kwargs)

    original = arms.fit
    monkeypatch.setattr(arms, "fit", fit)
    again = run(config, folder)
    assert trained == [folder / "prior_1000x"]
    assert stored.read_text() == before
    assert again.claims == result.claims


def test_variants_differ_in_values_only():
    assert len({tuple(flatten(get_config(v).to_dict())) for v in ("default", "full", "smoke")}) == 1
    with pytest.raises(ValueError, match="there are default, full, smoke"):
        get_config("huge")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.batch_size", 12, r"batch of 12 does not divide"),
        ("model.hidden", (), r"model.hidden needs widths of at least 1"),
        ("model.hidden", (8, 0), r"model.hidden needs widths of at least 1"),
        ("scale", 1.0, r"scale must be above 1 and below 1e9, got 1"),
        ("optim.learning_rate", 0.0, r"learning_rate must be in"),
        ("optim.adam_rate", 0.0, r"adam_rate must be in"),
        ("optim.momentum", 1.0, r"momentum must be in \[0, 1\)"),
        ("optim.clip", 0.0, r"clip must be in"),
        ("train.steps", 0, r"train.steps must be at least 1"),
        ("train.on_nonfinite", "ignore", r"stop or skip, got 'ignore'"),
    ],
)
def test_a_config_that_cannot_be_run_says_why(tmp_path, field, value, message):
    config = get_config("smoke")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        multitask_digits.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_labels_of_three_tasks():
    splits = trunk.load("train", "test")
    train, test = splits["train"], splits["test"]
    assert abs(train["ink"].mean()) < 1e-5 and train["ink"].std() == pytest.approx(1, rel=1e-5)
    # The ink of the test split in the units of the training split's.
    mean = digits.load("test")["image"].reshape(360, 64).mean(axis=1)
    slope, offset = np.polyfit(train["pixels"].mean(axis=1), train["ink"], 1)
    np.testing.assert_allclose(test["ink"], slope * mean + offset, atol=1e-4)
    np.testing.assert_array_equal(test["class"], digits.load("test")["label"])
    assert [(c, p) for c, p in zip(test["class"], test["parity"], strict=True) if c % 2 != p] == []


def test_references_are_the_losses_of_a_guess():
    counts = np.array([3, 5])
    data = {
        "class": np.repeat([4, 7], counts),
        "parity": np.repeat([0, 1], counts),
        "ink": np.array([1.0, -1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    }
    entropy = scipy.stats.entropy(counts)
    np.testing.assert_allclose(trunk.reference(data, 10.0), [entropy, entropy, 10.0], rtol=1e-12)


def by_hand(params, x):
    """The heads' outputs in float64."""
    x = np.float64(x)
    for layer in params["trunk"]:
        x = np.maximum(x @ np.float64(layer["kernel"]) + np.float64(layer["bias"]), 0)
    heads = params["heads"].items()
    return {n: x @ np.float64(h["kernel"]) + np.float64(h["bias"]) for n, h in heads}


def rows(n):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 10, n)
    return {
        "pixels": np.float32(rng.normal(size=(n, 64))), "class": label, "parity": label % 2,
        "ink": np.float32(rng.normal(size=n)), "row": np.arange(n),
        "weight": np.ones(n, np.float32),
    }  # fmt: skip


def losses_by_hand(params, batch, scale):
    found = by_hand(params, batch["pixels"])
    of_classes = [
        -scipy.special.log_softmax(found[name], axis=1)[batch["row"], batch[name]].mean()
        for name in ("class", "parity")
    ]
    return np.array([*of_classes, scale * np.square(found["ink"][:, 0] - batch["ink"]).mean()])


FAST = ("sum",)


@pytest.mark.parametrize(
    "method",
    [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in multitask_digits.METHODS],
)
def test_a_step_of_each_method_weighs_the_losses(method):
    config, batch, scale = get_config("smoke"), rows(8), 64.0
    reference = [2.0, 0.5, 3.0]
    task = multitask_digits.make_task(config, method, scale, reference)
    state = jax.jit(task.init)(jax.random.key(0))
    _, metrics = jax.jit(task.step)(state, batch, jax.random.key(1))
    values = losses_by_hand(state.params, batch, scale)
    np.testing.assert_allclose([metrics[f"loss/{n}"] for n in trunk.NAMES], values, rtol=1e-5)
    weights = np.array([metrics[f"weight/{n}"] for n in trunk.NAMES])
    if method == "gradient_normalized":
        norms = np.array([metrics[f"grad_norm/{n}"] for n in trunk.NAMES])
        np.testing.assert_allclose(weights * norms, 1, rtol=1e-5)
    elif method == "min_norm":
        assert weights.sum() == pytest.approx(1, rel=1e-5) and weights[2] < 0.1
    else:
        expected = {"prior": 1 / np.array(reference), "inverse": 1 / values}
        np.testing.assert_allclose(weights, expected.get(method, np.ones(3)), rtol=1e-5)
    if method == "sum":  # first steps of SGD: the rate times the clipped gradient
        assert metrics["grad_norm"] > 2
        assert metrics["update_norm"] == pytest.approx(0.1, rel=1e-5)
    if method == "sum_adam":  # each weight and bias by the rate, but for ReLUs that are off
        most = 1e-2 * np.sqrt(sum(x.size for x in jax.tree.leaves(state.params)))
        assert 0.5 * most < metrics["update_norm"] < 1.001 * most


def test_weights_of_losses():
    losses, reference = np.float32([4.0, 1.0, 1e-9]), [2.0, 0.5, 1e3]
    expected = {"sum": [1, 1, 1], "prior": [0.5, 2, 1e-3], "inverse": [0.25, 1, 1e5]}
    for method, weights in expected.items():
        found = multitask_digits.weighting_of(method, reference)(losses).weights
        np.testing.assert_allclose(found, weights, rtol=1e-6)


def test_figures_by_hand():
    params = jax.jit(lambda key: trunk.init(key, (8, 4)))(jax.random.key(0))["params"]
    batch = rows(40)
    found = by_hand(params, batch["pixels"])
    wrong = np.square(found["ink"][:, 0] - batch["ink"]).mean()
    expected = {
        "class": (found["class"].argmax(1) == batch["class"]).mean(),
        "parity": (found["parity"].argmax(1) == batch["parity"]).mean(),
        "ink": wrong / np.float64(batch["ink"]).var(),
    }
    assert 0 < expected["class"] < 1
    assert trunk.measure(params, batch) == pytest.approx(expected, rel=1e-5)
    assert [x["kernel"].shape for x in params["trunk"]] == [(64, 8), (8, 4)]


def test_the_claims_by_hand():
    def both(one, many):
        names = ("class", "parity", "ink")
        return {"1x": dict(zip(names, one, strict=True)), "1000x": dict(zip(names, many))}  # noqa: B905

    figures = {
        "sum": both((0.97, 0.99, 0.1), (0.1, 0.6, 0.01)),
        "sum_adam": both((0.99, 0.99, 0.1), (0.7, 0.8, 0.01)),  # takes no part
        "prior": both((0.95, 0.97, 0.2), (0.95, 0.98, 0.1)),
        "inverse": both((0.96, 0.99, 0.3), (0.90, 0.85, 0.3)),
        "gradient_normalized": both((0.985, 0.99, 0.2), (0.985, 0.99, 0.2)),
        "min_norm": both((0.96, 0.99, 0.9), (0.98, 0.99, 0.2)),
    }
    config = get_config()
    claims = multitask_digits.claims(config, [figures])
    np.testing.assert_allclose(
        [c.value for c in claims],
        [0.1, 0, -0.06, 0, 0.02, 0.015, 0.85, 0.2, 0.3, 0.2, 0.9],
        atol=1e-9,
    )
    # Min-norm's ink may go from learnt to not learnt: they say what they look at.
    assert all(c.statement.endswith("changes nothing for the class") for c in claims[1:5])
    inf = np.inf
    assert [(c.low, c.high) for c in claims] == [
        (-inf, 0.5), *[(-0.01, 0.01)] * 4, (0, inf), (0.9, inf), *[(-inf, 0.5)] * 4,
    ]  # fmt: skip
    assert [c.verdict for c in claims] == [
        "holds", "holds", "fails", "holds", "fails", "holds", "fails", "holds", "holds", "holds",
        "fails",
    ]  # fmt: skip
    config.judge = False
    assert {c.verdict for c in multitask_digits.claims(config, [figures])} == {"not judged"}


def test_a_figure_that_is_no_number_fails():
    """At the second scale, where Python's max and min would pass over it."""
    good = {"class": 0.9, "parity": 0.9, "ink": 0.1}
    figures = {m: {"1x": good, "1000x": good} for m in multitask_digits.METHODS}
    for method in ("inverse", "min_norm"):
        figures[method] = {"1x": good, "1000x": dict.fromkeys(good, math.nan)}
    stored = {  # as it is read back: JSON has no NaN
        m: {
            s: {"test": {t: None if math.isnan(v) else v for t, v in f.items()}}
            for s, f in by.items()
        }
        for m, by in figures.items()
    }
    claims = multitask_digits.claims(get_config(), multitask_digits.on_test([stored]))
    lost = [i for i, c in enumerate(claims) if math.isnan(c.value)]
    assert lost == [2, 4, 6, 8, 10]
    assert {claims[i].verdict for i in lost} == {"fails"}
