"""Batches as a pure function of (seed, step), so that a run resumes from a step number alone.

A batch is a dict of arrays with the same leading axis. To the caller's arrays are added

  `row`     int32, the example's index in the global batch: what per-example randomness hangs on;
  `weight`  float32, 1 for an example and 0 for padding.

With several processes each gets its contiguous share of the same global batch.
"""

import operator
from collections.abc import Mapping

import numpy as np

Batch = dict[str, np.ndarray]


class Batches:
    """Endless shuffled batches: call it with a step, in any order, at the same cost.

    The examples are the endless concatenation of one permutation per epoch,
    `numpy.random.default_rng([seed, epoch]).permutation(n)`; the global batch of step `t` is the
    rows `t * batch_size` to `(t + 1) * batch_size` of it. So every example comes exactly once per
    epoch, a batch may span epochs, and it may be larger than the data.

    Args:
      arrays: name -> `[n, ...]`. They are kept, not copied, and indexed with integer arrays.
      batch_size: rows of the global batch.
      seed: an integer in [0, 2^32).
      process_index: which share of the global batch this process gets.
      process_count: in how many equal shares it is cut.

    Raises:
      ValueError: for a batch that is empty or that the processes cannot share equally; for arrays
        that are none, empty, without a leading axis, of different lengths, or called `row` or
        `weight`; for a process index, seed or step out of range.

    >>> batches = Batches({"x": np.arange(6)}, 4, seed=0)
    >>> two_epochs = np.concatenate([batches(step)["x"] for step in range(3)])
    >>> sorted(two_epochs[:6].tolist())
    [0, 1, 2, 3, 4, 5]
    >>> batches(1)["row"]
    array([0, 1, 2, 3], dtype=int32)
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        batch_size: int,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._arrays, self._size = _checked_arrays(arrays)
        self._rows = _share(batch_size, process_index, process_count)
        self.batch_size = int(batch_size)
        self.seed = operator.index(seed)
        if not 0 <= self.seed < 2**32:  # from there on, [seed, epoch] would name streams twice
            raise ValueError(f"the seed {seed} lies outside of [0, 2^32)")
        self._recent: dict[int, np.ndarray] = {}

    def __call__(self, step: int) -> Batch:
        """This process's share of the batch of a step: `[batch_size / process_count, ...]` each.

        Args:
          step: at least 0.

        Returns:
          The arrays' rows in their own dtypes, with `row` and `weight`.
        """
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"the step is {step}, and steps count from 0")
        first = step * self.batch_size + int(self._rows[0])
        last = first + len(self._rows) - 1
        pieces = []
        for epoch in range(first // self._size, last // self._size + 1):
            start = max(first - epoch * self._size, 0)
            pieces.append(self._permutation(epoch)[start : last + 1 - epoch * self._size])
        return _gather(self._arrays, np.concatenate(pieces), self._rows)

    def _permutation(self, epoch: int) -> np.ndarray:
        recent = self._recent
        found = recent.get(epoch)
        if found is None:
            found = np.random.default_rng([self.seed, epoch]).permutation(self._size)
            # The two latest are kept. One assignment, so that threads may share this object.
            self._recent = dict([*recent.items()][-1:]) | {epoch: found}
        return found


class EvaluationBatches:
    """Every example once, in order; the last batch is padded to full size.

    Padding repeats the first examples of the data, with `weight` 0: shapes stay the same, and a
    weighted sum over all batches (and processes) is the sum over the data.

    Args:
      arrays: as in `Batches`.
      batch_size: rows of the global batch.
      process_index: as in `Batches`.
      process_count: as in `Batches`.

    `len()` is the number of batches, the same for all processes.

    Raises:
      ValueError: as in `Batches`.
      IndexError: when called with an index that is negative or not below `len()`.

    >>> batches = EvaluationBatches({"x": np.arange(5)}, 4)
    >>> len(batches)
    2
    >>> batches(1)["x"], batches(1)["weight"]
    (array([4, 0, 1, 2]), array([1., 0., 0., 0.], dtype=float32))
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._arrays, self._size = _checked_arrays(arrays)
        self._rows = _share(batch_size, process_index, process_count)
        self.batch_size = int(batch_size)

    def __len__(self) -> int:
        return -(-self._size // self.batch_size)

    def __call__(self, index: int) -> Batch:
        """This process's share of a batch, `0 <= index < len()`; laid out as in `Batches`."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"no batch {index} among the {len(self)} of {self._size} examples")
        position = index * self.batch_size + self._rows.astype(np.int64)
        batch = _gather(self._arrays, position % self._size, self._rows)
        batch["weight"] = (position < self._size).astype(np.float32)
        return batch


def _checked_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    taken = {"row", "weight"} & set(arrays)
    if taken:
        raise ValueError(f"the names {sorted(taken)} are added to every batch: rename the arrays")
    held = {name: np.asarray(array) for name, array in arrays.items()}
    shapes = {name: array.shape for name, array in held.items()}
    lengths = {shape[0] if shape else None for shape in shapes.values()}
    if len(lengths) != 1 or None in lengths or 0 in lengths:
        raise ValueError(f"arrays need one common first axis of at least 1, but have {shapes}")
    return held, lengths.pop()  # pyright: ignore[reportReturnType]


def _share(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """Rows of the global batch that belong to this process, int32."""
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}, and must be at least 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"there is no process {process_index} among {process_count}")
    share, left_over = divmod(operator.index(batch_size), process_count)
    if left_over:
        raise ValueError(
            f"a batch of {batch_size} rows cannot be shared equally by {process_count} processes"
        )
    return np.arange(process_index * share, (process_index + 1) * share, dtype=np.int32)


def _gather(arrays: dict[str, np.ndarray], index: np.ndarray, row: np.ndarray) -> Batch:
    batch = {name: array[index] for name, array in arrays.items()}
    return batch | {"row": row.copy(), "weight": np.ones(len(row), np.float32)}
