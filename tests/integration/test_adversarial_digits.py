import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tracked_config import Tracked

from blogjax.train import mesh as meshes
from configs.adversarial_digits import get_config
from experiments import adversarial_digits as adversarial
from experiments.launch.configs import ConfigError, flatten
from experiments.optimisers import arms
from experiments.regularisers import equivalence
from experiments.regularisers.methods import methods
from experiments.regularisers.replicas import labelled_subsets, logits


def run(config, folder):
    """On one device, for which tasks compile faster than for eight."""
    one = meshes.make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda: one)
        return adversarial.run(config, folder)


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
    assert set(get_config().methods.names) == set(methods(get_config().methods))
    with pytest.raises(ValueError, match="there are default, full, smoke"):
        get_config("huge")


@pytest.mark.slow  # the run of the fixture compiles many programs
def test_the_folder_holds_what_a_run_promises(smoke):
    folder, _, _, result = smoke
    assert result.pictures == ["regularisers.png"]
    assert 10_000 < (folder / "regularisers.png").stat().st_size < 400_000
    assert [c.verdict for c in result.claims] == ["not judged"] * 3
    assert all(c.statement and c.source.startswith("https://") for c in result.claims)
    for name in ("plain", "fgm", "equivalence"):
        assert (folder / name / "metrics.jsonl").stat().st_size > 0
        assert list((folder / name / "checkpoints").glob("[0-9]*"))
    json.dumps(result.measured)


@pytest.mark.slow  # the run of the fixture compiles many programs
def test_fgm_and_the_penalty_part_with_the_square_of_epsilon(smoke):
    """Also for a few steps of a small network: 2, by the expansion, and 1 for what both do."""
    _, _, _, result = smoke
    found = result.measured["by_seed"][0]["equivalence"]
    assert 1.9 < found["slope"] < 2.1 and 0.9 < found["effect_slope"] < 1.1
    assert max(found["apart"]) < min(found["effect"])


@pytest.mark.slow  # the run of the fixture compiles many programs
def test_finished_arms_are_read_back_and_an_interrupted_one_goes_on(smoke, monkeypatch):
    folder, config, _, result = smoke
    stored = folder / "plain" / "measured.json"
    before = stored.read_text()
    stored.unlink()  # as after a kill between training and measuring
    trained = []

    def fit(*args, workdir, **kwargs):
        trained.append(workdir)
        return original(*args, workdir=workdir, **kwargs)

    original = arms.fit
    monkeypatch.setattr(arms, "fit", fit)
    again = run(config, folder)
    assert trained == [folder / "plain"]
    assert stored.read_text() == before
    np.testing.assert_equal([c.value for c in again.claims], [c.value for c in result.claims])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.labelled", 15, r"data.labelled must be a multiple of 10 in \[10, .*, got 15"),
        ("data.labelled", 10_000, r"data.labelled must be a multiple of 10 in \[10, 1[0-9]{3}\]"),
        ("data.batch_size", 12, r"batch of 12 does not divide"),
        ("model.hidden", (4, 0), r"model.hidden needs widths of at least 1"),
        ("optim.learning_rate", 0.0, r"learning_rate must be in"),
        ("methods.epsilon", 0.0, r"epsilon must be in"),
        ("methods.epsilon", 0.7, r"attack.strengths, \[0.0, 1.0\], must hold .*, 0.7"),
        ("methods.pgd_steps", 0, r"pgd_steps must be in"),
        ("methods.rho", -0.1, r"rho must be in"),
        ("methods.penalty_weights", (1.0,), r"penalty_weights must be two positive numbers"),
        ("methods.penalty_weights", (10.0, 1.0), r"rising: \[10.0, 1.0\]"),
        ("methods.names", ("plain", "fgn"), r"methods.names has \['fgn'\], but there are plain"),
        ("methods.names", ("fgm",), r"methods.names, \['fgm'\], lacks \['plain'"),
        ("judge", True, r"methods.names, .*, lacks \['pgd', 'penalty_1'"),
        ("attack.strengths", (0.5, 1.0), r"attack.strengths must rise from 0"),
        ("attack.pgd_steps", 0, r"pgd_steps must be in"),
        ("equivalence.epsilons", (0.1,), r"equivalence.epsilons must be two positive numbers"),
        ("equivalence.steps", 0, r"equivalence.steps must be at least 1"),
        ("train.replicas", 0, r"replicas must be in"),
        ("train.seeds", (0, 0), r"train.seeds must be different numbers"),
    ],
)
def test_a_config_that_cannot_be_run_says_why(tmp_path, field, value, message):
    config = get_config("smoke")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        adversarial.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_labelled_images_are_as_many_of_each_class():
    rng = np.random.default_rng(0)
    data = {"pixels": np.arange(200.0)[:, None], "label": rng.permutation(np.arange(200) % 10)}
    found = labelled_subsets(data, 30, 3, seed=7)
    rows = found["pixels"][..., 0].astype(int)
    np.testing.assert_array_equal(data["label"][rows], found["label"])
    for replica in range(3):
        assert len(set(rows[:, replica])) == 30
        np.testing.assert_array_equal(np.bincount(found["label"][:, replica]), [3] * 10)
    assert (rows[:, 0] != rows[:, 1]).any()
    fewer = labelled_subsets(data, 30, 2, seed=7)
    np.testing.assert_array_equal(fewer["pixels"], found["pixels"][:, :2])
    other = labelled_subsets(data, 30, 3, seed=8)
    assert (other["pixels"] != found["pixels"]).any()


