"""One primary task, and auxiliary ones that must not get worse.

What: `primary_auxiliary_weights`, a combiner; `project_conflicts`, the same for gradients that are
  at hand as trees; `agreeing_examples`, the mask over examples that the post compares it to.
Post: https://kexue.fm/archives/8907
Paper: Lopez-Paz & Ranzato 2017, arXiv:1706.08840 (GEM, the same quadratic program); Wang et al.
  2021, arXiv:2102.13549 (masking examples).
Equations: max_u <u, g_0> - |u|^2 / 2 subject to <u, g_i> >= 0 for all auxiliary i; dual:
  min_{l >= 0} |g_0 + sum_i l_i g_i|^2, u = g_0 + sum_i l_i g_i. For one auxiliary task
  l = relu(-<g_0, g_1>) / |g_1|^2.
Differences from the post: its iteration, which re-solves for the coefficient of the most violated
  constraint only, ends short of the optimum: for g_0 = (0, 2, -1), g_1 = (0, -1, 0),
  g_2 = (2, -3, -2) at |u|^2 = 689 / 289 instead of 1. Here the optimum is found up to rounding.
"""

from typing import Any

import jax
import jax.numpy as jnp

from blogjax.core.random import Key
from blogjax.multitask.combiner import check_gram, finite_or_uniform
from blogjax.multitask.gram import combine, gram
from blogjax.multitask.nonnegative_least_squares import nonnegative_least_squares


def primary_auxiliary_weights(
    gram: jax.Array,
    *,
    key: Key | None = None,
    losses: jax.Array | None = None,
    primary: int = 0,
) -> jax.Array:
    """Weights of the vector nearest to the primary gradient that goes against no other.

    To first order the step against it raises no auxiliary loss, nor, as `<u, g_0> = |u|^2`, the
    primary one.

    Args:
      gram: `[K, K]`, from `multitask.gram`.
      key, losses: ignored.
      primary: which task is the primary one.

    Returns:
      `[K]`, not negative, exactly 1 for the primary task; exactly 0 for every other task where
      there is no conflict, so that `u = g_0` to the bit. Auxiliary gradients of zero get 0. If
      `gram` is not finite, all weights are `1 / K`.

    Numerics: `|u|^2` is the least up to rounding; constraints hold to about
      `eps |g_i| sum_j w_j |g_j|`.

    Raises:
      ValueError: if `gram` is not a square matrix of real numbers, or `primary` out of range.

    >>> gram = jnp.array([[1.0, -2.0], [-2.0, 8.0]])  # (1, 0) and (-2, 2)
    >>> primary_auxiliary_weights(gram).round(6).tolist()
    [1.0, 0.25]
    """
    del key, losses
    gram = check_gram(gram)
    tasks = gram.shape[0]
    if not 0 <= primary < tasks:
        raise ValueError(f"primary is {primary}, but there are {tasks} tasks, from 0 on")
    others = jnp.array([i for i in range(tasks) if i != primary], jnp.int32)

    def weigh(gram: jax.Array) -> jax.Array:
        inner = gram[others][:, others]
        coefficients = nonnegative_least_squares(inner, gram[others, primary]).x
        return jnp.ones(tasks, gram.dtype).at[others].set(coefficients)

    return finite_or_uniform(gram, weigh)


def project_conflicts(gradient: Any, auxiliary: Any) -> Any:
    """Takes out of a gradient what goes against auxiliary ones.

    Args:
      gradient: pytree of real arrays, the primary gradient, or any direction.
      auxiliary: pytree of the same structure, leaves with a leading axis of tasks.

    Returns:
      The nearest tree `u` with `<u, a_i> >= 0` for each auxiliary gradient; `gradient` to the bit
      where there is no conflict.

    Raises:
      ValueError: if the shapes do not fit.

    >>> project_conflicts(jnp.array([1.0, 0.0]), jnp.array([[-2.0, 2.0]])).round(6).tolist()
    [0.5, 0.5]
    """

    def behind(first: jax.Array, rest: jax.Array) -> jax.Array:
        if first.shape != rest.shape[1:]:
            raise ValueError(f"auxiliary of shape {rest.shape} for a gradient of {first.shape}")
        return jnp.concatenate([first[None], rest.astype(first.dtype)])

    together = jax.tree.map(behind, gradient, auxiliary)
    return combine(together, primary_auxiliary_weights(gram(together)))


def agreeing_examples(products: jax.Array) -> jax.Array:
    """Weights 1 for the examples that agree with a clean gradient, 0 for the others.

    The alternative that the post compares: instead of correcting the mean gradient of noisy
    examples, leave out those whose own gradient goes against that of clean ones. The products are
    cheap: `jax.jvp` of the per-example losses along the clean gradient.

    Args:
      products: `[B]`, `<grad l_i, g_clean>`.

    Returns:
      float32 `[B]`; 0 where the product is 0, negative or NaN.

    >>> loss = lambda w: (jnp.array([1.0, -1.0]) * w[0] + jnp.array([0.0, 2.0]) * w[1])
    >>> clean = jnp.array([1.0, 0.0])
    >>> agreeing_examples(jax.jvp(loss, (jnp.zeros(2),), (clean,))[1]).tolist()
    [1.0, 0.0]
    """
    return (products > 0).astype(jnp.float32)
