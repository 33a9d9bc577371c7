"""The task of a diffusion model: denoise, evaluate the same loss, render samples.

What: `denoising_task`, a `gradient_task` whose loss is `diffusion.gaussian.denoising_loss` at
  uniformly drawn times.
Post: https://kexue.fm/archives/9152, https://kexue.fm/archives/9164
Paper: Ho et al. 2020, arXiv:2006.11239, algorithm 1.
Equations: l = w_t |prediction - target|^2 at x_t = A_t x_0 + B_t e, t uniform on 1..T.
Differences from the post: what is predicted and how it is weighed are arguments; classes; images
  may be changed at random first.
"""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from blogjax.core.random import Key, fold_in_rows, split_keys
from blogjax.diffusion.checks import check_choice
from blogjax.diffusion.gaussian import Weighting, denoising_loss, uniform_timesteps
from blogjax.diffusion.prediction import PREDICTIONS, Prediction
from blogjax.diffusion.sampling import sample
from blogjax.diffusion.schedules import NoiseSchedule
from blogjax.tasks.gradient import LossOutput, gradient_task
from blogjax.train.task import Batch, Task

Apply = Callable[[Any, jax.Array, jax.Array, jax.Array | None, Key | None], jax.Array]


def denoising_task(
    init: Callable[[Key], Mapping[str, Any]],
    apply: Apply,
    schedule: NoiseSchedule,
    tx: optax.GradientTransformation,
    *,
    prediction: Prediction = "eps",
    weighting: Weighting = "simple",
    ema_decay: float | None = None,
    augment: Callable[[Key, jax.Array], jax.Array] | None = None,
    render_steps: int = 10,
    axis_name: str | None = None,
    average_gradients: bool = True,
) -> Task:
    """Makes a task of batches with `image`, `[B, ...]` in [-1, 1], and perhaps `label`, `[B]`.

    Images of dtype uint8 are scaled on the device, to `x / 127.5 - 1`: a quarter of the bytes to
    keep and to send. Time, noise, dropout and augmentation of an example are drawn from
    `fold_in(key, row)`. The loss is summed over the image, in nats or squared pixels as `weighting`
    says, and averaged over the batch.

    Args:
      init: `init(key) -> {"params": tree}`.
      apply: `apply(params, x_t, t, label, keys) -> [B, ...]`, what the network predicts. `label` is
        None where the batch has none; `keys` is one key per example while training, for dropout,
        and None otherwise.
      schedule: discrete.
      tx: the optimiser.
      prediction: what the network returns; see `diffusion.gaussian`.
      weighting: see `denoising_loss`.
      ema_decay: of the parameters that are evaluated and rendered; see `gradient_task`.
      augment: `augment(keys [B], images) -> images`, such as `augmentation.random_horizontal_flip`;
        applied to scaled images while training, not in evaluation.
      render_steps: steps of DDIM in a rendered sample.
      axis_name, average_gradients: see `gradient_task`.

    Returns:
      A `Task`; it evaluates `loss` and renders `samples` of the batch's labels.

    Raises:
      ValueError: if a name is unknown, listing the valid ones, or, in a step, if images are neither
        uint8 nor floating.

    >>> import jax.numpy as jnp
    >>> from blogjax.diffusion.schedules import linear_beta_schedule
    >>> def apply(params, x_t, t, label, keys):
    ...     return params["scale"] * x_t
    >>> init = lambda key: {"params": {"scale": jnp.zeros(())}}
    >>> task = denoising_task(init, apply, linear_beta_schedule(10), optax.sgd(1e-3))
    >>> batch = {"image": jnp.ones((4, 2, 2, 1)), "label": jnp.zeros(4, jnp.int32),
    ...          "row": jnp.arange(4), "weight": jnp.ones(4)}
    >>> state, metrics = task.step(task.init(jax.random.key(0)), batch, jax.random.key(1))
    >>> int(state.step), metrics["loss"].shape
    (1, ())
    """
    check_choice("prediction", prediction, PREDICTIONS)
    check_choice("weighting", weighting, get_args(Weighting))

    def losses(params: Any, batch: Batch, key: Key, train: bool) -> jax.Array:
        keys = split_keys(fold_in_rows(key, batch["row"]), 4)
        time_keys, noise_keys, dropout_keys, augment_keys = keys
        images = scaled(batch["image"])
        if train and augment is not None:
            images = augment(augment_keys, images)
        times = uniform_timesteps(time_keys, batch["row"].shape, schedule)

        def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
            return apply(params, x_t, t, batch.get("label"), dropout_keys if train else None)

        return denoising_loss(
            denoise,
            noise_keys,
            images,
            times,
            schedule,
            prediction=prediction,
            weighting=weighting,
        )

    def render(params: Any, model_state: Any, batch: Batch, key: Key) -> dict[str, jax.Array]:
        images = sample(
            fold_in_rows(key, batch["row"]),
            lambda x_t, t: apply(params, x_t, t, batch.get("label"), None),
            schedule,
            batch["image"].shape,
            steps=min(render_steps, schedule.num_steps),
            prediction=prediction,
            clip_x0=1.0,
        )
        return {"samples": images / 2 + 0.5}

    return gradient_task(
        init,
        lambda params, model_state, batch, key: LossOutput(losses(params, batch, key, True)),
        tx,
        ema_decay=ema_decay,
        evaluate=lambda params, model_state, batch, key: {
            "loss": losses(params, batch, key, False)
        },
        render=render,
        axis_name=axis_name,
        average_gradients=average_gradients,
    )


def scaled(images: jax.Array) -> jax.Array:
    """Returns images in [-1, 1]: uint8 as `x / 127.5 - 1` in float32, floating ones as they are.

    Raises:
      ValueError: for any other dtype.

    >>> scaled(jnp.array([0, 255], jnp.uint8)).tolist()
    [-1.0, 1.0]
    """
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floating in [-1, 1] or uint8, got {images.dtype}")
    return images
