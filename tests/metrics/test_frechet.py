import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from blogjax.metrics import frechet

dims = st.integers(1, 12)
seeds = st.integers(0, 2**32 - 1)


def _gaussian(rng, d):
    a = rng.normal(size=(d, d))
    return rng.normal(size=d), a @ a.T + 0.1 * np.eye(d)


@given(dims, seeds)
def test_it_is_the_textbook_formula(d, seed):
    rng = np.random.default_rng(seed)
    (m1, c1), (m2, c2) = _gaussian(rng, d), _gaussian(rng, d)
    root = scipy.linalg.sqrtm(c1 @ c2)
    expected = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * np.real(root))
    np.testing.assert_allclose(frechet.frechet_distance(m1, c1, m2, c2), expected, rtol=1e-9)


@given(dims, seeds)
def test_gaussians_with_common_axes(d, seed):
    rng = np.random.default_rng(seed)
    axes = scipy.stats.ortho_group.rvs(d, random_state=rng) if d > 1 else np.eye(1)
    s1, s2, shift = rng.uniform(0, 3, d), rng.uniform(0, 3, d), rng.normal(size=d)
    got = frechet.frechet_distance(shift, axes * s1**2 @ axes.T, np.zeros(d), axes * s2**2 @ axes.T)
    np.testing.assert_allclose(got, np.sum(shift**2) + np.sum((s1 - s2) ** 2), atol=1e-10)


@given(dims, seeds)
def test_it_is_the_cost_of_the_optimal_map(d, seed):
    # A symmetric positive definite A is the gradient of a convex function, so x -> A x is optimal.
    rng = np.random.default_rng(seed)
    (m, c), (_, a) = _gaussian(rng, d), _gaussian(rng, d)
    moved = a - np.eye(d)
    expected = m @ moved @ moved @ m + np.trace(moved @ c @ moved)
    got = frechet.frechet_distance(m, c, a @ m, a @ c @ a)
    np.testing.assert_allclose(got, expected, rtol=1e-8)


def test_singular_covariances_cost_no_accuracy():
    rng = np.random.default_rng(0)
    for d in (2, 30, 100):
        a, b = rng.normal(size=(2, d))
        zero = np.zeros(d)
        got = frechet.frechet_distance(zero, np.outer(a, a), zero, np.outer(b, b))
        np.testing.assert_allclose(got, a @ a + b @ b - 2 * abs(a @ b), rtol=1e-12)
    assert (
        frechet.frechet_distance([0.0, 0.0], np.zeros((2, 2)), [3.0, 4.0], np.zeros((2, 2))) == 25
    )
    assert frechet.frechet_distance([0.0, 0.0], np.zeros((2, 2)), [3.0, 4.0], np.eye(2)) == 27


