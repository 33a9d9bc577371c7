import itertools
import threading
import time

import numpy as np
import pytest

from blogjax.data.batches import Batches
from blogjax.train.prefetch import prefetch


def _arrays(n):
    return {"x": np.arange(n), "image": np.arange(n * 6, dtype=np.float32).reshape(n, 2, 3)}


def _prefetching():
    return [thread for thread in threading.enumerate() if thread.name == "blogjax-prefetch"]


def _numbered(step):
    return {"x": np.array([step])}


@pytest.mark.parametrize("depth", [0, 1, 2, 100])
def test_prefetch_yields_what_a_plain_loop_does(depth):
    def put(batch):
        return batch["x"].tolist()

    batches = Batches(_arrays(7), 4, seed=0)
    expected = [put(batches(step)) for step in range(5, 25)]
    assert list(prefetch(batches, 5, 25, put, depth)) == expected
    assert list(prefetch(batches, 5, 5, put, depth)) == []
    assert _prefetching() == []


def test_depth_zero_prepares_on_demand_in_this_thread():
    seen = []

    def put(batch):
        seen.append((int(batch["x"][0]), threading.get_ident()))

    stream = prefetch(_numbered, 0, 5, put, depth=0)
    next(stream)
    assert seen == [(0, threading.get_ident())]


def test_prefetch_runs_ahead_by_its_depth_and_no_further():
    seen = []
    third = threading.Event()

    def put(batch):
        seen.append(int(batch["x"][0]))
        if len(seen) == 3:
            third.set()
        return threading.get_ident()

    stream = prefetch(_numbered, 0, 10, put, depth=2)
    assert seen == [] and _prefetching() == []  # nothing before it is asked for
    assert next(stream) != threading.get_ident()
    assert third.wait(10)
    time.sleep(0.05)
    assert seen == [0, 1, 2]
    stream.close()


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("where", ["batches", "put"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_surfaces_in_its_place_with_the_step(depth, where, error):
    def fail(batch):
        if batch["x"][0] == 3:
            raise error("unreadable")
        return batch

    if where == "put":
        stream = prefetch(_numbered, 1, 9, fail, depth)
    else:
        stream = prefetch(lambda step: fail(_numbered(step)), 1, 9, lambda batch: batch, depth)
    assert [int(batch["x"][0]) for batch in itertools.islice(stream, 2)] == [1, 2]
    with pytest.raises(error, match="unreadable") as info:
        next(stream)
    assert info.value.__notes__ == ["while preparing the batch of step 3"]
    assert _prefetching() == []


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_early_ends_the_thread(taken):
    for leave in ("close", "drop", "throw"):
        stream = prefetch(_numbered, 0, 10**9, lambda batch: batch)
        assert len([*itertools.islice(stream, taken)]) == taken
        assert len(_prefetching()) == (taken > 0)
        if leave == "close":
            stream.close()
        elif leave == "throw":
            with pytest.raises(ZeroDivisionError):
                stream.throw(ZeroDivisionError())
        del stream
        assert _prefetching() == []


def test_closing_waits_for_the_batch_in_the_making():
    begun, finished = threading.Event(), []

    def slow(step):
        if step == 1:
            begun.set()
            time.sleep(0.1)
            finished.append(step)
        return _numbered(step)

    stream = prefetch(slow, 0, 5, lambda batch: batch)
    next(stream)
    assert begun.wait(10)
    stream.close()
    assert finished == [1] and _prefetching() == []


def test_a_generator_left_open_does_not_keep_the_interpreter():
    stream = prefetch(_numbered, 0, 5, lambda batch: batch)
    next(stream)
    assert all(thread.daemon for thread in _prefetching())
    stream.close()


def test_negative_depth_is_refused_at_once():
    with pytest.raises(ValueError, match="-1"):
        prefetch(_numbered, 0, 5, lambda batch: batch, depth=-1)
