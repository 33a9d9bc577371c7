"""Several primary tasks and several auxiliary ones.

What: `mixed_weights`, a combiner between `min_norm` and `primary_auxiliary`.
Post: https://kexue.fm/archives/8907
Paper: none; the post leaves the algorithm to the reader.
Equations: min over a in the simplex, l >= 0 of |sum_i a_i g_i + sum_j l_j g_j|^2, i primary,
  j auxiliary. Solved as x = argmin_{x >= 0} x' K x / 2 - sum over primary i of x_i, divided by that
  sum. At the optimum u has <u, g_j> >= 0 and <u, g_i> >= |u|^2.
Differences from the post: none.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from blogjax.core.random import Key
from blogjax.multitask.combiner import check_gram, finite_or_uniform, shares, unit_of
from blogjax.multitask.nonnegative_least_squares import nonnegative_least_squares


def mixed_weights(
    gram: jax.Array,
    is_primary: Sequence[bool],
    *,
    key: Key | None = None,
    losses: jax.Array | None = None,
    drop_zero: bool = False,
) -> jax.Array:
    """Weights of the step that lowers every primary loss and raises no auxiliary one.

    Args:
      gram: `[K, K]`, from `multitask.gram`.
      is_primary: one bool for each task, at least one True. All True is `min_norm_weights`, one
        True `primary_auxiliary_weights`.
      key, losses: ignored.
      drop_zero: as in `min_norm_weights`, for primary gradients of zero.

    Returns:
      `[K]`, not negative; those of the primary tasks sum to 1. If `gram` is not finite, `1 / K`; if
      all primary tasks are left out, 0.

    Raises:
      ValueError: if `gram` is not a square matrix of real numbers, or `is_primary` of another
        length, without a True or not of bools.

    >>> gram = jnp.array([[1.0, -2.0], [-2.0, 8.0]])
    >>> mixed_weights(gram, [True, False]).round(6).tolist()
    [1.0, 0.25]
    """
    del key, losses
    gram = check_gram(gram)
    primary = list(is_primary)
    bools = all(isinstance(p, bool | np.bool_) for p in primary)
    if not bools or len(primary) != gram.shape[0] or not any(primary):
        raise ValueError(
            f"is_primary needs a bool for each of {gram.shape[0]} tasks, one of them True, got "
            f"{primary}"
        )

    def weigh(gram: jax.Array) -> jax.Array:
        chosen = jnp.array(primary)
        zero = chosen & (jnp.diagonal(gram) <= 0)
        unit = unit_of(jnp.where(chosen, jnp.diagonal(gram), 0))
        x = nonnegative_least_squares(gram, jnp.where(chosen, -unit, 0)).x
        if not drop_zero:
            x = jnp.where(jnp.any(zero), zero.astype(x.dtype), x)
        return shares(x, chosen)

    return finite_or_uniform(gram, weigh)
