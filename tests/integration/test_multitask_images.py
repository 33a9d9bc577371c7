"""configs/multitask_images.py, as it is, and shrunk on a dataset of CelebA's name and shape."""

import json

import jax
import numpy as np
import pytest
import scipy.special
from tiny_celeb_a import SIZES, attribute_names, labels, prepare
from tracked_config import Tracked

from blogjax.data import tfds as data_tfds
from blogjax.train import mesh as meshes
from blogjax.train.reporting import read_metrics
from configs.multitask_images import get_config
from experiments import multitask_images
from experiments.launch.configs import ConfigError, flatten
from experiments.multitask import attribute_model
from experiments.multitask.attributes import Attributes, flat_example, open_attributes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """For which tasks compile faster than for eight."""
    one = meshes.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(meshes, "make_mesh", lambda fsdp: one)


def small(folder, **changes):
    config = get_config("smoke")
    config.update_from_flattened_dict({"data.dir": str(folder), **changes})
    return config


def synthetic(config, names=("a", "b", "c")):
    return Attributes(config.data, names, (config.data.size, config.data.size, 3), {}, None)


def rows(config, attributes):
    rng = np.random.default_rng(0)
    size = config.data.size
    return {
        "image": rng.integers(0, 256, (8, size, size, 3)).astype(np.uint8),
        "attributes": rng.random((8, attributes)) < 0.5, "row": np.arange(8),
        "weight": np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32),
    }  # fmt: skip


def test_variants_differ_in_values_only():
    assert len({tuple(flatten(get_config(v).to_dict())) for v in ("celeb_a", "smoke")}) == 1
    with pytest.raises(ValueError, match="there are celeb_a, smoke"):
        get_config("default")


def test_the_scaled_setting():
    """Sizes by hand, and twenty epochs of CelebA's 162770 training images."""
    config = get_config("celeb_a")
    conv = lambda size, a, b: size**2 * a * b + b  # noqa: E731
    widths = [32, 64, 128, 256]
    blocks = sum(
        2 * a + conv(3, a, b) + 2 * b + conv(3, b, b) + (conv(1, a, b) if a != b else 0)
        for a, b in zip([32, *widths], widths, strict=False)
    )
    halvings = sum(conv(2, a, a) for a in widths[:3])
    plan = attribute_model.build(config, synthetic(config, attribute_names()))
    params = jax.eval_shape(plan.task.init, jax.random.key(0)).params
    sizes = {n: sum(x.size for x in jax.tree.leaves(params[n])) for n in ("encoder", "head")}
    assert sizes == {"encoder": conv(3, 3, 32) + blocks + halvings + 512, "head": 257 * 40}
    assert abs(config.train.steps * config.data.batch_size / 162_770 - 20) < 0.01
    assert abs(config.train.evaluate_every * 20 - config.train.steps) == 0
    assert (config.multitask.method, config.multitask.mode) == ("min_norm", "scan")


def test_a_crop_made_smaller_by_whole_grids():
    """Each pixel becomes size x size equal ones; of these each new pixel has crop x crop."""
    image = np.random.default_rng(0).integers(0, 256, (13, 9, 3)).astype(np.uint8)
    names = ["x", "y"]
    found = flat_example({"image": image, "attributes": {"y": True, "x": False}}, names, 7, 3)
    fine = np.kron(image[3:10, 1:8].astype(float), np.ones((3, 3, 1)))
    expected = fine.reshape(3, 7, 3, 7, 3).mean(axis=(1, 3))
    assert found["image"].dtype == np.uint8 and found["image"].shape == (3, 3, 3)
    np.testing.assert_allclose(found["image"], expected, atol=0.5001)
    assert found["attributes"].tolist() == [False, True]


