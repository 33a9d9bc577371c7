import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blogjax.data.batches import Batches, EvaluationBatches

sizes = st.integers(1, 20)
seeds = st.integers(0, 2**32 - 1)


def _arrays(n):
    return {"x": np.arange(n), "image": np.arange(n * 6, dtype=np.float32).reshape(n, 2, 3)}


@given(sizes, st.integers(1, 50), seeds)
def test_every_example_comes_once_per_epoch(n, batch_size, seed):
    batches = Batches(_arrays(n), batch_size, seed=seed)
    steps = -(-3 * n // batch_size)
    stream = np.concatenate([batches(step)["x"] for step in range(steps)])
    epochs = stream[: 3 * n].reshape(3, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (3, 1)))


@given(sizes, st.integers(1, 50), seeds)
def test_the_stream_is_the_one_that_is_documented(n, batch_size, seed):
    epochs = [np.random.default_rng([seed, e]).permutation(n) for e in range(200 // n + 1)]
    stream = np.concatenate(epochs)
    batches = Batches(_arrays(n), batch_size, seed=seed)
    for step in range(200 // batch_size):
        expected = stream[step * batch_size : (step + 1) * batch_size]
        np.testing.assert_array_equal(batches(step)["x"], expected)


@given(sizes, sizes, seeds, st.permutations(range(8)))
def test_a_batch_depends_on_seed_and_step_alone(n, batch_size, seed, order):
    in_order = [Batches(_arrays(n), batch_size, seed=seed)(step) for step in range(8)]
    batches = Batches(_arrays(n), batch_size, seed=seed)
    for step in order:
        got = batches(np.int64(step))
        for name, value in got.items():
            np.testing.assert_array_equal(value, in_order[step][name])
            value[...] = 0  # a consumer that writes into its batch does no harm


@given(sizes, st.integers(1, 6), st.integers(1, 5), seeds, st.integers(0, 30))
def test_the_shares_of_processes_are_the_batch_of_one(n, share, count, seed, step):
    whole = Batches(_arrays(n), share * count, seed=seed)(step)
    shares = []
    for p in range(count):
        place = dict(process_index=p, process_count=count)
        shares.append(Batches(_arrays(n), share * count, seed=seed, **place)(step))
    for name, value in whole.items():
        assert all(len(piece[name]) == share for piece in shares)
        np.testing.assert_array_equal(np.concatenate([piece[name] for piece in shares]), value)


def test_names_types_and_rows():
    batches = Batches(_arrays(5), 8, seed=0, process_index=1, process_count=2)
    batch = batches(3)
    assert batches.batch_size == 8
    assert list(batch) == ["x", "image", "row", "weight"]
    assert batch["row"].dtype == np.int32 and batch["row"].tolist() == [4, 5, 6, 7]
    assert batch["weight"].dtype == np.float32 and batch["weight"].tolist() == [1, 1, 1, 1]
    assert batch["image"].dtype == np.float32 and batch["image"].shape == (4, 2, 3)
    np.testing.assert_array_equal(batch["image"], _arrays(5)["image"][batch["x"]])


def test_seeds_and_epochs_differ():
    seeds = (0, 1, 2, 2**32 - 1)
    orders = {tuple(Batches(_arrays(50), 50, seed=s)(e)["x"]) for s in seeds for e in (0, 1, 2)}
    assert len(orders) == 12


def test_any_step_costs_the_same(monkeypatch):
    drawn = []
    generator = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda s: drawn.append(s[1]) or generator(s))
    batches = Batches(_arrays(10), 4, seed=0)
    batches(10**15 + 2)  # its rows 8 to 11 of an epoch
    assert drawn == [4 * 10**14, 4 * 10**14 + 1]
    drawn.clear()
    for step in range(50):
        batches(step)
    assert drawn == list(range(20))  # each permutation drawn once
    for step in (4, 2, 4, 2, 4, 2):  # two epochs in turn stay at hand
        batches(step)
    assert len(drawn) <= 20 + 3


ARGUMENTS = dict(arrays=_arrays(5), batch_size=4, process_index=0, process_count=1)
WRONG = [
    (dict(batch_size=0), "batch size is 0"),
    (dict(batch_size=-4), "batch size is -4"),
    (dict(process_count=3), "4 rows.*3 processes"),
    (dict(process_index=2, process_count=2), "no process 2 among 2"),
    (dict(process_index=-1, process_count=2), "no process -1 among 2"),
    (dict(process_count=0), "no process 0 among 0"),
    (dict(arrays={}), "common first axis"),
    (dict(arrays={"x": np.zeros((0, 2))}), r"'x': \(0, 2\)"),
    (dict(arrays={"x": np.float32(1)}), r"'x': \(\)"),
    (dict(arrays={"x": np.zeros(3), "y": np.zeros((4, 1))}), r"'x': \(3,\), 'y': \(4, 1\)"),
    (dict(arrays={"x": np.zeros(3), "row": np.zeros(3)}), r"\['row'\]"),
    (dict(arrays={"weight": np.zeros(3)}), r"\['weight'\]"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[m for _, m in WRONG])
@pytest.mark.parametrize("kind", [lambda **k: Batches(**k, seed=0), EvaluationBatches])
def test_wrong_arguments_are_refused_with_the_numbers(kind, wrong, message):
    kind(**ARGUMENTS)
    with pytest.raises(ValueError, match=message):
        kind(**ARGUMENTS | wrong)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ValueError, match=str(seed)):
        Batches(_arrays(5), 4, seed=seed)


def test_steps_and_indices_out_of_range_are_refused():
    with pytest.raises(ValueError, match="-1"):
        Batches(_arrays(5), 4, seed=0)(-1)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"{index}.*2.*5"):
            EvaluationBatches(_arrays(5), 4)(index)


@given(sizes, st.integers(1, 8), st.integers(1, 5))
def test_evaluation_sees_each_example_once_and_in_order(n, share, count):
    every = [EvaluationBatches(_arrays(n), share * count, p, count) for p in range(count)]
    assert len({len(batches) for batches in every}) == 1
    parts = [batches(i) for i in range(len(every[0])) for batches in every]
    assert all(len(part[name]) == share for part in parts for name in part)
    stream = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert stream["weight"].dtype == np.float32 and stream["weight"].sum() == n
    np.testing.assert_array_equal(stream["weight"][:n], 1)
    assert len(stream["x"]) - n < share * count  # no batch of padding alone
    padded = np.resize(np.arange(n), len(stream["x"]))
    np.testing.assert_array_equal(stream["x"], padded)
    np.testing.assert_array_equal(stream["image"], _arrays(n)["image"][padded])
    np.testing.assert_array_equal(stream["row"], np.resize(np.arange(share * count), len(padded)))
    assert stream["row"].dtype == np.int32 and every[0].batch_size == share * count
