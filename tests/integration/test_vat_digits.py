import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tracked_config import Tracked

from blogjax.core.random import fold_in_rows
from blogjax.gradients.virtual_adversarial import vat_loss
from blogjax.train import mesh as meshes
from configs.vat_digits import get_config
from experiments import vat_digits as vat
from experiments.launch.configs import ConfigError, flatten
from experiments.optimisers import arms
from experiments.regularisers import directions
from experiments.regularisers.replicas import logits


def run(config, folder):
    """On one device, for which tasks compile faster than for eight."""
    one = meshes.make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda: one)
        return vat.run(config, folder)


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
    assert result.pictures == ["vat.png"]
    assert 10_000 < (folder / "vat.png").stat().st_size < 400_000
    assert [c.verdict for c in result.claims] == ["not judged"] * 7
    assert all(c.statement and c.source.startswith("https://") for c in result.claims)
    for name in ("supervised", "vat_0", "vat_1"):
        assert (folder / name / "metrics.jsonl").stat().st_size > 0
        assert list((folder / name / "checkpoints").glob("[0-9]*"))
    (seed,) = result.measured["by_seed"]
    shapes = {name: np.shape(seed[name]["test"]) for name in seed}
    assert shapes == {"supervised": (1, 2), "vat_0": (2, 2), "vat_1": (2, 2)}
    assert set(result.measured["chosen"][0]) == {"vat_0", "vat_1"}
    assert [("directions" in seed[name]) for name in seed] == [True, False, True]
    json.dumps(result.measured)


@pytest.mark.slow  # the run of the fixture compiles many programs
def test_finished_arms_are_read_back_and_an_interrupted_one_goes_on(smoke, monkeypatch):
    folder, config, _, result = smoke
    stored = folder / "vat_0" / "measured.json"
    before = stored.read_text()
    stored.unlink()  # as after a kill between training and measuring
    trained = []

    def fit(*args, workdir, **kwargs):
        trained.append(workdir)
        return original(*args, workdir=workdir, **kwargs)

    original = arms.fit
    monkeypatch.setattr(arms, "fit", fit)
    again = run(config, folder)
    assert trained == [folder / "vat_0"]
    assert stored.read_text() == before
    assert [c.value for c in again.claims] == [c.value for c in result.claims]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.labelled", 5, r"data.labelled must be a multiple of 10 in \[10, .*, got 5"),
        ("data.batch_size", 12, r"batch of 12 does not divide"),
        ("model.hidden", (0,), r"model.hidden needs widths of at least 1"),
        ("optim.learning_rate", 0.0, r"learning_rate must be in"),
        ("vat.weight", -1.0, r"weight must be in"),
        ("vat.epsilons", (1.0,), r"vat.epsilons must be two positive numbers or more"),
        ("vat.epsilons", (0.0, 1.0), r"rising: \[0.0, 1.0\]"),
        ("vat.epsilons", (1.0, 0.5), r"rising: \[1.0, 0.5\]"),
        ("vat.epsilon", 0.7, r"vat.epsilon, 0.7, must be among vat.epsilons, \[0.5, 1.0\]"),
        ("vat.iterations", (1, 2), r"vat.iterations must rise and begin with 0, 1: \[1, 2\]"),
        ("vat.iterations", (0, 1, 1), r"vat.iterations must rise"),
        ("directions.iterations", (0, 2), r"directions.iterations must rise and begin with 0, 1"),
        ("directions.images", 361, r"images must be in \[1, 361\), got 361"),
        ("directions.xi", 0.0, r"xi must be in"),
        ("train.replicas", 0, r"replicas must be in"),
        ("train.steps", 0, r"train.steps must be at least 1"),
        ("train.on_nonfinite", "ignore", r"stop or skip, got 'ignore'"),
    ],
)
def test_a_config_that_cannot_be_run_says_why(tmp_path, field, value, message):
    config = get_config("smoke")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        vat.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_batches_hold_labelled_images_and_any():
    pixels = np.arange(30.0)[:, None]
    labelled = {"pixels": 100 + np.arange(20.0).reshape(10, 2, 1), "label": np.ones((10, 2), int)}
    batches = vat.BothBatches(labelled, pixels, 8, seed=3)
    seen = [batches(step) for step in range(15)]
    assert set(seen[0]) == {"pixels", "label", "unlabelled", "row", "weight"}
    assert seen[0]["pixels"].shape == (8, 2, 1) and seen[0]["unlabelled"].shape == (8, 1)
    taken = np.concatenate([b["unlabelled"][:, 0] for b in seen])
    np.testing.assert_array_equal(np.bincount(taken.astype(int)), [4] * 30)  # four whole epochs
    taken = np.concatenate([b["pixels"][:, 1, 0] for b in seen])
    assert set(taken) == set(range(101, 120, 2)) and len(taken) == 120