class Softmax:
    """Softmax regression in numpy: what every method is to minimise, in closed form."""

    def __init__(self, x, y):
        self.x, self.target = x, np.eye(10)[y]

    def parts(self, w, b, x):
        log_p = scipy.special.log_softmax(x @ w + b, axis=1)
        return -(log_p * self.target).sum(axis=1), np.exp(log_p) - self.target

    def mean(self, w, b, x=None):
        return self.parts(w, b, self.x if x is None else x)[0].mean()

    def grad(self, w, b, x=None):
        x = self.x if x is None else x
        delta = self.parts(w, b, x)[1] / len(x)
        return x.T @ delta, delta.sum(axis=0)

    def input_gradient(self, w, b, x):
        return self.parts(w, b, x)[1] @ w.T

    def unit(self, w, b, x):
        g = self.input_gradient(w, b, x)
        return g / np.linalg.norm(g, axis=1, keepdims=True)

    def pgd(self, w, b, epsilon, steps, step):
        r = np.zeros_like(self.x)
        for _ in range(steps):
            r = r + step * self.unit(w, b, self.x + r)
            length = np.linalg.norm(r, axis=1, keepdims=True)
            r = r * np.minimum(1, epsilon / length)
        return r

    def beside(self, w, b, rho):
        gw, gb = self.grad(w, b)
        norm = np.sqrt((gw**2).sum() + (gb**2).sum())
        return self.grad(w + rho * gw / norm, b + rho * gb / norm)

    def penalised(self, w, b, weight):
        g = self.input_gradient(w, b, self.x)
        return self.mean(w, b) + weight * (g**2).sum(axis=1).mean()

    def parameter(self, w, b, weight):
        gw, gb = self.grad(w, b)
        return self.mean(w, b) + weight * ((gw**2).sum() + (gb**2).sum())


def slope_along(function, w, b, dw, db, h=1e-5):
    return (function(w + h * dw, b + h * db) - function(w - h * dw, b - h * db)) / (2 * h)


