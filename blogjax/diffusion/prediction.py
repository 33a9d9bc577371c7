"""What a denoiser may predict, and how one prediction is turned into another.

What: conversions between noise e, data x_0, velocity v and score at a known x_t = A_t x_0 + B_t e.
Post: https://kexue.fm/archives/9119, https://kexue.fm/archives/9164
Papers: Ho et al. 2020 (arXiv 2006.11239); Salimans & Ho 2022 (arXiv 2202.00512) for v
Equations: v = A_t e - B_t x_0, score = -e / B_t;
    x_0 = (x_t - B_t e) / A_t = A_t x_t - B_t v; e = (x_t - A_t x_0) / B_t = B_t x_t + A_t v.
Differences from the post: posts 9119 and 9152 write the network as e1 with
mean (x_t - b_t e1) / a_t. That e1 is (b_t / B_t) e, not e: a network trained by the one and sampled
by the other is wrong by a factor that depends on t. Everything here is about e.

In all functions a time t is a scalar or has one value per example, `[B]`; results are float32 or
better, whatever comes in. Where B_t = 0, at t = 0, there is no noise to be known and e, v from x_0
and the score are NaN or infinite.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from blogjax.core.broadcasting import per_example
from blogjax.diffusion.checks import check_choice, check_same_shape
from blogjax.diffusion.schedules import Schedule

Prediction = Literal["eps", "x0", "v", "score"]
PREDICTIONS = ("eps", "x0", "v", "score")


def at_least_float32(x: ArrayLike) -> jax.Array:
    """Casts bf16 and the like to float32 and leaves float64 alone.

    >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def signal_and_noise(
    like: jax.Array, t: ArrayLike, schedule: Schedule
) -> tuple[jax.Array, jax.Array]:
    """Returns A_t and B_t, shaped to be multiplied with `like`, `[B, ...]`."""
    return per_example(schedule.signal(t), like), per_example(schedule.noise(t), like)


def _prepare(value: jax.Array, x_t: jax.Array, t: ArrayLike, schedule: Schedule):
    check_same_shape("the prediction", value.shape, "x_t", x_t.shape)
    a, b = signal_and_noise(x_t, t, schedule)
    return at_least_float32(value), at_least_float32(x_t), a, b


def eps_to_x0(eps: jax.Array, x_t: jax.Array, t: ArrayLike, schedule: Schedule) -> jax.Array:
    """Data from noise: x_0 = (x_t - B_t e) / A_t. An error in e grows by B_t / A_t."""
    eps, x_t, a, b = _prepare(eps, x_t, t, schedule)
    return (x_t - b * eps) / a


def x0_to_eps(x0: jax.Array, x_t: jax.Array, t: ArrayLike, schedule: Schedule) -> jax.Array:
    """Noise from data: e = (x_t - A_t x_0) / B_t. An error in x_0 grows by A_t / B_t."""
    x0, x_t, a, b = _prepare(x0, x_t, t, schedule)
    return (x_t - a * x0) / b


def eps_to_v(eps: jax.Array, x_t: jax.Array, t: ArrayLike, schedule: Schedule) -> jax.Array:
    """Velocity from noise: v = (e - B_t x_t) / A_t."""
    eps, x_t, a, b = _prepare(eps, x_t, t, schedule)
    return (eps - b * x_t) / a


def v_to_eps(v: jax.Array, x_t: jax.Array, t: ArrayLike, schedule: Schedule) -> jax.Array:
    """Noise from velocity: e = B_t x_t + A_t v. No division: right at every t."""
    v, x_t, a, b = _prepare(v, x_t, t, schedule)
    return b * x_t + a * v


def v_to_x0(v: jax.Array, x_t: jax.Array, t: ArrayLike, schedule: Schedule) -> jax.Array:
    """Data from velocity: x_0 = A_t x_t - B_t v. No division: right at every t."""
    v, x_t, a, b = _prepare(v, x_t, t, schedule)
    return a * x_t - b * v


