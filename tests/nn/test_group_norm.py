import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blogjax.nn.group_norm import group_count, group_norm


@given(st.integers(1, 600), st.integers(1, 40), st.integers(1, 8))
def test_group_count_is_the_largest_that_fits(channels, maximum, smallest):
    groups = group_count(channels, maximum, smallest)
    assert channels % groups == 0 and groups <= maximum
    assert groups == 1 or channels // groups >= smallest
    for more in range(groups + 1, maximum + 1):
        assert channels % more or channels // more < smallest


def test_group_count_of_the_papers_widths():
    assert [group_count(c) for c in (128, 256, 384, 512)] == [32] * 4
    with pytest.raises(ValueError, match="0, 32, 4"):
        group_count(0)


@pytest.mark.parametrize("shape", [(2, 3, 4, 12), (3, 12)])
def test_group_norm_against_a_loop_also_far_from_zero(key, shape):
    # Around 1000, E[x^2] - E[x]^2 in float32 has no correct digit.
    keys = jax.random.split(key, 3)
    x = 1000.0 + jax.random.normal(keys[0], shape)
    layer = group_norm(12)
    scale, bias = jax.random.normal(keys[1], (12,)), jax.random.normal(keys[2], (12,))
    out = jax.jit(layer.apply)({"params": {"scale": scale, "bias": bias}}, x)
    expected = np.empty(shape)
    for b in range(shape[0]):
        for group in range(3):
            own = slice(4 * group, 4 * group + 4)
            part = np.asarray(x[b, ..., own], np.float64)
            part = (part - part.mean()) / np.sqrt(part.var() + 1e-6)
            expected[b, ..., own] = part * np.asarray(scale[own]) + np.asarray(bias[own])
    np.testing.assert_allclose(out, expected, atol=2e-3)


def test_group_norm_of_a_constant_and_in_bfloat16(key):
    layer = group_norm(8, dtype=jnp.bfloat16)
    x = jnp.full((1, 4, 8), 3.0, jnp.bfloat16)
    variables = layer.init(key, x)
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
    out, grad = jax.value_and_grad(lambda x: layer.apply(variables, x).astype(jnp.float32).sum())(x)
    assert out == 0 and jnp.isfinite(grad).all()
    # 4096 positions of mean 256: sums in bfloat16 would stop growing at 256 times the first.
    x = 256 + 2.0 * jax.random.randint(key, (1, 4096, 8), 0, 2).astype(jnp.bfloat16)
    out = np.asarray(layer.apply(variables, x), np.float32)
    np.testing.assert_allclose(np.abs(out), 1, atol=0.05)


def test_groups_must_divide():
    with pytest.raises(ValueError, match="5 groups do not divide 12 channels"):
        group_norm(12, groups=5)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 3, 5, 12), 3),
        ((2, 12), 4),
        pytest.param((3, 7, 6), 1, marks=pytest.mark.slow),
        pytest.param((1, 2, 3, 4, 8), 8, marks=pytest.mark.slow),
    ],
)
def test_group_norm_and_its_gradients_are_flaxs(key, shape, groups):
    with jax.enable_x64(True):
        keys = jax.random.split(key, 4)
        x, g = (3 + jax.random.normal(k, shape, jnp.float64) for k in keys[:2])
        params = {
            name: jax.random.normal(k, shape[-1:], jnp.float64)
            for name, k in zip(("scale", "bias"), keys[2:], strict=True)
        }

        def values(layer):
            out, vjp = jax.vjp(lambda p, x: layer.apply({"params": p}, x), params, x)
            return out, *vjp(g)

        ours = jax.jit(lambda: values(group_norm(shape[-1], groups=groups)))()
        theirs = jax.jit(lambda: values(nn.GroupNorm(groups, use_fast_variance=False)))()
        chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
        chex.assert_trees_all_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.slow  # seconds of compiling
def test_group_norm_under_vmap_is_that_of_a_batch(key):
    x = jax.random.normal(key, (3, 5, 7, 8))
    layer = group_norm(8)
    variables = layer.init(key, x)
    one = jax.vmap(lambda x: layer.apply(variables, x[None])[0])
    np.testing.assert_allclose(one(x), layer.apply(variables, x), atol=1e-6)


def test_group_norm_refuses_what_it_cannot_divide(key):
    with pytest.raises(ValueError, match=r"not an array of shape \(12,\)"):
        group_norm(12).init(key, jnp.ones(12))
    with pytest.raises(ValueError, match=r"3 groups do not divide 16 channels \(input \(2, 16\)\)"):
        group_norm(12).init(key, jnp.ones((2, 16)))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("of_x", [jnp.bfloat16, jnp.float32])
def test_group_norm_dtypes(key, dtype, param_dtype, of_x):
    layer = group_norm(8, dtype=dtype, param_dtype=param_dtype)
    out, variables = layer.init_with_output(key, jnp.ones((2, 3, 8), of_x))
    chex.assert_type(jax.tree.leaves(variables), param_dtype)
    chex.assert_type(out, jnp.promote_types(of_x, param_dtype) if dtype is None else dtype)
