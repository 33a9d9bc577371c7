import gc
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blogjax.data import streaming
from blogjax.data.batches import Batches, EvaluationBatches
from blogjax.data.streaming import StreamedBatches, StreamedEvaluationBatches, decode_all

sizes = st.integers(1, 20)
seeds = st.integers(0, 2**32 - 1)


class Examples:
    """A source that notes what is read; example i fails as often as `failing[i]` says."""

    def __init__(self, n, failing=None):
        self.n, self.read, self.failing = n, [], dict(failing or {})

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        assert type(index) is int and 0 <= index < self.n
        self.read.append(index)
        if self.failing.get(index):
            self.failing[index] -= 1
            raise OSError(f"example {index} is gone")
        image = np.arange(6 * index, 6 * index + 6).astype(np.uint8).reshape(2, 3)
        return {"x": np.int32(index), "image": image, "half": np.float16(index / 2)}


def arrays_of(n):
    image = np.arange(6 * n).astype(np.uint8).reshape(n, 2, 3)
    half = (np.arange(n) / 2).astype(np.float16)
    return {"x": np.arange(n, dtype=np.int32), "image": image, "half": half}


def assert_same(got, expected):
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def settled(values, seconds=0.1):
    """What the length of a list comes to once it has not changed for a while."""
    length, since = len(values), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.01)
        if len(values) != length:
            length, since = len(values), time.monotonic()
    return length


@given(sizes, st.integers(1, 6), st.integers(1, 3), seeds, st.integers(1, 3), st.data())
def test_batches_are_those_from_memory_in_any_order_of_steps(n, share, count, seed, threads, data):
    process = data.draw(st.integers(0, count - 1))
    place = dict(seed=seed, process_index=process, process_count=count)
    streamed = StreamedBatches(Examples(n), share * count, **place, threads=threads, ahead=3)
    in_memory = Batches(arrays_of(n), share * count, **place)
    assert streamed.batch_size == share * count and streamed.seed == seed
    jumps = data.draw(st.lists(st.integers(0, 2**50), max_size=3))
    for step in [0, 1, 2, 5, 6, 3, 3, *jumps, 0]:
        batch = streamed(np.int64(step))
        assert_same(batch, in_memory(step))
        for value in batch.values():
            value[...] = 0  # a consumer that writes into its batch does no harm
    streamed.close()


@given(sizes, st.integers(1, 6), st.integers(1, 3), st.data())
def test_evaluation_batches_are_those_from_memory(n, share, count, data):
    place = (share * count, data.draw(st.integers(0, count - 1)), count)
    streamed = StreamedEvaluationBatches(Examples(n), *place)
    in_memory = EvaluationBatches(arrays_of(n), *place)
    assert len(streamed) == len(in_memory) and streamed.batch_size == in_memory.batch_size
    order = [*range(len(streamed))] * 2 + data.draw(st.permutations(range(len(streamed))))
    for index in order:
        assert_same(streamed(index), in_memory(index))
    for index in (-1, len(streamed)):
        with pytest.raises(IndexError, match=f"{index}.*{len(streamed)}.*{n}"):
            streamed(index)
    streamed.close()


def test_only_the_rows_of_this_process_are_read_and_only_so_far_ahead():
    source = Examples(40)
    streamed = StreamedBatches(
        source, 8, seed=3, process_index=1, process_count=2, threads=2, ahead=3
    )
    assert source.read == [0]  # for the shapes
    source.read.clear()
    stream = np.random.default_rng([3, 0]).permutation(40).reshape(5, 2, 4)[:, 1]
    streamed(0)
    assert settled(source.read) == 4 * (1 + 3)
    assert sorted(source.read) == sorted(stream[:4].ravel())
    streamed(1)
    assert settled(source.read) == 4 * (2 + 3)
    streamed(10**12)
    assert settled(source.read) == 4 * (2 + 3) + 4 * (1 + 3)


def test_an_evaluation_reads_each_example_once():
    source = Examples(11)
    streamed = StreamedEvaluationBatches(source, 4, ahead=2)
    source.read.clear()
    for index in range(3):
        streamed(index)
    assert settled(source.read) == 12 and sorted(source.read) == sorted([*range(11), 0])


def test_batches_are_read_whole_where_the_source_can():
    class ManyAtOnce(Examples):
        def __getitems__(self, indices):
            assert all(type(index) is int for index in indices)
            asked.append(len(indices))
            return [self[index] for index in indices]

    asked = []
    streamed = StreamedBatches(ManyAtOnce(20), 6, seed=0, threads=1, ahead=1)
    assert_same(streamed(2), Batches(arrays_of(20), 6, seed=0)(2))
    assert settled(asked) == 2 and set(asked) == {6}


def test_after_an_error_the_batches_are_the_right_ones_again():
    order = np.random.default_rng([0, 0]).permutation(30)
    source = Examples(30, failing={order[7]: 2})  # in step 1, and again when it is tried anew
    streamed, in_memory = StreamedBatches(source, 5, seed=0), Batches(arrays_of(30), 5, seed=0)
    assert_same(streamed(0), in_memory(0))
    for _ in range(2):
        with pytest.raises(OSError, match=f"example {order[7]} is gone"):
            streamed(1)
    for step in (1, 2, 3):
        assert_same(streamed(step), in_memory(step))


