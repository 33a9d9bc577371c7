"""configs/ddpm.py:cifar10, shrunk, on a dataset of CIFAR-10's name and shape made here."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from tiny_cifar10 import SIZES, prepare
from tracked_config import Tracked

from blogjax.data import tfds as data_tfds
from blogjax.diffusion.sampling import sample
from blogjax.diffusion.schedules import linear_beta_schedule
from blogjax.models.unet import ddpm_cifar10
from blogjax.tasks.augmentation import random_horizontal_flip
from blogjax.train import mesh as meshes
from configs.ddpm import get_config
from experiments import ddpm
from experiments.diffusion import image_claims, model
from experiments.images import dataset
from experiments.launch.configs import ConfigError, flatten


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds"))


def small(folder, **changes):
    config = get_config("cifar10")
    config.update_from_flattened_dict(
        {
            "data.dir": str(folder), "data.splits": ("train", "test[:16]", "test[16:]"),
            "data.batch_size": 8, "model.channels": 4, "model.num_blocks": 1,
            "model.multipliers": (1, 2),
            "train.steps": 3, "train.evaluate_every": 2, "train.render_every": 3,
            "train.log_every": 1, "sample.num": 30, "sample.batch_size": 16,
            "sample.steps": (2,), "optim.warmup_fraction": 0.4, **changes,
        }
    )  # fmt: skip
    return config


@pytest.mark.slow  # seconds of compiling
def test_the_published_setting():
    """Against Ho et al. 2020, section 4 and appendix B, by hand."""
    config = get_config("cifar10")
    data = dataset.Images("cifar10", (32, 32, 3), 10, {}, None, None)
    plan = model.build(config, data.shape, data.num_classes)
    abstract = jax.eval_shape(plan.task.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(abstract.params)) == 35_746_307
    chex.assert_trees_all_equal_shapes(
        abstract.params,
        jax.eval_shape(model.make_init(ddpm_cifar10(), data.shape), jax.random.key(0))["params"],
    )
    betas = 1 - np.asarray(plan.schedule.signal(np.arange(1, 1001)), np.float64) ** 2
    assert plan.schedule.num_steps == 1000
    assert betas[0] == pytest.approx(1e-4, rel=1e-3)  # beta_1
    last = 1 - (1 - betas[-1]) / (1 - betas[-2])
    assert last == pytest.approx(0.02, rel=1e-2)  # beta_T
    rate = model.make_optimizer(config.optim, config.train.steps)
    # One coordinate under Adam moves by the learning rate while its gradient stays the same.
    state = rate.init(np.zeros(1))
    moves = []
    for _ in range(5):
        update, state = rate.update(np.ones(1, np.float32), state)
        moves.append(-float(update[0]))
    expected = 2e-4 * np.arange(5) / 5000
    np.testing.assert_allclose(moves, expected, rtol=1e-3, atol=1e-12)
    assert (config.data.batch_size, config.train.steps, config.optim.ema_decay) == (
        128, 800_000, 0.9999,
    )  # fmt: skip
    assert config.data.flip
    assert (config.model.dropout, config.diffusion.prediction) == (0.1, "eps")
    assert (config.optim.b1, config.optim.b2) == (0.9, 0.999)
    # Clipped at 1 is the gradient of a mean over an image's numbers; ours is of their sum.
    assert config.optim.clip_norm == 1.0 * 32 * 32 * 3
    assert not config.model.conditional
    assert "ddpm_large" in config.sample.samplers and 1000 in config.sample.steps


@pytest.mark.slow  # seconds of compiling
def test_the_larger_variance_is_that_of_the_forward_step():
    """Ho et al., section 3.2: sigma_t^2 = beta_t, above the posterior's, and none at the end."""
    schedule = linear_beta_schedule(10)
    shape = (20_000, 1)

    def spread(kind, steps):
        """Deviation of x_s given x_t = 0 where the network says 0, over one step of the sampler."""
        options = {"eta": 0.0, **model.SAMPLERS[kind]}
        x = sample(
            jax.random.key(0), lambda x, t: jax.numpy.zeros_like(x), schedule, shape,
            steps=steps, x_T=jax.numpy.zeros(shape), **options,
        )  # fmt: skip
        return float(x.std())

    signal = np.asarray(schedule.signal(np.arange(11)), np.float64)
    beta = 1 - (signal[6] / signal[5]) ** 2
    posterior = beta * (1 - signal[5] ** 2) / (1 - signal[6] ** 2)
    assert spread("ddpm_large", [6, 5]) == pytest.approx(beta**0.5, rel=0.03)
    assert spread("ddpm", [6, 5]) == pytest.approx(posterior**0.5, rel=0.03)
    assert spread("ddim", [6, 5]) == 0
    assert spread("ddpm_large", [1, 0]) == 0
    assert beta > 1.05 * posterior


