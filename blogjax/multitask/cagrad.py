"""CAGrad: the direction near the mean gradient that is best for the worst-off task.

What: `cagrad_weights`, a combiner.
Post: https://kexue.fm/archives/8896 (for comparison; the post does not have it)
Paper: Liu et al. 2021, arXiv:2110.14048.
Equations: max_d min_i <g_i, d> subject to |d - g| <= c |g|, g the mean gradient. For a level m the
  nearest d with <g_i, d> >= m for all i is g + sum_i l_i g_i, l = argmin_{l >= 0}
  |g + sum_i l_i g_i|^2 / 2 - m sum_i l_i. Its distance from g grows with m, and the level where it
  is c |g| is found by bisection.
Differences from the post: it does not have this method. From the paper: it
  minimises the dual over the simplex with a general solver; this needs none but
  `nonnegative_least_squares`.
"""

import jax
import jax.numpy as jnp

from blogjax.core.random import Key
from blogjax.multitask.combiner import check_gram, finite_or_uniform
from blogjax.multitask.nonnegative_least_squares import nonnegative_least_squares


def cagrad_weights(
    gram: jax.Array,
    *,
    key: Key | None = None,
    losses: jax.Array | None = None,
    c: float = 0.5,
    rescale: bool = False,
) -> jax.Array:
    """Weights of the conflict-averse direction.

    Args:
      gram: `[K, K]`, from `multitask.gram`.
      key, losses: ignored.
      c: radius as a share of the mean gradient's norm, in [0, 1). 0 is the mean gradient.
      rescale: whether to divide by `1 + c^2`, as the paper's code does.

    Returns:
      `[K]`, each at least `1 / K` (before rescaling). If `gram` is not finite, `1 / K`.

    Numerics: bisection, one solve for each bit of the dtype's significand. Where the hull of the
      gradients comes nearer to zero than about `sqrt(K eps)` of their norms, the level stays at
      what can be told from rounding: at a Pareto stationary point the direction is nearly the mean
      gradient.

    Raises:
      ValueError: if `gram` is not a square matrix of real numbers, or `c` out of range.

    >>> cagrad_weights(jnp.array([[1.0, 0.0], [0.0, 4.0]]), c=0.0).tolist()
    [0.5, 0.5]
    """
    del key, losses
    if not 0 <= c < 1:
        raise ValueError(f"c is {c}, but must lie in [0, 1)")
    gram = check_gram(gram)
    tasks = gram.shape[0]
    eps, bits = float(jnp.finfo(gram.dtype).eps), int(jnp.finfo(gram.dtype).nmant) + 3

    def weigh(gram: jax.Array) -> jax.Array:
        products = jnp.mean(gram, axis=1)  # <g_i, g>
        radius = c * jnp.sqrt(jnp.maximum(jnp.mean(products), 0))
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))

        def extra(level: jax.Array) -> jax.Array:
            return nonnegative_least_squares(gram, products - level).x

        def reachable(x: jax.Array) -> jax.Array:
            square = jnp.dot(x, jnp.matmul(gram, x, precision=jax.lax.Precision.HIGHEST))
            # A level that nothing reaches gives large coefficients of gradients that cancel.
            noise = tasks * eps * jnp.square(jnp.dot(x, norms))
            return (square <= radius * radius) & (square >= noise)

        def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = ends
            middle = (low + high) / 2
            inside = reachable(extra(middle))
            return jnp.where(inside, middle, low), jnp.where(inside, high, middle)

        low = jnp.min(products)
        high = jnp.min(products + radius * norms)
        low, _ = jax.lax.fori_loop(0, bits, halve, (low, high))
        return (1 / tasks + extra(low)) / (1 + c * c if rescale else 1)

    return finite_or_uniform(gram, weigh)
