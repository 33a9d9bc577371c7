import math

import numpy as np
import pytest
import sklearn.neighbors
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blogjax.metrics import neighbours, samples

seeds = st.integers(0, 2**32 - 1)
# A coarse grid has ties and duplicates, and its squared distances are exact integers.
grids = hnp.arrays(np.int64, st.tuples(st.integers(5, 12), st.just(2)), elements=st.integers(-3, 3))


@pytest.fixture(params=[1, 7, 1 << 22], ids=["row by row", "few rows", "one block"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK_ENTRIES", request.param * 10)


def _squared(a, b):
    return sum((int(p) - int(q)) ** 2 for p, q in zip(a, b, strict=True))


def test_pairwise_distances_are_exact_far_from_the_origin():
    # |x|^2 - 2 x y + |y|^2 would lose all of it: |x|^2 is 1e16.
    rng = np.random.default_rng(0)
    x = 1e8 + rng.integers(0, 2, size=(6, 3)) / 4
    y = 1e8 + rng.integers(0, 2, size=(5, 3)) / 4
    expected = [[math.dist(a, b) ** 2 for b in y] for a in x]
    got = neighbours.pairwise_squared_distances(x, y)
    assert got.shape == (6, 5) and got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-14)


def test_images_are_flattened_and_float32_is_widened():
    x = np.random.default_rng(0).normal(size=(4, 2, 3, 1)).astype(np.float32)
    flat = x.reshape(4, 6).astype(np.float64)
    expected = [[math.dist(a, b) ** 2 for b in flat] for a in flat]
    np.testing.assert_allclose(neighbours.pairwise_squared_distances(x, x), expected, rtol=1e-14)


def test_nearest_distances_are_those_of_scikit_learn(blocks):
    rng = np.random.default_rng(0)
    x, reference = rng.normal(size=(37, 5)), rng.normal(size=(23, 5))
    for own in (False, True):
        data = x if own else reference
        index = sklearn.neighbors.NearestNeighbors(algorithm="kd_tree").fit(data)
        expected = index.kneighbors(x, 2)[0][:, int(own)]
        got = neighbours.nearest_distances(x, data, exclude_self=own)
        assert got.shape == (37,) and got.dtype == np.float64
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_a_duplicate_is_at_distance_zero_but_a_sample_is_not_its_own_neighbour():
    x = np.array([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]])
    assert neighbours.nearest_distances(x, x).tolist() == [0, 0, 0]
    assert neighbours.nearest_distances(x, x, exclude_self=True).tolist() == [5, 0, 0]


def _naive_share(rows, support, k):
    inside = 0
    for g in rows:
        for i, s in enumerate(support):
            others = sorted(_squared(s, t) for j, t in enumerate(support) if j != i)
            if _squared(g, s) <= others[k - 1]:
                inside += 1
                break
    return inside / len(rows)


@given(grids, grids, st.integers(1, 4))
def test_precision_and_recall_by_two_loops(real, generated, k):
    got = neighbours.precision_recall(real, generated, k=k)
    assert got.precision == _naive_share(generated, real, k)
    assert got.recall == _naive_share(real, generated, k)


def test_precision_and_recall_in_blocks(blocks):
    rng = np.random.default_rng(0)
    real, generated = rng.integers(-4, 5, size=(31, 2)), rng.integers(-6, 3, size=(26, 2))
    got = neighbours.precision_recall(real, generated)  # k is 3 unless said otherwise
    assert got == (_naive_share(generated, real, 3), _naive_share(real, generated, 3))
    assert 0 < got.precision < 1 and 0 < got.recall < 1


@given(st.integers(4, 30), st.integers(1, 5), seeds)
def test_limits_of_precision_and_recall(n, d, seed):
    x = np.random.default_rng(seed).normal(size=(n, d))
    assert neighbours.precision_recall(x, x[::-1]) == (1, 1)
    assert neighbours.precision_recall(x, x + 1e3) == (0, 0)


def test_what_is_missing_costs_recall_and_what_is_wrong_costs_precision():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(100, 2)), rng.normal(size=(100, 2)) + 50
    both = np.concatenate([left, right])
    dropped = neighbours.precision_recall(both, left)
    assert dropped.precision == 1 and dropped.recall == 0.5
    invented = neighbours.precision_recall(left, both)
    assert invented.precision == 0.5 and invented.recall == 1


ZEROS = np.zeros((5, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: neighbours.pairwise_squared_distances(ZEROS, np.zeros((5, 3))), r"x.*2\).*y.*3\)"),
        (lambda: neighbours.pairwise_squared_distances(ZEROS[0], ZEROS[0]), r"x has shape \(2,\)"),
        (lambda: neighbours.nearest_distances(ZEROS, ZEROS[:0]), r"reference has shape \(0, 2\)"),
        (
            lambda: neighbours.nearest_distances(ZEROS, ZEROS[None]),
            r"x.*5, 2\).*reference.*1, 5, 2",
        ),
        (lambda: neighbours.nearest_distances(ZEROS, ZEROS[:4], True), "x has 5, reference has 4"),
        (lambda: neighbours.nearest_distances(ZEROS[:1], ZEROS[:1], True), "x has 1, reference h"),
        (
            lambda: neighbours.precision_recall(ZEROS, ZEROS[:3]),
            "k = 3.*real has 5, generated has 3",
        ),
        (
            lambda: neighbours.precision_recall(ZEROS[:3], ZEROS),
            "k = 3.*real has 3, generated has 5",
        ),
        (lambda: neighbours.precision_recall(ZEROS, ZEROS, k=0), "k = 0"),
        (
            lambda: neighbours.precision_recall(ZEROS, ZEROS * np.nan),
            "generated has NaN .* 5 of its",
        ),
        (lambda: samples.as_rows(np.zeros((3, 0)), "x"), r"x has shape \(3, 0\)"),
        (lambda: samples.as_rows([[0.0], [np.inf]], "x"), "x has NaN or infinity in 1 of its 2"),
    ],
)
def test_wrong_samples_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