def test_a_constant_rate_without_warmup_is_not_zero():
    config = get_config("cifar10")
    config.optim.warmup_fraction = 0.0
    tx = model.make_optimizer(config.optim, 100)
    state = tx.init(np.zeros(1))
    for _ in range(3):
        update, state = tx.update(np.ones(1, np.float32), state)
    assert -float(update[0]) == pytest.approx(2e-4, rel=1e-4)


def lion_by_hand(p, g, m, v, t):
    del t
    return -3e-5 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * p), 0.99 * m + 0.01 * g, v


def adamw_by_hand(p, g, m, v, t):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    scaled = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return -3e-4 * (scaled + 0.01 * p), m, v


@pytest.mark.parametrize(
    ("variant", "by_hand"), [("cifar10_lion", lion_by_hand), ("cifar10_adamw", adamw_by_hand)]
)
def test_the_pair_of_lions_authors(variant, by_hand):
    """The updates of the chain against float64, every number written out once more."""
    config, paper = get_config(variant), get_config("cifar10")
    fields, same = (flatten(c.to_dict()) for c in (config, paper))
    changed = {name for name in fields if fields[name] != same[name]}
    pair = {"optim.name", "optim.learning_rate", "optim.weight_decay"}
    assert pair <= changed <= pair | {"optim.b2"}
    config.optim.warmup_fraction = 0.0
    tx = model.make_optimizer(config.optim, 100)
    rng = np.random.default_rng(0)
    params = rng.normal(size=50)
    state = tx.init(params.astype(np.float32))
    m = v = np.zeros(50)
    for t, size in enumerate([1e2, 1e4, 1e2, 1e1], start=1):
        g = rng.normal(size=50)
        g *= size / np.linalg.norm(g)
        update, state = tx.update(g.astype(np.float32), state, params.astype(np.float32))
        expected, m, v = by_hand(params, g * min(1, 3072 / size), m, v, t)
        # The first step of a rate that rises has rate 0.
        np.testing.assert_allclose(update, expected * (t > 1), rtol=1e-4, atol=1e-9)


def test_published_figures_stand_beside_what_they_are_of():
    fid = image_claims.published_fid
    assert fid("cifar10", "adam", "ddpm_large", 1000) == 3.17
    assert fid("cifar10", "adam", "ddpm_large", 3) is None
    assert fid("cifar10", "lion", "ddpm_large", 1000) is None
    assert fid("cifar100", "adam", "ddpm_large", 1000) is None


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = small(folder)
    config.lock()
    tracked = Tracked(config)
    return workdir, config, tracked, ddpm.run(tracked, workdir)


@pytest.mark.slow
def test_it_trains_samples_and_says_what_was_published(run):
    workdir, config, tracked, result = run
    assert set(flatten(config.to_dict())) == tracked.read
    assert [c.verdict for c in result.claims] == ["not judged"] * 2
    assert "published FID 3.17" not in "".join(c.statement for c in result.claims)  # of 1000 steps
    for name in result.pictures:
        assert (workdir / name).stat().st_size > 0
    parts = sorted((workdir / "samples" / "ddpm_large_2").glob("*.npy"))
    pixels = np.concatenate([np.load(p) for p in parts])
    assert pixels.shape == (30, 32, 32, 3) and pixels.dtype == np.uint8
    assert len(parts) == 2
    program = json.loads((workdir / "program.json").read_text())
    assert program["flops"] > 0 and program["temporaries"] > 0


@pytest.mark.slow
def test_sampling_goes_on_where_it_was_stopped(run, monkeypatch):
    workdir, config, _, result = run
    missing = workdir / "samples" / "ddim_2" / "000016.npy"
    before = missing.read_bytes()
    missing.unlink()
    (workdir / "measured.json").unlink()
    asked = []
    whole = model.sampler

    def counting(*args):
        generate = whole(*args)

        def noted(params, seed, steps, kind, first):
            asked.append((kind, steps, first))
            return generate(params, seed, steps, kind, first)

        return noted

    monkeypatch.setattr(ddpm.image_claims, "sampler", counting)
    again = ddpm.run(config, workdir)
    assert asked == [("ddim", 2, 16)]
    assert missing.read_bytes() == before
    assert again.claims == result.claims