def test_threads_may_share_it():
    streamed = StreamedBatches(Examples(50), 4, seed=1)
    in_memory = Batches(arrays_of(50), 4, seed=1)
    right = []

    def work(first):
        for step in range(first, first + 40):
            right.append(streamed(step)["x"].tolist() == in_memory(step)["x"].tolist())

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1, 200, 400)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # they get in each other's way as often as can be
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert right == [True] * 160


def _readers():
    return sum(thread.name.startswith("grain-prefetch") for thread in threading.enumerate())


def _none_is_left():
    deadline = time.monotonic() + 5
    while _readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not _readers()


@pytest.mark.parametrize("end", ["close", "drop"])
def test_threads_end_when_it_is_closed_or_dropped(end):
    gc.collect()
    assert _none_is_left()
    streamed = StreamedBatches(Examples(50), 4, seed=1, threads=2, ahead=4)
    assert not _readers()  # before the first call there is nothing to do
    streamed(0)
    assert _readers()
    gc.disable()  # a cycle of references would keep the threads until some collection
    try:
        if end == "close":
            streamed.close()
            assert _none_is_left()
            assert_same(streamed(9), Batches(arrays_of(50), 4, seed=1)(9))
            streamed.close()
            streamed.close()
        else:
            del streamed
        assert _none_is_left()
    finally:
        gc.enable()


def test_features_are_chosen_by_name():
    streamed = StreamedBatches(Examples(5), 2, seed=0, features=["half", "x"])
    assert list(streamed(0)) == ["half", "x", "row", "weight"]
    evaluation = StreamedEvaluationBatches(Examples(5), 2, features=["image"])
    assert list(evaluation(0)) == ["image", "row", "weight"]
    assert list(decode_all(Examples(5), ["x"])) == ["x"]


@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])
def test_everything_is_read_into_memory(n):
    source = Examples(n)
    assert_same(decode_all(source), arrays_of(n))
    assert sorted(source.read[1:]) == list(range(n))
    assert streaming.nbytes(Examples(n)) == sum(array.nbytes for array in arrays_of(n).values())


def test_values_without_a_dtype_take_that_of_numpy():
    arrays = decode_all([{"a": 1, "b": 0.5, "c": [True, False]}] * 2)
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        "a": "int64", "b": "float64", "c": "bool"
    }  # fmt: skip
    assert arrays["c"].shape == (2, 2)


def _with(name, value):
    return [{"x": 1.0, name: value}] * 3


WRONG = [
    (dict(source=[]), "no examples"),
    (dict(features=["x", "y", "z"]), r"\['y', 'z'\].*\['x'\]"),
    (dict(features=[]), r"\['x'\]"),
    (dict(source=_with("row", 1)), r"\['row'\]"),
    (dict(source=_with("weight", 1)), r"\['weight'\]"),
    (dict(source=_with("text", b"abc")), "'text' of example 0.*bytes.*transform"),
    (dict(source=_with("name", "abc")), "'name' of example 0.*str.*transform"),
    (dict(source=_with("boxes", {"y": 1})), "'boxes' of example 0.*dict"),
    (dict(source=_with("ragged", [[1], [2, 3]])), "'ragged' of example 0.*ragged"),
    (dict(source=_with("nothing", None)), "'nothing' of example 0"),
    (dict(batch_size=0), "batch size is 0"),
    (dict(batch_size=3, process_count=2), "3 rows.*2 processes"),
    (dict(process_index=1), "no process 1 among 1"),
    (dict(threads=0), "threads=0"),
    (dict(threads=3, ahead=2), "threads=3 and ahead=2"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[m for _, m in WRONG])
@pytest.mark.parametrize(
    "kind", [lambda **k: StreamedBatches(**k, seed=0), StreamedEvaluationBatches]
)
def test_wrong_arguments_are_refused(kind, wrong, message):
    arguments = dict(source=[{"x": 1.0}] * 3, batch_size=2)
    kind(**arguments)
    with pytest.raises(ValueError, match=message):
        kind(**arguments | wrong)


def test_seeds_and_steps_out_of_range_are_refused():
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=str(seed)):
            StreamedBatches(Examples(3), 2, seed=seed)
    streamed = StreamedBatches(Examples(3), 2, seed=0)
    with pytest.raises(ValueError, match="-1"):
        streamed(-1)
    with pytest.raises(TypeError):
        streamed(0.5)


DIFFERENT = [
    (np.zeros((5, 4, 3), np.uint8), r"uint8\[2, 3\] in example 0, uint8\[5, 4, 3\] in example 2"),
    (np.zeros((2, 3), np.int16), r"uint8\[2, 3\] in example 0, int16\[2, 3\] in example 2"),
    (np.uint8(1), r"uint8\[2, 3\] in example 0, uint8\[\] in example 2"),
]


@pytest.mark.parametrize(("value", "message"), DIFFERENT, ids=[m for _, m in DIFFERENT])
def test_a_feature_that_varies_is_named_with_both_shapes(value, message):
    source = [{"image": np.zeros((2, 3), np.uint8)}] * 4
    source[2] = {"image": value}
    with pytest.raises(ValueError, match=f"'image' varies: {message}.*transform"):
        decode_all(source)
    with pytest.raises(ValueError, match=f"'image' varies: {message}.*transform"):
        StreamedBatches(source, 4, seed=0)(0)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"grain.*pip install blogjax\[train\]"):
        StreamedBatches(Examples(3), 2, seed=0)
