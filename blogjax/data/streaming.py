"""Batches read from a random-access source while training goes on, ahead of it, by grain.

For data that does not fit in memory. The batches are those that `blogjax.data.batches` makes of the
same examples, bit for bit, so a run may change from one to the other and resume. A source is
anything with a length and `source[index] -> {name: array}`: a TFDS data source, a grain source, a
list. One with `__getitems__(indices)` is read a batch at a time.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from blogjax.data import batches
from blogjax.data.batches import Batch, EpochOrder

_CHUNK = 256  # examples read at once into memory


class Source(Protocol):
    """Examples by number: `source[index]` for `0 <= index < len(source)`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class StreamedBatches:
    """`blogjax.data.batches.Batches` of a source instead of arrays: the same batches.

    Called with consecutive steps, it returns what grain's threads have read ahead; called with
    another step, it starts reading there, at the same cost whatever the step. Only this process's
    rows are read (and example 0, once, for the shapes). At most `ahead` batches are held besides
    the one returned. Several threads may call it, one at a time.

    Args:
      source: the examples. Every one must have the shapes and dtypes of example 0.
      batch_size: rows of the global batch.
      seed: an integer in [0, 2^32).
      features: names of what goes into the batch; None for all that example 0 has.
      process_index: which share of the global batch this process gets.
      process_count: in how many equal shares it is cut.
      threads: how many batches are in the making at the same time. More than one pays off for
        PNG and JPEG where cores are idle, and for slow disks; for stored tensors it does not.
      ahead: how many batches are in the making or ready; at least `threads`.

    Raises:
      ValueError: as `Batches`; if there is no such feature, or it is text, nested, or differs in
        shape or dtype from that of example 0; for `threads` or `ahead` out of range.
      ImportError: if grain is not installed.

    What reading raises, the call for the step raises; the next call starts reading anew.

    >>> source = [{"x": np.float32(i)} for i in range(6)]
    >>> streamed = StreamedBatches(source, 4, seed=0)
    >>> in_memory = batches.Batches(decode_all(source), 4, seed=0)
    >>> all(np.array_equal(streamed(t)["x"], in_memory(t)["x"]) for t in (0, 1, 10**9))
    True
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        seed: int,
        features: Sequence[str] | None = None,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 1,
        ahead: int = 2,
    ):
        self._rows = batches.share_of_rows(batch_size, process_index, process_count)
        read = _reader(source, features)
        order = EpochOrder(len(source), seed)
        self.batch_size, self.seed = int(batch_size), order.seed
        # Bound to what it needs, not to this object, which can then be dropped at once.
        make = functools.partial(_training_batch, read, order, self.batch_size, self._rows)
        self._batches = _Ahead(make, sys.maxsize, threads, ahead)

    def __call__(self, step: int) -> Batch:
        """This process's share of the batch of a step, as `Batches` returns it."""
        # Also checks the step, here and not in a thread.
        batches.training_positions(step, self.batch_size, self._rows)
        return self._batches(step)

    def close(self) -> None:
        """Ends the threads and drops what they read; happens by itself to a dropped object.

        A later call starts them again.
        """
        self._batches.close()


class StreamedEvaluationBatches:
    """`blogjax.data.batches.EvaluationBatches` of a source instead of arrays: the same batches.

    Args:
      source: as in `StreamedBatches`.
      batch_size: rows of the global batch.
      process_index: as in `StreamedBatches`.
      process_count: as in `StreamedBatches`.
      features: as in `StreamedBatches`.
      threads: as in `StreamedBatches`.
      ahead: as in `StreamedBatches`.

    `len()` is the number of batches, the same for all processes.

    Raises:
      ValueError: as in `StreamedBatches`.
      IndexError: when called with an index that is negative or not below `len()`.

    >>> evaluation = StreamedEvaluationBatches([{"x": i} for i in range(5)], 4)
    >>> len(evaluation), evaluation(1)["x"], evaluation(1)["weight"]
    (2, array([4, 0, 1, 2]), array([1., 0., 0., 0.], dtype=float32))
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        *,
        features: Sequence[str] | None = None,
        threads: int = 1,
        ahead: int = 2,
    ):
        self._rows = batches.share_of_rows(batch_size, process_index, process_count)
        read, self._size = _reader(source, features), len(source)
        self.batch_size = int(batch_size)
        place = (self.batch_size, self._rows, self._size)
        make = functools.partial(_evaluation_batch, read, *place)
        self._batches = _Ahead(make, len(self), threads, ahead)

    def __len__(self) -> int:
        return -(-self._size // self.batch_size)

    def __call__(self, index: int) -> Batch:
        """This process's share of a batch, `0 <= index < len()`."""
        batches.evaluation_rows(index, self.batch_size, self._rows, self._size)
        return self._batches(index)

    def close(self) -> None:
        """As in `StreamedBatches`."""
        self._batches.close()