@pytest.mark.slow
def test_memory_and_grain_give_the_same_losses(run, folder, tmp_path):
    workdir, config, _, _ = run
    data = dataset.open_images(config.data)
    assert isinstance(data.batches("train", 8, 0), data_tfds.Batches)
    config = small(folder, **{"data.serve": "grain"})
    data = dataset.open_images(config.data)
    assert isinstance(data.batches("train", 8, 0), data_tfds.StreamedBatches)
    plan = model.build(config, data.shape, data.num_classes)
    ddpm.train(plan, config, 0, data, tmp_path)
    memory, grain = ((f / "metrics.jsonl").read_text() for f in (workdir, tmp_path))
    assert len(memory.splitlines()) == 5
    assert memory == grain


@pytest.mark.slow
def test_bfloat16_computes_low_and_keeps_high(run, folder):
    """The same first loss to bfloat16's precision, with parameters and moments in float32."""
    config = small(folder, **{"model.dtype": "bfloat16"})
    data = dataset.open_images(config.data)
    plan = model.build(config, data.shape, data.num_classes)
    batch = data.batches("train", 8, 0)(0)
    state = jax.jit(plan.task.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.01, state.params)  # at first the network says 0
    losses = []
    for dtype in ("float32", "bfloat16"):
        config.model.dtype = dtype
        task = model.build(config, data.shape, data.num_classes).task
        old = dataclasses.replace(state, params=params)
        new, metrics = jax.jit(task.step)(old, batch, jax.random.key(1))
        assert {x.dtype for x in jax.tree.leaves((new.params, new.ema))} == {np.dtype(np.float32)}
        losses.append(float(metrics["loss"]))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_flips_reach_the_task(folder, monkeypatch):
    seen = []
    whole = model.denoising_task

    def noted(*args, augment, **options):
        seen.append(augment)
        return whole(*args, augment=augment, **options)

    monkeypatch.setattr(model, "denoising_task", noted)
    for flip in (True, False):
        model.build(small(folder, **{"data.flip": flip}), (32, 32, 3), 10)
    assert seen == [random_horizontal_flip, None]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.splits", ("train", "test[:16]", "tset"), "'tset' of cifar10: there are"),
        ("data.splits", ("train", "validation", "test"), "'validation' of cifar10: there are"),
        ("data.name", "cifar11", "near names: .*cifar10"),
        ("judge", True, "judge must be False"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_is(folder, field, value, message):
    with pytest.raises(ConfigError, match=message):
        ddpm.run(small(folder, **{field: value}), folder / "none")


def test_samples_need_no_classes_where_the_network_has_none(folder):
    config = small(folder, **{"sample.num": 31})
    assert model.build(config, (32, 32, 3), 100).task.axis_name is None
    config.model.conditional = True
    with pytest.raises(ValueError, match="a multiple of the 100 classes and at least 300"):
        model.build(config, (32, 32, 3), 100)


def test_only_the_images_compared_with_are_read(folder):
    data = dataset.open_images(small(folder).data)
    first = data.first("train", 5)
    assert first.shape == (5, 32, 32, 3) and first.dtype == np.uint8
    whole = data_tfds.load("cifar10", "train", folder)["image"]
    np.testing.assert_array_equal(first, whole[:5])
    assert len(data.first("test", 1000)) == SIZES["test"] - 16


@pytest.mark.slow
def test_files_of_samples_do_not_depend_on_the_devices(folder):
    config = small(folder)
    plan = model.build(config, (32, 32, 3), 10)
    params = jax.jit(plan.task.init)(jax.random.key(0)).params
    one = dataclasses.replace(plan, mesh=meshes.make_mesh(devices=jax.devices()[:3]))
    assert [*model.batch_starts(plan)] == [*model.batch_starts(one)] == [0, 16]
    for first, count in ((0, 16), (16, 14)):
        parts = [model.sampler(p, (32, 32, 3))(params, 0, 1, "ddim", first) for p in (plan, one)]
        assert parts[0].shape == (count, 32, 32, 3)
        np.testing.assert_allclose(*parts, atol=1e-5)
