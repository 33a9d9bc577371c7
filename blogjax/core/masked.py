"""Masked reductions: padding rows count nothing, and their values are never looked at."""

import jax
import jax.numpy as jnp


def masked_sum(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns `sum_i weight_i values_i` over the first axis, rows of weight 0 left out.

    A row of weight 0 contributes exactly 0 to the value and to the gradient, also where it holds
    NaN or infinity.

    Args:
      values: `[B]` or `[B, ...]`.
      weight: `[B]`, not negative.

    Returns:
      `[...]`, float32 or better.

    Raises:
      ValueError: if `weight` is not of shape `[B]`.

    >>> import jax.numpy as jnp
    >>> float(masked_sum(jnp.array([1.0, jnp.nan]), jnp.array([1.0, 0.0])))
    1.0
    """
    if weight.shape != values.shape[:1]:
        raise ValueError(
            f"weight has shape {weight.shape}, but values of shape {values.shape} need one weight "
            f"per row: {values.shape[:1]}"
        )
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    weight = weight.reshape(weight.shape + (1,) * (values.ndim - 1)).astype(dtype)
    # The inner `where` keeps NaN out of the product, and its gradient out of the sum.
    return jnp.sum(weight * jnp.where(weight == 0, 0, values.astype(dtype)), axis=0)


def masked_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns `sum_i weight_i values_i / sum_i weight_i`, and 0 where all weights are 0.

    Args and errors as in `masked_sum`.

    >>> import jax.numpy as jnp
    >>> float(masked_mean(jnp.array([1.0, 3.0, 100.0]), jnp.array([1.0, 1.0, 0.0])))
    2.0
    """
    total = jnp.sum(weight, dtype=jnp.promote_types(weight.dtype, jnp.float32))
    return masked_sum(values, weight) / jnp.where(total == 0, 1, total)
