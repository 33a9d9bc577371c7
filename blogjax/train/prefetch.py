"""Batches prepared ahead of the step that needs them, by one thread."""

import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

from blogjax.train.task import HostBatch

T = TypeVar("T")


def prefetch(
    batches: Callable[[int], HostBatch],
    start: int,
    stop: int,
    put: Callable[[HostBatch], T],
    depth: int = 2,
) -> Generator[T, None, None]:
    """Yields `put(batches(step))` for `start <= step < stop`, prepared ahead in one thread.

    The thread starts with the first `next` and ends with the last batch, with an error, or when the
    generator is closed or dropped; closing waits for the batch in the making. Settings of jax that
    belong to a thread (a transfer guard, a default device, x64) do not reach `put`: give it the
    sharding it needs.

    Args:
      batches: step -> batch on the host.
      start: first step.
      stop: the step after the last one; nothing is yielded if it is not above `start`.
      put: places a batch on the devices. Called in the thread, in order.
      depth: how many batches may lie ready besides the one in use; 0 prepares each one when it is
        asked for, without a thread.

    Returns:
      A generator.

    Raises:
      ValueError: if `depth` is negative.

    Whatever `batches` or `put` raises is raised to the consumer in its place in the order, with a
    note that names the step.

    >>> import numpy as np
    >>> batches = lambda step: {"x": np.full(2, step)}
    >>> [b["x"].tolist() for b in prefetch(batches, 3, 5, put=lambda batch: batch)]
    [[3, 3], [4, 4]]
    """
    if depth < 0:
        raise ValueError(f"the depth of prefetching is {depth}, and must be at least 0")

    def prepare(step: int) -> T:
        try:
            return put(batches(step))
        except BaseException as error:
            error.add_note(f"while preparing the batch of step {step}")
            raise

    if depth == 0:
        return (prepare(step) for step in range(start, stop))
    return _prepared_ahead(prepare, range(start, stop), depth)


def _prepared_ahead(
    prepare: Callable[[int], T], steps: range, depth: int
) -> Generator[T, None, None]:
    ready: queue.SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = queue.SimpleQueue()
    free = threading.Semaphore(depth)
    stopped = threading.Event()

    def work():
        for step in steps:
            free.acquire()
            if stopped.is_set():
                return
            try:
                ready.put((prepare(step), None))
            except BaseException as error:  # also what is no Exception: the consumer is waiting
                ready.put((None, error))
                return

    # A daemon, so that a generator nobody closed does not keep the interpreter from ending.
    thread = threading.Thread(target=work, name="blogjax-prefetch", daemon=True)
    thread.start()
    try:
        for _ in steps:
            value, error = ready.get()
            if error is not None:
                raise error
            free.release()
            yield value  # pyright: ignore[reportReturnType]
    finally:
        stopped.set()
        free.release()
        thread.join()
