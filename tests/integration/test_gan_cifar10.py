"""configs/gan.py:cifar10 and :cifar10_dcgan, as published, and shrunk on a dataset made here."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_cifar10 import prepare
from tracked_config import Tracked

from blogjax.core.random import fold_in_rows
from blogjax.train import mesh as meshes
from blogjax.train.reporting import read_metrics
from configs.gan import get_config
from experiments import gan
from experiments.adversarial import image_model
from experiments.launch.configs import flatten

SHAPE = (32, 32, 3)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """For which tasks compile faster than for eight."""
    one = meshes.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(meshes, "make_mesh", lambda fsdp: one)


def changed(variant, **changes):
    config = get_config(variant)
    config.update_from_flattened_dict(changes)
    return config


def test_the_published_settings():
    """Against the authors' repository: sizes of the networks and what their configs say."""
    conv = lambda size, a, b: size**2 * a * b + b  # noqa: E731
    block = 2 * 512 + 2 * conv(3, 256, 256) + conv(1, 256, 256)
    plain = 2 * conv(3, 128, 128)
    sizes = {
        "cifar10": (
            129 * 4096 + 3 * block + 512 + conv(3, 256, 3),
            conv(3, 3, 128) + conv(3, 128, 128) + conv(1, 3, 128)
            + plain + conv(1, 128, 128) + 2 * plain + 129,
        ),
        "cifar10_dcgan": (
            129 * 8192 + 1024 + conv(4, 512, 256) + 512 + conv(4, 256, 128) + 256
            + conv(4, 128, 64) + 128 + conv(3, 64, 3),
            conv(3, 3, 64) + conv(4, 64, 128) + conv(3, 128, 128) + conv(4, 128, 256)
            + conv(3, 256, 256) + conv(4, 256, 512) + conv(3, 512, 512) + 16 * 512 + 1,
        ),
    }  # fmt: skip
    for variant, expected in sizes.items():
        config = get_config(variant)
        plan = image_model.build(config, SHAPE)
        params = jax.eval_shape(plan.task.init, jax.random.key(0)).params
        counts = [sum(x.size for x in jax.tree.leaves(params[n])) for n in ("generator", "critic")]
        assert counts == [*expected]
        assert (config.train.steps, config.model.latent, config.optim.ema_decay) == (
            200_000, 128, 0.9999,
        )  # fmt: skip
        assert (config.optim.b1, config.optim.b2, config.data.flip) == (0, 0.9, True)
        assert (config.game.constraint, config.model.norm) == ("gn", "batch")
        updates, rows = config.game.critic_steps, config.data.batch_size
        assert rows // updates == 64 and rows // updates * config.game.generator_draws == 128
        assert (updates, config.game.loss, config.optim.schedule) == (
            (5, "hinge", "linear") if variant == "cifar10" else (1, "non_saturating", "constant")
        )
        rates = config.optim.generator_rate, config.optim.critic_rate
        assert rates == ((2e-4, 4e-4) if variant == "cifar10" else (2e-4, 2e-4))


def test_rates_fall_once_a_step():
    """One coordinate under Adam moves by the rate while its gradient stays the same."""

    def moves(count, **options):
        tx = image_model.make_optimizer(**options)
        state, found = tx.init(np.zeros(1)), []
        for _ in range(count):
            update, state = tx.update(np.ones(1, np.float32), state)
            found.append(-float(update[0]))
        return found

    optim = get_config("cifar10").optim
    falling = moves(12, optim=optim, player="critic", steps=4, updates=3)
    np.testing.assert_allclose(falling, 4e-4 * np.repeat([1, 0.75, 0.5, 0.25], 3), rtol=1e-4)
    falling = moves(4, optim=optim, player="generator", steps=4)
    np.testing.assert_allclose(falling, 2e-4 * np.array([1, 0.75, 0.5, 0.25]), rtol=1e-4)
    optim.schedule = "constant"
    staying = moves(3, optim=optim, player="critic", steps=2)
    np.testing.assert_allclose(staying, 4e-4, rtol=1e-4)
    # Without momentum a gradient that turns moves the other way at once.
    tx = image_model.make_optimizer(optim, "critic", 2)
    state = tx.init(np.zeros(1))
    for gradient in (1.0, -1.0):
        update, state = tx.update(np.full(1, gradient, np.float32), state)
    assert float(update[0]) == pytest.approx(4e-4, rel=1e-4)


