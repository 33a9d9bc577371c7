import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blogjax.nn.spectral_norm import spectral_normalize, spectral_vectors

normalize = jax.jit(spectral_normalize, static_argnames="iterations")


def start(params):
    return spectral_vectors(jax.random.key(0), params)


def largest(kernel):
    kernel = np.asarray(kernel, np.float64)
    return np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), compute_uv=False)[0]


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "conv": {"kernel": rng.normal(size=(3, 3, 2, 5)).astype(np.float32), "bias": np.ones(5)},
        "dense": {"kernel": rng.normal(size=(4, 1)).astype(np.float32)},
        "scale": np.full((), 3.0, np.float32),
    }


def test_the_estimate_converges_to_the_singular_value():
    params = jax.tree.map(jnp.asarray, tree())
    vectors = start(params)
    for _ in range(30):
        divided, vectors = normalize(params, vectors, iterations=2)
    for name in ("conv", "dense"):
        kernel = params[name]["kernel"]
        np.testing.assert_allclose(divided[name]["kernel"], kernel / largest(kernel), rtol=1e-5)
    np.testing.assert_array_equal(divided["conv"]["bias"], params["conv"]["bias"])
    assert float(divided["scale"]) == 3.0
    assert vectors["conv"]["bias"] is None and vectors["scale"] is None


def test_iterations_in_one_call_are_those_of_several():
    params = jax.tree.map(jnp.asarray, tree())
    vectors = start(params)
    for _ in range(3):
        one_by_one, vectors_1 = normalize(params, vectors)
        vectors, last = vectors_1, vectors
    at_once, vectors_3 = normalize(params, start(params), iterations=3)
    np.testing.assert_allclose(
        at_once["conv"]["kernel"], one_by_one["conv"]["kernel"], rtol=1e-6, atol=1e-6
    )
    for a, b in zip(jax.tree.leaves(vectors), jax.tree.leaves(vectors_3), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # One iteration in float64 numpy, from the vectors before the last call.
    w = np.asarray(params["conv"]["kernel"], np.float64).reshape(-1, 5)
    v = w @ np.asarray(last["conv"]["kernel"], np.float64)
    v /= np.linalg.norm(v)
    sigma = np.linalg.norm(w.T @ v)
    np.testing.assert_allclose(
        one_by_one["conv"]["kernel"], (w / sigma).reshape(3, 3, 2, 5), rtol=1e-5, atol=1e-6
    )


@given(seed=st.integers(0, 2**16), power=st.integers(-28, 28))
def test_the_norm_is_never_taken_for_more_than_it_is(seed, power):
    """Whatever the scale: squares of 1e-28 and of 1e28 are no float32."""
    kernel = np.random.default_rng(seed).normal(size=(6, 3)) * 10.0**power
    kernel = jnp.asarray(kernel, jnp.float32)
    divided, vectors = normalize(kernel, spectral_vectors(jax.random.key(seed), kernel))
    assert 1 - 1e-5 <= largest(divided) < 10
    assert np.linalg.norm(vectors) == pytest.approx(1, abs=1e-5)


def test_the_gradient_runs_through_the_singular_value(x64):
    """Against finite differences of W / sigma(W) with sigma from the SVD."""
    rng = np.random.default_rng(0)
    w, a, direction = (rng.normal(size=(4, 3)) for _ in range(3))
    vectors = start(jnp.asarray(w))
    for _ in range(60):
        _, vectors = normalize(w, vectors)
    grad = jax.jit(jax.grad(lambda w: jnp.sum(a * spectral_normalize(w, vectors)[0])))(w)
    assert grad.dtype == vectors.dtype == jnp.float64

    def f(w):
        return np.sum(a * w) / largest(w)

    h = 1e-5
    difference = (f(w + h * direction) - f(w - h * direction)) / (2 * h)
    assert float(np.sum(grad * direction)) == pytest.approx(difference, rel=1e-6)


def test_no_gradient_reaches_the_vectors():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    vectors = start(kernel)
    _, pull = jax.vjp(jax.jit(lambda w: spectral_normalize(w, vectors)[1]), kernel)
    assert not np.any(pull(jnp.ones(3))[0])


def test_zeros_stay_zeros_and_come_back():
    kernel, vectors = jnp.zeros((4, 3)), start(jnp.zeros((4, 3)))
    divided, after = normalize(kernel, vectors)
    grad = jax.jit(jax.grad(lambda w: jnp.sum(spectral_normalize(w, vectors)[0])))(kernel)
    np.testing.assert_array_equal(divided, 0)
    np.testing.assert_array_equal(after, vectors)
    np.testing.assert_array_equal(grad, 1)
    divided, _ = normalize(kernel + 2.0, after, iterations=3)
    assert largest(divided) == pytest.approx(1, abs=1e-5)


def test_nan_is_seen():
    kernel = jnp.full((4, 3), jnp.nan)
    assert np.isnan(normalize(kernel, start(kernel))[0]).all()


def test_dtypes():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(40, 30)), jnp.bfloat16)
    vectors = start(kernel)
    new = vectors
    for _ in range(40):
        divided, new = normalize(kernel, new)
    assert divided.dtype == jnp.bfloat16 and vectors.dtype == new.dtype == jnp.float32
    # Rounded once, at the end.
    wanted = np.asarray(kernel, np.float64) / largest(kernel)
    np.testing.assert_allclose(np.asarray(divided, np.float64), wanted, rtol=2**-8)


def test_vectors_of_different_kernels_are_different_units():
    vectors = start({"a": jnp.ones((2, 9)), "b": jnp.ones((3, 9))})
    assert np.abs(vectors["a"] - vectors["b"]).max() > 0.1
    for u in vectors.values():
        assert np.linalg.norm(u) == pytest.approx(1, abs=1e-6)


def test_bad_input():
    kernel = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        spectral_normalize(kernel, jnp.ones(3), iterations=0)
    with pytest.raises(ValueError, match=r"\(4, 3\) needs a vector \(3,\), got \(4,\)"):
        spectral_normalize(kernel, jnp.ones(4))
    with pytest.raises(ValueError, match=r"\(4, 3\) needs a vector \(3,\), got None"):
        spectral_normalize(kernel, None)
    with pytest.raises(ValueError, match=r"\(3,\) needs a vector None, got \(3,\)"):
        spectral_normalize(jnp.ones(3), jnp.ones(3))
