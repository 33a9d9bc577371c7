"""Batches as a pure function of (seed, step), so that a run resumes from a step number alone.

A batch is a dict of arrays with the same leading axis. To the caller's arrays are added

  `row`     int32, the example's index in the global batch: what per-example randomness hangs on;
  `weight`  float32, 1 for an example and 0 for padding.

With several processes each gets its contiguous share of the same global batch.
"""

import operator
from collections.abc import Iterable, Mapping

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
        self._arrays, size = _checked_arrays(arrays)
        self._rows = share_of_rows(batch_size, process_index, process_count)
        self._examples = EpochOrder(size, seed)
        self.batch_size = int(batch_size)
        self.seed = self._examples.seed

    def __call__(self, step: int) -> Batch:
        """This process's share of the batch of a step: `[batch_size / process_count, ...]` each.

        Args:
          step: at least 0.

        Returns:
          The arrays' rows in their own dtypes, with `row` and `weight`.
        """
        examples = self._examples(training_positions(step, self.batch_size, self._rows))
        arrays = {name: array[examples] for name, array in self._arrays.items()}
        return with_rows(arrays, self._rows)


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
        self._rows = share_of_rows(batch_size, process_index, process_count)
        self.batch_size = int(batch_size)

    def __len__(self) -> int:
        return -(-self._size // self.batch_size)

    def __call__(self, index: int) -> Batch:
        """This process's share of a batch, `0 <= index < len()`; laid out as in `Batches`."""
        examples, weight = evaluation_rows(index, self.batch_size, self._rows, self._size)
        arrays = {name: array[examples] for name, array in self._arrays.items()}
        return with_rows(arrays, self._rows, weight)


class EpochOrder:
    """Which example stands where in the endless concatenation of one permutation per epoch.

    The permutation of an epoch is `numpy.random.default_rng([seed, epoch]).permutation(size)`.
    Calls may come from several threads and in any order; the two latest epochs are kept.

    Args:
      size: number of examples, at least 1.
      seed: an integer in [0, 2^32).

    Raises:
      ValueError: for a size or seed out of range.

    >>> order = EpochOrder(3, seed=0)
    >>> order(range(3, 6)).tolist() == np.random.default_rng([0, 1]).permutation(3).tolist()
    True
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed = operator.index(size), operator.index(seed)
        if self.size < 1:
            raise ValueError(f"an epoch of {size} examples: there must be at least 1")
        if not 0 <= self.seed < 2**32:  # from there on, [seed, epoch] would name streams twice
            raise ValueError(f"the seed {seed} lies outside of [0, 2^32)")
        self._recent: dict[int, np.ndarray] = {}

    def __call__(self, positions: range) -> np.ndarray:
        """The examples at consecutive positions of the stream: int64 `[len(positions)]`."""
        first, last, size = positions[0], positions[-1], self.size
        pieces = []
        for epoch in range(first // size, last // size + 1):
            start = max(first - epoch * size, 0)
            pieces.append(self._permutation(epoch)[start : last + 1 - epoch * size])
        return np.concatenate(pieces)

    def _permutation(self, epoch: int) -> np.ndarray:
        recent = self._recent
        found = recent.get(epoch)
        if found is None:
            found = np.random.default_rng([self.seed, epoch]).permutation(self.size)
            # The two latest are kept. One assignment, so that threads may share this object.
            self._recent = dict([*recent.items()][-1:]) | {epoch: found}
        return found


def _checked_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    check_names(arrays)
    held = {name: np.asarray(array) for name, array in arrays.items()}
    shapes = {name: array.shape for name, array in held.items()}
    lengths = {shape[0] if shape else None for shape in shapes.values()}
    if len(lengths) != 1 or None in lengths or 0 in lengths:
        raise ValueError(f"arrays need one common first axis of at least 1, but have {shapes}")
    return held, lengths.pop()  # pyright: ignore[reportReturnType]


def share_of_rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """Rows of the global batch that belong to a process: int32, consecutive.

    Raises:
      ValueError: for an empty batch, one that does not divide, or a process out of range.
    """
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


def training_positions(step: int, batch_size: int, rows: np.ndarray) -> range:
    """Where in the endless stream of examples the rows of a step stand.

    Raises:
      ValueError: if the step is negative.
    """
    step = operator.index(step)
    if step < 0:
        raise ValueError(f"the step is {step}, and steps count from 0")
    first = step * batch_size + int(rows[0])
    return range(first, first + len(rows))


def evaluation_rows(
    index: int, batch_size: int, rows: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Examples (int64) and weights (float32) of the rows of an evaluation batch.

    Raises:
      IndexError: if there is no such batch among those of `size` examples.
    """
    index, count = operator.index(index), -(-size // batch_size)
    if not 0 <= index < count:
        raise IndexError(f"no batch {index} among the {count} of {size} examples")
    position = index * batch_size + rows.astype(np.int64)
    return position % size, (position < size).astype(np.float32)


def with_rows(arrays: Batch, rows: np.ndarray, weight: np.ndarray | None = None) -> Batch:
    """Adds `row` and `weight` (default 1 everywhere) to the arrays of a batch."""
    weight = np.ones(len(rows), np.float32) if weight is None else weight
    return arrays | {"row": rows.copy(), "weight": weight}


def check_names(names: Iterable[str]) -> None:
    """Refuses arrays called `row` or `weight`, which every batch has besides.

    Raises:
      ValueError: with the names.
    """
    taken = {"row", "weight"} & set(names)
    if taken:
        raise ValueError(f"the names {sorted(taken)} are added to every batch: rename the arrays")