def decode_all(source: Source, features: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Reads every example into memory.

    Args:
      source: as in `StreamedBatches`.
      features: as in `StreamedBatches`.

    Returns:
      name -> `[len(source), ...]`, in the source's order and dtypes.

    Raises:
      ValueError: as in `StreamedBatches`.

    >>> decode_all([{"x": [0.5, 1.0]}, {"x": [2.0, 3.0]}])["x"].shape
    (2, 2)
    """
    read = _Reader(source, features)
    arrays = read.empty(len(source))
    for start in range(0, len(source), _CHUNK):
        chunk = range(start, min(start + _CHUNK, len(source)))
        for name, rows in read(chunk).items():
            arrays[name][chunk.start : chunk.stop] = rows
    return arrays


def nbytes(source: Source, features: Sequence[str] | None = None) -> int:
    """How many bytes `decode_all` would take, judged by example 0.

    >>> nbytes([{"x": np.zeros(3, np.float32)}] * 10)
    120
    """
    return len(source) * sum(array.nbytes for array in _Reader(source, features).empty(1).values())


class _Reader:
    """Reads examples as arrays, and holds them to the shapes and dtypes of example 0."""

    def __init__(self, source: Source, features: Sequence[str] | None):
        if len(source) < 1:
            raise ValueError("the source holds no examples")
        self._source = source
        first = source[0]
        names = list(first) if features is None else list(features)
        unknown = [name for name in names if name not in first]
        if unknown or not names:
            raise ValueError(f"no features {unknown} in the source: there are {sorted(first)}")
        self._layout = {name: _array(name, first[name], 0) for name in names}

    def empty(self, count: int) -> dict[str, np.ndarray]:
        return {
            name: np.empty((count, *array.shape), array.dtype)
            for name, array in self._layout.items()
        }

    def __call__(self, indices: Iterable[int]) -> dict[str, np.ndarray]:
        indices = [int(index) for index in indices]
        read_many = getattr(self._source, "__getitems__", None)
        examples = read_many(indices) if read_many else map(self._source.__getitem__, indices)
        arrays = self.empty(len(indices))
        for place, (index, example) in enumerate(zip(indices, examples, strict=True)):
            for name, first in self._layout.items():
                value = _array(name, example[name], index)
                if (value.shape, value.dtype) != (first.shape, first.dtype):
                    raise ValueError(
                        f"the feature {name!r} varies: {_layout(first)} in example 0, "
                        f"{_layout(value)} in example {index}. Leave it out, or give a transform "
                        "that makes all examples alike"
                    )
                arrays[name][place] = value
        return arrays


def _reader(source: Source, features: Sequence[str] | None) -> _Reader:
    reader = _Reader(source, features)
    batches.check_names(reader.empty(0))
    return reader


def _array(name: str, value: Any, index: int) -> np.ndarray:
    what = type(value).__name__
    if not isinstance(value, Mapping):
        try:
            array = np.asarray(value)
        except ValueError:
            what = "ragged"
        else:
            if array.dtype.kind not in "OSU":
                return array
            what = f"{what} {array.dtype}"
    raise ValueError(
        f"the feature {name!r} of example {index} is no array of numbers ({what}). Leave it out, "
        "or give a transform that makes it one"
    )


def _layout(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _training_batch(
    read: _Reader, order: EpochOrder, batch_size: int, rows: np.ndarray, step: int
) -> Batch:
    positions = batches.training_positions(step, batch_size, rows)
    return batches.with_rows(read(order(positions)), rows)


def _evaluation_batch(
    read: _Reader, batch_size: int, rows: np.ndarray, size: int, index: int
) -> Batch:
    examples, weight = batches.evaluation_rows(index, batch_size, rows, size)
    return batches.with_rows(read(examples), rows, weight)


class _Ahead:
    """A function of an index below `count`, whose next values grain's threads prepare ahead."""

    def __init__(self, make: Callable[[int], Batch], count: int, threads: int, ahead: int):
        if not 1 <= threads <= ahead:
            raise ValueError(f"threads={threads} and ahead={ahead} must be 1 <= threads <= ahead")
        try:
            import grain
        except ImportError as error:
            raise ImportError(
                "batches are streamed by grain, which is not installed: pip install blogjax[train]"
            ) from error
        self._set_next_index = grain.experimental.set_next_index
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        self._dataset = grain.MapDataset.range(count).map(make).to_iter_dataset(options)
        self._lock = threading.Lock()
        self._iterator: Any = None
        self._next: int | None = None

    def __call__(self, index: int) -> Batch:
        with self._lock:
            if self._iterator is None:
                self._iterator = iter(self._dataset)
                self._next = None
            if index != self._next:
                self._set_next_index(self._iterator, int(index))
            # Unknown until it succeeds: after an error grain's count and its buffer disagree.
            self._next = None
            value = next(self._iterator)
            self._next = int(index) + 1
            return value

    def close(self) -> None:
        with self._lock:
            if self._iterator is not None:
                self._iterator.close()
                self._iterator = None
