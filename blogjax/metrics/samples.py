"""What every comparison of two sets of samples asks of them."""

import numpy as np
from numpy.typing import ArrayLike


def as_rows(samples: ArrayLike, name: str, *, at_least: int = 1) -> np.ndarray:
    """Returns samples `[n, ...]` as float64 rows `[n, d]`.

    Args:
      samples: `[n, ...]`, real numbers of any dtype.
      name: what an error calls them.
      at_least: how many there must be.

    Raises:
      ValueError: if the rank is below 2, there are fewer than `at_least` samples or no numbers in
        them, or one is NaN or infinite.

    >>> as_rows(np.zeros((5, 8, 8, 1), np.float32), "digits").shape
    (5, 64)
    """
    array = np.asarray(samples)
    if array.ndim < 2:
        raise ValueError(f"{name} has shape {array.shape}, but samples are [n, ...] with rank >= 2")
    if len(array) < at_least or array[:1].size == 0:
        raise ValueError(
            f"{name} has shape {array.shape}: at least {at_least} samples of at least 1 number are "
            "needed"
        )
    rows = array.reshape(len(array), -1).astype(np.float64)
    bad = int(np.sum(~np.isfinite(rows).all(axis=1)))
    if bad:
        raise ValueError(f"{name} has NaN or infinity in {bad} of its {len(rows)} samples")
    return rows


def as_row_pair(
    x: ArrayLike, y: ArrayLike, names: tuple[str, str], *, at_least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """`as_rows` of two sets whose samples have the same shape.

    Raises:
      ValueError: as in `as_rows`, or if the shapes behind the first axis differ.

    >>> x, y = as_row_pair(np.zeros((5, 2)), np.zeros((3, 2)), ("real", "generated"))
    >>> x.shape, y.shape
    ((5, 2), (3, 2))
    """
    shapes = np.shape(x), np.shape(y)
    if shapes[0][1:] != shapes[1][1:]:
        raise ValueError(
            f"samples of different shapes: {names[0]} has {shapes[0]}, {names[1]} has {shapes[1]}"
        )
    return as_rows(x, names[0], at_least=at_least), as_rows(y, names[1], at_least=at_least)
