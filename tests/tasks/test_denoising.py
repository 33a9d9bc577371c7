import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.diffusion.schedules import linear_beta_schedule
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
