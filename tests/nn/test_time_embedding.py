import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blogjax.nn.time_embedding import TimeEmbedding, sinusoidal_embedding


def slow_sinusoid(t, dim, max_period=10000.0):
    """One number at a time in float64: geometric from period 2 pi to period 2 pi max_period."""
    half = dim // 2
    ratio = max_period ** (-1 / (half - 1)) if half > 1 else 1.0
    return [
        [math.sin(x * ratio**i) for i in range(half)]
        + [math.cos(x * ratio**i) for i in range(half)]
        for x in t
    ]


@given(
    st.lists(st.floats(-2000, 2000, width=32), min_size=1, max_size=4),
    st.integers(1, 12).map(lambda half: 2 * half),
    st.sampled_from([10.0, 10000.0]),
)
def test_sinusoid_is_that_of_float64(t, dim, max_period):
    got = sinusoidal_embedding(np.array(t, np.float32), dim, max_period)
    expected = np.array(slow_sinusoid(t, dim, max_period))
    # Only the phase is rounded: half a unit in the last place of |t|, for t and for the frequency.
    tolerance = 2e-6 + 1.5e-7 * np.abs(np.array(t))[:, None]
    assert np.all(np.abs(np.asarray(got, np.float64) - expected) <= tolerance)


def test_sinusoid_takes_integers_and_low_precision_and_gives_float32():
    steps = jnp.array([0, 3, 999], jnp.int32)
    chex.assert_trees_all_equal(
        sinusoidal_embedding(steps, 8), sinusoidal_embedding(steps.astype(jnp.float32), 8)
    )
    for dtype in (jnp.bfloat16, jnp.float16, jnp.int8, jnp.uint32):
        out = sinusoidal_embedding(jnp.ones(2, dtype), 8)
        chex.assert_shape(out, (2, 8))
        chex.assert_type(out, jnp.float32)
    assert jnp.isnan(sinusoidal_embedding(jnp.array([jnp.nan, 1.0]), 4)).all(axis=1).tolist() == [
        True,
        False,
    ]


def test_sinusoid_refuses():
    t = jnp.zeros(3)
    for dim in (7, 0, -2):
        with pytest.raises(ValueError, match=f"even.* not {dim}"):
            sinusoidal_embedding(t, dim)
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        sinusoidal_embedding(t[:, None], 8)
    with pytest.raises(ValueError, match="bool"):
        sinusoidal_embedding(t == 0, 8)
    with pytest.raises(ValueError, match="complex"):
        TimeEmbedding(4, 4).init(jax.random.key(0), t.astype(jnp.complex64))
    with pytest.raises(ValueError, match=r"greater than 1, not 1\.0"):
        sinusoidal_embedding(t, 8, 1.0)


def test_time_embedding_is_two_dense_layers_on_the_scaled_time(key):
    t = jnp.array([0.0, 0.25, 1.0])
    module = TimeEmbedding(features=6, dim=8, time_scale=1000.0)
    variables = jax.jit(module.init)(key, t)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    h = np.array(slow_sinusoid(np.asarray(t, np.float64) * 1000.0, 8))
    h = h @ p["hidden"]["kernel"] + p["hidden"]["bias"]
    h = h / (1 + np.exp(-h))
    expected = h @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(module.apply(variables, t), expected, atol=2e-4)

    steps = TimeEmbedding(features=6, dim=8).apply(variables, jnp.array([0, 250, 1000]))
    np.testing.assert_allclose(steps, expected, atol=2e-4)


def test_time_embedding_keeps_the_phase_in_float32_under_bfloat16(key):
    # In bfloat16, 1001 is 1000: the two times would be one.
    module = TimeEmbedding(features=16, dim=8, dtype=jnp.bfloat16)
    out, variables = module.init_with_output(key, jnp.array([1000, 1001]))
    chex.assert_type(out, jnp.bfloat16)
    assert np.abs(np.asarray(out[0] - out[1], np.float32)).max() > 0.05
    wide = module.clone(dtype=None).apply(variables, jnp.array([1000, 1001]))
    np.testing.assert_allclose(np.asarray(out, np.float32), wide, atol=0.03)
