"""Nearest neighbours between two sets of samples: memorisation, precision and recall.

Paper: precision and recall of a generator, Kynkaanniemi et al. 2019,
https://arxiv.org/abs/1904.06991.

Distances are Euclidean and summed from differences in float64: not from the expansion
`|x|^2 - 2 x y + |y|^2`, which loses the close neighbours that matter. Work is done in blocks of
rows, so memory stays bounded; time is O(n m d). Host side, numpy and scipy.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial import distance

from blogjax.metrics import samples

_BLOCK_ENTRIES = 1 << 22  # distances held at a time: 32 MiB


def pairwise_squared_distances(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """`D_ij = |x_i - y_j|^2`.

    Args:
      x: `[n, ...]` with n >= 1, any real dtype; flattened.
      y: `[m, ...]` with m >= 1 and samples of the same shape.

    Returns:
      `[n, m]` float64, in squared units of the samples.

    Raises:
      ValueError: if the shapes do not fit, a set is empty, or a value is NaN or infinite.

    >>> pairwise_squared_distances([[0.0, 0.0]], [[3.0, 4.0], [0.0, 1.0]])
    array([[25.,  1.]])
    """
    rows, reference = samples.as_row_pair(x, y, ("x", "y"))
    return distance.cdist(rows, reference, "sqeuclidean")


def nearest_distances(x: ArrayLike, reference: ArrayLike, exclude_self: bool = False) -> np.ndarray:
    """`min_j |x_i - r_j|`, how far every sample is from the nearest one in a reference set.

    Generated samples far closer to the training set than held-out data are memorised.

    Args:
      x: `[n, ...]` with n >= 1, any real dtype; flattened.
      reference: `[m, ...]` with m >= 1 and samples of the same shape.
      exclude_self: leave out `j = i`, for a set as its own reference. By index, not by value: a
        sample that occurs twice has distance 0.

    Returns:
      `[n]` float64, in units of the samples.

    Raises:
      ValueError: if the shapes do not fit, a set is empty, or a value is NaN or infinite; with
        `exclude_self` also if the lengths differ or are below 2.

    >>> nearest_distances([[0.0, 0.0], [6.0, 8.0]], [[3.0, 4.0], [0.0, 1.0]])
    array([1., 5.])
    """
    rows, reference = samples.as_row_pair(x, reference, ("x", "reference"))
    if exclude_self and not len(rows) == len(reference) >= 2:
        raise ValueError(
            f"exclude_self needs the same set twice, of at least 2 samples: x has {len(rows)}, "
            f"reference has {len(reference)}"
        )
    blocks = _distance_blocks(rows, reference, exclude_self)
    return np.sqrt(np.concatenate([block.min(axis=1) for _, block in blocks]))


class PrecisionRecall(NamedTuple):
    """Two fractions in [0, 1]."""

    precision: float
    recall: float


def precision_recall(real: ArrayLike, generated: ArrayLike, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall: the share of each set that lies in the other's support.

    The support of a set S is estimated by the union of the closed balls around its points with
    radius `r_k(s)`, the distance from s to its k-th nearest neighbour in S without s itself:

      precision = share of generated g with `|g - s| <= r_k(s)` for some s in real,
      recall    = share of real x with `|x - s| <= r_k(s)` for some s in generated.

    Precision falls with implausible samples, recall with parts of the data that are not generated.
    Both grow with k and depend on the sizes of the sets: compare at equal sizes. One outlier makes
    one large ball; the paper does nothing about it either.

    Args:
      real: `[n, ...]` with n > k, any real dtype; flattened.
      generated: `[m, ...]` with m > k and samples of the same shape.
      k: which neighbour gives the radius, at least 1.

    Returns:
      Precision and recall, floats.

    Raises:
      ValueError: if the shapes do not fit, k is below 1 or not below n and m, or a value is NaN or
        infinite.

    >>> square = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> precision_recall(square, np.concatenate([square, square + 100]), k=2)
    PrecisionRecall(precision=0.5, recall=1.0)
    """
    rows1, rows2 = samples.as_row_pair(real, generated, ("real", "generated"))
    if not 1 <= k < min(len(rows1), len(rows2)):
        raise ValueError(
            f"k = {k} must be at least 1 and below both numbers of samples: real has {len(rows1)}, "
            f"generated has {len(rows2)}"
        )
    return PrecisionRecall(_share_inside(rows2, rows1, k), _share_inside(rows1, rows2, k))


def _share_inside(rows: np.ndarray, support: np.ndarray, k: int) -> float:
    """Share of `rows` within the k-nearest-neighbour balls of `support`; distances squared."""
    blocks = _distance_blocks(support, support, exclude_self=True)
    radius = np.concatenate([np.partition(block, k - 1, axis=1)[:, k - 1] for _, block in blocks])
    inside = 0
    for _, block in _distance_blocks(rows, support):
        inside += int(np.any(block <= radius, axis=1).sum())
    return inside / len(rows)


def _distance_blocks(
    rows: np.ndarray, reference: np.ndarray, exclude_self: bool = False
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, squared distances of the rows from there to all of `reference`), in order."""
    height = max(1, _BLOCK_ENTRIES // len(reference))
    for start in range(0, len(rows), height):
        block = distance.cdist(rows[start : start + height], reference, "sqeuclidean")
        if exclude_self:
            own = np.arange(len(block))
            block[own, start + own] = np.inf
        yield start, block
