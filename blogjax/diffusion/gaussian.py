"""Gaussian diffusion: mix noise in, and learn to predict it.

What: samples of x_t given x_0, random times, and the denoising loss in all its weightings.
Post: https://kexue.fm/archives/9119, https://kexue.fm/archives/9152, https://kexue.fm/archives/9164
Papers: Ho et al. 2020 (arXiv 2006.11239); Salimans & Ho 2022 (arXiv 2202.00512)
Equations: x_t = A_t x_0 + B_t e; loss_t = w_t |e - e(x_t, t)|^2.
Differences from the post: the network predicts e, x_0, v or the score; in posts 9119 and 9152 it
predicts (b_t / B_t) e, see `prediction`. The names of `prediction` and `reverse` can be imported
from here as well.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from blogjax.core.broadcasting import per_example, sum_except
from blogjax.core.random import Key, normal, randint, uniform
from blogjax.diffusion.checks import check_choice, check_floating, check_same_shape
from blogjax.diffusion.prediction import (
    Prediction,
    at_least_float32,
    eps_to_score,
    eps_to_v,
    eps_to_x0,
    log_error_scale,
    prediction_target,
    score_to_eps,
    signal_and_noise,
    to_x0_eps,
    v_to_eps,
    v_to_x0,
    x0_to_eps,
)
from blogjax.diffusion.reverse import (
    ReverseCoefficients,
    Sigma,
    posterior_mean_variance,
    reverse_coefficients,
    reverse_step,
)
from blogjax.diffusion.schedules import Schedule

__all__ = [
    "Denoise",
    "Prediction",
    "ReverseCoefficients",
    "Sigma",
    "Weighting",
    "denoising_loss",
    "eps_to_score",
    "eps_to_v",
    "eps_to_x0",
    "posterior_mean_variance",
    "prediction_target",
    "q_sample",
    "reverse_coefficients",
    "reverse_step",
    "score_to_eps",
    "to_x0_eps",
    "uniform_timesteps",
    "v_to_eps",
    "v_to_x0",
    "x0_to_eps",
]

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
"""`denoise(x_t [B, ...], t [B]) -> [B, ...]`: t is int32, or float32 for continuous time."""

Weighting = Literal["simple", "eps", "x0", "v", "score", "elbo"]


def uniform_timesteps(key: Key, batch_shape: Sequence[int], schedule: Schedule) -> jax.Array:
    """Times uniform on 1..T (int32), or on (0, 1] (float32) for a continuous schedule.

    Args:
      key: scalar, or one per example.
      batch_shape: what to draw, usually `(B,)`.
      schedule: says what a time is.

    >>> from blogjax.diffusion.schedules import post_schedule
    >>> uniform_timesteps(jax.random.key(0), (3,), post_schedule()).dtype
    dtype('int32')
    """
    if schedule.num_steps is None:
        return 1 - uniform(key, batch_shape)
    return randint(key, batch_shape, 1, schedule.num_steps + 1)


def _mix(x0: jax.Array, eps: jax.Array, t: ArrayLike, schedule: Schedule) -> jax.Array:
    check_floating("x0", x0)
    check_same_shape("eps", eps.shape, "x0", x0.shape)
    a, b = signal_and_noise(x0, t, schedule)
    return (a * at_least_float32(x0) + b * at_least_float32(eps)).astype(x0.dtype)


def q_sample(
    key: Key, x0: jax.Array, t: ArrayLike, schedule: Schedule
) -> tuple[jax.Array, jax.Array]:
    """Draws e and returns x_t = A_t x_0 + B_t e with it.

    Args:
      key: scalar, or `[B]`, one stream per example.
      x0: `[B, ...]`, data; roughly within [-1, 1] or of unit variance.
      t: scalar or `[B]`.
      schedule: gives A_t and B_t.

    Returns:
      x_t, shape and dtype of `x0`, mixed in float32; and e, float32 or better.

    Raises:
      ValueError: if t is neither a scalar nor one value per example or is outside the schedule, or
        if `x0` is not floating.

    >>> from blogjax.diffusion.schedules import post_schedule
    >>> x_t, eps = q_sample(jax.random.key(0), jnp.ones((2, 3)), jnp.array([1, 9]), post_schedule())
    >>> x_t.shape, eps.shape
    ((2, 3), (2, 3))
    """
    eps = normal(key, x0.shape, jnp.promote_types(x0.dtype, jnp.float32))
    return _mix(x0, eps, t, schedule), eps


def _log_weight(
    weighting: Weighting, prediction: Prediction, t: jax.Array, schedule: Schedule
) -> jax.Array:
    check_choice("weighting", weighting, get_args(Weighting))
    if weighting == "simple":
        return jnp.zeros(t.shape, jnp.float32)
    if weighting != "elbo":
        wanted = log_error_scale(weighting, t, schedule)
    elif schedule.num_steps is None:
        raise ValueError("weighting='elbo' needs a discrete schedule, this one is continuous")
    else:
        log_ratio = schedule.log_ratio(t, t - 1)
        wanted = jnp.log(0.5 * -jnp.expm1(2 * log_ratio)) - 2 * log_ratio
        wanted = wanted + log_error_scale("score", t, schedule)
    return wanted - log_error_scale(prediction, t, schedule)


def denoising_loss(
    denoise: Denoise,
    key: Key | None,
    x0: jax.Array,
    t: ArrayLike,
    schedule: Schedule,
    *,
    prediction: Prediction = "eps",
    weighting: Weighting = "simple",
    reduction: Literal["sum", "mean"] = "sum",
    eps: jax.Array | None = None,
) -> jax.Array:
    """Squared error of a denoiser at x_t = A_t x_0 + B_t e, one number per example.

    At a fixed x_t the errors of e, x_0, v and the score are multiples of one another, so that what
    the network returns and what is weighed are chosen apart:

      "simple"  the error of the prediction itself, unweighted (Ho et al. for "eps")
      "eps", "x0", "v", "score"  the error of that quantity
      "elbo"    b_t^2 / (2 a_t^2 B_t^2) times the error of e: term t of the bound, up to a constant,
                for a model of variance b_t^2. T times it estimates the sum over t.

    Args:
      denoise: `denoise(x_t, t) -> [B, ...]`; t is always passed as `[B]`.
      key: scalar or `[B]`, one stream per example; None only if `eps` is given.
      x0: `[B, ...]`.
      t: scalar or `[B]`, from 1 on (see `uniform_timesteps`).
      schedule: gives A_t and B_t.
      prediction: what the denoiser returns.
      weighting: see above.
      reduction: over the axes after the first. The post advises "sum": with "mean" the gradients
        of its large networks were too small to train.
      eps: the noise, shape of `x0`, in place of a random one.

    Returns:
      `[B]`, float32 or better; the error is taken and summed in it also for bf16 networks.

    Raises:
      ValueError: if a name is unknown, if the denoiser's output has not the shape of x_t, if
        neither `key` nor `eps` is given, or for weighting "elbo" in continuous time.

    >>> from blogjax.diffusion.schedules import post_schedule
    >>> def denoise(x, t):
    ...     return jnp.zeros_like(x)
    >>> denoising_loss(denoise, None, jnp.ones((2, 3)), 5, post_schedule(), eps=jnp.ones((2, 3)))
    Array([3., 3.], dtype=float32)
    """
    check_choice("reduction", reduction, ("sum", "mean"))
    if x0.ndim < 1:
        raise ValueError(f"x0 must have a batch axis, got shape {x0.shape}")
    per_example(jnp.asarray(t), x0)  # raises unless t is a scalar or one value per example
    if eps is not None:
        x_t = _mix(x0, eps, t, schedule)
    elif key is not None:
        x_t, eps = q_sample(key, x0, t, schedule)
    else:
        raise ValueError("denoising_loss needs a key, or the noise itself as eps")
    log_weight = _log_weight(weighting, prediction, jnp.asarray(t), schedule)
    value = denoise(x_t, jnp.broadcast_to(t, x0.shape[:1]))
    check_same_shape("the output of denoise", value.shape, "x_t", x_t.shape)
    target = prediction_target(prediction, x0, eps, t, schedule)
    error = sum_except(jnp.square(at_least_float32(value) - target))
    if reduction == "mean":
        error = error * (x0.shape[0] / x0.size)
    return error * jnp.exp(log_weight)
