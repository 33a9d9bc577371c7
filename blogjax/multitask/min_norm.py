"""MGDA: the convex combination of task gradients with the least norm, exactly.

What: `min_norm_weights`, a combiner.
Post: https://kexue.fm/archives/8896
Paper: Desideri 2012, Comptes Rendus 350 (MGDA); Sener & Koltun 2018, arXiv:1810.04650.
Equations: max_u min_i <g_i, u> - |u|^2 / 2 = min_{a in simplex} |sum_i a_i g_i|^2 / 2, attained at
  u = sum_i a_i g_i. At the optimum <g_i, u> >= |u|^2 for all i, with equality where a_i > 0. It is
  solved as x = argmin_{x >= 0} x' K x / 2 - sum_i x_i, a = x / sum_i x_i.
Differences from the post: it iterates by Frank and Wolfe, whose error falls as 1 / iterations; here
  the optimum is found up to rounding. Its proof that the bound by shared features finds Pareto
  stationary points is not relied on (the post refutes it).
"""

from typing import Literal

import jax
import jax.numpy as jnp

from blogjax.core.random import Key
from blogjax.multitask.combiner import (
    check_gram,
    check_losses,
    finite_or_uniform,
    shares,
    unit_of,
)
from blogjax.multitask.nonnegative_least_squares import nonnegative_least_squares

Normalize = Literal["none", "l2", "loss", "loss+"]
NORMALIZE = ("none", "l2", "loss", "loss+")


def min_norm_weights(
    gram: jax.Array,
    *,
    key: Key | None = None,
    losses: jax.Array | None = None,
    normalize: Normalize = "none",
    drop_zero: bool = False,
) -> jax.Array:
    """Weights of the shortest vector in the convex hull of the gradients.

    The step against that vector lowers every loss to first order, or the point is Pareto
    stationary and the vector zero.

    Args:
      gram: `[K, K]`, from `multitask.gram`.
      key: ignored.
      losses: `[K]`, for `normalize="loss"` and `"loss+"`.
      normalize: divides each gradient by n_i before: `"none"` 1, `"l2"` |g_i|, `"loss"` L_i,
        `"loss+"` L_i |g_i|. The hull is that of the quotients, and so is the vector: the weights
        are `a_i / n_i`.
      drop_zero: a gradient of zero is in itself the shortest, so the result is the zero vector and
        all of the weight lies on such tasks. True leaves them out instead, with weight 0.

    Returns:
      `[K]`, not negative. They sum to 1 for `normalize="none"`. If `gram` is not finite, `1 / K`;
      if all tasks are left out, 0.

    Numerics: the objective is the least up to rounding, for K of at least 32 (see the benchmark).
    Where n_i is not positive it counts as 1.

    Raises:
      ValueError: if `gram` is not a square matrix of real numbers, `normalize` unknown, or losses
        needed and absent or of another length.

    >>> gram = jnp.array([[1.0, 0.0], [0.0, 4.0]])  # (1, 0) and (0, 2)
    >>> min_norm_weights(gram).tolist()
    [0.800000011920929, 0.20000000298023224]
    >>> min_norm_weights(jnp.array([[1.0, 2.0], [2.0, 9.0]])).tolist()
    [1.0, 0.0]
    """
    del key
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize is {normalize!r}, but must be one of {', '.join(NORMALIZE)}")
    gram = check_gram(gram)
    size = jnp.ones(gram.shape[0], gram.dtype)
    if normalize in ("l2", "loss+"):
        square = jnp.diagonal(gram)
        size = jnp.sqrt(jnp.where(square > 0, square, 1))
    if normalize in ("loss", "loss+"):
        losses = check_losses(losses, gram, f"normalize={normalize!r}")
        size = size * jnp.where(losses > 0, losses, 1)

    def weigh(gram: jax.Array) -> jax.Array:
        zero = jnp.diagonal(gram) <= 0
        scaled = gram / size[:, None] / size[None, :]
        unit = unit_of(jnp.diagonal(scaled))
        x = nonnegative_least_squares(scaled, jnp.full_like(size, -unit)).x
        if not drop_zero:
            x = jnp.where(jnp.any(zero), zero.astype(x.dtype), x)
        return shares(x) / size

    return finite_or_uniform(gram, weigh)
