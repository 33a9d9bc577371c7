"""Non-negative least squares on a Gram matrix, exact and inside a compiled step.

What: `nonnegative_least_squares`, the one solver behind `min_norm`, `primary_auxiliary`, `mixed`
  and `upgrad`.
Post: https://kexue.fm/archives/8907
Paper: Lawson & Hanson 1974, Solving Least Squares Problems, chapter 23.
Equations: min_{x >= 0} f(x) = x' K x / 2 + c' x, K = G G'. At the optimum w = -(K x + c) is at most
  0, and 0 where x > 0. With s = diag(K)^(-1/2) the method works on s_i K_ij s_j and s_i c_i, whose
  scales are those of cosines.
Differences from the post: it iterates over single coefficients, choosing the most violated
  constraint, and never lowers a coefficient whose constraint is slack. That stops short of the
  optimum; tests/multitask has the counter-example. Here a set of free coefficients is kept, solved
  for together, and left again where a coefficient would become negative.
Differences from the book: the set starts with all coefficients that lower the objective by
  themselves instead of with none, and loses the negative ones until a solution has no more of them.
  It takes a few systems instead of one for each coefficient, and equal gradients share.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Solution(NamedTuple):
    """What the solver found.

    Attributes:
      x: `[n]`, not negative; exact zeros where a coefficient is not used.
      iterations: int32 scalar, linear systems solved.
      converged: bool scalar, whether no coefficient is left that would lower the objective.
    """

    x: jax.Array
    iterations: jax.Array
    converged: jax.Array


class _State(NamedTuple):
    x: jax.Array  # feasible, scaled
    free: jax.Array  # the coefficients that the next system is solved for
    barred: jax.Array  # those that went straight back to 0
    value: jax.Array  # the objective when a coefficient was last freed
    iterations: jax.Array
    done: jax.Array


def nonnegative_least_squares(
    gram: jax.Array, linear: jax.Array, *, max_iterations: int | None = None
) -> Solution:
    """Minimises `x' gram x / 2 + linear' x` over `x >= 0`.

    Args:
      gram: `[n, n]`, symmetric and positive semi-definite, float32 or float64.
      linear: `[n]`, of the same dtype; n may be 0.
      max_iterations: bound on the linear systems solved; by default `10 n + 10`, many times what
        is needed: usually 2 to 5, about 20 in the worst cases seen with n = 32.

    Returns:
      The solution. Where the minimum is not reached (a direction without curvature along which the
      objective falls), the coefficients along it are large, about `1 / (n eps)`. A coefficient
      without curvature of its own, `gram[i, i] == 0`, stays 0.

    Numerics: in the arithmetic of `gram`. A ridge on the scaled matrix, of `n eps` or more where
      rounding has made it indefinite, keeps the systems solvable; one step of refinement takes its
      effect out again where the matrix is not singular. NaN or infinity end the loop at once and
      give some finite or NaN `x`; callers look beforehand.

    Raises:
      ValueError: if the shapes or the dtypes do not fit.

    Compiles once per n; under `vmap` the loop runs until all are done.

    >>> gram = jnp.array([[2.0, -1.0], [-1.0, 2.0]])
    >>> nonnegative_least_squares(gram, jnp.array([-1.0, 3.0])).x.round(6).tolist()
    [0.5, 0.0]
    """
    n = linear.shape[0] if linear.ndim == 1 else -1
    if gram.shape != (n, n):
        raise ValueError(f"gram of shape {gram.shape} does not fit linear of shape {linear.shape}")
    if gram.dtype != linear.dtype or not jnp.issubdtype(gram.dtype, jnp.floating):
        raise ValueError(f"gram is {gram.dtype} and linear {linear.dtype}; one float type needed")
    if n == 0:
        return Solution(jnp.zeros_like(linear), jnp.zeros((), jnp.int32), jnp.ones((), bool))
    limit = 10 * n + 10 if max_iterations is None else max_iterations
    eps = float(jnp.finfo(gram.dtype).eps)

    diagonal = jnp.diagonal(gram)
    curved = diagonal > 0
    scale = jnp.where(curved, 1 / jnp.sqrt(jnp.where(curved, diagonal, 1)), 0)
    eye = jnp.eye(n, dtype=bool)
    matrix = jnp.where(eye, curved.astype(gram.dtype), gram * scale[:, None] * scale[None, :])
    target = -linear * scale
    # What is common to all coefficients has no part in which are free.
    size = jnp.max(jnp.abs(target))
    target = target / jnp.where(size > 0, size, 1)

    # Inner products of long vectors are rounded by more than n eps: what should be singular may be
    # indefinite. A ridge that is enough for the whole matrix is so for every part of it.
    def indefinite(ridge: jax.Array) -> jax.Array:
        factor = jax.lax.linalg.cholesky(matrix + jnp.diag(jnp.where(curved, ridge, 1)))
        return jnp.any(jnp.isnan(factor)) & (ridge < 1)

    smallest = jnp.asarray(n * eps, gram.dtype)
    ridge = jax.lax.while_loop(indefinite, lambda ridge: 8 * ridge, smallest)

    def solve(free: jax.Array) -> jax.Array:
        both = free[:, None] & free[None, :]
        system = jnp.where(both, matrix, 0) + jnp.diag(jnp.where(free, ridge, 1))
        factor = jax.scipy.linalg.cho_factor(system, lower=True)
        wanted = jnp.where(free, target, 0)
        x = jax.scipy.linalg.cho_solve(factor, wanted)
        left = jnp.where(free, target - _times(matrix, x), 0)
        return x + jax.scipy.linalg.cho_solve(factor, left)

    def body(state: _State) -> _State:
        x, free, barred, value, iterations, _ = state
        z = jnp.where(free, solve(free), 0)
        # A coefficient that would become negative stops the way from x to z.
        negative = free & (z <= 0)
        blocked = jnp.any(negative)
        reach = jnp.where(negative, x / jnp.where(x > z, x - z, 1), 1)
        first = negative & (reach <= jnp.min(reach))
        part = x + jnp.min(reach) * (z - x)
        # Before the first system without negative coefficients all of those leave at once.
        unsolved = ~jnp.any(x > 0)
        leaving = jnp.where(unsolved, negative, first | (free & (part <= 0)))
        stopped = jnp.where(leaving | ~free, 0, part)

        slope = target - _times(matrix, z)
        value_z = _value(matrix, target, z)
        # Freed again only after the objective has fallen: so the loop ends in any arithmetic.
        barred_z = barred & ~(value_z < value)
        tolerance = 4 * eps * (1 + jnp.sum(z))
        open_ = curved & ~free & ~barred_z & (slope > tolerance)
        best = jnp.argmax(jnp.where(open_, slope, -jnp.inf))
        return _State(
            x=jnp.where(blocked, stopped, z),
            free=jnp.where(blocked, free & ~leaving, free | (open_ & (jnp.arange(n) == best))),
            barred=jnp.where(blocked, barred | (leaving & (x <= 0) & ~unsolved), barred_z),
            value=jnp.where(blocked, value, jnp.minimum(value, value_z)),
            iterations=iterations + 1,
            done=~blocked & ~jnp.any(open_),
        )

    def unfinished(state: _State) -> jax.Array:
        return ~state.done & (state.iterations < limit)

    none = jnp.zeros(n, bool)
    zero = jnp.zeros((), gram.dtype)
    start = _State(
        x=jnp.zeros_like(target),
        free=target > 0,
        barred=none,
        value=zero,
        iterations=jnp.zeros((), jnp.int32),
        done=jnp.zeros((), bool),
    )
    end = jax.lax.while_loop(unfinished, body, start)
    return Solution(end.x * scale * size, end.iterations, end.done)


def _times(matrix: jax.Array, x: jax.Array) -> jax.Array:
    # Accelerators multiply float32 matrices in less than float32 unless told otherwise.
    return jnp.matmul(matrix, x, precision=jax.lax.Precision.HIGHEST)


def _value(matrix: jax.Array, target: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(x * (_times(matrix, x) / 2 - target))
