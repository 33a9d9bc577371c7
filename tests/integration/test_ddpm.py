import dataclasses

import jax
import numpy as np
import optax
import pytest
from tracked_config import Tracked

from blogjax.train import mesh as meshes
from blogjax.train import per_device, profiling
from blogjax.train.reporting import read_metrics
from configs.ddpm import get_config
from experiments import ddpm
from experiments.diffusion import model
from experiments.launch.configs import ConfigError, flatten


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The published experiment, shrunk; one run for all tests here."""
    folder = tmp_path_factory.mktemp("ddpm")
    config = get_config("smoke")
    config.lock()
    tracked = Tracked(config)
    result = ddpm.run(tracked, folder)
    return folder, config, tracked, result


@pytest.mark.slow
def test_every_field_of_the_config_is_read(smoke):
    _, config, tracked, _ = smoke
    assert set(flatten(config.to_dict())) == tracked.read


def test_variants_differ_in_values_only():
    variants = ("default", "full", "smoke", "cifar10", "cifar10_lion", "cifar10_adamw")
    fields = {tuple(flatten(get_config(v).to_dict())) for v in variants}
    assert len(fields) == 1
    with pytest.raises(ValueError, match=", ".join(variants)):
        get_config("huge")


@pytest.mark.slow
def test_the_folder_holds_what_a_run_promises(smoke):
    folder, config, _, result = smoke
    for name in ("samples.png", "denoising.png", "curves.png", "metrics.jsonl", "measured.json"):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").glob("*tfevents*"))
    assert (folder / "checkpoints" / str(config.train.steps)).is_dir()
    assert list((folder / "images").glob("samples_*.png"))
    assert [c.verdict for c in result.claims] == ["not judged"] * 5
    assert all(c.statement and c.source.startswith("https://") for c in result.claims)


@pytest.mark.slow
def test_a_finished_seed_is_read_back(smoke, monkeypatch):
    folder, config, _, result = smoke
    monkeypatch.setattr(ddpm, "fit", None)
    again = ddpm.run(config, folder)
    assert again.claims == result.claims


@pytest.mark.slow
def test_samples_do_not_depend_on_the_devices(smoke):
    _, config, _, _ = smoke
    assert jax.device_count() == 8
    shape = (8, 8, 1)
    plan = model.build(config, shape, 10)
    # Noise on all parameters: at initialisation the network says 0 whatever it is asked.
    params = jax.tree.map(
        lambda x: (
            jax.numpy.asarray(x)
            + 0.1 * np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype)
        ),
        jax.device_get(plan.task.init(jax.random.key(0)).params),
    )
    one = dataclasses.replace(plan, mesh=meshes.make_mesh(devices=jax.devices()[:1]))
    many, single = (
        model.sampler(p, shape)(params, 0, 2, "ddpm", 0, trajectory=True) for p in (plan, one)
    )
    assert many.shape == (3, config.sample.num, *shape)
    assert abs(many - single).max() < 1e-4
    labels = np.arange(config.sample.num) % 10
    swapped = np.roll(labels, 1)
    x, t = many[1], np.full(config.sample.num, 500)
    answers = [plan.apply(params, x, t, jax.numpy.asarray(c), None) for c in (labels, swapped)]
    assert abs(answers[0] - answers[1]).max() > 1e-3  # so a wrong class would have been seen


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.batch_size", 12, r"batch of 12 does not divide over data=8 x fsdp=1"),
        ("mesh.fsdp", 3, r"fsdp=3 needs 6 devices, but there are 8"),
        ("diffusion.schedule", "sigmoid", r"one of linear, post, cosine, got 'sigmoid'"),
        ("sample.steps", (2, 5000), r"within 1\.\.1000"),
        ("sample.num", 41, r"multiple of the 10 classes"),
        ("data.batch_size", 0, r"batch size must be at least 1"),
        ("sample.steps", (5,), r"sample.steps needs two numbers"),
        ("sample.samplers", ("euler",), r"some of ddim, ddpm, ddpm_large, got \('euler',\)"),
        ("sample.samplers", ("ddim",), r"must be \('ddim', 'ddpm'\) for the digits"),
        ("mesh.view", "vmap", r"one of jit, pmap, shard_map, got 'vmap'"),
        ("model.conditional", False, r"a claim asks for classes"),
        ("optim.schedule", "step", r"cosine or constant, got 'step'"),
        ("data.serve", "disk", r"one of memory, grain, auto, got 'disk'"),
        ("data.splits", ("train",), r"must name train, validation, test"),
        ("data.splits", ("train", "test", "test"), r"splits of their own"),
        ("optim.b1", 1.5, r"b1 must be in \[0, 1\)"),
        ("optim.name", "muon", r"one of adam, adamw, lion, sgd, got 'muon'"),
        ("optim.accumulate_steps", 0, r"accumulate_steps must be in 1..6, .* got 0"),
        ("optim.accumulate_steps", 7, r"accumulate_steps must be in 1..6, .* got 7"),
        ("optim.weight_decay", 0.1, r"weight_decay is 0.1, but optim.name is 'adam'"),
        ("optim.weight_decay", -0.1, r"weight_decay must be in \[0, inf\), got -0.1"),
        ("optim.warmup_fraction", -1.0, r"warmup_fraction must be in"),
        ("train.steps", 0, r"train.steps must be at least 1"),
        ("model.channels", 7, r"channels must be even"),
        ("sample.batch_size", 0, r"sample.batch_size must be at least 1"),
        ("diffusion.prediction", "foo", r"prediction='foo' is unknown; valid: 'eps'"),
        ("diffusion.weighting", "foo", r"weighting='foo' is unknown"),
        ("model.num_heads", 3, r"3"),
        ("model.dtype", "foo", r"foo"),
        ("train.log_every", 0, r"train.log_every must be at least 1"),
        ("train.on_nonfinite", "ignore", r"stop or skip, got 'ignore'"),
        ("train.seeds", (), r"train.seeds must be different numbers"),
        ("optim.ema_decay", 1.5, r"ema_decay must be in \[0, 1\)"),
    ],
)
def test_a_config_that_cannot_be_run_says_why(tmp_path, field, value, message):
    config = get_config("smoke")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        ddpm.run(config, tmp_path)


def test_a_profile_after_the_last_step_is_refused(tmp_path):
    with (
        profiling.profiling(6, 9),
        pytest.raises(ConfigError, match="6:9 begins after the 6 steps"),
    ):
        ddpm.run(get_config("smoke"), tmp_path)


def test_a_per_device_view_does_not_split_parameters(tmp_path):
    config = get_config("smoke")
    config.mesh.update(view="pmap", fsdp=2)
    with pytest.raises(ConfigError, match=r"'pmap' every device holds the whole state.* fsdp=2"):
        ddpm.run(config, tmp_path)


def test_accumulated_steps_are_one_update():
    """Three updates of two steps each, by hand: means of pairs, and a rate that counts updates."""
    optim = get_config("smoke").optim
    optim.update(
        name="sgd", accumulate_steps=2, clip_norm=1e9, warmup_fraction=0.0, learning_rate=0.5
    )
    tx = model.make_optimizer(optim, 7)
    gradients = np.array([1.0, 3.0, -2.0, 6.0, 5.0, 1.0], np.float32)
    state, moved = tx.init(np.zeros((), np.float32)), []
    for g in gradients:
        updates, state = tx.update(g, state)
        moved.append(float(updates))
    rates = 0.25 * (1 + np.cos(np.pi * np.arange(3) / 3))
    expected = np.stack([np.zeros(3), -rates * gradients.reshape(3, 2).mean(1)], 1).ravel()
    np.testing.assert_allclose(moved, expected, rtol=1e-6)


@pytest.mark.slow
def test_the_views_losses_are_equal(tmp_path, monkeypatch):
    """The smoke config on 8 devices; SGD, since Adam would hide a wrong scale of gradients."""
    monkeypatch.setattr(model, "make_optimizer", lambda optim, steps: optax.sgd(1e-3))
    losses = {}
    for view in ("jit", "pmap", "shard_map"):
        config = get_config("smoke")
        config.mesh.view = view
        data = ddpm.dataset.open_images(config.data)
        plan = model.build(config, data.shape, data.num_classes)
        assert plan.mesh.size == 8
        assert plan.task.axis_name == per_device.axis_name(view)
        ddpm.train(plan, config, 0, data, tmp_path / view)
        records = (
            read_metrics(tmp_path / view / "metrics.jsonl", k) for k in ("train", "evaluate")
        )
        losses[view] = np.concatenate([r["loss"] for r in records])
    assert len(losses["jit"]) == 8
    for view in ("pmap", "shard_map"):
        np.testing.assert_allclose(losses[view], losses["jit"], rtol=1e-6)
