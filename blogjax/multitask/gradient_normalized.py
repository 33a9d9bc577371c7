"""The sum of normalised task gradients: indifferent to any loss's unit and zero point.

What: `gradient_normalized_weights`, a combiner.
Post: https://kexue.fm/archives/8870
Paper: Chen et al. 2018, arXiv:1711.02257 (GradNorm, to which the post compares it).
Equations: w_i = 1 / |g_i|, so that u = sum_i g_i / |g_i|, the gradient of
  sum_i L_i / stop_gradient(|grad L_i|).
Differences from the post: a gradient of zero gets the weight 0.
"""

import jax
import jax.numpy as jnp

from blogjax.core.random import Key
from blogjax.multitask.combiner import check_gram, finite_or_uniform


def gradient_normalized_weights(
    gram: jax.Array, *, key: Key | None = None, losses: jax.Array | None = None
) -> jax.Array:
    """Weights `1 / |g_i|`.

    For two tasks the sum never goes against either of them. For three and more it may: in R^3 about
    a third of random triples have a task with `<g_i, u> < 0`.

    Args:
      gram: `[K, K]`, from `multitask.gram`.
      key, losses: ignored.

    Returns:
      `[K]`; 0 for a gradient of zero. Multiplying one loss by a power of two leaves the combined
      gradient the same to the bit, adding a constant does too. If `gram` is not finite, `1 / K`.

    Raises:
      ValueError: if `gram` is not a square matrix of real numbers.

    >>> gradient_normalized_weights(jnp.array([[4.0, 1.0], [1.0, 0.25]])).tolist()
    [0.5, 2.0]
    """
    del key, losses
    gram = check_gram(gram)

    def weigh(gram: jax.Array) -> jax.Array:
        square = jnp.diagonal(gram)
        something = square > 0
        return jnp.where(something, 1 / jnp.sqrt(jnp.where(something, square, 1)), 0)

    return finite_or_uniform(gram, weigh)