@pytest.mark.slow  # seconds of compiling
def test_every_network_has_its_own_length_and_images():
    config = get_config("smoke")
    config.vat.weight = 0.3
    task = vat.make_task(config, 1)
    state = jax.jit(task.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    x, u = np.float32(rng.normal(size=(8, 2, 64))), np.float32(rng.normal(size=(8, 64)))
    y, row = rng.integers(0, 10, (8, 2)), np.arange(8)
    batch = {"pixels": x, "label": y, "unlabelled": u, "row": row, "weight": np.ones(8, np.float32)}
    key = jax.random.key(5)
    _, metrics = jax.jit(task.step)(state, batch, jax.random.clone(key))
    kernels = np.asarray(state.params[0]["kernel"])
    assert len(kernels) == 4
    np.testing.assert_array_equal(kernels[:2], kernels[-2:])  # both lengths begin alike
    expected = []
    smoothness = jax.jit(
        lambda params, u, keys, epsilon: vat_loss(
            logits, params, u, keys, epsilon=epsilon, iterations=1
        )
    )
    for c, epsilon in enumerate([0.5, 1.0]):
        for r in range(2):
            own = jax.tree.map(lambda leaf, n=2 * c + r: leaf[n], state.params)
            z = np.asarray(logits(own, x[:, r]), np.float64)
            value = -scipy.special.log_softmax(z, axis=1)[row, y[:, r]].mean()
            keys = fold_in_rows(jax.random.fold_in(jax.random.clone(key), 2 * c + r), row)
            value += 0.3 * np.mean(smoothness(own, u, keys, epsilon))
            expected.append(value)
    np.testing.assert_allclose(metrics["loss"], np.mean(expected), rtol=1e-5)


def test_the_top_eigenvector_of_one_layer(x64):
    """H = W (diag(p) - p p') W' there, in numpy."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(64, 10)) / 4, rng.normal(size=(5, 64))
    found = directions.top_eigenvectors([{"kernel": jnp.asarray(w), "bias": jnp.zeros(10)}], x)
    for row, p in zip(found, scipy.special.softmax(x @ w, axis=1), strict=True):
        _, s, vt = np.linalg.svd((np.diag(np.sqrt(p)) - np.outer(np.sqrt(p), p)) @ w.T)
        assert s[0] > 1.01 * s[1]
        np.testing.assert_allclose(abs(row @ vt[0]), 1.0, rtol=1e-9)


def test_the_difference_of_the_post(x64):
    rng = np.random.default_rng(0)
    w, x, u = rng.normal(size=(64, 10)) / 4, rng.normal(size=(5, 64)), rng.normal(size=(5, 64))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    params = [{"kernel": jnp.asarray(w), "bias": jnp.zeros(10)}]
    found = directions.by_difference(params, x, u, iterations=2, xi=0.5)
    for _ in range(2):
        g = (scipy.special.softmax((x + 0.5 * u) @ w, 1) - scipy.special.softmax(x @ w, 1)) @ w.T
        u = g / np.linalg.norm(g, axis=1, keepdims=True)
    np.testing.assert_allclose(found, u, rtol=1e-7, atol=1e-9)


def test_where_there_is_but_one_direction_one_iteration_finds_it():
    """Logits of rank 1: whatever the noise and the step, gradients lie along `a`."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=64), rng.normal(size=10)
    params = [{"kernel": np.float32(np.outer(a, b) / 8), "bias": np.zeros(10, np.float32)}]
    x = np.float32(rng.normal(size=(60, 64)))
    found = directions.alignment(params, x, jax.random.key(0), (0, 1), 0.1)
    # Of noise the mean is 1/64; its standard deviation over 60 images is a tenth of that times 1.8.
    assert abs(found["exact"][0] - 1 / 64) < 4 * np.sqrt(2) / 64 / np.sqrt(60)
    assert found["exact"][0] == found["difference"][0]
    np.testing.assert_allclose([found["exact"][1], found["difference"][1]], 1.0, rtol=1e-5)


def test_accuracies_lie_by_candidate_and_directions_are_of_the_posts_length(monkeypatch):
    config = get_config("smoke")
    config.vat.epsilon = 0.5  # the first candidate
    rng = np.random.default_rng(0)
    w = np.float32(rng.normal(size=(4, 64, 10)))
    x, y = np.float32(rng.normal(size=(20, 64))), rng.integers(0, 10, 20)
    asked = []

    def alignment(params, pixels, key, iterations, xi):
        asked.append((params[0]["kernel"], pixels, iterations, xi))
        return {"exact": [float(len(asked))], "difference": [0.5]}

    monkeypatch.setattr(directions, "alignment", alignment)
    params = [{"kernel": w, "bias": np.zeros((4, 10), np.float32)}]
    splits = {"validation": {"pixels": x[:9], "label": y[:9]}, "test": {"pixels": x, "label": y}}
    found = vat.measure(config, 1, params, splits, 0)
    right = np.array([(x @ own).argmax(1) == y for own in w])
    np.testing.assert_allclose(found["test"], right.mean(1).reshape(2, 2), atol=1e-6)
    np.testing.assert_allclose(found["validation"], right[:, :9].mean(1).reshape(2, 2), atol=1e-6)
    assert found["directions"] == {"exact": [1.5], "difference": [0.5]}
    for (own, pixels, iterations, xi), wanted in zip(asked, w[:2], strict=True):
        np.testing.assert_array_equal(own, wanted)
        np.testing.assert_array_equal(pixels, x[:3])
        assert (list(iterations), xi) == ([0, 1], 10.0)
    config.vat.epsilon = 1.0
    vat.measure(config, 1, params, splits, 0)
    np.testing.assert_array_equal(asked[2][0], w[2])
    assert "directions" not in vat.measure(config, 2, params, splits, 0)


def test_the_length_is_chosen_on_validation():
    tried = {"validation": [[0.5, 0.7], [0.8, 0.6], [0.7, 0.7]], "test": [[1, 1], [0, 0], [1, 1]]}
    assert vat.choose(tried) == 1


def test_the_claims_by_hand():
    config = get_config()
    config.vat.update(epsilons=(0.5, 1.0), iterations=(0, 1, 2))
    found = {"exact": [0.0, 0.8, 1.0], "difference": [0.0, 0.3, 1.0]}
    figures = {
        "supervised": {"validation": [[0.9]], "test": [[0.80, 0.82]], "directions": {}},
        "vat_0": {"validation": [[0.9, 0.9], [0.8, 0.8]], "test": [[0.93, 0.93], [0.82, 0.82]]},
        "vat_1": {"validation": [[0.9, 0.9], [0.8, 0.8]], "test": [[0.87, 0.87], [0.84, 0.86]],
                  "directions": found},
        "vat_2": {"validation": [[0.8, 0.8], [0.9, 0.9]], "test": [[0.1, 0.1], [0.9, 0.92]]},
    }  # fmt: skip
    claims = vat.claims(config, [figures])
    np.testing.assert_allclose([c.value for c in claims], [4, 1, 3, -6, 4, 0.8, 0.3], atol=1e-9)
    inf = np.inf
    assert [(c.low, c.high) for c in claims] == [
        (0.9, inf), (0, inf), (0, inf), (0, inf), (-inf, 0.5), (0.5, inf), (0.5, inf),
    ]  # fmt: skip
    assert [c.verdict for c in claims] == [
        "holds", "undecided", "holds", "fails", "fails", "holds", "fails",
    ]  # fmt: skip
    config.judge = False
    assert {c.verdict for c in vat.claims(config, [figures])} == {"not judged"}
