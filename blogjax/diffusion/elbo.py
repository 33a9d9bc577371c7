"""The evidence bound of a Gaussian diffusion model, term by term, in nats.

What: the three parts of the negative bound, their sum, and bits per dimension.
Post: https://kexue.fm/archives/9152 (DDPM as an autoregressive VAE)
Papers: Ho et al. 2020 (arXiv 2006.11239); Nichol & Dhariwal 2021 (arXiv 2102.09672)
Equations: -log p(x_0) <= KL(q(x_T | x_0) || N(0, I))
      + sum_{t=2..T} E KL(q(x_{t-1} | x_t, x_0) || N(m_t, s_t^2 I)) - E log p(x_0 | x_1),
    m_t the posterior's mean with the denoiser's x_0 in place of the true one.
Differences from the post: the post drops all constants and keeps the squares. Here they stay, so
that the sum is a bound on a density and can be compared with an entropy. The step t = 1 is a
decoder of its own: there the posterior's variance is 0, and a density with it is infinite.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jax.typing import ArrayLike

from blogjax.core.broadcasting import sum_except
from blogjax.core.random import Key, normal
from blogjax.diffusion.checks import check_choice, check_floating, check_same_shape, concrete
from blogjax.diffusion.gaussian import Denoise, Prediction, denoising_loss, to_x0_eps
from blogjax.diffusion.prediction import at_least_float32, signal_and_noise
from blogjax.diffusion.schedules import NoiseSchedule


class ElboTerms(NamedTuple):
    """The negative bound in nats, per example.

    Attributes:
      prior: `[B]`, KL(q(x_T | x_0) || N(0, I)).
      transitions: `[T - 1, B]`; row i is the KL term of t = i + 2.
      reconstruction: `[B]`, -log p(x_0 | x_1).
    """

    prior: jax.Array
    transitions: jax.Array
    reconstruction: jax.Array

    def total(self) -> jax.Array:
        """The whole bound, `[B]`: an upper bound on -log p(x_0)."""
        return self.prior + jnp.sum(self.transitions, axis=0) + self.reconstruction


def log_gaussian_bin(x: jax.Array, mean: jax.Array, std: ArrayLike, levels: int) -> jax.Array:
    """Returns the log probability that N(mean, std^2) gives the bin of x.

    The `levels` bins are centred on -1, ..., 1, equally far apart; the first and the last one reach
    to infinity, so that the probabilities of all bins sum to 1.

    Args:
      x: values on the grid of bin centres.
      mean: shape of `x`.
      std: positive; scalar or shape of `x`.
      levels: number of bins, at least 2.

    Returns:
      Shape of `x`, float32 or better. Computed from log Phi in the tail where it is exact: a bin
      hundreds of deviations away has a finite log probability and a gradient. An inner bin much
      narrower than std is its width times the density in its middle.

    Raises:
      ValueError: if `levels` is below 2 or the shapes of `x` and `mean` differ.

    >>> x = jnp.array([-1.0, 0.0, 1.0])
    >>> round(float(jnp.exp(log_gaussian_bin(x, jnp.full(3, 0.2), 0.5, 3)).sum()), 5)
    1.0
    """
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    check_same_shape("mean", mean.shape, "x", x.shape)
    x, mean = at_least_float32(x), at_least_float32(mean)
    half = 1 / (levels - 1)
    std = at_least_float32(std)
    below, above = (x - half - mean) / std, (x + half - mean) / std
    # The mirror image has the same probability, and lies in the left tail.
    mirror = below + above > 0
    left, right = jnp.where(mirror, -above, below), jnp.where(mirror, -below, above)
    log_right = log_ndtr(right)
    gap = log_right - log_ndtr(left)
    # log(1 - exp(-gap)), each form where it keeps its digits.
    narrow = gap < math.log(2)
    inner = log_right + jnp.where(
        narrow,
        jnp.log(-jnp.expm1(-jnp.where(narrow & (gap > 0), gap, 1.0))),
        jnp.log1p(-jnp.exp(-jnp.where(narrow, 1.0, gap))),
    )
    # The difference of two nearly equal numbers has no digits left; the density has them all.
    middle, width = (x - mean) / std, 2 * half / std
    density = -0.5 * (jnp.square(middle) + math.log(2 * math.pi)) + jnp.log(width)
    inner = jnp.where(width * (1 + jnp.abs(middle)) < 1e-2, density, inner)
    inner = jnp.where(x <= half - 1, log_ndtr(above), inner)
    return jnp.where(x >= 1 - half, log_ndtr(-below), inner)


def elbo_terms(
    key: Key | None,
    x0: jax.Array,
    denoise: Denoise,
    schedule: NoiseSchedule,
    *,
    prediction: Prediction = "eps",
    sigma: Literal["beta", "posterior"] = "beta",
    decoder: Literal["gaussian", "discretised"] = "gaussian",
    levels: int | None = None,
    decoder_std: ArrayLike | None = None,
    eps: jax.Array | None = None,
) -> ElboTerms:
    """All terms of the negative bound, with one draw of the noise per term. T denoiser calls.

    With u = A_{t-1}^2 b_t^2 / B_t^2, term t >= 2 of a model with s_t = b_t is
    (u / (2 B_t^2)) |x_0 - x_0hat|^2 - d (u + log(1 - u)) / 2, and with the posterior's s_t it is
    u / (2 B_{t-1}^2) |x_0 - x_0hat|^2.

    Args:
      key: scalar or `[B]`, one stream per example; None only if `eps` is given.
      x0: `[B, ...]`; for the discretised decoder on the grid of `levels` values from -1 to 1.
      denoise: `denoise(x_t, t [B]) -> [B, ...]`.
      schedule: discrete, T >= 2.
      prediction: what the denoiser returns.
      sigma: the model's standard deviation s_t for t >= 2: b_t, or the posterior's.
      decoder: of the step t = 1. "gaussian": the density N(x_0; x_0hat, s_1^2), for real data.
        "discretised": the probability of the bin (see `log_gaussian_bin`), for integer data.
      levels: number of bins, 256 for images; given exactly if the decoder is discretised.
      decoder_std: s_1, a positive scalar. None: b_1 for sigma "beta". With sigma "posterior" the
        formula says 0, which no decoder can have: the discretised one then takes the posterior's
        s_2 in its place, as Nichol & Dhariwal do; the Gaussian one refuses.
      eps: shape of `x0`, the noise to use in every term. Each term is an expectation over its own
        noise, so that a quadrature over `eps` is exact term by term.

    Returns:
      `ElboTerms`, float32 or better. Infinite or NaN predictions propagate.

    Raises:
      ValueError: if a name is unknown, the schedule is continuous or has one step, `levels` does
        not go with `decoder`, s_1 would be 0, or the denoiser's output has not the shape of `x0`.

    >>> from blogjax.diffusion.schedules import post_schedule
    >>> terms = elbo_terms(
    ...     jax.random.key(0), jnp.zeros((2, 3)), lambda x, t: x, post_schedule(10))
    >>> terms.prior.shape, terms.transitions.shape, terms.total().shape
    ((2,), (9, 2), (2,))
    """
    check_choice("sigma", sigma, ("beta", "posterior"))
    check_choice("decoder", decoder, ("gaussian", "discretised"))
    if schedule.num_steps is None or schedule.num_steps < 2:
        raise ValueError(f"the bound needs T >= 2 steps, the schedule has {schedule.num_steps}")
    if (levels is None) != (decoder == "gaussian"):
        raise ValueError(f"decoder={decoder!r} does not go with levels={levels}")
    if sigma == "posterior" and decoder == "gaussian" and decoder_std is None:
        raise ValueError(
            "sigma='posterior' is 0 at t = 1, where a Gaussian decoder would have infinite "
            "density; give decoder_std"
        )
    known = None if decoder_std is None else concrete(decoder_std)
    if known is not None and not (known.ndim == 0 and known > 0):
        raise ValueError(f"decoder_std must be a positive number, got {decoder_std}")
    check_floating("x0", x0)
    if (key is None) == (eps is None):
        raise ValueError("elbo_terms needs either a key or the noise itself as eps")

    def draw(t: jax.Array) -> jax.Array:
        if key is None:
            assert eps is not None
            return eps
        fold = jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))
        return normal(fold(key, t), x0.shape, jnp.promote_types(x0.dtype, jnp.float32))

    size = x0.size // x0.shape[0]
    log_signal = schedule.log_signal_at(schedule.num_steps)
    signal_squared = jnp.exp(2 * log_signal)
    prior = 0.5 * (
        signal_squared * sum_except(jnp.square(at_least_float32(x0)))
        - size * (signal_squared + jnp.log1p(-signal_squared))
    )

    def square_of_x0(t: jax.Array) -> jax.Array:
        return denoising_loss(
            denoise, None, x0, t, schedule, prediction=prediction, weighting="x0", eps=draw(t)
        )

    def transition(t: jax.Array) -> jax.Array:
        square = square_of_x0(t)
        before = t - 1
        noise, noise_before = schedule.noise(t), schedule.noise(before)
        u = jnp.square(schedule.signal(before) * schedule.step_noise(t) / noise)
        if sigma == "posterior":
            return 0.5 * u / jnp.square(noise_before) * square
        return 0.5 * u / jnp.square(noise) * square - 0.5 * size * (u + jnp.log1p(-u))

    transitions = jax.lax.map(transition, jnp.arange(2, schedule.num_steps + 1, dtype=jnp.int32))

    if decoder_std is not None:
        std = jnp.asarray(decoder_std, jnp.float32)
    elif sigma == "beta":
        std = schedule.step_noise(1)
    else:
        std = schedule.noise(1) * schedule.step_noise(2) / schedule.noise(2)
    first = jnp.int32(1)
    if levels is None:
        # The error of x_0 from that of the prediction: x_0 - x_0hat has few digits beside b_1.
        reconstruction = 0.5 * square_of_x0(first) / jnp.square(std) + size * (
            jnp.log(std) + 0.5 * math.log(2 * math.pi)
        )
    else:
        a, b = signal_and_noise(x0, first, schedule)
        x_1 = (a * at_least_float32(x0) + b * draw(first)).astype(x0.dtype)
        value = denoise(x_1, jnp.broadcast_to(first, x0.shape[:1]))
        x0_hat, _ = to_x0_eps(prediction, value, x_1, first, schedule)
        reconstruction = -sum_except(log_gaussian_bin(x0, x0_hat, std, levels))
    return ElboTerms(prior, transitions, reconstruction)


def bits_per_dim(nats: ArrayLike, num_dims: int, *, bin_width: float | None = None) -> jax.Array:
    """Nats per example as bits per dimension: nats / (D log 2), less log2 of the bin width.

    Args:
      nats: negative log likelihood, any shape.
      num_dims: D, numbers per example.
      bin_width: None if `nats` is already that of discrete data (the discretised decoder), or if
        the data are real. If `nats` is that of a density and stands for integer data, the width of
        one integer in the density's unit: 2 / 255 for 0..255 spread from -1 to 1. Then the density
        times the width is the probability.

    Returns:
      Shape of `nats`, float32 or better.

    Raises:
      ValueError: if `num_dims` or `bin_width` is not positive.

    >>> round(float(bits_per_dim(1.4189385332, 1)), 5)
    2.0471
    >>> float(bits_per_dim(0.0, 3, bin_width=0.25))
    2.0
    """
    if num_dims < 1:
        raise ValueError(f"num_dims must be at least 1, got {num_dims}")
    if bin_width is not None and bin_width <= 0:
        raise ValueError(f"bin_width must be positive, got {bin_width}")
    offset = 0.0 if bin_width is None else math.log2(bin_width)
    return at_least_float32(nats) / (num_dims * math.log(2)) - offset
