import functools
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from tracked_config import Tracked

from blogjax.gradients.gradient_bound import batch_gradient_bound, mlp_gradient_bound
from blogjax.train import mesh as meshes
from configs.gradient_penalty_inequality import get_config
from experiments import gradient_penalty_inequality as inequality
from experiments.launch.configs import ConfigError, flatten

FOUR = ("relu", "tanh", "narrow", "affine")


def run(config, folder):
    """On one device, for which tasks compile faster than for eight."""
    one = meshes.make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda: one)
        return inequality.run(config, folder)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("smoke"), get_config("smoke").lock()
    tracked = Tracked(config)
    return folder, config, tracked, run(tracked, folder)


@pytest.mark.slow  # the run of the fixture compiles many programs
def test_every_field_of_the_config_is_read(smoke):
    _, config, tracked, _ = smoke
    assert set(flatten(config.to_dict())) == tracked.read


def test_variants_differ_in_values_only():
    assert len({tuple(flatten(get_config(v).to_dict())) for v in ("default", "full", "smoke")}) == 1
    with pytest.raises(ValueError, match="there are default, full, smoke"):
        get_config("huge")


@pytest.mark.slow  # the run of the fixture compiles many programs
def test_the_folder_holds_what_a_run_promises(smoke):
    folder, _, _, result = smoke
    assert result.pictures == ["inequality.png"]
    assert 10_000 < (folder / "inequality.png").stat().st_size < 400_000
    assert [c.verdict for c in result.claims] == ["not judged"] * 8
    assert all(c.statement and c.source.startswith("https://") for c in result.claims)
    for name in FOUR:
        assert (folder / name / "metrics.jsonl").stat().st_size > 0
        assert list((folder / name / "checkpoints").glob("[0-9]*"))
        for steps in (1, 3):
            assert (folder / name / f"measured_{steps}.json").exists()
    json.dumps(result.measured)


@pytest.mark.slow  # the run of the fixture compiles many programs
def test_what_must_hold_does(smoke):
    """Theorems: also for a few steps of small networks."""
    _, _, _, result = smoke
    for name in FOUR:
        for at in result.measured["by_seed"][0][name]:
            assert 0 < at["ratio"]["median"] <= at["ratio"]["largest"] < 1 + 1e-9
            assert max(b["batch_largest"] for b in at["batches"].values()) < 1 + 1e-9
            if name in ("narrow", "affine"):
                assert at["ratio"]["off"] < 1e-9


