"""PCGrad: each gradient projected off those it conflicts with, one after the other.

What: `pcgrad_weights`, a combiner.
Post: https://kexue.fm/archives/8896 (for comparison; the post does not have it)
Paper: Yu et al. 2020, arXiv:2001.06782.
Equations: for each i, v <- g_i; for j != i in random order:
  v <- v - min(<v, g_j>, 0) g_j / |g_j|^2; u = sum_i v_i.
Differences from the post: it does not have this method. From the paper:
  all of it on the Gram matrix, nothing is done with gradients.
"""

import jax
import jax.numpy as jnp

from blogjax.core.random import Key
from blogjax.multitask.combiner import check_gram, finite_or_uniform


def pcgrad_weights(
    gram: jax.Array, *, key: Key | None = None, losses: jax.Array | None = None
) -> jax.Array:
    """Weights of the sum of the projected gradients.

    For two tasks it is a direction of common descent. For more the projections undo each other in
    part, and the result depends on their order.

    Args:
      gram: `[K, K]`, from `multitask.gram`.
      key: typed key that the orders are drawn from, one for each task. Needed for three tasks and
        more; with fewer there is one order only.
      losses: ignored.

    Returns:
      `[K]`, each at least 1. A gradient of zero conflicts with nobody. If `gram` is not finite, 1.

    Raises:
      ValueError: if `gram` is not a square matrix of real numbers, or the key is missing.

    >>> pcgrad_weights(jnp.array([[1.0, -1.0], [-1.0, 2.0]])).tolist()
    [2.0, 1.5]
    """
    del losses
    gram = check_gram(gram)
    tasks = gram.shape[0]
    if key is None and tasks > 2:
        raise ValueError(f"the order of {tasks} tasks is random: pcgrad needs a key")

    def weigh(gram: jax.Array) -> jax.Array:
        if key is None:
            orders = jnp.broadcast_to(jnp.arange(tasks), (tasks, tasks))
        else:
            draw = lambda k: jax.random.permutation(k, tasks)  # noqa: E731
            orders = jax.vmap(draw)(jax.random.split(key, tasks))
        square = jnp.diagonal(gram)
        safe = jnp.where(square > 0, square, 1)

        def one(task: jax.Array, order: jax.Array) -> jax.Array:
            def project(v: jax.Array, j: jax.Array) -> tuple[jax.Array, None]:
                product = jnp.dot(v, gram[j], precision=jax.lax.Precision.HIGHEST)
                step = jnp.where((j != task) & (square[j] > 0), jnp.minimum(product, 0), 0)
                return v.at[j].add(-step / safe[j]), None

            own = (jnp.arange(tasks) == task).astype(gram.dtype)
            return jax.lax.scan(project, own, order)[0]

        return jnp.sum(jax.vmap(one)(jnp.arange(tasks), orders), axis=0)

    return finite_or_uniform(gram, weigh, total=float(tasks))
