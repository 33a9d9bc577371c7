"""Noise, Laplacian and penalty: Gaussian quadrature in float64, closed forms, all sign vectors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from blogjax.core.random import fold_in_rows
from blogjax.gradients.smoothness import (
    laplacian_penalty,
    laplacian_penalty_estimate,
    noise_distance,
    noise_penalty,
    noise_penalty_estimate,
)

DISTANCES = ("squared", "kl")
W1 = np.random.default_rng(0).normal(size=(2, 4))
W2 = np.random.default_rng(1).normal(size=(4, 3))
X = np.array([[0.3, -0.6], [1.0, 0.4]])


def network(w, x):
    return jnp.tanh(x @ w) @ W2.astype(x.dtype)


def numpy_outputs(x, distance):
    out = np.tanh(x @ W1) @ W2
    return out if distance == "squared" else scipy.special.log_softmax(out, axis=-1)


def numpy_distance(noisy, clean, distance):
    if distance == "squared":
        return np.square(noisy - clean).sum(-1)
    return (np.exp(clean) * (clean - noisy)).sum(-1)


def gaussian_mean(f, sigma):
    """E f(e) over 2-D noise by a product of Gauss-Hermite rules: exact to rounding here."""
    nodes, weight = np.polynomial.hermite_e.hermegauss(20)
    weight = weight / weight.sum()
    pairs = itertools.product(range(20), repeat=2)
    return sum(weight[i] * weight[j] * f(sigma * nodes[[i, j]]) for i, j in pairs)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_penalty_is_the_mean_distance_to_fourth_order(x64, distance):
    clean = numpy_outputs(X, distance)
    penalty = jax.jit(lambda s: noise_penalty(network, W1, X, distance=distance, sigma=s))
    gaps = []
    for sigma in (0.04, 0.02):
        mean = gaussian_mean(
            lambda e: numpy_distance(numpy_outputs(X + e, distance), clean, distance), sigma
        )
        gaps.append(np.abs(mean - penalty(sigma)))
        np.testing.assert_allclose(penalty(sigma), mean, rtol=0.1)
    np.testing.assert_allclose(gaps[0] / gaps[1], [16, 16], rtol=0.05)


def loss(w, x, y):
    return jnp.square(jnp.tanh(x @ w).sum(-1) - y)


def test_the_laplacian_is_what_noise_adds_to_fourth_order(x64):
    y = np.array([0.5, -1.0])

    def numpy_loss(x):
        return np.square(np.tanh(x @ W1).sum(-1) - y)

    penalty = jax.jit(lambda s: laplacian_penalty(loss, W1, X, y, sigma=s))
    gaps = []
    for sigma in (0.04, 0.02):
        added = gaussian_mean(lambda e: numpy_loss(X + e), sigma) - numpy_loss(X)
        gaps.append(np.abs(added - penalty(sigma)))
    assert np.all(gaps[1] < 0.1 * np.abs(penalty(0.02)))
    np.testing.assert_allclose(gaps[0] / gaps[1], [16, 16], rtol=0.05)


matrices = hnp.arrays(np.float32, (3, 2), elements=st.floats(-4, 4, width=16))


@jax.jit
def _linear_and_quadratic(w, x, hessian):
    def linear(w, x):
        return x @ w

    def quadratic(h, x):
        return ((x @ h) * x).sum(-1)

    return (
        noise_penalty(linear, w, x, sigma=0.5),
        laplacian_penalty(quadratic, hessian, x, sigma=0.5),
    )


@given(matrices, hnp.arrays(np.float32, (3, 3), elements=st.floats(-4, 4, width=16)))
def test_both_are_exact_for_linear_and_quadratic(w, hessian):
    """E |W e|^2 = s^2 |W|_F^2; E e' H e = s^2 tr H, which may be negative."""
    penalty, laplacian = _linear_and_quadratic(w, np.eye(3, dtype=np.float32)[:2], hessian)
    np.testing.assert_allclose(penalty, 2 * [0.25 * np.square(w).sum()], rtol=1e-5)
    np.testing.assert_allclose(laplacian, 2 * [0.25 * np.trace(hessian)], atol=1e-4)


