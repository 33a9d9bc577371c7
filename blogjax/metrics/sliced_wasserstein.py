"""Sliced Wasserstein distance: how far apart two sets of samples are, seen from many directions.

Paper: Rabin et al. 2011, https://doi.org/10.1007/978-3-642-24785-9_37; Bonneel et al. 2015,
https://doi.org/10.1007/s10851-014-0506-3.

On a line the Wasserstein distance needs no optimisation: sorted samples are matched in order. The
sliced one is its mean over projections on lines. It is a metric, equal to 0 only for equal
distributions (with all directions), and at most the Wasserstein distance itself. Projections
shrink: a shift by t is at the distance |t| / sqrt(d) for p = 2.

Of two sets of n samples from the same distribution it is not 0: it falls like n^(-1/2), and for
p = 2 like n^(-1/4) where projections have gaps. Compare at equal numbers of samples, and give that
floor beside the figure.

Host side, numpy, all in float64.
"""

import operator

import numpy as np
from numpy.typing import ArrayLike

from blogjax.metrics import samples

_BLOCK_ENTRIES = 1 << 22  # projected numbers held at a time: 32 MiB per set


def even_directions(count: int) -> np.ndarray:
    """Unit vectors of the plane, evenly spread over half a turn: opposite ones project alike.

    Args:
      count: how many, at least 1.

    Returns:
      `[count, 2]` float64, the first along x.

    Raises:
      ValueError: if `count` is below 1.

    >>> even_directions(2).round(3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    count = operator.index(count)
    if count < 1:
        raise ValueError(f"there must be at least 1 direction, not {count}")
    angle = np.pi * np.arange(count) / count
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def random_directions(count: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors drawn uniformly from the sphere.

    Args:
      count: how many, at least 1.
      dim: numbers of a sample, at least 1.
      seed: an integer of at least 0.

    Returns:
      `[count, dim]` float64. Fewer directions are the first ones of more.

    Raises:
      ValueError: if an argument is out of range.

    >>> bool(np.allclose(np.linalg.norm(random_directions(5, 3, seed=0), axis=1), 1))
    True
    """
    count, dim, seed = (operator.index(value) for value in (count, dim, seed))
    if count < 1 or dim < 1 or seed < 0:
        raise ValueError(
            f"count {count} and dim {dim} must be at least 1, and the seed {seed} at least 0"
        )
    normal = np.random.default_rng(seed).standard_normal((count, dim))
    return normal / np.linalg.norm(normal, axis=1, keepdims=True)


def sliced_wasserstein(x: ArrayLike, y: ArrayLike, directions: ArrayLike, p: float = 2.0) -> float:
    """`(mean_k W_p(x u_k, y u_k)^p)^(1/p)`, the Wasserstein distances of projections.

    `W_p` is that of the empirical distributions, exact: with the quantile functions F and G of the
    projected sets `W_p^p` is the integral of `|F(t) - G(t)|^p` over t in (0, 1), a finite sum. For
    as many samples on both sides it is the mean of `|x_(i) - y_(i)|^p` over sorted samples.

    Args:
      x: `[n, ...]` with n >= 1, any real dtype; each sample is flattened to d numbers.
      y: `[m, ...]` with m >= 1 and samples of the same shape.
      directions: `[k, d]`, the u_k, not 0; only their direction counts. In the plane
        `even_directions` has no noise of its own.
      p: at least 1 and finite; differences should be such that their p-th power is finite.

    Returns:
      The distance, not squared, in units of the samples; a float.

    Raises:
      ValueError: if the shapes do not fit, a set is empty, a value is NaN or infinite, a direction
        is 0, or p is out of range.

    >>> x = np.array([[0.0, 0.0], [0.0, 2.0]])
    >>> sliced_wasserstein(x, x + [3.0, 4.0], np.array([[1.0, 0.0]]))
    3.0
    >>> round(sliced_wasserstein(x, x + [3.0, 4.0], even_directions(8)) * 2**0.5, 12)
    5.0
    """
    rows, others = samples.as_row_pair(x, y, ("x", "y"))
    units = np.asarray(directions, np.float64)
    if units.ndim != 2 or not len(units) or units.shape[1] != rows.shape[1]:
        raise ValueError(
            f"directions have shape {units.shape}, but for samples of {rows.shape[1]} numbers they "
            f"are [k, {rows.shape[1]}] with k > 0"
        )
    if not 1 <= p < np.inf:
        raise ValueError(f"p is {p}, but must be at least 1 and finite")
    largest = np.abs(units).max(axis=1, keepdims=True)
    if not (np.isfinite(largest).all() and np.all(largest > 0)):
        raise ValueError("directions must be finite and not 0")
    units = units / largest  # squares of tiny numbers would be 0
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    first, second, weight = _matching(len(rows), len(others))
    size = max(_BLOCK_ENTRIES // len(weight), 1)
    powers = []
    for start in range(0, len(units), size):
        block = units[start : start + size].T
        a, b = np.sort(rows @ block, axis=0), np.sort(others @ block, axis=0)
        powers.append(weight @ np.abs(a[first] - b[second]) ** p)
    return float(np.mean(np.concatenate(powers)) ** (1 / p))


def _matching(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which sorted samples of n and of m lie over which share of (0, 1).

    Both quantile functions are constant between neighbouring levels i / n and j / m. In units of
    1 / (n m) the levels are whole numbers, which meet exactly.
    """
    levels = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    return levels[:-1] // m, levels[:-1] // n, np.diff(levels) / (n * m)
