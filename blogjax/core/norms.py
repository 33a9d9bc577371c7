"""Norms of trees, in float32 or better whatever the leaves are."""

from typing import Any

import jax
import jax.numpy as jnp


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm of all entries of all leaves together.

    Squares are summed in float32 or better, so bfloat16 leaves lose nothing in the sum. The
    gradient at zero is NaN, as for any norm; this is a measurement, not a part of a loss.

    Args:
      tree: pytree of real arrays.

    Returns:
      Scalar; 0 for an empty tree.

    >>> import jax.numpy as jnp
    >>> float(global_norm({"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}))
    5.0
    """
    total = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(tree):
        x = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        total = total + jnp.sum(x * x)
    return jnp.sqrt(total)
