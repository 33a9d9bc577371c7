"""One step back, from time t to any earlier time s: DDPM, DDIM and everything between.

What: the coefficients of x_s given x_t and x_0, for every noise level sigma, and the step itself.
Post: https://kexue.fm/archives/9164 (DDPM), https://kexue.fm/archives/9181 (DDIM)
Papers: Ho et al. 2020 (arXiv 2006.11239); Song et al. 2020 (arXiv 2010.02502)
Equations: x_s = A_s x_0 + sqrt(B_s^2 - sigma^2) e + sigma z has the right marginal for every
    sigma in [0, B_s]; sigma = eta (B_s / B_t) b with b^2 = 1 - A_t^2 / A_s^2;
    equally x_s = k x_t + l x_0 + sigma z, k = sqrt(B_s^2 - sigma^2) / B_t, l = A_s - A_t k.
Differences from the post: sigma = b, which the post offers beside the posterior's, is refused where
b > B_s: there the square root has no value. The DDIM paper's "sigma-hat" is kept apart as "hat".
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from blogjax.core.broadcasting import per_example
from blogjax.core.random import Key, normal
from blogjax.diffusion.checks import check_choice, check_same_shape, concrete
from blogjax.diffusion.prediction import at_least_float32
from blogjax.diffusion.schedules import NoiseSchedule, Schedule, sqrt_one_minus_exp

Sigma = Literal["eta", "posterior", "beta", "hat"]
SIGMAS = ("eta", "posterior", "beta", "hat")


class ReverseCoefficients(NamedTuple):
    """Three ways to write the same x_s, each plus `sigma` z. All of the shape of t and s.

    x_s = x0 x_0 + eps e = k x_t + l x_0 = k_eps x_t + l_eps e.
    """

    x0: jax.Array
    eps: jax.Array
    k: jax.Array
    l: jax.Array
    k_eps: jax.Array
    l_eps: jax.Array
    sigma: jax.Array


def _check_pair(t: ArrayLike, s: ArrayLike) -> None:
    t_known, s_known = concrete(t), concrete(s)
    if t_known is None or s_known is None:
        return
    if t_known.shape != s_known.shape and t_known.ndim and s_known.ndim:
        raise ValueError(f"t has shape {t_known.shape}, but s has shape {s_known.shape}")
    t_all, s_all = np.broadcast_arrays(t_known, s_known)
    wrong = np.flatnonzero(t_all.ravel() <= s_all.ravel())
    if wrong.size:
        first_t, first_s = t_all.flat[wrong[0]], s_all.flat[wrong[0]]
        raise ValueError(f"a step back needs s < t, got t = {first_t} and s = {first_s}")


def _is_known(*values: object) -> bool:
    return all(concrete(leaf) is not None for leaf in jax.tree.leaves(values))


def _check_real(
    schedule: Schedule, t: ArrayLike, s: ArrayLike, eta: ArrayLike, sigma: Sigma
) -> None:
    """Raises where the coefficient of e would be the root of a negative number."""
    if not _is_known(schedule, t, s, eta) or (sigma == "eta" and np.all(np.asarray(eta) <= 1)):
        return
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        step = np.asarray(sqrt_one_minus_exp(schedule.log_ratio(t, s)), np.float64)
        noise_t, noise_s = (np.asarray(schedule.noise(u), np.float64) for u in (t, s))
    scale = step if sigma == "beta" else np.asarray(eta) * step * noise_s / noise_t
    t_all, scale, noise_s = np.broadcast_arrays(np.asarray(t), scale, noise_s)
    wrong = np.flatnonzero((scale > noise_s * (1 + 1e-6)).ravel())
    if wrong.size:
        first = wrong[0]
        raise ValueError(
            f"sigma={sigma!r} asks for noise {scale.flat[first]:.6g} at t = "
            f"{', '.join(str(v) for v in t_all.ravel()[wrong][:5])}, but at most B_s = "
            f"{noise_s.flat[first]:.6g} keeps the marginal; use 'posterior', 'eta' or 'hat'"
        )


def reverse_coefficients(
    schedule: Schedule,
    t: ArrayLike,
    s: ArrayLike,
    *,
    eta: ArrayLike = 1.0,
    sigma: Sigma = "eta",
) -> ReverseCoefficients:
    """Coefficients of the step from t to s, for any 0 <= s < t.

    With a = A_t / A_s, b^2 = 1 - a^2 and q = a B_s / B_t, the square root is computed as
    B_s sqrt(q^2 + (1 - eta^2) b^2 / B_t^2), which cancels nothing: for eta = 1 it is B_s q.

    Args:
      schedule: discrete or continuous.
      t: scalar or `[N]`, where the step begins.
      s: like t, where it ends; s < t. It need not be t - 1.
      eta: "eta" reads it, the others do not. 0 is DDIM, 1 is DDPM with the posterior's variance;
        up to B_t / b is possible. May be traced; scalar or shape of t.
      sigma: how much fresh noise.
        "eta": eta (B_s / B_t) b. "posterior": the same with eta = 1.
        "beta": b, which needs b <= B_s. It never is at s = 0, and not yet at the first few t of a
        common schedule (1, 2, 3 of `post_schedule`, 1, 2 of `linear_beta_schedule`).
        "hat": the posterior's mean with noise b. This is no member of the family: x_s then has
        more variance than it should, which is what Ho et al.'s larger variance does.

    Returns:
      `ReverseCoefficients`, float32.

    Raises:
      ValueError: if `sigma` is unknown; and, where the values are known: if s >= t, if a time is
        outside of the schedule, if eta < 0, or if sigma > B_s. Under tracing these give NaN,
        but for a negative eta, which turns the sign of z.

    >>> from blogjax.diffusion.schedules import post_schedule
    >>> step = reverse_coefficients(post_schedule(), 500, 400, eta=0.0)
    >>> round(float(step.x0), 4), round(float(step.eps), 4), float(step.sigma)
    (0.4475, 0.8943, 0.0)
    """
    check_choice("sigma", sigma, SIGMAS)
    _check_pair(t, s)
    eta_known = concrete(eta)
    if eta_known is not None and np.any(eta_known < 0):
        raise ValueError(f"eta must not be negative, got {eta_known}")
    if sigma in ("eta", "beta"):
        _check_real(schedule, t, s, eta, sigma)

    log_signal_t, log_signal_s = schedule.log_signal_at(t), schedule.log_signal_at(s)
    log_ratio = schedule.log_ratio(t, s)
    a, b = jnp.exp(log_ratio), sqrt_one_minus_exp(log_ratio)
    signal_s = jnp.exp(log_signal_s)
    noise_t, noise_s = sqrt_one_minus_exp(log_signal_t), sqrt_one_minus_exp(log_signal_s)
    # 1 - q^2 = (b / B_t)^2, exactly.
    q, one_minus_q2 = a * noise_s / noise_t, jnp.square(b / noise_t)

    if sigma == "beta":
        fresh = b
        # B_s^2 - b^2 = a^2 - A_s^2. At s = 0 it is negative, never zero.
        left = jnp.sqrt(jnp.square(signal_s) * jnp.expm1(2 * (log_ratio - log_signal_s)))
        kept = a * left / noise_t
        rest = one_minus_q2 * (1 + jnp.square(a)) / (1 + kept)
    else:
        e = jnp.asarray(eta, jnp.promote_types(jnp.result_type(eta), jnp.float32))
        e = e if sigma == "eta" else jnp.ones_like(e)
        fresh = e * b * noise_s / noise_t
        inside = jnp.square(q) + (1 - e) * (1 + e) * one_minus_q2
        inside = jnp.where(jnp.abs(inside) < 1e-6, 0.0, inside)  # the largest eta, rounded
        root = jnp.sqrt(jnp.where(noise_s == 0, 1.0, inside))  # B_0 = 0 stands before it
        left = noise_s * root
        kept = q * root
        rest = one_minus_q2 * (1 + jnp.square(e * q)) / (1 + kept)  # 1 - q root
        fresh = b if sigma == "hat" else fresh
    return ReverseCoefficients(
        x0=signal_s,
        eps=left,
        k=left / noise_t,
        l=signal_s * rest,
        k_eps=1 / a,
        l_eps=-noise_t * rest / a,
        sigma=fresh,
    )


def reverse_step(
    key: Key | None, x0: jax.Array, eps: jax.Array, coefficients: ReverseCoefficients
) -> jax.Array:
    """Returns x_s = A_s x_0 + sqrt(B_s^2 - sigma^2) e + sigma z.

    Args:
      key: scalar or `[B]`, one stream per example; None leaves `sigma z` out.
      x0: `[B, ...]`, the estimate of the data.
      eps: shape of `x0`, the estimate of the noise.
      coefficients: from `reverse_coefficients`, scalars or `[B]`.

    Returns:
      Shape of `x0`, float32 or better.

    Raises:
      ValueError: if the shapes of `x0` and `eps` differ, or the keys or the coefficients are
        neither one nor one per example.

    >>> from blogjax.diffusion.schedules import post_schedule
    >>> last = reverse_coefficients(post_schedule(), 1, 0)
    >>> reverse_step(jax.random.key(0), jnp.ones((1, 2)), jnp.zeros((1, 2)), last).tolist()
    [[1.0, 1.0]]
    """
    check_same_shape("x0", x0.shape, "eps", eps.shape)
    x0, eps = at_least_float32(x0), at_least_float32(eps)
    x_s = per_example(coefficients.x0, x0) * x0 + per_example(coefficients.eps, x0) * eps
    if key is None:
        return x_s
    return x_s + per_example(coefficients.sigma, x0) * normal(key, x0.shape, x_s.dtype)


def posterior_mean_variance(
    x_t: jax.Array, x0: jax.Array, t: ArrayLike, schedule: NoiseSchedule
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of x_{t-1} given x_t and x_0, by Bayes.

    mean = a_t B_{t-1}^2 / B_t^2 x_t + A_{t-1} b_t^2 / B_t^2 x_0,
    variance = B_{t-1}^2 b_t^2 / B_t^2.

    Args:
      x_t: `[B, ...]`.
      x0: shape of `x_t`.
      t: int, scalar or `[B]`, in 1..T.
      schedule: discrete; for other pairs of times use `reverse_coefficients`.

    Returns:
      The mean, shape of `x_t`, float32 or better, and the variance, shape of t, float32. At t = 1
      they are x_0 and 0.

    Raises:
      ValueError: if the shapes of `x_t` and `x0` differ or the schedule is continuous.

    >>> from blogjax.diffusion.schedules import post_schedule
    >>> mean, variance = posterior_mean_variance(jnp.ones(1), jnp.zeros(1), 1, post_schedule())
    >>> float(mean[0]), float(variance)
    (0.0, 0.0)
    """
    check_same_shape("x0", x0.shape, "x_t", x_t.shape)
    if schedule.num_steps is None:
        raise ValueError("a continuous schedule has no t - 1; use reverse_coefficients(t, s)")
    c = reverse_coefficients(schedule, t, jnp.asarray(t) - 1, sigma="posterior")
    x_t, x0 = at_least_float32(x_t), at_least_float32(x0)
    return per_example(c.k, x0) * x_t + per_example(c.l, x0) * x0, jnp.square(c.sigma)