@pytest.mark.slow  # seconds of compiling
def test_the_game_reaches_the_task(monkeypatch):
    """By what a step asks of the networks, and by what the task is told."""
    seen, options = [], {}
    whole, made = image_model.adversarial_task, image_model.make_generate

    def noted(*args, **kwargs):
        options.update(kwargs, txs=args[3:])
        return whole(*args, **kwargs)

    def counting(*args):
        generate = made(*args)

        def noted(params, model_state, keys, batch, train):
            seen.append((len(keys), train))
            return generate(params, model_state, keys, batch, train)

        return noted

    monkeypatch.setattr(image_model, "adversarial_task", noted)
    monkeypatch.setattr(image_model, "make_generate", counting)
    widths = {"model.generator_widths": (4, 4), "model.critic_widths": (4, 4), "model.latent": 2}
    config = changed("cifar10", **widths)
    plan = image_model.build(config, SHAPE)
    image = np.random.default_rng(0).integers(0, 256, (320, 32, 32, 3)).astype(np.uint8)
    batch = {"image": image, "row": np.arange(320, dtype=np.int32), "weight": np.ones(320)}
    state = jax.eval_shape(plan.task.init, jax.random.key(0))
    jax.eval_shape(plan.task.step, state, batch, jax.random.key(1))
    assert set(seen) == {(64, True), (128, True)}
    assert (options["loss"], options["ema_decay"], options["axis_name"]) == ("hinge", 0.9999, None)
    keys = fold_in_rows(jax.random.key(2), jnp.arange(320))
    scaled = image / np.float32(127.5) - 1
    flipped = np.asarray(options["real"](batch, keys))
    left = np.abs(flipped - scaled).max(axis=(1, 2, 3)) < 1e-6
    right = np.abs(flipped - scaled[:, :, ::-1]).max(axis=(1, 2, 3)) < 1e-6
    assert (left ^ right).all() and 100 < left.sum() < 220
    image_model.build(changed("cifar10", **widths, **{"data.flip": False}), SHAPE)
    np.testing.assert_allclose(options["real"](batch, keys), scaled, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["cifar10", "cifar10_dcgan"])
def test_cifar10_trains_and_samples(variant, tmp_path_factory, tmp_path):
    """Both scaled variants, shrunk, on a dataset of that name and shape made here."""
    rows = 40 if variant == "cifar10" else 8
    halved = 2 if variant == "cifar10" else 3
    config = changed(
        variant,
        **{
            "data.dir": str(prepare(tmp_path_factory.mktemp("tfds"))),
            "data.splits": ("train", "test[:16]", "test[16:]"), "data.batch_size": rows,
            "model.generator_widths": (8, 4, 4, 4), "model.critic_widths": (4,) * (halved + 1),
            "model.latent": 4, "train.steps": 2, "train.evaluate_every": 2,
            "train.render_every": 2, "train.log_every": 1, "sample.num": 30,
            "sample.batch_size": 16, "measure.lines": 2, "measure.parts": 8,
            "measure.directions": 4,
        },
    ).lock()  # fmt: skip
    tracked = Tracked(config)
    result = gan.run(tracked, tmp_path)
    assert set(flatten(config.to_dict())) == tracked.read
    assert [c.verdict for c in result.claims] == ["not judged"] * 6
    for name in result.pictures:
        assert (tmp_path / name).stat().st_size > 0
    files = sorted((tmp_path / "samples").glob("*.npy"))
    pixels = np.concatenate([np.load(p) for p in files])
    assert pixels.shape == (30, 32, 32, 3) and pixels.dtype == np.uint8
    found = json.loads((tmp_path / "measured.json").read_text())
    assert found["num"] == 30 and found["critic"]["steep"] == 0
    assert found["samples"]["frechet"] != found["train"]["frechet"]
    train = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert len(train["loss"]) == 2 and np.isfinite(train["loss"]).all()