def test_images_and_attributes_arrive_together(folder):
    data = open_attributes(small(folder).data)
    assert data.names == tuple(sorted(attribute_names())) and data.shape == (8, 8, 3)
    batch = data.evaluation("test", 8)(0)
    assert set(batch) == {"image", "attributes", "row", "weight"}
    colours = batch["image"].reshape(8, -1)
    assert (np.ptp(colours, axis=1) <= 2).all()
    at = np.rint(colours.mean(axis=1) / 10).astype(int)
    assert len(set(at)) == 8 and set(at) <= set(range(SIZES["test"]))  # TFDS shuffles them
    order = [attribute_names().index(name) for name in data.names]
    np.testing.assert_array_equal(batch["attributes"], labels("test")[at][:, order])
    memory = data.batches("train", 8, seed=1)
    grain = open_attributes(small(folder, **{"data.serve": "grain"}).data)
    streamed = grain.batches("train", 8, seed=1)
    assert isinstance(memory, data_tfds.Batches)
    assert isinstance(streamed, data_tfds.StreamedBatches)
    for name, values in memory(3).items():
        np.testing.assert_array_equal(values, streamed(3)[name])
    streamed.close()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("judge", True, "judge must be False"),
        ("data.splits", ("train", "test"), "data.splits must name train, validation, test"),
        ("data.splits", ("train", "valid", "test"), "'valid' of celeb_a: there are"),
        ("data.serve", "disk", "data.serve must be one of memory, grain, auto"),
        ("data.crop", 179, "must rise from 1 to 178, the shorter side of the images, got 8 and"),
        ("data.size", 33, "got 33 and 32"),
        ("data.size", 7, "are not both multiples of 2"),
        ("multitask.method", "sum", "multitask.method must be one of mean, min_norm"),
        ("multitask.mode", "loop", "mode is 'loop'"),
        ("optim.learning_rate", -1.0, "learning_rate must be in"),
        ("train.steps", 0, "train.steps must be at least 1"),
        ("train.evaluate_every", 0, "train.evaluate_every must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_is(folder, tmp_path, field, value, message):
    with pytest.raises(ConfigError, match=message):
        multitask_images.run(small(folder, **{field: value}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_published_figures_stand_beside_what_they_are_of():
    config = get_config("celeb_a")
    figures = {"error": [0.1, 0.3], "guess": [0.2, 0.3]}
    claims = multitask_images.claims(config, [figures])
    np.testing.assert_allclose([c.value for c in claims], [20, 0.5])
    assert claims[0].statement.endswith("(published for a ResNet-18: 8.33)")
    for field, value in (("data.name", "faces"), ("data.size", 32), ("multitask.method", "cagrad")):
        config = get_config("celeb_a")
        config.update_from_flattened_dict({field: value})
        assert "published" not in multitask_images.claims(config, [figures])[0].statement
    assert {c.verdict for c in claims} == {"not judged"}


def test_errors_are_counted_over_all_rows_but_padding(monkeypatch):
    config = get_config("smoke")
    data = synthetic(config)
    plan = attribute_model.build(config, data)
    batches = [rows(config, 3), rows(config, 3)]
    batches[1]["attributes"] = np.random.default_rng(2).random((8, 3)) < 0.2
    found = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)

    class Listed(list):
        batch_size = 8
        __call__ = list.__getitem__

    monkeypatch.setattr(Attributes, "evaluation", lambda *_: Listed(batches))
    monkeypatch.setattr(attribute_model, "logits", lambda *_: jax.numpy.asarray(found))
    measured = attribute_model.measure(plan, {}, data, "test", 8)
    there = np.concatenate([b["attributes"][:6] for b in batches])
    told = np.concatenate([found[:6] > 0] * 2)
    assert ((there != told).mean(axis=0) != 0.5).any()
    np.testing.assert_allclose(measured["error"], (there != told).mean(axis=0))
    share = there.mean(axis=0)
    np.testing.assert_allclose(measured["guess"], np.minimum(share, 1 - share))
    assert measured["images"] == 12


@pytest.mark.slow  # seconds of compiling
def test_flips_reach_the_task(monkeypatch):
    seen = []

    def noted(keys, images):
        seen.append((keys.shape, images.shape))
        return images

    monkeypatch.setattr(attribute_model, "random_horizontal_flip", noted)
    for flip in (True, False):
        config = small("", **{"data.flip": flip, "multitask.method": "mean"})
        plan = attribute_model.build(config, synthetic(config))
        state = jax.eval_shape(plan.task.init, jax.random.key(0))
        jax.eval_shape(plan.task.step, state, rows(config, 3), jax.random.key(1))
    assert set(seen) == {((8,), (8, 8, 8, 3))}
    before = len(seen)
    jax.eval_shape(plan.task.evaluate, state, rows(config, 3), jax.random.key(1))
    assert len(seen) == before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["min_norm", "mean"])
def test_a_step_of_forty_tasks_in_small(method):
    """Losses from the logits by scipy; one gradient at a time gives what all at once give."""
    config = small("", **{"multitask.method": method, "data.flip": False})
    data = synthetic(config)
    batch, found = rows(config, 3), {}
    for mode in ("scan", "jacrev"):
        config.multitask.mode = mode
        plan = attribute_model.build(config, data)
        state = jax.jit(plan.task.init)(jax.random.key(0))
        image = np.float32(batch["image"]) / 127.5 - 1
        logits = np.float64(attribute_model.logits(plan.encoder, plan.head, state.params, image))
        _, metrics = jax.jit(plan.task.step)(state, batch, jax.random.key(1))
        sign = np.where(batch["attributes"], 1, -1)
        expected = -scipy.special.log_expit(sign * logits)[:6].mean(axis=0)
        np.testing.assert_allclose([metrics[f"loss/{n}"] for n in "abc"], expected, rtol=1e-5)
        wrong = ((logits > 0) != batch["attributes"])[:6].mean()
        np.testing.assert_allclose(metrics["error"], wrong, rtol=1e-5)
        found[mode] = metrics
    if method == "min_norm":  # the tasks share the encoder, not the head

        def losses(encoder):
            params = {**state.params, "encoder": encoder}
            z = attribute_model.logits(plan.encoder, plan.head, params, image)
            return jax.nn.softplus(-sign * z)[:6].mean(axis=0)

        slopes = jax.tree.leaves(jax.jit(jax.jacrev(losses))(state.params["encoder"]))
        norms = np.sqrt(sum(np.square(np.float64(g)).reshape(3, -1).sum(axis=1) for g in slopes))
        np.testing.assert_allclose(
            [found["scan"][f"grad_norm/{n}"] for n in "abc"], norms, rtol=1e-4
        )
    weights = np.array([[m[f"weight/{n}"] for n in "abc"] for m in found.values()])
    np.testing.assert_allclose(*weights, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_trains_goes_on_and_measures(folder, tmp_path, dtype):
    config = small(folder, **{"model.dtype": dtype}).lock()
    tracked = Tracked(config)
    result = multitask_images.run(tracked, tmp_path)
    assert set(flatten(config.to_dict())) == tracked.read
    assert [c.verdict for c in result.claims] == ["not judged"] * 2
    for name in result.pictures:
        assert (tmp_path / name).stat().st_size > 0
    train = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert len(train["loss"]) == 3 and np.isfinite(train["loss"]).all()
    weights = sum(train[f"weight/{name}"] for name in attribute_names())
    np.testing.assert_allclose(weights, 1, rtol=1e-4)
    found = json.loads((tmp_path / "measured.json").read_text())
    share = labels("test").mean(axis=0)
    order = np.argsort(attribute_names())
    np.testing.assert_allclose(found["guess"], np.minimum(share, 1 - share)[order], rtol=1e-6)
    assert found["images"] == SIZES["test"] and len(found["error"]) == 40
    # A longer run goes on from the last checkpoint.
    (tmp_path / "measured.json").unlink()
    again = multitask_images.run(
        small(folder, **{"model.dtype": dtype, "train.steps": 5}), tmp_path
    )
    assert read_metrics(tmp_path / "metrics.jsonl", "train")["step"].tolist() == [1, 2, 3, 4, 5]
    assert len(again.claims) == 2
