"""Frechet distance of two Gaussians: how far a generator's first two moments are from the data's.

Papers: the distance, Dowson and Landau 1982, J. Multivariate Analysis 12, 450-455; as a
measure of generators, Heusel et al. 2017, https://arxiv.org/abs/1706.08500.

It is the SQUARED 2-Wasserstein distance of the Gaussians, in squared units of the samples, as in
the usual FID. Numbers compare only in the same features (pixels in [0, 1] give a quarter of pixels
in [-1, 1]) and with the same number of samples: the estimate is biased upwards by about 1/n
(https://arxiv.org/abs/1911.07023). FID proper takes its features from one particular Inception
network, which is not part of this.

Host side, numpy and scipy, all in float64.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from blogjax.metrics import samples


class GaussianMoments(NamedTuple):
    """Mean `[d]` and covariance `[d, d]`, float64."""

    mean: np.ndarray
    covariance: np.ndarray


def gaussian_moments(x: ArrayLike) -> GaussianMoments:
    """Mean `m = sum_i x_i / n` and unbiased covariance `sum_i (x_i - m)(x_i - m)^T / (n - 1)`.

    Args:
      x: `[n, ...]` with n >= 2, any real dtype; each sample is flattened to `d` numbers.

    Returns:
      Mean `[d]` and covariance `[d, d]`, float64.

    Raises:
      ValueError: if the rank is below 2, n is below 2, or a value is NaN or infinite.

    >>> gaussian_moments([[0.0, 0.0], [2.0, 4.0]]).covariance
    array([[2., 4.],
           [4., 8.]])
    """
    return _moments(samples.as_rows(x, "x", at_least=2))


def frechet_distance(
    mean1: ArrayLike, covariance1: ArrayLike, mean2: ArrayLike, covariance2: ArrayLike
) -> float:
    """`|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`, the squared W2 distance of two Gaussians.

    With factors `C = F F^T`, `tr (C1 C2)^(1/2)` is the sum of the singular values of `F1^T F2`. The
    factors come from symmetric eigenvalue decompositions with the eigenvalues that are rounding (up
    to `d eps` of the largest, or below 0) set to 0. So nothing takes the root of a matrix that is
    not symmetric, singular covariances (fewer samples than dimensions) cost no accuracy, and the
    result is at least 0.

    Args:
      mean1: `[d]`.
      covariance1: `[d, d]`, symmetric and positive semi-definite up to rounding.
      mean2: `[d]`.
      covariance2: `[d, d]`, likewise.

    Returns:
      The distance, in squared units of the samples; a float.

    Raises:
      ValueError: if the shapes do not fit, a value is NaN or infinite, or a covariance is not
        symmetric or not positive semi-definite by more than 1e-4 of its largest entry.

    >>> frechet_distance([0.0, 0.0], np.eye(2), [3.0, 4.0], 4 * np.eye(2))
    27.0
    """
    first = _checked_moments(mean1, covariance1, "1")
    second = _checked_moments(mean2, covariance2, "2")
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"Gaussians of different dimensions: mean1 has shape {first.mean.shape}, "
            f"mean2 has shape {second.mean.shape}"
        )
    factors = _factor(first.covariance, "1"), _factor(second.covariance, "2")
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return _distance(first.mean - second.mean, traces, *factors)


def _distance(apart: np.ndarray, traces: float, factor1: np.ndarray, factor2: np.ndarray) -> float:
    cross = np.linalg.svd(factor1.T @ factor2, compute_uv=False)
    return float(np.sum(apart**2) + max(traces - 2 * cross.sum(), 0.0))


def frechet_distance_from_samples(x: ArrayLike, y: ArrayLike) -> float:
    """Frechet distance of the Gaussians with the moments of two sets of samples.

    Fewer samples than dimensions are themselves, centred, a factor of their covariance: nothing
    of the size `[d, d]` is made then.

    Args:
      x: `[n, ...]` with n >= 2, any real dtype; flattened.
      y: `[m, ...]` with m >= 2 and samples of the same shape.

    Returns:
      The squared distance, in squared units of the samples; a float.

    Raises:
      ValueError: if the shapes do not fit, there are fewer than 2 samples, or a value is NaN or
        infinite.

    >>> frechet_distance_from_samples([[0.0], [2.0]], [[5.0], [7.0]])
    25.0
    """
    rows1, rows2 = samples.as_row_pair(x, y, ("x", "y"), at_least=2)
    mean1, trace1, factor1 = _mean_trace_factor(rows1, "1")
    mean2, trace2, factor2 = _mean_trace_factor(rows2, "2")
    return _distance(mean1 - mean2, trace1 + trace2, factor1, factor2)


def _mean_trace_factor(rows: np.ndarray, name: str) -> tuple[np.ndarray, float, np.ndarray]:
    if len(rows) > rows.shape[1]:
        mean, covariance = _moments(rows)
        return mean, float(np.trace(covariance)), _factor(covariance, name)
    mean = rows.mean(axis=0)
    factor = (rows - mean).T / np.sqrt(len(rows) - 1)
    return mean, float(np.sum(factor**2)), factor


def _moments(rows: np.ndarray) -> GaussianMoments:
    mean = rows.mean(axis=0)
    centred = rows - mean
    return GaussianMoments(mean, centred.T @ centred / (len(rows) - 1))


def _checked_moments(mean: ArrayLike, covariance: ArrayLike, name: str) -> GaussianMoments:
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or mean.size == 0 or covariance.shape != mean.shape * 2:
        raise ValueError(
            f"mean{name} of shape {mean.shape} and covariance{name} of shape {covariance.shape} "
            "should be [d] and [d, d]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"mean{name} or covariance{name} holds NaN or infinity")
    skew = np.abs(covariance - covariance.T).max()
    if skew > 1e-4 * np.abs(covariance).max():
        raise ValueError(f"covariance{name} is not symmetric: opposite entries differ by {skew:g}")
    return GaussianMoments(mean, (covariance + covariance.T) / 2)


def _factor(covariance: np.ndarray, name: str) -> np.ndarray:
    """F with `F F^T` the covariance, its null space left out exactly."""
    values, vectors = scipy.linalg.eigh(covariance)
    if values[0] < -1e-4 * np.abs(covariance).max():
        raise ValueError(
            f"covariance{name} is not positive semi-definite: its smallest eigenvalue is "
            f"{values[0]:g}"
        )
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])
