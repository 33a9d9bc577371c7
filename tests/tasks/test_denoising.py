import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blogjax.core.random import fold_in_rows
from blogjax.diffusion.schedules import linear_beta_schedule
from blogjax.tasks.augmentation import random_horizontal_flip
from blogjax.tasks.denoising import denoising_task

SCHEDULE = linear_beta_schedule(20)
BATCH = {
    "image": jnp.linspace(-1, 1, 16).reshape(4, 2, 2, 1), "label": jnp.arange(4),
    "row": jnp.arange(4), "weight": jnp.ones(4),
}  # fmt: skip


def make(apply, **options):
    return denoising_task(
        lambda key: {"params": {"w": jnp.zeros(())}}, apply, SCHEDULE, optax.sgd(0.0), **options
    )


@pytest.mark.slow  # seconds of compiling
def test_dropout_keys_are_given_in_training_only():
    seen = []

    def apply(params, x, t, label, keys):
        seen.append(None if keys is None else keys.shape)
        return x * params["w"]

    task = make(apply)
    state = task.init(jax.random.key(0))
    task.step(state, BATCH, jax.random.key(1))
    assert seen and set(seen) == {(4,)}
    seen.clear()
    task.evaluate(state, BATCH, jax.random.key(1))
    task.render(state, BATCH, jax.random.key(1))
    assert seen and set(seen) == {None}


def test_rendered_samples_are_images_of_the_labels():
    """The exact denoiser of data that is one grey level per label gives that level back."""
    level = jnp.array([-1.0, -0.5, 0.5, 1.0])

    def apply(params, x, t, label, keys):
        signal, noise = (f(t).reshape(-1, 1, 1, 1) for f in (SCHEDULE.signal, SCHEDULE.noise))
        return (x - signal * level[label].reshape(-1, 1, 1, 1)) / noise

    task = make(apply)
    images = task.render(task.init(jax.random.key(0)), BATCH, jax.random.key(1))["samples"]
    assert images.shape == (4, 2, 2, 1)
    np.testing.assert_allclose(images[:, 0, 0, 0], level / 2 + 0.5, atol=1e-4)


def test_the_loss_of_a_network_that_says_nothing_is_the_norm_of_its_target():
    """E |e|^2 = 4 per image of four pixels; over many keys the mean comes close."""
    task = make(lambda params, x, t, label, keys: jnp.zeros_like(x) * params["w"])
    state = task.init(jax.random.key(0))
    evaluate = jax.jit(task.evaluate)
    sums = [evaluate(state, BATCH, jax.random.key(i))["loss"] for i in range(400)]
    mean = sum(float(s) for s, _ in sums) / sum(float(n) for _, n in sums)
    assert abs(mean - 4) < 4 * np.sqrt(2 * 4 / 1600)


def zero_apply(params, x, t, label, keys):
    return x * params["w"]


def test_bytes_are_scaled_on_the_device():
    task = make(zero_apply)
    state = task.init(jax.random.key(0))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 2, 2, 1)).astype(np.uint8)
    floats = (pixels.astype(np.float64) / 255 * 2 - 1).astype(np.float32)
    batches = [{**BATCH, "image": jnp.asarray(x)} for x in (pixels, floats)]
    losses = [loss_of_images(b) for b in batches]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    with pytest.raises(ValueError, match="uint8, got int32"):
        task.step(state, {**BATCH, "image": jnp.zeros((4, 2, 2, 1), jnp.int32)}, jax.random.key(1))


def loss_of_images(batch):
    """A loss that depends on the images: the target of x0-prediction is the image itself."""
    task = make(zero_apply, prediction="x0")
    return float(task.step(task.init(jax.random.key(0)), batch, jax.random.key(1))[1]["loss"])


def test_the_loss_sees_augmented_images_in_training_only():
    calls = []

    def augment(keys, images):
        calls.append(keys.shape)
        return images + 1

    task = make(zero_apply, prediction="x0", augment=augment)
    state = task.init(jax.random.key(0))
    image = np.asarray(BATCH["image"], np.float64)
    loss = float(task.step(state, BATCH, jax.random.key(1))[1]["loss"])
    np.testing.assert_allclose(loss, ((image + 1) ** 2).sum() / 4, rtol=1e-5)
    total, count = task.evaluate(state, BATCH, jax.random.key(1))["loss"]
    np.testing.assert_allclose(float(total / count), (image**2).sum() / 4, rtol=1e-5)
    assert set(calls) == {(4,)}


def test_augmentation_draws_nothing_that_the_rest_draws():
    """The times and the noise are the same with it as without."""
    same = [
        float(t.step(t.init(jax.random.key(0)), BATCH, jax.random.key(1))[1]["loss"])
        for t in (make(zero_apply), make(zero_apply, augment=lambda keys, images: images))
    ]
    assert same[0] == same[1]


def test_batches_without_labels():
    seen = []

    def apply(params, x, t, label, keys):
        seen.append(label)
        return x * params["w"]

    task = make(apply)
    state = task.init(jax.random.key(0))
    batch = {k: v for k, v in BATCH.items() if k != "label"}
    task.step(state, batch, jax.random.key(1))
    task.render(state, batch, jax.random.key(1))
    assert set(seen) == {None}


def test_flips_are_fair_and_follow_the_row():
    rows = jnp.arange(4000)
    keys, again_keys = (fold_in_rows(jax.random.key(2), rows) for _ in range(2))
    images = jax.random.normal(jax.random.key(3), (4000, 2, 3, 1))
    flipped = random_horizontal_flip(keys, images)
    mirrored = np.asarray((flipped == images[:, :, ::-1]).all((1, 2, 3)))
    kept = np.asarray((flipped == images).all((1, 2, 3)))
    assert (mirrored ^ kept).all()  # each is one or the other, whole
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)
    order = np.random.default_rng(0).permutation(4000)
    again = random_horizontal_flip(again_keys[order], images[order])
    np.testing.assert_array_equal(again, np.asarray(flipped)[order])
    with pytest.raises(ValueError, match=r"one key each, got images of shape \(4000, 2, 3, 1\)"):
        random_horizontal_flip(again_keys[:3], images)
