"""Weights for losses: what makes one number of K losses.

What: `reference_weighted` with the references `classification_initial`, `regression_initial`,
  `classification_prior` and `regression_prior`; `inverse_loss`; `generalized_mean`;
  `uncertainty_weighted`; `dynamic_weight_average`.
Post: https://kexue.fm/archives/8870
Paper: Kendall et al. 2018, arXiv:1705.07115 (uncertainty); Liu et al. 2019, arXiv:1803.10704
  (dynamic weight average).
Equations: initial, prior: sum_i L_i / L_i^ref with L^ref = log K or E|y|^2, and the entropy H(p) or
  E|y - E y|^2. Inverse: sum_i L_i / stop_gradient(L_i), of the gradient of sum_i log L_i.
  Generalised mean: (1/K sum_i L_i^gamma)^(1/gamma). Uncertainty: sum_i L_i / (2 exp s_i) + s_i / 2.
  Dynamic: w = K softmax(L_i(t-1) / L_i(t-2) / T).
Differences from the post: the inverse has a floor, without which a loss that reaches 0 makes
  everything NaN. The generalised mean is taken in log space.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

# Closer to 0 than this, gamma may underflow in float32, and the mean is the geometric one anyway.
_GEOMETRIC = 1e-30


class WeightedLoss(NamedTuple):
    """A scalar to differentiate, and its derivatives by the losses, `[K]`."""

    loss: jax.Array
    weights: jax.Array


def _checked(losses: ArrayLike) -> jax.Array:
    losses = jnp.asarray(losses)
    if losses.ndim != 1 or losses.shape[0] < 1:
        raise ValueError(f"losses are [K] with K of at least 1, got shape {losses.shape}")
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(f"losses must be real numbers, got {losses.dtype}")
    return losses.astype(jnp.promote_types(losses.dtype, jnp.float32))


def _check_positive(losses: jax.Array, what: str) -> None:
    # Traced values cannot be looked at; those at hand can.
    if not isinstance(losses, Tracer) and not np.all(np.asarray(losses) > 0):
        raise ValueError(f"{what} needs positive losses, got {np.asarray(losses).tolist()}")


def classification_initial(num_classes: int) -> float:
    """The cross-entropy of a uniform guess, `log K`, in nats.

    Raises:
      ValueError: if there are fewer than two classes.

    >>> round(classification_initial(10), 4)
    2.3026
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    return math.log(num_classes)


def classification_prior(counts: ArrayLike) -> float:
    """The cross-entropy of guessing the frequencies of the classes: their entropy, in nats.

    Args:
      counts: `[classes]`, how often each occurs in the training set, or its frequencies.

    Raises:
      ValueError: if a count is negative, or fewer than two are positive: then there is nothing to
        learn, and the loss nothing to be divided by.

    >>> round(classification_prior([50, 50]), 4)
    0.6931
    """
    p = np.asarray(counts, np.float64)
    if p.ndim != 1 or not (p >= 0).all() or (p > 0).sum() < 2:
        raise ValueError(f"counts must be [classes], at least two of them positive, got {p}")
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())


def regression_initial(targets: ArrayLike) -> float:
    """The squared error of guessing zero, `E |y|^2`.

    Args:
      targets: `[n, ...]`, those of the training set; squares are summed over all but the first
        axis.

    Raises:
      ValueError: if there are none, or all are zero.

    >>> regression_initial([1.0, 3.0])
    5.0
    """
    return _mean_square(np.asarray(targets, np.float64), "targets are all zero")


def regression_prior(targets: ArrayLike) -> float:
    """The squared error of guessing the mean, `E |y - E y|^2`; as `regression_initial`.

    >>> regression_prior([1.0, 3.0])
    1.0
    """
    y = np.asarray(targets, np.float64)
    if y.ndim and y.shape[0]:
        y = y - y.mean(axis=0)
    return _mean_square(y, "targets are all the same")


def _mean_square(y: np.ndarray, problem: str) -> float:
    if y.ndim < 1 or y.shape[0] < 1:
        raise ValueError(f"targets are [n, ...] with n of at least 1, got shape {y.shape}")
    mean = float(np.square(y).reshape(y.shape[0], -1).sum(axis=1).mean())
    if not mean > 0:
        raise ValueError(f"{problem}: the reference loss is {mean}")
    return mean


def reference_weighted(losses: ArrayLike, reference: ArrayLike) -> WeightedLoss:
    """`sum_i L_i / reference_i`: indifferent to the losses' units.

    Args:
      losses: `[K]`. Under data parallelism means over the global batch.
      reference: `[K]`, positive: what each loss is before anything is learnt, or what it is
        for a guess from the prior.

    Raises:
      ValueError: if the shapes differ, or a reference at hand is not positive.

    >>> reference_weighted(jnp.array([1.0, 8.0]), [2.0, 4.0]).loss.item()
    2.5
    """
    losses = _checked(losses)
    reference = _checked(reference)
    if reference.shape != losses.shape:
        raise ValueError(f"reference of shape {reference.shape} for losses of {losses.shape}")
    _check_positive(reference, "reference_weighted")
    weights = 1 / reference
    return WeightedLoss(jnp.sum(losses * weights), weights)