@pytest.mark.slow  # seconds of compiling
def test_what_each_method_minimises(x64):
    """With one layer all is known in closed form; the penalties' gradients by differences."""
    settings = get_config().methods
    settings.update(epsilon=0.7, penalty_weights=(0.5, 2.0), parameter_weight=3.0, rho=0.2)
    settings.update(flood_level=5.0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 64)), rng.integers(0, 10, 6)
    w, b, dw, db = (rng.normal(size=s) / 4 for s in ((64, 10), (10,)) * 2)
    one = Softmax(x, y)
    known = methods(settings)
    params = [{"kernel": jnp.asarray(w), "bias": jnp.asarray(b)}]

    @jax.jit
    def all_of_them(params, x, y):
        return {k: jax.value_and_grad(m.objective)(params, x, y) for k, m in known.items()}

    found = jax.device_get(all_of_them(params, x, y))
    plain, (gw, gb) = one.mean(w, b), one.grad(w, b)
    fgm = x + 0.7 * one.unit(w, b, x)
    pgd = x + one.pgd(w, b, 0.7, 3, 0.35)
    sam_w, sam_b = one.beside(w, b, 0.2)
    assert plain < 5
    expected = {
        "plain": (plain, (gw, gb)),
        "fgm": (one.mean(w, b, fgm), one.grad(w, b, fgm)),
        "pgd": (one.mean(w, b, pgd), one.grad(w, b, pgd)),
        "sam": (plain, (sam_w, sam_b)),
        "norm": (plain, (0.2 * gw + 0.8 * sam_w, 0.2 * gb + 0.8 * sam_b)),
        "flooding": (10 - plain, (-gw, -gb)),
    }
    for name, (value, (kernel, bias)) in expected.items():
        np.testing.assert_allclose(found[name][0], value, rtol=1e-6, err_msg=name)
        (layer,) = found[name][1]
        np.testing.assert_allclose(layer["kernel"], kernel, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(layer["bias"], bias, atol=1e-6, err_msg=name)
    by_difference = {
        "penalty_0.5": lambda w, b: one.penalised(w, b, 0.5),
        "penalty_2": lambda w, b: one.penalised(w, b, 2.0),
        "penalty_tanh": lambda w, b: one.penalised(w, b, 2.0),
        "parameter": lambda w, b: one.parameter(w, b, 3.0),
    }
    for name, function in by_difference.items():
        np.testing.assert_allclose(found[name][0], function(w, b), rtol=1e-6, err_msg=name)
        (layer,) = found[name][1]
        along = (layer["kernel"] * dw).sum() + (layer["bias"] * db).sum()
        wanted = slope_along(function, w, b, dw, db)
        np.testing.assert_allclose(along, wanted, rtol=1e-5, err_msg=name)
    assert set(found) == set(expected) | set(by_difference)


@pytest.mark.slow  # seconds of compiling
def test_activations_are_those_of_the_names(x64):
    """The largest penalty on two layers, with both activations."""
    known = methods(get_config().methods)
    rng = np.random.default_rng(0)
    w1, w2, x, y = (*(rng.normal(size=s) for s in ((64, 8), (8, 10), (1, 64))), 7)
    w1 = w1 / 8
    params = [{"kernel": w1, "bias": np.zeros(8)}, {"kernel": w2, "bias": np.zeros(10)}]
    z = x @ w1
    assert (z > 0).any() and (z < 0).any()
    for name, h, slope in (
        ("penalty_tanh", np.tanh(z), 1 - np.tanh(z) ** 2),
        ("penalty_100", np.maximum(z, 0), 1.0 * (z > 0)),
    ):
        log_p = scipy.special.log_softmax(h @ w2, axis=1)
        g = ((np.exp(log_p) - np.eye(10)[[y]]) @ w2.T * slope) @ w1.T
        found = known[name].objective(params, jnp.asarray(x), jnp.array([y]))
        np.testing.assert_allclose(found, -log_p[0, y] + 100 * (g**2).sum(), rtol=1e-6)
    for name, method in known.items():
        assert method.activation is (jnp.tanh if name == "penalty_tanh" else jax.nn.relu)
    assert known["penalty_1"].label == "input penalty 1"


def test_replicas_train_by_themselves():
    """Adam's first step is the sign of each one's own gradient, however large the others' are."""
    config = get_config("smoke")
    config.model.hidden = ()
    task = adversarial.make_task(config, methods(config.methods)["plain"])
    state = jax.jit(task.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(8, 2, 64)))
    x[:, 1] *= 1e-3
    y = rng.integers(0, 10, (8, 2))
    batch = {"pixels": x, "label": y, "row": np.arange(8), "weight": np.ones(8, np.float32)}
    (before,) = jax.device_get(state.params)
    after, metrics = jax.jit(task.step)(state, batch, jax.random.key(1))
    (layer,) = jax.device_get(after.params)
    losses = []
    for r in range(2):
        w, b = (np.float64(before[k][r]) for k in ("kernel", "bias"))
        one = Softmax(np.float64(x[:, r]), y[:, r])
        losses.append(one.mean(w, b))
        gw, _ = one.grad(w, b)
        step = -config.optim.learning_rate * gw / (abs(gw) + 1e-8)
        np.testing.assert_allclose(layer["kernel"][r] - w, step, atol=2e-7)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    assert (before["kernel"][0] != before["kernel"][1]).any()
    assert abs(np.std(before["kernel"]) / np.sqrt(2 / 64) - 1) < 0.1  # He et al.; 1280 weights


def test_networks_of_two_layers():
    rng = np.random.default_rng(0)
    w1, w2, x = (rng.normal(size=s) for s in ((64, 5), (5, 10), (3, 64)))
    params = [
        {"kernel": np.float32(w1), "bias": np.ones(5, np.float32)},
        {"kernel": np.float32(w2), "bias": np.zeros(10, np.float32)},
    ]
    for activation, same in ((jax.nn.relu, lambda z: np.maximum(z, 0)), (jnp.tanh, np.tanh)):
        found = logits(params, np.float32(x), activation)
        np.testing.assert_allclose(found, same(x @ w1 + 1) @ w2, rtol=1e-4, atol=1e-5)


