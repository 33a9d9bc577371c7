import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blogjax.nn.class_embedding import ClassEmbedding


@pytest.mark.parametrize("num_classes", [1, 3])
def test_rows_of_the_table_and_nan_for_labels_that_do_not_exist(key, num_classes):
    module = ClassEmbedding(num_classes, 5)
    inside = np.arange(num_classes)
    outside = np.array([-1, -num_classes, num_classes, 2**31 - 1, -(2**31)])
    labels = jnp.asarray(np.concatenate([inside, outside]), jnp.int32)
    variables = module.init(key, labels)
    got = np.asarray(jax.jit(module.apply)(variables, labels))
    np.testing.assert_array_equal(got[:num_classes], variables["params"]["embedding"])
    assert np.isnan(got[num_classes:]).all()


def test_gradient_reaches_the_rows_that_were_asked_for(key):
    module = ClassEmbedding(4, 2)
    labels = jnp.array([2, 2, 0])
    variables = module.init(key, labels)
    grad = jax.grad(lambda v: module.apply(v, labels).sum())(variables)
    np.testing.assert_array_equal(grad["params"]["embedding"][:, 0], [1, 0, 2, 0])


def test_dtypes_and_refusals(key):
    labels = jnp.zeros(3, jnp.uint8)
    out, variables = ClassEmbedding(2, 4, dtype=jnp.bfloat16).init_with_output(key, labels)
    chex.assert_type([out, variables["params"]["embedding"]], [jnp.bfloat16, jnp.float32])
    for bad in (jnp.zeros(3), jnp.zeros((3, 1), jnp.int32), jnp.array([True]), jnp.int32(1)):
        with pytest.raises(ValueError, match=f"integer vector.* not {bad.dtype}"):
            ClassEmbedding(2, 4).init(key, bad)
    with pytest.raises(ValueError, match="num_classes must be at least 1, not 0"):
        ClassEmbedding(0, 4).init(key, labels)
