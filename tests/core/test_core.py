import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blogjax.core import broadcasting, masked, norms, random


def test_per_example_refuses_what_would_broadcast_by_accident():
    with pytest.raises(ValueError, match=r"\(4,\).*\(3, 8, 8, 1\)"):
        broadcasting.per_example(jnp.ones(4), jnp.ones((3, 8, 8, 1)))
    chex.assert_shape(broadcasting.per_example(2.0, jnp.ones((3, 8))), (1, 1))


def test_sum_except_reduces_bfloat16_in_float32():
    x = jnp.full((2, 4096), 0.1, jnp.bfloat16)
    got = broadcasting.sum_except(x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 4096 * float(jnp.bfloat16(0.1)), rtol=1e-6)


@given(hnp.arrays(np.float32, st.integers(1, 9), elements=st.floats(-8, 8, width=16)), st.data())
def test_masked_mean_is_the_mean_of_the_kept_rows(values, data):
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    poisoned = np.where(keep, values, np.nan).astype(np.float32)
    expected = values[keep].astype(np.float64).mean() if keep.any() else 0.0
    got = masked.masked_mean(jnp.asarray(poisoned), jnp.asarray(keep, jnp.float32))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_masked_mean_passes_no_gradient_to_padding():
    weight = jnp.array([1.0, 1.0, 0.0])
    grad = jax.grad(lambda v: masked.masked_mean(jnp.log(v), weight))(jnp.array([1.0, 2.0, 0.5]))
    np.testing.assert_allclose(grad, [0.5, 0.25, 0.0])


def test_masked_mean_of_nothing_is_zero():
    assert masked.masked_mean(jnp.array([jnp.nan]), jnp.zeros(1)) == 0


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3, 1\)"):
        masked.masked_sum(jnp.ones((3, 1)), jnp.ones(2))


@pytest.mark.parametrize("draw", ["normal", "uniform", "randint"])
def test_an_examples_numbers_depend_on_its_row_alone(key, draw):
    args = (0, 1000) if draw == "randint" else ()
    rows = jnp.array([5, 0, 3])
    got = getattr(random, draw)(random.fold_in_rows(key, rows), (3, 4), *args)
    for i, row in enumerate(rows):
        alone = getattr(random, draw)(random.fold_in_rows(key, row[None]), (1, 4), *args)
        chex.assert_trees_all_equal(got[i], alone[0])


def test_split_keys_gives_independent_streams(key):
    keys = random.fold_in_rows(key, jnp.arange(3))
    a, b = random.split_keys(keys)
    assert a.shape == b.shape == (3,)
    assert not np.any(random.normal(a, (3,)) == random.normal(b, (3,)))


def test_keys_that_do_not_lead_the_shape_are_refused(key):
    with pytest.raises(ValueError, match=r"\(3,\).*\(4, 2\)"):
        random.normal(random.fold_in_rows(key, jnp.arange(3)), (4, 2))


def test_global_norm_sums_bfloat16_leaves_in_float32():
    tree = {"a": jnp.full(4096, 0.1, jnp.bfloat16), "b": jnp.full((2, 3), -2.0), "c": jnp.ones(5)}
    expected = np.sqrt(4096 * float(jnp.bfloat16(0.1)) ** 2 + 6 * 4.0 + 5)
    np.testing.assert_allclose(norms.global_norm(tree), expected, rtol=1e-6)
    assert norms.global_norm({}) == 0


def test_old_style_keys_are_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"typed key.*uint32.*wrap_key_data"):
        random.normal(jax.random.PRNGKey(0), (3,))
