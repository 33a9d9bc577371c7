import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blogjax.data import splits


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data(), st.integers(0, 2**40))
def test_splits_are_disjoint_complete_and_in_proportion(labels, data, seed):
    labels = np.array(labels)
    n = len(labels)
    first = data.draw(st.integers(0, n))
    second = data.draw(st.integers(0, n - first))
    sizes = {"a": first, "b": second, "c": n - first - second}
    got = splits.stratified_split(labels, sizes, seed=seed)
    assert {name: len(rows) for name, rows in got.items()} == sizes
    assert sorted(np.concatenate([*got.values()]).tolist()) == list(range(n))
    of_class = np.bincount(labels, minlength=5)
    for name, rows in got.items():
        counts = np.bincount(labels[rows], minlength=5)
        off = np.abs(counts - of_class * sizes[name] / n)
        # Of the first one the quota itself is apportioned; of the others that of what is left.
        assert off.max() < (1 if name == "a" else 2)


def test_largest_remainders_decide():
    labels = np.repeat([0, 1, 2], [47, 34, 19])  # for 10 places: 4.7, 3.4, 1.9
    got = splits.stratified_split(labels, {"ten": 10, "rest": 90})
    assert np.bincount(labels[got["ten"]]).tolist() == [5, 3, 2]


def test_the_seed_decides_members_and_order():
    labels = np.repeat(np.arange(4), 25)
    sizes = {"a": 40, "b": 60}
    one, same, other = (splits.stratified_split(labels, sizes, seed=s)["a"] for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert set(one) != set(other)
    assert np.mean(np.diff(labels[one]) == 0) < 0.5  # classes are mixed, not one after the other


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match=r"'a': 2.*3 examples"):
        splits.stratified_split(np.zeros(3, int), {"a": 2})
    with pytest.raises(ValueError, match="-1"):
        splits.stratified_split(np.zeros(3, int), {"a": -1, "b": 4})
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        splits.stratified_split(np.zeros((3, 1), int), {"a": 3})