def inverse_loss(losses: ArrayLike, floor: ArrayLike = 1e-8) -> WeightedLoss:
    """`sum_i L_i / max(stop_gradient(L_i), floor)`: every task counts as 1, whatever its loss.

    The gradient is that of `sum_i log L_i`, whose direction is that of the geometric mean, for
    losses above the floor. The value says nothing: watch the losses.

    Args:
      losses: `[K]`. Under data parallelism means over the global batch: the mean of the devices'
        quotients is another thing.
      floor: scalar or `[K]`, positive, in the losses' units: below, the weight grows no more. A
        good choice is 1e-8 times what the loss starts with.

    Raises:
      ValueError: if a floor at hand is not positive or of another shape.

    >>> inverse_loss(jnp.array([0.5, 0.0])).weights.tolist()
    [2.0, 100000000.0]
    """
    losses = _checked(losses)
    floor = jnp.asarray(floor, losses.dtype)
    if floor.shape not in ((), losses.shape):
        raise ValueError(f"floor of shape {floor.shape} for losses of {losses.shape}")
    _check_positive(floor, "inverse_loss: a positive floor;")
    weights = 1 / jnp.maximum(jax.lax.stop_gradient(losses), floor)
    return WeightedLoss(jnp.sum(losses * weights), weights)


def generalized_mean(losses: ArrayLike, gamma: float) -> WeightedLoss:
    """`(1/K sum_i L_i^gamma)^(1/gamma)`, from the least (-inf) to the largest (inf) of the losses.

    1 is the arithmetic, 0 the geometric, -1 the harmonic mean. It grows with gamma. Weights are
    `(L_i / mean)^(gamma - 1) / K`.

    Args:
      losses: `[K]`, positive unless gamma is 1. Under data parallelism means over the global batch.
      gamma: any number, infinity included.

    Returns:
      The mean and its derivatives by the losses. Where losses that are not positive are met inside
      a compiled function, NaN.

    Numerics: in log space; no gamma overflows. One that float32 lacks counts as infinite.

    Raises:
      ValueError: if gamma is NaN, or losses at hand are not positive and gamma is not 1.

    >>> [round(float(generalized_mean(jnp.array([1.0, 4.0]), g).loss), 4) for g in (-1, 0, 1)]
    [1.6, 2.0, 2.5]
    """
    if math.isnan(gamma):
        raise ValueError("gamma is NaN")
    losses = _checked(losses)
    tasks = losses.shape[0]
    if gamma == 1:
        return WeightedLoss(jnp.mean(losses), jnp.full_like(losses, 1 / tasks))
    _check_positive(losses, f"generalized_mean with gamma={gamma}")
    losses = jnp.where(losses > 0, losses, jnp.nan)
    if abs(gamma) > float(jnp.finfo(losses.dtype).max):
        extreme = jnp.max(losses) if gamma > 0 else jnp.min(losses)
        reached = jax.lax.stop_gradient(losses == extreme)
        return WeightedLoss(extreme, reached / jnp.sum(reached))
    logs = jnp.log(losses)
    if abs(gamma) < _GEOMETRIC:
        mean = jnp.mean(logs)
        weights = jnp.exp(mean - logs) / tasks
    else:
        # The largest power is 1, so nothing overflows; expm1 and log1p keep what is small. The
        # derivative by the reference is 0 in exact arithmetic.
        reference = jax.lax.stop_gradient(jnp.max(logs) if gamma > 0 else jnp.min(logs))
        exponents = gamma * (logs - reference)
        log_mean = jnp.log1p(jnp.mean(jnp.expm1(exponents)))
        mean = reference + log_mean / gamma
        # Not (gamma - 1) * (logs - mean): gamma would multiply the rounding of the difference.
        weights = jnp.exp(exponents - log_mean + (mean - logs)) / tasks
    return WeightedLoss(jnp.exp(mean), weights)


def uncertainty_weighted(losses: ArrayLike, log_variances: ArrayLike) -> WeightedLoss:
    """`sum_i L_i / (2 exp(s_i)) + s_i / 2`: each loss with a learnt variance `exp(s_i)`.

    Args:
      losses: `[K]`.
      log_variances: `[K]`, trained along with the network; LibMTL starts them at -0.5. At the
        optimum `exp(s_i) = L_i`, so the weight is `1 / (2 L_i)`: for losses that change slowly it
        is `inverse_loss` with half the step.

    Raises:
      ValueError: if the shapes differ.

    >>> uncertainty_weighted(jnp.array([2.0, 4.0]), jnp.zeros(2)).loss.item()
    3.0
    """
    losses = _checked(losses)
    s = _checked(log_variances)
    if s.shape != losses.shape:
        raise ValueError(f"log_variances of shape {s.shape} for losses of {losses.shape}")
    weights = jnp.exp(-s) / 2
    return WeightedLoss(jnp.sum(losses * weights + s / 2), weights)


def dynamic_weight_average(
    losses: ArrayLike, last: ArrayLike, before_last: ArrayLike, temperature: float = 2.0
) -> WeightedLoss:
    """`sum_i w_i L_i`, w larger for losses that fall more slowly: `w = K softmax(r / T)`.

    Args:
      losses: `[K]`.
      last: `[K]`, the losses of the epoch before; no gradient passes.
      before_last: `[K]`, those of the epoch before that, positive; `r = last / before_last`. In the
        first two epochs give the same for both: all weights are 1.
      temperature: positive; the paper's default.

    Numerics: a quotient over a loss of 0 counts as 1.

    Raises:
      ValueError: if the shapes differ or the temperature is not positive.

    >>> fast, slow = [1.0, 1.0], [2.0, 1.0]
    >>> dynamic_weight_average(jnp.ones(2), fast, slow).weights.round(3).tolist()[1] > 1
    True
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    losses, last, before = _checked(losses), _checked(last), _checked(before_last)
    if not losses.shape == last.shape == before.shape:
        raise ValueError(
            f"losses of shape {losses.shape}, last {last.shape} and before_last {before.shape} "
            "must be of one"
        )
    ratio = jnp.where(before == 0, 1, last / jnp.where(before == 0, 1, before))
    ratio = jax.lax.stop_gradient(ratio)
    weights = losses.shape[0] * jax.nn.softmax(ratio / temperature)
    return WeightedLoss(jnp.sum(losses * weights), weights)
