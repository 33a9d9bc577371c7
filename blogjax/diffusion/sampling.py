"""Samplers of a Gaussian diffusion model: DDPM, DDIM, any timetable, and DDIM backwards.

What: noise to data in one scan over precomputed coefficients; data to noise; mixing of noises.
Post: https://kexue.fm/archives/9164 (DDPM), https://kexue.fm/archives/9181 (DDIM)
Papers: Ho et al. 2020 (arXiv 2006.11239); Song et al. 2020 (arXiv 2010.02502)
Equations: x_s = A_s x_0 + sqrt(B_s^2 - sigma^2) e + sigma z, x_0 and e from the denoiser;
    sigma = eta (B_s / B_t) sqrt(1 - A_t^2 / A_s^2). As an equation in time: d(x / A) = e d(B / A).
Differences from the post: the inverse of a step asks the denoiser at the step's noisy end, as the
step itself does, so that iterating makes it exact and t = 0 is never asked.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from blogjax.core.broadcasting import per_example
from blogjax.core.random import Key, normal, split_keys
from blogjax.diffusion.checks import check_choice, check_floating, check_same_shape, concrete
from blogjax.diffusion.gaussian import Denoise
from blogjax.diffusion.prediction import (
    PREDICTIONS,
    Prediction,
    at_least_float32,
    to_x0_eps,
    x0_to_eps,
)
from blogjax.diffusion.reverse import Sigma, reverse_coefficients, reverse_step
from blogjax.diffusion.schedules import Schedule, Spacing, timesteps


def _timetable(
    schedule: Schedule, steps: int | ArrayLike | None, spacing: Spacing
) -> jax.Array | np.ndarray:
    if steps is None:
        if schedule.num_steps is None:
            raise ValueError("a continuous schedule has no own number of steps; give steps")
        steps = schedule.num_steps
    if isinstance(steps, (int, np.integer)):
        return timesteps(schedule, int(steps), spacing)
    times = jnp.asarray(steps) if isinstance(steps, jax.Array) else np.asarray(steps)
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"steps must be a number or a vector of times, got shape {times.shape}")
    known = concrete(times)
    if known is not None and np.any(known[:-1] <= known[1:]):
        raise ValueError(f"the times in steps must descend, got {known}")
    return times


def _call(denoise: Denoise, x: jax.Array, t: jax.Array, dtype: jnp.dtype) -> jax.Array:
    value = denoise(x.astype(dtype), jnp.broadcast_to(t, x.shape[:1]))
    check_same_shape("the output of denoise", value.shape, "x_t", x.shape)
    return value


def sample(
    key: Key | None,
    denoise: Denoise,
    schedule: Schedule,
    shape: Sequence[int],
    *,
    steps: int | ArrayLike | None = None,
    spacing: Spacing = "trailing",
    prediction: Prediction = "eps",
    eta: ArrayLike = 0.0,
    sigma: Sigma = "eta",
    clip_x0: float | None = None,
    x_T: jax.Array | None = None,
    trajectory: bool = False,
) -> jax.Array:
    """Draws samples, from pure noise to data, in one `lax.scan`.

    Args:
      key: scalar, or `[B]`, one stream per example: an example then depends on its own key only,
        not on its place or on the number of devices. None will do, and no key is used, if
        nothing is random: with `x_T`, and eta the number 0.
      denoise: `denoise(x_t [B, ...], t [B]) -> [B, ...]`.
      schedule: discrete or continuous.
      shape: `(B, ...)`, what to draw.
      steps: None for all T; a number (see `timesteps`); or the descending times themselves, which
        end in 0 unless noisy samples are wanted.
      spacing: "trailing", "leading" or "quadratic", for a number of steps.
      prediction: what the denoiser returns.
      eta: 0 for DDIM, 1 for DDPM. May be traced: one program serves every eta.
      sigma: see `reverse_coefficients`. "beta" cannot take the step to 0; "hat" takes it without
        noise, as Ho et al. do.
      clip_x0: a bound c: x_0 is kept within [-c, c] at every step and e recomputed from it, so that
        both still make up x_t. None leaves x_0 alone.
      x_T: `shape`, where to start, in place of a standard normal draw.
      trajectory: return the states at all times, from x_T on.

    Returns:
      `shape`, or `[steps + 1, *shape]` with `trajectory`, in the dtype of `x_T` (float32 without
      one). Between the steps x_t is kept in float32 or better; the denoiser sees it cast to that
      dtype. NaN from the denoiser propagates.

    Raises:
      ValueError: if a name is unknown, `shape` has no batch axis or is not that of `x_T` or of
        the denoiser's output, steps are out of range or do not descend, `clip_x0` is not positive,
        eta < 0, or sigma is too large for a step (see `reverse_coefficients`).

    >>> from blogjax.diffusion.schedules import post_schedule
    >>> schedule = post_schedule()
    >>> def denoise(x, t):  # the exact denoiser of data that is always 1
    ...     return (x - schedule.signal(t)[:, None]) / schedule.noise(t)[:, None]
    >>> x = sample(jax.random.key(0), denoise, schedule, (2, 3), steps=10, eta=1.0)
    >>> jnp.allclose(x, 1.0, atol=1e-4).item()
    True
    """
    shape = tuple(shape)
    check_choice("prediction", prediction, PREDICTIONS)
    if not shape:
        raise ValueError("shape must have a batch axis, got ()")
    if clip_x0 is not None and not clip_x0 > 0:
        raise ValueError(f"clip_x0 must be positive, got {clip_x0}")
    times = _timetable(schedule, steps, spacing)
    before, after = times[:-1], times[1:]
    coefficients = reverse_coefficients(schedule, before, after, eta=eta, sigma=sigma)
    if sigma == "hat":
        quiet = jnp.where(after == 0, 0.0, coefficients.sigma)
        coefficients = coefficients._replace(sigma=quiet)

    # Without noise to draw, the key is left alone.
    eta_known = concrete(eta)
    silent = sigma == "eta" and eta_known is not None and not np.any(eta_known)
    if x_T is not None:
        check_same_shape("x_T", x_T.shape, "the sample", shape)
    noise_key = None
    if x_T is not None and silent:
        start = x_T
    elif key is None:
        raise ValueError("sample without a key needs x_T and eta = 0")
    else:
        start_key, noise_key = split_keys(key)
        start = normal(start_key, shape) if x_T is None else x_T
    dtype = start.dtype

    def key_of(index):
        if silent or noise_key is None:
            return None
        fold_in = jax.random.fold_in
        return (fold_in if noise_key.ndim == 0 else jax.vmap(fold_in, (0, None)))(noise_key, index)

    def step(x, inputs):
        index, t, row = inputs
        x0, eps = to_x0_eps(prediction, _call(denoise, x, t, dtype), x, t, schedule)
        if clip_x0 is not None:
            x0 = jnp.clip(x0, -clip_x0, clip_x0)
            eps = x0_to_eps(x0, x, t, schedule)
        x_s = reverse_step(key_of(index), x0, eps, row)
        x_s = x_s.astype(x.dtype)
        return x_s, x_s.astype(dtype) if trajectory else None

    inputs = (jnp.arange(before.shape[0]), jnp.asarray(before), coefficients)
    last, states = jax.lax.scan(step, at_least_float32(start), inputs)
    return last.astype(dtype) if states is None else jnp.concatenate([start[None], states])


def ddim_invert(
    denoise: Denoise,
    x0: jax.Array,
    schedule: Schedule,
    *,
    steps: int | ArrayLike | None = None,
    spacing: Spacing = "trailing",
    prediction: Prediction = "eps",
    iterations: int = 1,
) -> jax.Array:
    """Finds the noise from which `sample` with eta = 0 makes `x0`.

    A step of DDIM is x_s = x_t / a + d e(x_t, t). Its inverse solves x_t = a (x_s - d e(x_t, t)) by
    `iterations` rounds, starting from x_s inside of e: one round is explicit and off by the size of
    a step, more rounds converge to the exact inverse wherever a |d| |de/dx| < 1, so for steps that
    are not too long. Data of one point has no inverse: all noises lead to it.

    Args:
      denoise: `denoise(x_t [B, ...], t [B]) -> [B, ...]`; called `iterations` times a step, never
        at t = 0.
      x0: `[B, ...]`, data.
      schedule: discrete or continuous.
      steps: as in `sample`; the same timetable, gone through backwards.
      spacing: as in `sample`.
      prediction: what the denoiser returns.
      iterations: at least 1.

    Returns:
      Shape and dtype of `x0`; between the steps float32 or better.

    Raises:
      ValueError: as `sample`, and if `iterations` is below 1.

    >>> from blogjax.diffusion.schedules import post_schedule
    >>> schedule = post_schedule()
    >>> def denoise(x, t):  # the exact denoiser of standard normal data
    ...     return schedule.noise(t)[:, None] * x
    >>> z = ddim_invert(denoise, jnp.ones((1, 2)), schedule, steps=50, iterations=10)
    >>> x = sample(None, denoise, schedule, (1, 2), steps=50, x_T=z)
    >>> jnp.allclose(x, 1.0, atol=1e-4).item()
    True
    """
    check_choice("prediction", prediction, PREDICTIONS)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if x0.ndim < 1:
        raise ValueError(f"x0 must have a batch axis, got shape {x0.shape}")
    check_floating("x0", x0)
    times = _timetable(schedule, steps, spacing)
    noisy = times[:-1]
    coefficients = reverse_coefficients(schedule, noisy, times[1:], eta=0.0)

    def step(x_s, inputs):
        t, row = inputs
        k, l = per_example(row.k_eps, x_s), per_example(row.l_eps, x_s)

        def improve(_, x_t):
            _, eps = to_x0_eps(prediction, _call(denoise, x_t, t, x0.dtype), x_t, t, schedule)
            return ((x_s - l * eps) / k).astype(x_s.dtype)

        return jax.lax.fori_loop(0, iterations, improve, x_s), None

    inputs = (jnp.asarray(noisy), coefficients)
    last, _ = jax.lax.scan(step, at_least_float32(x0), inputs, reverse=True)
    return last.astype(x0.dtype)


def spherical_interpolation(z1: jax.Array, z2: jax.Array, weight: ArrayLike) -> jax.Array:
    """Returns cos(w pi / 2) z1 + sin(w pi / 2) z2: of independent N(0, I) again N(0, I).

    Args:
      z1: `[B, ...]`, noise; returned for w = 0.
      z2: shape of `z1`; returned for w = 1.
      weight: w, scalar or `[B]`. The straight mean would have too small a norm, which DDIM turns
        into a blurred sample.

    Returns:
      Shape of `z1`, float32 or better.

    Raises:
      ValueError: if the shapes of `z1` and `z2` differ, or w is neither scalar nor `[B]`.

    >>> spherical_interpolation(jnp.ones((1, 2)), jnp.zeros((1, 2)), 0.0).tolist()
    [[1.0, 1.0]]
    """
    check_same_shape("z2", z2.shape, "z1", z1.shape)
    z1, z2 = at_least_float32(z1), at_least_float32(z2)
    angle = per_example(at_least_float32(weight), z1) * (jnp.pi / 2)
    return jnp.cos(angle) * z1 + jnp.sin(angle) * z2