@pytest.mark.slow  # the run of the fixture compiles many programs
def test_finished_parts_are_read_back_and_an_interrupted_one_goes_on(smoke, monkeypatch):
    folder, config, _, result = smoke
    stored = folder / "tanh" / "measured_3.json"
    before = stored.read_text()
    stored.unlink()  # as after a kill between training and measuring
    trained = []

    def fit(*args, workdir, **kwargs):
        trained.append((args[2], workdir))
        return original(*args, workdir=workdir, **kwargs)

    original = inequality.fit
    monkeypatch.setattr(inequality, "fit", fit)
    again = run(config, folder)
    assert trained == [(3, folder / "tanh")]
    assert stored.read_text() == before
    assert [c.value for c in again.claims] == [c.value for c in result.claims]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.batch_size", 12, r"batch of 12 does not divide"),
        ("model.hidden", (4, 0), r"model.hidden needs widths of at least 1, got \[4, 0\]"),
        ("optim.learning_rate", 0.0, r"learning_rate must be in"),
        ("measure.steps", (3,), r"measure.steps must be two numbers or more"),
        ("measure.steps", (0, 3), r"measure.steps must be .* \[0, 3\]"),
        ("measure.steps", (3, 1), r"rising: \[3, 1\]"),
        ("measure.batch_sizes", (8, 8), r"measure.batch_sizes must be .*rising: \[8, 8\]"),
        ("measure.batch_sizes", (2, 3), r"images, 16, cannot be cut in batches of \[3\]"),
        ("measure.images", 1288, r"images must be in \[1, 1288\), got 1288"),
        ("train.seeds", (0, 0), r"train.seeds must be different numbers"),
        ("train.on_nonfinite", "ignore", r"stop or skip, got 'ignore'"),
    ],
)
def test_a_config_that_cannot_be_run_says_why(tmp_path, field, value, message):
    config = get_config("smoke")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        inequality.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_network_takes_plain_steps_on_its_loss():
    """The scalar network: logistic regression on digits from 5 on, in numpy."""
    task = inequality.make_task(inequality.networks((4,))["affine"], 0.5)
    state = jax.jit(task.init)(jax.random.key(0))
    (layer,) = jax.device_get(state.params)
    rng = np.random.default_rng(0)
    x, label = np.float32(rng.normal(size=(8, 64))), np.arange(8)
    batch = {"pixels": x, "label": label, "row": np.arange(8), "weight": np.ones(8, np.float32)}
    after, metrics = jax.jit(task.step)(state, batch, jax.random.key(1))
    z = (x @ layer["kernel"] + layer["bias"])[:, 0]
    large = label >= 5
    p = 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(
        metrics["loss"], -np.where(large, np.log(p), np.log(1 - p)).mean(), rtol=1e-5
    )
    kernel = layer["kernel"][:, 0] - 0.5 * ((p - large) @ x) / 8
    np.testing.assert_allclose(after.params[0]["kernel"][:, 0], kernel, rtol=1e-4, atol=1e-6)
    assert layer["bias"] == 0 and 0.5 < np.std(layer["kernel"]) / np.sqrt(2 / 64) < 1.5


@pytest.mark.slow  # seconds of compiling
def test_the_figures_of_a_network(x64):
    config = get_config("smoke")
    config.measure.update(images=8, batch_sizes=(2, 4))
    rng = np.random.default_rng(0)
    widths = (64, 4, 3, 10)
    params = [
        {"kernel": np.float32(rng.normal(size=s) / 4), "bias": np.float32(rng.normal(size=s[1]))}
        for s in itertools.pairwise(widths)
    ]
    data = {"pixels": np.float32(rng.normal(size=(11, 64))), "label": rng.integers(0, 10, 11)}
    network = inequality.networks((4, 3))["tanh"]
    found = inequality.make_measure(config, network, data)(types.SimpleNamespace(params=params))

    wide, x, label = jax.tree.map(np.float64, params), data["pixels"][:8], data["label"][:8]

    x = np.float64(x)

    def loss(params, row, own):
        h = jnp.tanh(row @ params[0]["kernel"] + params[0]["bias"])
        h = jnp.tanh(h @ params[1]["kernel"] + params[1]["bias"])
        return -jax.nn.log_softmax(h @ params[2]["kernel"] + params[2]["bias"])[own]

    both = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1)), (None, 0, 0)))
    values, (by_params, by_input) = both(wide, x, label)
    by_params = np.concatenate([g.reshape(8, -1) for g in jax.tree.leaves(by_params)], axis=1)
    parameter, by_input = np.square(by_params).sum(1), np.square(by_input).sum(1)

    @functools.partial(jax.jit, static_argnums=0)
    def lhs_of(form, x, label):
        return form(wide, x, network.loss, label, activation=jnp.tanh).lhs

    lhs = np.asarray(lhs_of(mlp_gradient_bound, x, label))
    ratio = lhs / parameter
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9)  # noqa: E731
    close(found["loss"], values.mean())
    close(found["input"], by_input.mean())
    close(found["parameter"], parameter.mean())
    close(found["ratio"]["median"], np.median(ratio))
    close(found["ratio"]["largest"], ratio.max())
    close(found["ratio"]["off"], (1 - ratio).max())
    close(found["bracket"], np.median(lhs / by_input))
    close(found["correlation"], scipy.stats.spearmanr(by_input, parameter).statistic)
    close(found["spectral"], [np.linalg.norm(layer["kernel"], 2) for layer in wide])
    for size in (2, 4):
        naive, holding = [], []
        for i in range(0, 8, size):
            rows = slice(i, i + size)
            whole = np.square(by_params[rows].mean(axis=0)).sum()
            naive.append(lhs[rows].mean() / whole)
            holding.append(lhs_of(batch_gradient_bound, x[rows], label[rows]) / whole)
        batch = found["batches"][str(size)]
        close(batch["naive"], np.median(naive))
        close(batch["violated"], np.mean(np.array(naive) > 1))
        close(batch["batch"], np.median(holding))
        close(batch["batch_largest"], np.max(holding))