@given(st.integers(2, 30), st.integers(2, 30), seeds)
def test_few_and_many_samples_give_the_distance_of_their_moments(n, m, seed):
    """With up to 12 samples no covariance is formed; beside it stands the one that forms it."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 12)), rng.normal(2, 3, size=(m, 12))
    moments = [(z.mean(0), np.cov(z, rowvar=False)) for z in (x, y)]
    got = frechet.frechet_distance_from_samples(x, y)
    expected = frechet.frechet_distance(*moments[0], *moments[1])
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@given(st.integers(2, 6), st.integers(2, 6), seeds)
def test_fewer_samples_than_dimensions(n, m, seed):
    # The nuclear norm of the cross products of the samples.
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 40)), rng.normal(2, 3, size=(m, 40))
    a, b = (x - x.mean(0)) / np.sqrt(n - 1), (y - y.mean(0)) / np.sqrt(m - 1)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(a**2) + np.sum(b**2)
    expected -= 2 * np.linalg.norm(a @ b.T, "nuc")
    got = frechet.frechet_distance_from_samples(x, y)
    np.testing.assert_allclose(got, expected, rtol=1e-11)


@given(dims, seeds)
def test_a_metric_that_rotations_keep(d, seed):
    rng = np.random.default_rng(seed)
    (m1, c1), (m2, c2) = _gaussian(rng, d), _gaussian(rng, d)
    straight = frechet.frechet_distance(m1, c1, m2, c2)
    np.testing.assert_allclose(frechet.frechet_distance(m2, c2, m1, c1), straight, rtol=1e-10)
    r, t = np.linalg.qr(rng.normal(size=(d, d)))[0], rng.normal(size=d)
    turned = frechet.frechet_distance(r @ m1 + t, r @ c1 @ r.T, r @ m2 + t, r @ c2 @ r.T)
    np.testing.assert_allclose(turned, straight, rtol=1e-9)
    scaled = frechet.frechet_distance(3 * m1, 9 * c1, 3 * m2, 9 * c2)
    np.testing.assert_allclose(scaled, 9 * straight, rtol=1e-10)


@given(st.integers(2, 30), dims, st.floats(-8, 8), seeds)
def test_equal_sets_are_at_distance_zero_and_never_below(n, d, log_scale, seed):
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32) * 10**log_scale
    got = frechet.frechet_distance_from_samples(x, x[::-1])
    assert 0 <= got <= 1e-12 * np.sum(np.var(x, axis=0, ddof=1))


def test_moments_are_unbiased_float64_and_survive_a_large_mean():
    x = np.random.default_rng(0).normal(size=(50, 3))
    got = frechet.gaussian_moments(x)
    np.testing.assert_allclose(got.mean, x.mean(axis=0))
    np.testing.assert_allclose(got.covariance, np.cov(x, rowvar=False))
    far = frechet.gaussian_moments(x + 1e8)
    np.testing.assert_allclose(far.covariance, np.cov(x, rowvar=False), atol=1e-6)
    half = frechet.gaussian_moments(x.astype(np.float16))
    np.testing.assert_allclose(half.covariance, np.cov(x.astype(np.float16), rowvar=False))


def test_samples_of_any_rank_are_flattened():
    x = np.random.default_rng(0).normal(size=(2, 20, 2, 3, 1))
    flat = frechet.frechet_distance_from_samples(*x.reshape(2, 20, 6))
    assert frechet.frechet_distance_from_samples(*x) == flat


def test_rounding_in_a_float32_covariance_is_forgiven():
    x = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    c = np.cov(x, rowvar=False, dtype=np.float32)
    c[0, 1] *= 1 + 1e-6
    assert np.linalg.eigvalsh(c)[0] < 0
    assert frechet.frechet_distance(np.zeros(40), c, np.zeros(40), c) < 1e-5


ONE = ([0.0, 0.0], np.eye(2))


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ((np.zeros(3), np.eye(3)), r"mean1 has shape \(2,\), mean2 has shape \(3,\)"),
        ((np.zeros(2), np.eye(3)), r"mean2 of shape \(2,\).*covariance2 of shape \(3, 3\)"),
        ((np.zeros((2, 1)), np.eye(2)), r"mean2 of shape \(2, 1\)"),
        ((np.zeros(0), np.zeros((0, 0))), r"mean2 of shape \(0,\)"),
        (([0.0, np.nan], np.eye(2)), "mean2 or covariance2 holds NaN"),
        ((np.zeros(2), np.diag([1.0, np.inf])), "mean2 or covariance2 holds NaN or infinity"),
        ((np.zeros(2), [[1.0, 0.5], [0.0, 1.0]]), "covariance2 is not symmetric.*0.5"),
        ((np.zeros(2), np.diag([1.0, -0.25])), "covariance2 is not positive.*-0.25"),
    ],
)
def test_wrong_moments_are_refused(moments, message):
    with pytest.raises(ValueError, match=message):
        frechet.frechet_distance(*ONE, *moments)
    with pytest.raises(ValueError, match="1"):
        frechet.frechet_distance(*moments, *ONE)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros((5, 3)), r"x has \(5, 2\), y has \(5, 3\)"),
        (np.zeros((5, 2, 1)), r"x has \(5, 2\), y has \(5, 2, 1\)"),
        (np.zeros((1, 2)), r"y has shape \(1, 2\): at least 2"),
        (np.full((5, 2), np.nan), "y has NaN or infinity in 5 of its 5"),
    ],
)
def test_wrong_samples_are_refused(y, message):
    with pytest.raises(ValueError, match=message):
        frechet.frechet_distance_from_samples(np.zeros((5, 2)), y)
