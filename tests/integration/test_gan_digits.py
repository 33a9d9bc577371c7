import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tracked_config import Tracked

from blogjax.core.random import fold_in_rows
from blogjax.train import mesh as meshes
from blogjax.train import per_device
from blogjax.train.reporting import read_metrics
from configs.gan import get_config
from experiments import gan
from experiments.adversarial import image_claims, image_model
from experiments.images import dataset
from experiments.launch.configs import ConfigError, flatten

VARIANTS = ("default", "full", "smoke", "cifar10", "cifar10_dcgan")


def changed(variant="smoke", **changes):
    config = get_config(variant)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def one_device(monkeypatch):
    """For which tasks compile faster than for eight."""
    one = meshes.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(meshes, "make_mesh", lambda fsdp: one)


def test_variants_differ_in_values_only():
    assert len({tuple(flatten(get_config(v).to_dict())) for v in VARIANTS}) == 1
    with pytest.raises(ValueError, match=", ".join(VARIANTS)):
        get_config("huge")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.batch_size", 12, r"batch of 12 does not divide over data=8 x fsdp=1"),
        ("data.splits", ("train",), r"must name train, validation, test"),
        ("model.architecture", "mlp", r"one of dcgan, resnet, got 'mlp'"),
        ("model.latent", 0, r"model.latent must be at least 1, got 0"),
        ("model.generator_widths", (), r"model.generator_widths needs numbers of at least 1"),
        ("model.critic_widths", (4, 0), r"model.critic_widths needs numbers of at least 1"),
        ("model.generator_widths", (4,) * 5, r"asks for 4 doublings or halvings, .* 8 x 8 pixels"),
        ("model.halvings", -1, r"model.halvings asks for -1 doublings or halvings"),
        ("model.halvings", 2, r"halvings is 2, but a DCGAN critic of 2 widths halves 1 times"),
        ("model.norm", "layer", r"'batch', 'group' or 'none', got 'layer'"),
        ("model.dtype", "foo", r"foo"),
        ("game.loss", "gan", r"'gan' is unknown; valid: 'wasserstein'"),
        ("game.constraint", "gnn", r"constraint 'gnn' is unknown"),
        ("game.critic_steps", 3, r"batch_size of 16 does not divide among game.critic_steps=3"),
        ("game.critic_steps", 0, r"does not divide among game.critic_steps=0"),
        ("game.generator_draws", 0, r"generator_draws must be at least 1, got 0"),
        ("optim.schedule", "cosine", r"optim.schedule must be linear or constant, got 'cosine'"),
        ("optim.critic_rate", -1.0, r"critic_rate must be in"),
        ("optim.b1", 1.0, r"b1 must be in \[0, 1\)"),
        ("optim.ema_decay", 1.5, r"ema_decay must be in \[0, 1\)"),
        ("train.steps", 0, r"train.steps must be at least 1"),
        ("sample.num", 15, r"sample.num must be at least 16 for the digits, got 15"),
        ("sample.batch_size", 0, r"sample.batch_size must be at least 1"),
        ("measure.lines", 0, r"measure.lines must be at least 1, got 0"),
        ("measure.parts", 6, r"measure.parts must be a multiple of 4, got 6"),
        ("measure.directions", 0, r"measure.directions must be at least 1"),
        ("mesh.view", "vmap", r"one of jit, pmap, shard_map, got 'vmap'"),
    ],
)
def test_a_config_that_cannot_be_run_says_why(tmp_path, field, value, message):
    with pytest.raises(ConfigError, match=message):
        gan.run(changed(**{field: value}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_depends_on_more_than_one_field(tmp_path):
    config = changed(judge=True, **{"game.constraint": "gp"})
    with pytest.raises(ConfigError, match=r"'gn' where claims are judged, got 'gp'"):
        gan.run(config, tmp_path)
    config = changed(**{"mesh.view": "pmap", "game.critic_steps": 4})
    with pytest.raises(ConfigError, match=r"of 16, 2 on each of 8 devices, does not .*steps=4"):
        gan.run(config, tmp_path)
    with pytest.raises(ValueError, match="judge must be False for images other than the digits"):
        image_claims.check(changed("cifar10", judge=True))


def test_bfloat16_computes_low_and_keeps_high():
    plan = image_model.build(changed(**{"model.dtype": "bfloat16"}), (8, 8, 1))
    state = jax.eval_shape(plan.task.init, jax.random.key(0))
    batch = {"image": np.zeros((16, 8, 8, 1), np.float32), "row": np.arange(16, dtype=np.int32),
             "weight": np.ones(16, np.float32)}  # fmt: skip
    new, metrics = jax.eval_shape(plan.task.step, state, batch, jax.random.key(1))
    dtypes = {x.dtype for x in jax.tree.leaves((new, metrics))}
    assert {x for x in dtypes if jnp.issubdtype(x, jnp.inexact)} == {np.dtype(np.float32)}
    x = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    program = jax.make_jaxpr(plan.network.apply)({"params": state.params["critic"]}, x)
    assert "bf16[2,4,4,4]" in str(program)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_statistics_move_while_training_only(norm):
    config = changed(**{"model.norm": norm})
    generator, _ = image_model.networks(config.model, (8, 8, 1))
    generate = image_model.make_generate(generator, 4)

    @jax.jit
    def both():
        keys = lambda: jax.random.split(jax.random.key(1), 6)  # noqa: E731
        rest = generator.init(jax.random.key(0), jnp.zeros((2, 4)), train=True)
        params = rest.pop("params")
        z = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys())
        return params, z, *(generate(params, rest, keys(), {}, train) for train in (True, False))

    params, z, trained, judged = both()
    assert trained.examples.shape == judged.examples.shape == (6, 8, 8, 1)
    assert judged.model_state is None
    if norm == "none":
        assert trained.model_state is None
        np.testing.assert_array_equal(trained.examples, judged.examples)
        return
    first = np.asarray(trained.model_state["batch_stats"]["norm_0"]["mean"])
    h = np.asarray(z @ params["dense"]["kernel"]).reshape(6 * 4 * 4, 4)
    np.testing.assert_allclose(first, 0.1 * h.mean(axis=0), rtol=1e-4, atol=1e-7)
    assert abs(trained.examples - judged.examples).max() > 1e-4


@pytest.mark.slow  # seconds of compiling
def test_the_average_is_evaluated_and_rendered(one_device):
    """With gradient normalisation left out, so that the networks alone say what is expected."""
    config = changed(**{"game.constraint": "none", "model.norm": "none", "data.flip": True})
    plan = image_model.build(config, (8, 8, 1))
    state = jax.device_get(jax.jit(plan.task.init)(jax.random.key(0)))
    averaged = jax.tree.map(lambda x: x + 0.2, state.ema)
    state = dataclasses.replace(state, ema=averaged)
    image = np.random.default_rng(0).normal(size=(16, 8, 8, 1)).astype(np.float32)
    batch = {"image": image, "row": np.arange(16, dtype=np.int32), "weight": np.ones(16)}
    assert plan.task.evaluate is not None and plan.task.render is not None
    sums = jax.jit(plan.task.evaluate)(state, batch, jax.random.key(1))
    shown = jax.jit(plan.task.render)(state, batch, jax.random.key(1))["samples"]

    @jax.jit
    def expected():
        keys = fold_in_rows(jax.random.key(1), jnp.arange(16))
        z = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
        generator, critic = image_model.networks(config.model, (8, 8, 1))
        fake = generator.apply({"params": averaged["params"]}, z, train=False)
        judged = {"params": state.params["critic"]}
        return fake, critic.apply(judged, image), critic.apply(judged, fake)

    fake, of_real, of_fake = jax.device_get(expected())
    hinge = np.maximum(0, 1 - of_real) + np.maximum(0, 1 + of_fake)
    for name, values in (("loss", hinge), ("critic_real", of_real), ("critic_fake", of_fake)):
        assert float(sums[name][0] / sums[name][1]) == pytest.approx(values.mean(), rel=1e-4)
    np.testing.assert_allclose(shown, fake / 2 + 0.5, atol=1e-5)


def test_what_digits_are_compared_with():
    """The figures that `data.digits` gives of train and test."""
    train, test = (dataset.digits.load(name)["image"] for name in ("train", "test"))
    last = np.eye(10)[[9, *range(9)]]

    class Judge:
        classes_ = np.arange(10)

        def predict(self, rows):
            return np.argmax(rows[:, :10] @ last, axis=1)

    config = changed(**{"measure.directions": 3})
    same = gan.figures(test, train, test, config, Judge())
    assert same["sliced"] == 0 and same["precision"] == same["recall"] == 1
    assert abs(same["frechet"]) < 1e-6
    assert same["nearest"] == pytest.approx(2.08, abs=0.005)
    whole = gan.figures(train, train, test, config, Judge())
    assert whole["nearest"] == 0 and whole["frechet"] == pytest.approx(0.407, abs=0.001)
    assert 0 < whole["sliced"] < 0.2 and whole["recall"] != whole["precision"]
    shares = np.bincount(Judge().predict(train.reshape(-1, 64)), minlength=10) / 1287
    np.testing.assert_allclose(whole["classes"], shares)


def measurement(**changes):
    sets = {
        "frechet": (0.8, 0.4, 0.5), "sliced": (0.06, 0.05, 0.08), "precision": (0.8, 0.9, 0.2),
        "recall": (0, 0, 0), "nearest": (2.4, 0, 9),
    }  # fmt: skip
    found = {
        kind: {name: values[i] for name, values in sets.items()}
        for i, kind in enumerate(("samples", "train", "gaussian"))
    }
    found["samples"]["classes"] = [0.06, 0.14, *[0.1] * 8]
    found["train"]["classes"] = [0.09, 0.11, *[0.1] * 8]
    critic = {"largest": 0.99, "steep": 0.0, "off": 1e-15, "bound": 0.7, "outside": 0.0}
    return {**found, "nearest_test": 2.0, "critic": {**critic, "finer": 0.9, **changes}}


def test_the_claims_by_hand():
    claims = gan.claims([measurement()], judged=True)
    expected = [0, 1e-15, 0, 0.9, 0.8, 0.75, 6 / 7, 0.06, 1.2]
    np.testing.assert_allclose([c.value for c in claims], expected, rtol=1e-9)
    inf = np.inf
    assert [(c.low, c.high) for c in claims] == [
        (-inf, 0), (-inf, 1e-9), (-inf, 0), (0.5, inf), (-inf, 1), (-inf, 1), (0.5, inf),
        (0.02, inf), (0.9, inf),
    ]  # fmt: skip
    assert {c.verdict for c in claims} == {"holds"}
    bad = measurement(steep=0.01, off=1e-6, outside=0.01, finer=0.25)
    bad["samples"] = {
        "frechet": 1.3, "sliced": 0.09, "precision": 0.3, "nearest": 1.0, "classes": [0.0, 1.0],
    }  # fmt: skip
    verdicts = [c.verdict for c in gan.claims([bad], judged=True)]
    assert verdicts == ["fails"] * 9
    both = gan.claims([measurement(), bad], judged=True)
    assert both[0].value == pytest.approx(0.005) and both[4].value == pytest.approx(1.05)
    assert {c.verdict for c in gan.claims([bad], judged=False)} == {"not judged"}
    bad["gaussian"]["precision"] = bad["train"]["precision"]
    assert gan.claims([bad], judged=True)[6].verdict == "fails"


def test_the_gaussian_has_the_moments_of_the_digits():
    train = np.random.default_rng(0).gamma(2.0, size=(400, 2, 1, 1)) @ np.ones((1, 1))
    train[:, 1] += 0.5 * train[:, 0]
    drawn = gan.gaussian(train, 20_000)
    assert drawn.shape == (20_000, 2, 1, 1)
    rows, expected = drawn.reshape(-1, 2), train.reshape(-1, 2)
    np.testing.assert_allclose(rows.mean(axis=0), expected.mean(axis=0), atol=0.05)
    np.testing.assert_allclose(np.cov(rows.T), np.cov(expected.T), rtol=0.05, atol=0.05)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The experiment, shrunk; one run for all tests here."""
    folder = tmp_path_factory.mktemp("gan")
    config = get_config("smoke").lock()
    tracked = Tracked(config)
    return folder, config, tracked, gan.run(tracked, folder)


@pytest.mark.slow
def test_the_folder_holds_what_a_run_promises(smoke, monkeypatch):
    folder, config, tracked, result = smoke
    assert set(flatten(config.to_dict())) == tracked.read
    for name in (*result.pictures, "metrics.jsonl", "measured.json"):
        assert (folder / name).stat().st_size > 0, name
    assert result.pictures == ["samples.png", "critic.png", "curves.png"]
    assert (folder / "checkpoints" / str(config.train.steps)).is_dir()
    assert list((folder / "images").glob("samples_*.png"))
    assert [c.verdict for c in result.claims] == ["not judged"] * 9
    assert all(c.statement and c.source.startswith("https://") for c in result.claims)
    monkeypatch.setattr(gan, "fit", None)  # a finished seed is read back
    assert gan.run(config, folder).claims == result.claims


@pytest.mark.slow
def test_what_must_hold_does(smoke):
    """Theorems: also for a few steps of small networks."""
    critic = smoke[3].measured["by_seed"][0]["critic"]
    assert critic["steep"] == critic["outside"] == 0
    assert critic["off"] < 1e-9 and 0 < critic["largest"] <= 1


@pytest.mark.slow
def test_samples_are_those_of_the_average_on_any_devices(smoke):
    config = smoke[1]
    plan = image_model.build(config, (8, 8, 1))
    state = jax.device_get(jax.jit(plan.task.init)(jax.random.key(0)))
    moved = jax.tree.map(lambda x: x + 0.1 * np.arange(x.size).reshape(x.shape) % 1, state.ema)
    state = dataclasses.replace(state, ema=moved)
    assert [*image_model.batch_starts(plan)] == [0, 24]
    one = dataclasses.replace(plan, mesh=meshes.make_mesh(devices=jax.devices()[:3]))
    draws = [image_model.sampler(p, state, 5) for p in (plan, one)]
    for first, count in ((0, 24), (24, 16)):
        parts = [draw(first) for draw in draws]
        assert parts[0].shape == (count, 8, 8, 1)
        np.testing.assert_allclose(*parts, atol=1e-5)
        keys = fold_in_rows(jax.random.key(5), jnp.arange(first, first + count))
        z = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
        generator, _ = image_model.networks(config.model, (8, 8, 1))
        expected = generator.apply({"params": moved["params"], **moved["model_state"]}, z,
                                   train=False)  # fmt: skip
        np.testing.assert_allclose(parts[0], expected, atol=1e-5)


@pytest.mark.slow
def test_the_views_losses_are_equal(tmp_path, monkeypatch):
    """The smoke config on 8 devices; SGD, since Adam would hide a wrong scale of gradients."""
    monkeypatch.setattr(image_model, "make_optimizer", lambda *args: optax.sgd(1e-2))
    losses = {}
    for view in ("jit", "pmap", "shard_map"):
        config = changed(**{"mesh.view": view, "model.norm": "batch"})
        data = dataset.open_images(config.data)
        plan = image_model.build(config, data.shape)
        assert plan.mesh.size == 8 and plan.task.axis_name == per_device.axis_name(view)
        gan.train(plan, config, 0, data, tmp_path / view)
        records = [
            read_metrics(tmp_path / view / "metrics.jsonl", k) for k in ("train", "evaluate")
        ]
        names = ("loss", "critic_real", "critic_fake")
        losses[view] = np.concatenate(
            [*(r[n] for r in records for n in names), records[0]["generator_loss"]]
        )
    assert len(losses["jit"]) == 4 * 4 + 3 * 2
    for view in ("pmap", "shard_map"):
        np.testing.assert_allclose(losses[view], losses["jit"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(smoke, tmp_path, one_device):
    config = smoke[1]
    data = dataset.open_images(config.data)
    plan = image_model.build(config, data.shape)
    whole = gan.train(plan, config, 0, data, tmp_path / "whole")
    short = changed(**{"train.steps": 2})
    gan.train(plan, short, 0, data, tmp_path / "parts")  # the plan's rates are those of 4 steps
    parts = gan.train(plan, config, 0, data, tmp_path / "parts")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