def jacobian_rows(distance):
    """sqrt(lam_i) grad f_i by differences of numpy's outputs, `[B, K, 2]`."""
    step = 1e-6
    rows = [
        (numpy_outputs(X + step * e, distance) - numpy_outputs(X - step * e, distance)) / 2 / step
        for e in np.eye(2)
    ]
    root = 2**0.5 if distance == "squared" else np.exp(numpy_outputs(X, distance) / 2)[..., None]
    return root * np.stack(rows, -1)


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_estimate_takes_the_values_of_all_sign_vectors(x64, distance):
    rows = jacobian_rows(distance)
    signs = np.array(list(itertools.product([-1, 1], repeat=3)))
    values = np.square(np.einsum("sk,bkd->bsd", signs, rows)).sum(-1) / 2
    estimate = jax.jit(
        lambda row, x: noise_penalty_estimate(
            fold_in_rows(jax.random.key(0), row), network, W1, x, distance=distance
        )
    )
    got = np.stack([estimate(np.arange(2 * i, 2 * i + 2), X) for i in range(40)], 1)
    for b in range(2):
        nearest = np.abs(got[b][:, None] - values[b]).min(1)
        assert nearest.max() < 1e-6
        assert len(np.unique(np.round(got[b], 6))) == 4  # eta and -eta give the same
    exact = noise_penalty(network, W1, X, distance=distance)
    np.testing.assert_allclose(values.mean(1), exact, rtol=1e-7)


@pytest.mark.slow  # seconds of compiling
def test_many_probes_come_near_the_exact_penalties():
    w, y = jnp.asarray(W1, jnp.float32), jnp.array([0.5, -1.0])
    x = jnp.asarray(X, jnp.float32)

    @jax.jit
    def pairs(w, x, y):
        key = jax.random.key(0)
        keys = [fold_in_rows(k, jnp.arange(2)) for k in jax.random.split(key, 3)]
        return [
            (
                noise_penalty_estimate(keys[0], network, w, x, distance="kl", probes=3000),
                noise_penalty(network, w, x, distance="kl"),
            ),
            (
                laplacian_penalty_estimate(keys[1], loss, w, x, y, probes=3000),
                laplacian_penalty(loss, w, x, y),
            ),
            (
                noise_distance(keys[2], network, w, x, distance="kl", sigma=0.01, draws=3000) * 1e4,
                noise_penalty(network, w, x, distance="kl"),
            ),
        ]

    for estimate, exact in pairs(w, x, y):
        assert estimate.shape == (2,)
        np.testing.assert_allclose(estimate, exact, rtol=0.1)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_mean_distance_is_the_quadratures_also_for_much_noise(distance):
    """At sigma 0.8 the orders above the second count, and KL's two directions differ."""
    x, w = jnp.asarray(X, jnp.float32), jnp.asarray(W1, jnp.float32)

    def run(x, w):
        return noise_distance(
            jax.random.key(0), network, w, x, distance=distance, sigma=0.8, draws=20_000
        )

    clean = numpy_outputs(X, distance)
    forth, back = (
        gaussian_mean(lambda e, d=d: d(numpy_outputs(X + e, distance)), 0.8)
        for d in (
            lambda noisy: numpy_distance(noisy, clean, distance),
            lambda noisy: numpy_distance(clean, noisy, distance),
        )
    )
    np.testing.assert_allclose(jax.jit(run)(x, w), forth, rtol=0.03)
    assert distance == "squared" or np.all(np.abs(back / forth - 1) > 0.05)


@pytest.mark.slow  # seconds of compiling
def test_the_laplacian_estimate_is_exact_on_a_diagonal_and_random_off_it():
    def curved(h, x):
        return ((x @ h) * x).sum(-1) / 2

    hessian = jnp.array([[1.0, 2.0], [2.0, 3.0]])
    x = jnp.zeros((64, 2))
    got = laplacian_penalty_estimate(jax.random.key(0), curved, hessian, x)
    assert set(np.asarray(got).tolist()) == {0.0, 4.0}  # (4 -+ 2 * 2) / 2
    got = laplacian_penalty_estimate(jax.random.key(0), curved, jnp.diag(jnp.array([1.0, 3.0])), x)
    np.testing.assert_allclose(got, np.full(64, 2.0))