def test_accuracies_under_attack():
    """Two replicas of one layer each, in numpy."""
    config = get_config("smoke")
    config.attack.strengths = (0.0, 0.5, 1.0)
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(2, 64, 10)), rng.normal(size=(2, 10))
    x, y = rng.normal(size=(40, 64)), rng.integers(0, 10, 40)
    y = np.where(rng.random(40) < 0.7, (x @ w[0]).argmax(1), y)
    own_x, own_y = rng.normal(size=(9, 2, 64)), rng.integers(0, 10, (9, 2))
    single = lambda tree: jax.tree.map(np.float32, tree)  # noqa: E731
    found = adversarial.measure(
        config, methods(config.methods)["plain"], [single({"kernel": w, "bias": b})],
        {"pixels": np.float32(own_x), "label": own_y}, {"pixels": np.float32(x), "label": y},
    )  # fmt: skip
    for r in range(2):
        one, right = Softmax(x, y), lambda at, r=r: ((at @ w[r] + b[r]).argmax(1) == y).mean()
        unit = one.unit(w[r], b[r], x)
        attacked = [right(x + s * unit) for s in (0, 0.5, 1)]
        assert attacked[0] > attacked[2]
        np.testing.assert_allclose(np.array(found["attacked"])[:, r], attacked, atol=1e-6)
        pgd = right(x + one.pgd(w[r], b[r], 1.0, 20, 0.125))
        np.testing.assert_allclose(found["pgd"][r], pgd, atol=1e-6)
        mine = Softmax(own_x[:, r], own_y[:, r])
        np.testing.assert_allclose(found["loss"][r], mine.mean(w[r], b[r]), rtol=1e-4)
        wanted = ((own_x[:, r] @ w[r] + b[r]).argmax(1) == own_y[:, r]).mean()
        np.testing.assert_allclose(found["train"][r], wanted, atol=1e-6)


def test_distances_of_the_equivalence_by_hand():
    fgm = np.array([[5.0, 5.0], [1.0, 0.5], [3.0, 2.0]])
    penalty = np.array([[0.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    params = {"fgm": {"a": fgm}, "penalty": {"a": penalty}}
    settings = get_config().equivalence
    settings.epsilons = (0.1, 0.2)
    found = equivalence.measure(settings, params)
    np.testing.assert_allclose(found["apart"], [0.5, 2.0])
    np.testing.assert_allclose(found["effect"], [1.0, 5.0])
    np.testing.assert_allclose(found["slope"], 2.0)
    np.testing.assert_allclose(found["effect_slope"], np.log2(5))
    assert np.isnan(equivalence.slope((0.1, 0.2), np.array([0.0, 1.0])))


def test_the_claims_by_hand():
    config = get_config()
    config.attack.strengths = (0.0, 1.0)
    plain = {"attacked": [[0.9, 0.88], [0.4, 0.5]]}
    figures = {
        "plain": plain,
        "fgm": {"attacked": [[0.91, 0.91], [0.6, 0.6]]},  # + 2, under attack + 15
        "pgd": {"attacked": [[0.92, 0.92], [0.6, 0.6]]},
        "penalty_1": {"attacked": [[0.9, 0.9], [0.5, 0.45]]},
        "penalty_10": {"attacked": [[0.89, 0.88], [0.1, 0.1]]},
        "penalty_100": {"attacked": [[0.3, 0.4], [0.1, 0.1]]},
        "penalty_tanh": {"attacked": [[0.0, 0.0], [0.0, 0.0]]},
        "parameter": {"attacked": [[0.86, 0.86], [0.0, 0.0]]},
        "sam": {"attacked": [[0.91, 0.89], [0.0, 0.0]]},
        "norm": {"attacked": [[0.89, 0.893], [0.0, 0.0]]},
        "flooding": {"attacked": [[0.86, 0.86], [0.0, 0.0]]},
        "equivalence": {"slope": 1.5},
    }
    found = adversarial.claims(config, [figures])
    expected = [2, 1, -1, 1, 15, 2.5, -0.5, -54, -3, -3, 1, 0.15, 1.5]
    np.testing.assert_allclose([c.value for c in found], expected, atol=1e-9)
    inf = np.inf
    assert [(c.low, c.high) for c in found] == [
        (1, 3), (0, inf), (-0.3, 0.3), (-inf, 0), (0, inf), (0, inf), (-inf, -20), (-inf, -20),
        *[(0, inf)] * 4, (1.9, 2.1),
    ]  # fmt: skip
    assert [c.verdict for c in found] == [
        "holds", "holds", "undecided", "fails", "holds", "undecided", "fails", "holds", "fails",
        "fails", "holds", "undecided", "fails",
    ]  # fmt: skip
    other = {**figures, "fgm": {"attacked": [[0.9, 0.98], [0.6, 0.6]]}}  # + 5
    del other["norm"]
    first, *rest = adversarial.claims(config, [figures, other])
    assert first.seeds == 2 and np.isclose(first.value, 3.5) and np.isclose(first.spread, 4.5**0.5)
    assert len(rest) == 11 and rest[-2].statement == "SAM raises it"  # of what did not run, none
