"""Norms of trees, in float32 or better whatever the leaves are."""

from typing import Any

import jax
import jax.numpy as jnp

# Leaves below this many entries are never split over devices, so putting them together is free.
_SMALL = 2**12


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
    leaves = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in jax.tree.leaves(tree)]
    # Biases and scales go through one reduction together: each kernel less compiles faster.
    small = [x.ravel() for x in leaves if x.size < _SMALL]
    leaves = [x for x in leaves if x.size >= _SMALL]
    if small:
        leaves.append(jnp.concatenate(small))
    if not leaves:
        return jnp.zeros((), jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.stack([jnp.sum(x * x) for x in leaves])))