def test_networks_without_gradients_have_figures_too():
    zero = np.zeros(4)
    sides = {
        "alone": (zero, zero), "batch": [(zero[:2], zero[:2])], "input": zero, "loss": zero,
        "spectral": [0.0],
    }  # fmt: skip
    found = inequality.summary([2], sides)
    assert found["ratio"] == {"median": 0, "largest": 0, "off": 1}
    assert np.isnan(found["bracket"]) and np.isnan(found["correlation"])
    pulled = {**sides, "alone": (zero + 1, zero + 2)}  # of which the batch's gradient shows nothing
    expected = {"naive": np.inf, "violated": 1, "batch": 0, "batch_largest": 0}
    assert inequality.summary([2], pulled)["batches"]["2"] == expected


def test_the_claims_by_hand():
    def at(median, largest, off, bracket, correlation, spectral, violated, batch, batch_largest):
        batches = {
            "2": {"violated": 0.1, "batch": 0.9, "batch_largest": batch_largest},
            "8": {"violated": violated, "batch": batch, "batch_largest": 0.1},
        }
        ratio = {"median": median, "largest": largest, "off": off}
        return {"ratio": ratio, "bracket": bracket, "correlation": correlation,
                "spectral": spectral, "batches": batches}  # fmt: skip

    measured = {
        "relu": [
            at(0.1, 0.8, 9, 3, 0.1, [2.0, 1.7], 0.2, 0.2, 0.3),
            at(0.5, 0.3, 9, 6, 0.8, [0.5, 0.5], 0.9, 0.05, 0.2),
        ],
        "tanh": [
            at(0.1, 0.2, 9, 5, 0.2, [1.6, 4.0], 0.3, 0.2, 0.4),
            at(0.2, 0.7, 9, 4, 0.95, [0.4, 0.4], 0.7, 0.04, 0.1),
        ],
        "narrow": [at(1, 2, 1e-9, 99, 0, [0.1], 0, 9, 9), at(1, 2, 1e-8, 1, 0, [0.1], 0, 9, 9)],
        "affine": [at(1, 2, 1e-7, 99, 0, [0.1], 0, 9, 9), at(1, 2, 0, 1, 0, [0.1], 0, 9, 9)],
    }
    config = get_config("smoke")
    config.judge = True
    claims = inequality.claims(config, [measured])
    expected = [0.8, 1e-7, 1.6, 2.0, 0.8, 0.7, 0.4, 0.2]
    np.testing.assert_allclose([c.value for c in claims], expected, rtol=1e-12)
    edges = [(c.low, c.high) for c in claims]
    inf = np.inf
    assert edges == [(-inf, 1), (-inf, 1e-6), (1, inf), (-inf, 2), (0.9, inf), (0.5, inf),
                     (-inf, 1), (-inf, 0.01)]  # fmt: skip
    dead = measured["relu"][1]
    dead["bracket"] = None  # NaN, as JSON has it
    dead["ratio"]["median"] = dead["batches"]["8"]["batch"] = 0.0
    claims = inequality.claims(config, [measured])
    assert [np.isnan(claims[i].value) and claims[i].verdict for i in (3, 7)] == ["fails", "fails"]
