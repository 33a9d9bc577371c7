import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from blogjax.metrics import sliced_wasserstein as sliced
from blogjax.metrics.sliced_wasserstein import (
    even_directions,
    random_directions,
    sliced_wasserstein,
)

seeds = st.integers(0, 2**32 - 1)
ONE = np.array([[1.0]])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), seeds)
def test_for_p_1_it_is_the_mean_over_the_directions_of_scipys(n, m, d, seed):
    rng = np.random.default_rng(seed)
    x, y, u = rng.normal(size=(n, d)), rng.normal(1, 2, size=(m, d)), rng.normal(size=(5, d))
    by_hand = [
        scipy.stats.wasserstein_distance(x @ v / math.hypot(*v), y @ v / math.hypot(*v)) for v in u
    ]
    np.testing.assert_allclose(sliced_wasserstein(x, y, u, p=1), np.mean(by_hand), rtol=1e-12)


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 1.5, 2, 3]), seeds)
def test_on_a_line_it_is_the_cost_of_the_best_assignment(n, m, p, seed):
    """Each sample is split into equal parts, so that both sides have n m of them."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(-3, 4, n) / 2, rng.normal(size=m)
    cost = np.abs(np.repeat(x, m)[:, None] - np.repeat(y, n)) ** p
    best = scipy.optimize.linear_sum_assignment(cost)
    expected = np.mean(cost[best]) ** (1 / p)
    got = sliced_wasserstein(x[:, None], y[:, None], -3 * ONE, p=p)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_several_directions_are_averaged_as_powers():
    x, y = np.zeros((1, 2)), np.array([[3.0, 4.0]])
    u = [[2.0, 0.0], [0.0, 1e-200]]  # only the direction counts
    assert sliced_wasserstein(x, y, u) == math.sqrt((9 + 16) / 2)
    np.testing.assert_allclose(sliced_wasserstein(x, y, u, p=3), ((27 + 64) / 2) ** (1 / 3))
    np.testing.assert_allclose(sliced_wasserstein(x, y, [[3.0, 4.0]]), 5)


@given(st.integers(2, 30), st.integers(2, 7), seeds)
def test_a_shift_in_the_plane_shrinks_by_the_root_of_two(n, k, seed):
    rng = np.random.default_rng(seed)
    x, t = rng.normal(size=(n, 2)), rng.normal(size=2)
    got = sliced_wasserstein(x, x[::-1] + t, even_directions(k))
    np.testing.assert_allclose(got, math.hypot(*t) / math.sqrt(2), rtol=1e-12)


@given(st.integers(1, 12), st.integers(1, 12), seeds)
def test_it_is_a_metric_that_rotations_of_everything_keep(n, m, seed):
    rng = np.random.default_rng(seed)
    x, y, z = (rng.normal(size=(k, 3)) for k in (n, m, 4))
    u = random_directions(6, 3, seed=3)
    there = sliced_wasserstein(x, y, u)
    np.testing.assert_allclose(sliced_wasserstein(y, x, u), there, rtol=1e-12)
    assert sliced_wasserstein(x, np.repeat(x, 3, axis=0)[::-1], u) < 1e-15
    assert there <= (sliced_wasserstein(x, z, u) + sliced_wasserstein(z, y, u)) * (1 + 1e-12)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    np.testing.assert_allclose(sliced_wasserstein(x @ turn, y @ turn, u @ turn), there, rtol=1e-10)
    np.testing.assert_allclose(sliced_wasserstein(5 * x, 5 * y, u), 5 * there, rtol=1e-12)


def test_gaussians_of_many_samples_are_as_far_apart_as_their_formula_says():
    """On a line, W2^2 of two Gaussians is the squared difference of means plus of deviations."""
    rng = np.random.default_rng(0)
    scale, shift = np.array([1.0, 3.0]), np.array([1.0, -2.0])
    x, y = rng.normal(size=(40_000, 2)), rng.normal(size=(30_000, 2)) * scale + shift
    u = even_directions(16)
    squares = (u @ shift) ** 2 + (np.sqrt((u * scale) ** 2 @ [1, 1]) - 1) ** 2
    np.testing.assert_allclose(sliced_wasserstein(x, y, u), np.sqrt(squares.mean()), rtol=0.01)


def test_in_blocks_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    x, y, u = rng.normal(size=(30, 2)), rng.normal(size=(21, 2)), even_directions(7)
    whole = sliced_wasserstein(x, y, u)
    monkeypatch.setattr(sliced, "_BLOCK_ENTRIES", 100)
    np.testing.assert_allclose(sliced_wasserstein(x, y, u), whole, rtol=1e-15)


def test_images_are_flattened_and_half_precision_is_widened():
    x = np.random.default_rng(0).normal(size=(2, 6, 2, 2, 1)).astype(np.float16)
    u = random_directions(3, 4, seed=0)
    flat = sliced_wasserstein(*x.astype(np.float64).reshape(2, 6, 4), u)
    assert sliced_wasserstein(x[0], x[1], u) == flat
    far = np.float16([[60_000.0]])
    assert sliced_wasserstein(far, -far, ONE) == 2 * float(far[0, 0])


def test_even_directions_halve_the_turn():
    u = even_directions(6)
    assert u.shape == (6, 2) and u.dtype == np.float64
    angles = np.degrees(np.arctan2(u[:, 1], u[:, 0]))
    np.testing.assert_allclose(angles, [0, 30, 60, 90, 120, 150], atol=1e-12)
    np.testing.assert_allclose(np.hypot(*u.T), 1)


def test_random_directions_are_uniform_and_reproducible():
    u = random_directions(20_000, 3, seed=1)
    np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1)
    # Archimedes: every coordinate is uniform on [-1, 1].
    for i, sign in itertools.product(range(3), (1, -1)):
        assert scipy.stats.kstest((1 + sign * u[:, i]) / 2, "uniform").pvalue > 1e-3
    np.testing.assert_array_equal(random_directions(5, 3, seed=1), u[:5])
    assert not np.array_equal(random_directions(5, 3, seed=2), u[:5])


ZEROS = np.zeros((5, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sliced_wasserstein(ZEROS, ZEROS[:, :1], ONE), r"x has \(5, 2\), y has \(5, 1\)"),
        (lambda: sliced_wasserstein(ZEROS, ZEROS[:0], ZEROS[:1]), r"y has shape \(0, 2\)"),
        (lambda: sliced_wasserstein(ZEROS, ZEROS / 0, ZEROS[:1]), "y has NaN or infinity in 5"),
        (lambda: sliced_wasserstein(ZEROS, ZEROS, ONE), r"shape \(1, 1\), but .* 2 numbers"),
        (lambda: sliced_wasserstein(ZEROS, ZEROS, [1.0, 0.0]), r"shape \(2,\)"),
        (lambda: sliced_wasserstein(ZEROS, ZEROS, ZEROS[:0]), r"shape \(0, 2\)"),
        (lambda: sliced_wasserstein(ZEROS, ZEROS, ZEROS), "finite and not 0"),
        (lambda: sliced_wasserstein(ZEROS, ZEROS, [[np.nan, 1.0]]), "finite and not 0"),
        (lambda: sliced_wasserstein(ZEROS, ZEROS, ZEROS + 1, p=0.5), "p is 0.5"),
        (lambda: sliced_wasserstein(ZEROS, ZEROS, ZEROS + 1, p=np.inf), "p is inf"),
        (lambda: even_directions(0), "at least 1 direction, not 0"),
        (lambda: random_directions(0, 2, 0), "count 0 and dim 2"),
        (lambda: random_directions(1, 0, 0), "count 1 and dim 0"),
        (lambda: random_directions(1, 1, -1), "seed -1"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")  # NaN made on purpose
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
