"""What a combiner of task gradients is: a function from their Gram matrix to weights.

What: `Combiner`, the signature that all of them share; `check_gram`, `check_losses`; `shares`,
  `unit_of`; `finite_or_uniform`, which says what they do with NaN.
Post: https://kexue.fm/archives/8896
Paper: Sener & Koltun 2018, arXiv:1810.04650.
Equations: u = sum_i w_i g_i, w = combiner(G G').
Differences from the post: none.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from blogjax.core.random import Key


class Combiner(Protocol):
    """`combiner(gram, *, key=None, losses=None) -> weights`.

    `gram` is `[K, K]`, `weights` `[K]` of its dtype. Methods that draw take a typed `key`, those
    that look at the losses take them as `[K]`; the others ignore both, so that any of them can be
    put in any other's place. Options are bound with `functools.partial`.
    """

    def __call__(
        self, gram: jax.Array, /, *, key: Key | None = None, losses: jax.Array | None = None
    ) -> jax.Array:
        """Returns the weights `[K]`."""
        ...


def check_gram(gram: jax.Array) -> jax.Array:
    """Returns the matrix as a JAX array in float32 or better.

    Raises:
      ValueError: if it is not `[K, K]` with K at least 1, or not of real numbers.
    """
    gram = jnp.asarray(gram)  # numpy's float64 is more than JAX has by default
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] < 1:
        raise ValueError(f"a Gram matrix is [K, K] with K of at least 1, got {gram.shape}")
    if not jnp.issubdtype(gram.dtype, jnp.floating):
        raise ValueError(f"a Gram matrix is of real numbers, got {gram.dtype}")
    return gram.astype(jnp.promote_types(gram.dtype, jnp.float32))


def check_losses(losses: jax.Array | None, gram: jax.Array, name: str) -> jax.Array:
    """Returns the losses in the dtype of the Gram matrix.

    Raises:
      ValueError: if there are none, naming the method that needs them, or not one for each task.
    """
    if losses is None:
        raise ValueError(f"{name} needs the losses of the tasks: losses=[K]")
    if losses.shape != gram.shape[:1]:
        raise ValueError(f"losses of shape {losses.shape} for {gram.shape[0]} tasks")
    return losses.astype(gram.dtype)


def shares(x: jax.Array, among: jax.Array | None = None) -> jax.Array:
    """Returns `x` divided by the sum of its entries, exactly 1 where one entry is the whole sum.

    Args:
      x: `[K]`, not negative. If the sum is 0, it is returned as it is.
      among: bool `[K]`, the entries that are summed; by default all.

    >>> shares(jnp.array([0.0, 7.0])).tolist()
    [0.0, 1.0]
    """
    total = jnp.sum(x if among is None else jnp.where(among, x, 0))
    quotient = x / jnp.where(total > 0, total, 1)
    # XLA multiplies by the inverse of a number that divides a vector: a / a is not always 1 then.
    return jnp.where((x == total) & (total > 0), 1, quotient)


def unit_of(squares: jax.Array) -> jax.Array:
    """Returns a power of two, not above the least positive one of the squares and above its half.

    As the linear term of `min_{x >= 0} x' K x / 2 - unit sum_i x_i` it scales the solution only,
    without rounding, and keeps it near 1 or below: with 1 for it, x is `1 / |g|^2`, and the sum of
    such numbers need not be one of float32.

    Args:
      squares: `[n]`, of norms of gradients. Without a positive one the unit is 1.

    >>> unit_of(jnp.array([0.0, 7.0, 9.0])).item()
    4.0
    """
    least = jnp.min(jnp.where(squares > 0, squares, jnp.inf))
    least = jnp.where(jnp.isfinite(least), least, 1)
    _, exponent = jnp.frexp(least)
    return jnp.ldexp(jnp.ones_like(least), exponent - 1)


def finite_or_uniform(
    gram: jax.Array, weigh: Callable[[jax.Array], jax.Array], total: float = 1.0
) -> jax.Array:
    """Returns `weigh(gram)`, or equal weights where the matrix is not finite.

    With one task's gradient NaN or infinite no direction can be good for all, and a weight of 0
    would hide it: the weights stay finite, the combined gradient is not, and whoever guards updates
    (`optim.skip_nonfinite`) leaves the step out.

    Args:
      gram: `[K, K]`, checked.
      weigh: function of a finite matrix.
      total: the sum of the weights to fall back on.
    """
    tasks = gram.shape[0]
    finite = jnp.all(jnp.isfinite(gram))
    weights = weigh(jnp.where(finite, gram, jnp.eye(tasks, dtype=gram.dtype)))
    return jnp.where(finite, weights, jnp.asarray(total / tasks, gram.dtype))