@pytest.mark.slow
def test_derivatives_are_those_of_differences(x64):
    def mixed(w):
        terms = [
            noise_penalty(network, w, X),
            noise_penalty(network, w, X, distance="kl"),
            noise_penalty_estimate(jax.random.key(0), network, w, X, distance="kl"),
            noise_distance(jax.random.key(1), network, w, X, distance="kl", sigma=0.3),
            laplacian_penalty(loss, w, X, np.ones(2)),
            laplacian_penalty_estimate(jax.random.key(2), loss, w, X, np.ones(2)),
        ]
        return sum((i + 1) * jnp.mean(t) for i, t in enumerate(terms)) / 10

    check_grads(jax.jit(mixed), (W1,), order=2, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_a_constant_model_costs_nothing_and_is_flat():
    w, x = jnp.zeros((2, 3)), jnp.ones((2, 2))

    def linear(w, x):
        return x @ w

    for distance in DISTANCES:

        def penalty(w, d=distance):
            return noise_penalty(linear, w, x, distance=d).sum()

        value, slope = jax.jit(jax.value_and_grad(penalty))(w)
        assert value == 0
        np.testing.assert_array_equal(slope, np.zeros((2, 3)))


def test_kl_is_finite_where_a_probability_underflows():
    """sum f_i |grad log f_i|^2 with f = (1, 0): the gradients of the logits are (0, w), so 0."""

    def model(w, x):
        return jnp.concatenate([0 * x, w * x - 2000.0], 1)

    def penalty(w):
        return noise_penalty(model, w, jnp.ones((1, 1)), distance="kl").sum()

    np.testing.assert_array_equal(jax.jit(jax.value_and_grad(penalty))(3.0), [0.0, 0.0])


def test_kl_of_two_classes_is_the_logistic_variance():
    """f = sigmoid(w x): sum f_i |grad log f_i|^2 = w^2 f (1 - f)."""

    def model(w, x):
        return jnp.concatenate([w * x, 0 * x], 1)

    x = np.array([[-2.0], [0.1], [3.0]])
    got = noise_penalty(model, 1.5, jnp.asarray(x, jnp.float32), distance="kl", sigma=2.0)
    f = scipy.special.expit(1.5 * x[:, 0])
    np.testing.assert_allclose(got, 2 * 1.5**2 * f * (1 - f), rtol=1e-5)


def test_outputs_of_any_shape_and_arguments_per_example():
    def image(w, x, gain):
        return gain[:, None, None] * jnp.einsum("bij,jk->bik", x, w)

    x, w = jnp.ones((2, 2, 3)), jnp.array([[1.0], [2.0], [3.0]])
    got = noise_penalty(image, w, x, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(got, [2 * 14.0, 4 * 2 * 14.0], rtol=1e-6)


@pytest.mark.slow  # seconds of compiling
def test_noise_belongs_to_the_row():
    x = jnp.asarray(np.concatenate([X, X]), jnp.float32)
    w = jnp.asarray(W1, jnp.float32)
    for f in (noise_distance, noise_penalty_estimate):
        run = jax.jit(lambda row, f=f: f(fold_in_rows(jax.random.key(0), row), network, w, x))
        together, shifted = run(np.array([4, 5, 6, 7])), run(np.array([6, 7, 4, 5]))
        np.testing.assert_allclose(together, shifted[np.array([2, 3, 0, 1])], rtol=1e-6)
        assert np.any(together[:2] != together[2:])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_outputs_are_squared_in_float32(dtype):
    w, x = jnp.full((64, 2), 300.0, dtype), jnp.zeros((2, 64), dtype)
    got = noise_penalty(lambda w, x: x @ w, w, x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 2 * [128 * 300.0**2], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: noise_penalty(lambda w, x: x, None, x, distance="l2"), "'squared', 'kl'"),
        (lambda x: noise_penalty(lambda w, x: x, None, x, sigma=x), r"sigma has shape \(4, 3\)"),
        (lambda x: noise_penalty(lambda w, x: x[:, 0], None, x, distance="kl"), r"\(1,\).*logits"),
        (
            lambda x: noise_penalty(lambda w, x: x[:, :1], None, x, distance="kl"),
            r"2 classes.*\[0, z",
        ),
        (lambda x: noise_penalty(lambda w, x: x.sum(), None, x), r"shape \(\).*\(1, \.\.\.\)"),
        (lambda x: noise_penalty(lambda w, x, y: x, None, x, x[:2]), r"\(2, 3\).*4 rows"),
        (lambda x: laplacian_penalty(lambda w, x: x, None, x), r"\(1, 3\).*\(1,\)"),
        (lambda x: noise_distance(jax.random.key(0), None, None, x, draws=0), "draws=0 must be"),
        (lambda x: noise_penalty_estimate(None, None, None, x, probes=0), "probes=0 must be"),
        (lambda x: laplacian_penalty_estimate(None, None, None, x, probes=0), "probes=0 must be"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((4, 3)))


def test_a_traced_count_is_refused():
    def run(probes):
        return noise_penalty_estimate(jax.random.key(0), network, W1, X, probes=probes)

    with pytest.raises(TypeError, match=r"probes is .* must be an integer known when .* traced"):
        jax.jit(run)(2)
