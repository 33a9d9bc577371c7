"""Broadcasting that is asked for, so that nothing broadcasts by accident."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def per_example(values: ArrayLike, like: jax.Array) -> jax.Array:
    """Appends axes of size one to `values` until it has the rank of `like`.

    A vector of one number per example, `[B]`, becomes `[B, 1, 1, 1]` beside images `[B, H, W, C]`.
    A scalar is returned with rank `like.ndim` and broadcasts over everything.

    Args:
      values: array whose shape is a prefix of `like.shape`, or a scalar.
      like: the array that `values` will be multiplied with.

    Returns:
      `values`, reshaped; its dtype is kept.

    Raises:
      ValueError: if the shape of `values` is no prefix of the shape of `like`.

    >>> import jax.numpy as jnp
    >>> per_example(jnp.ones(3), jnp.ones((3, 8, 8, 1))).shape
    (3, 1, 1, 1)
    """
    values = jnp.asarray(values)
    if values.shape != like.shape[: values.ndim]:
        raise ValueError(
            f"values of shape {values.shape} do not lead an array of shape {like.shape}: "
            "give a scalar or one value per example"
        )
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def sum_except(x: jax.Array, batch_ndim: int = 1) -> jax.Array:
    """Sums over every axis but the first `batch_ndim`, in float32 or better.

    >>> import jax.numpy as jnp
    >>> sum_except(jnp.ones((2, 3, 4)))
    Array([12., 12.], dtype=float32)
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.sum(x, axis=tuple(range(batch_ndim, x.ndim)), dtype=dtype)
