"""Norms of examples: float64 numpy, the closed form of the Hessian, and the edges of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blogjax.core import norms


def numpy_norm(x, batch_ndim=1):
    x = np.asarray(x, np.float64)
    return np.sqrt(np.square(x).reshape(*x.shape[:batch_ndim], -1).sum(-1))


jitted_norm = jax.jit(norms.per_example_norm, static_argnums=1)


@given(
    hnp.arrays(np.float32, (2, 3, 2), elements=st.floats(-8, 8, width=16)),
    st.sampled_from([0, 1, 3]),
    st.integers(-60, 60),
)
def test_per_example_norm_is_numpys_at_any_scale(x, batch_ndim, exponent):
    got = jitted_norm(np.ldexp(x, exponent), batch_ndim)
    expected = np.ldexp(numpy_norm(x, batch_ndim), exponent)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=5e-7)


def test_value_and_slope_where_the_squares_do_not_exist():
    x = jnp.array([[3.0, -4.0], [0.5, 0.0]])
    value_and_slope = jax.jit(jax.value_and_grad(lambda x: norms.per_example_norm(x).sum()))
    for scale in (1e-37, 1e-25, 1e25, 1e37):
        value, slope = value_and_slope(scale * x)
        np.testing.assert_allclose(value / scale, 5.5, rtol=1e-6)
        np.testing.assert_allclose(slope, [[0.6, -0.8], [1.0, 0.0]], rtol=1e-6)


def test_the_bits_are_the_plain_formulas_in_between():
    x = jax.random.normal(jax.random.key(0), (64, 7))
    plain = jnp.sqrt(jnp.sum(jnp.square(x), -1))
    np.testing.assert_array_equal(jitted_norm(x, 1), plain)


def test_the_hessian_is_the_closed_form_and_zero_at_zero():
    x = jnp.array([[3.0, -4.0, 12.0], [0.0, 0.0, 0.0]])
    hessian = jax.jit(jax.vmap(jax.hessian(lambda row: norms.per_example_norm(row, 0))))(x)
    u = np.array([3.0, -4.0, 12.0]) / 13
    np.testing.assert_allclose(hessian[0], (np.eye(3) - np.outer(u, u)) / 13, atol=1e-7)
    np.testing.assert_array_equal(hessian[1], np.zeros((3, 3)))
    forward = jax.jit(lambda x: jax.jvp(norms.per_example_norm, (x,), (jnp.ones_like(x),)))(x)
    np.testing.assert_allclose(forward, [[13.0, 0.0], [11 / 13, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_entries_are_squared_in_float32(dtype):
    x = jnp.full((2, 4096), 300.1, dtype)  # 9e4 * 4096 is beyond float16
    got = jitted_norm(x, 1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 64 * float(dtype(300.1)), rtol=1e-6)


def test_nan_and_infinity_stay_in_their_example():
    x = jnp.array([[1.0, jnp.nan], [jnp.inf, 1.0], [3.0, 4.0]])
    np.testing.assert_array_equal(jitted_norm(x, 1), [np.nan, np.inf, 5.0])
    slope = jax.jit(jax.grad(lambda x: norms.per_example_norm(x)[2]))(x)
    np.testing.assert_allclose(slope[2], [0.6, 0.8], rtol=1e-6)


def test_empty_batches_and_examples():
    assert norms.per_example_norm(jnp.zeros((0, 3))).shape == (0,)
    np.testing.assert_array_equal(norms.per_example_norm(jnp.zeros((2, 0))), [0.0, 0.0])
    with pytest.raises(ValueError, match=r"\(3,\).*batch_ndim=2"):
        norms.per_example_norm(jnp.zeros(3), 2)


def test_what_has_no_norm_here_is_refused():
    """Squares of complex numbers are no squared sizes: 1 + i^2 = 0."""
    for norm in (norms.global_norm, norms.per_example_norm):
        with pytest.raises(TypeError, match="complex64"):
            norm(jnp.array([[1.0, 1.0j]]))
    with pytest.raises(ValueError, match=r"\(2, 3\) .*batch_ndim=-1"):
        norms.per_example_norm(jnp.ones((2, 3)), -1)


def test_plain_numbers_and_integers_have_a_norm_too():
    assert norms.global_norm({"a": 3.0, "b": (np.int8(4), None), "c": jnp.zeros((0, 2))}) == 5
    np.testing.assert_array_equal(norms.per_example_norm(np.array([[3, 4]])), [5.0])
    wide = norms.at_least_float32([1.0, np.float16(2), jnp.ones(2, jnp.bfloat16), None])
    assert [x.dtype for x in wide[:3]] == [jnp.float32] * 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_power_of_two(x64, dtype):
    tiny = np.finfo(dtype).tiny
    x = np.array([1.0, 1.99, 2.0, 0.3, tiny, np.finfo(dtype).max, 0, np.inf, np.nan, -3], dtype)
    got = norms.power_of_two(jnp.asarray(np.abs(x)))
    expected = [1, 1, 2, 0.25, tiny, np.ldexp(1.0, np.finfo(dtype).maxexp - 1), 1, 1, 1, 2]
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, np.array(expected, dtype))
    assert jax.grad(norms.power_of_two)(jnp.asarray(3, dtype)) == 0
    with pytest.raises(TypeError, match="bfloat16"):
        norms.power_of_two(jnp.ones(2, jnp.bfloat16))