def eps_to_score(eps: jax.Array, t: ArrayLike, schedule: Schedule) -> jax.Array:
    """Score from noise: -e / B_t, the gradient of log p_t if e is the mean noise given x_t."""
    return -at_least_float32(eps) / per_example(schedule.noise(t), eps)


def score_to_eps(score: jax.Array, t: ArrayLike, schedule: Schedule) -> jax.Array:
    """Noise from score: e = -B_t score."""
    return -at_least_float32(score) * per_example(schedule.noise(t), score)


def to_x0_eps(
    prediction: Prediction, value: jax.Array, x_t: jax.Array, t: ArrayLike, schedule: Schedule
) -> tuple[jax.Array, jax.Array]:
    """Turns any prediction into the pair (x_0, e), which satisfies x_t = A_t x_0 + B_t e.

    Args:
      prediction: what `value` is: "eps", "x0", "v" or "score".
      value: the denoiser's output, shape of `x_t`.
      x_t: `[B, ...]`, its input.
      t: scalar or `[B]`.
      schedule: gives A_t and B_t.

    Returns:
      x_0 and e, shape of `x_t`, float32 or better. The part that was predicted comes back as it is;
      v needs no division at all; e from x_0 is 0 / 0 at t = 0.

    Raises:
      ValueError: if `prediction` is unknown, if the shapes of `value` and `x_t` differ, or if t is
        neither a scalar nor one value per example.

    >>> from blogjax.diffusion.schedules import post_schedule
    >>> x0, eps = to_x0_eps("v", jnp.zeros((1, 2)), jnp.ones((1, 2)), 1000, post_schedule())
    >>> [round(float(part[0, 0]), 4) for part in (x0, eps)]
    [0.0065, 1.0]
    """
    check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "v":
        return v_to_x0(value, x_t, t, schedule), v_to_eps(value, x_t, t, schedule)
    if prediction == "x0":
        return at_least_float32(value), x0_to_eps(value, x_t, t, schedule)
    eps = at_least_float32(value) if prediction == "eps" else score_to_eps(value, t, schedule)
    return eps_to_x0(eps, x_t, t, schedule), eps


def prediction_target(
    prediction: Prediction, x0: jax.Array, eps: jax.Array, t: ArrayLike, schedule: Schedule
) -> jax.Array:
    """What a denoiser of this kind should return: e, x_0, A_t e - B_t x_0, or -e / B_t.

    Args:
      prediction: "eps", "x0", "v" or "score".
      x0: `[B, ...]`.
      eps: shape of `x0`, the noise that was mixed in.
      t: scalar or `[B]`.
      schedule: gives A_t and B_t.

    Returns:
      Shape of `x0`, float32 or better.

    Raises:
      ValueError: as `to_x0_eps`.

    >>> from blogjax.diffusion.schedules import post_schedule
    >>> prediction_target("x0", jnp.ones((1, 2)), jnp.zeros((1, 2)), 1, post_schedule()).tolist()
    [[1.0, 1.0]]
    """
    check_choice("prediction", prediction, PREDICTIONS)
    eps, x0, a, b = _prepare(eps, x0, t, schedule)
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    return a * eps - b * x0 if prediction == "v" else -eps / b


def log_error_scale(prediction: Prediction, t: ArrayLike, schedule: Schedule) -> jax.Array:
    """Returns log g_t, where a squared error of this prediction is g_t times that of e.

    At a fixed x_t all errors are multiples of one another: that of x_0 is -B_t / A_t times that of
    e, that of v is 1 / A_t times, that of the score -1 / B_t times.

    Returns:
      Shape of t, float32.

    >>> from blogjax.diffusion.schedules import post_schedule
    >>> float(log_error_scale("eps", 10, post_schedule()))
    0.0
    """
    check_choice("prediction", prediction, PREDICTIONS)
    log_signal = schedule.log_signal_at(t)
    log_noise_squared = jnp.log(-jnp.expm1(2 * log_signal))
    if prediction == "eps":
        return jnp.zeros_like(log_signal)
    if prediction == "x0":
        return log_noise_squared - 2 * log_signal
    return -2 * log_signal if prediction == "v" else -log_noise_squared
