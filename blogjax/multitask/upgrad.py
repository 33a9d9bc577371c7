"""UPGrad: every gradient freed of its conflicts, then the mean.

What: `upgrad_weights`, a combiner.
Post: https://kexue.fm/archives/8896 (for comparison; the post does not have it)
Paper: Quinton & Rey 2024, arXiv:2406.16232.
Equations: u = (1 / K) sum_i p(g_i), p the projection to {u: <u, g_j> >= 0 for all j}; each is a
  quadratic program, p(g_i) = g_i + sum_j l_j g_j, l = argmin_{l >= 0} |g_i + sum_j l_j g_j|^2.
Differences from the post: it does not have this method. From the paper: no
  regularisation of the Gram matrix.
"""

import jax
import jax.numpy as jnp

from blogjax.core.random import Key
from blogjax.multitask.combiner import check_gram, finite_or_uniform
from blogjax.multitask.nonnegative_least_squares import nonnegative_least_squares


def upgrad_weights(
    gram: jax.Array, *, key: Key | None = None, losses: jax.Array | None = None
) -> jax.Array:
    """Weights of the mean of the projected gradients.

    The step against it raises no loss to first order. Where no two tasks conflict it is the mean.
    Multiplying one gradient multiplies its own part and leaves the cone of the others as it is.

    Args:
      gram: `[K, K]`, from `multitask.gram`.
      key, losses: ignored.

    Returns:
      `[K]`, each at least `1 / K`. If `gram` is not finite, `1 / K`.

    Raises:
      ValueError: if `gram` is not a square matrix of real numbers.

    >>> upgrad_weights(jnp.array([[1.0, -1.0], [-1.0, 2.0]])).round(6).tolist()
    [1.0, 0.75]
    """
    del key, losses
    gram = check_gram(gram)
    tasks = gram.shape[0]

    def weigh(gram: jax.Array) -> jax.Array:
        one = lambda column: nonnegative_least_squares(gram, column).x  # noqa: E731
        return (1 + jnp.sum(jax.vmap(one)(gram), axis=0)) / tasks

    return finite_or_uniform(gram, weigh)
