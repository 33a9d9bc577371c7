"""Gradient accumulation that a bad microbatch cannot poison.

What: averages the gradients of k calls, then lets the wrapped transformation take one step. A
  microbatch with NaN or infinity anywhere in its gradients counts as if it had not been there.
Post: https://kexue.fm/archives/8634 (on accumulation; for the kind that needs no memory, hidden in
  the momentum, see `tiger`)
Equations: G = sum_{t in window, g_t finite} g_t, n the number of terms; after k calls
  (u, s') = inner(G / n, s) if n > 0, else u = 0 and s' = s.
Differences from the post: none in the mean; finite microbatches only. Differences from
  `optax.MultiSteps`: there one NaN is in the updates at once and in the sum for ever, because both
  are multiplied by 0 instead of replaced; and the inner update is computed in every call and thrown
  away in all but the last.
"""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from blogjax.optim.checks import check_at_least, check_floating, check_updates
from blogjax.optim.skip_nonfinite import nonfinite_leaves


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      calls: int32 `[]`, microbatches seen in the open window, bad ones too; below k.
      finite: int32 `[]`, how many of them were finite.
      emitted: int32 `[]`, updates of the wrapped transformation so far.
      skipped: int32 `[]`, microbatches that were not finite so far.
      nonfinite_leaves: bool `[number of leaves]`, in the order of `jax.tree.leaves`, which leaves
        of the last microbatch were not finite.
      sums: like the parameters, sum over the finite microbatches of the open window. Without
        meaning while `finite` is 0.
      inner: state of the wrapped transformation.
    """

    calls: jax.Array
    finite: jax.Array
    emitted: jax.Array
    skipped: jax.Array
    nonfinite_leaves: jax.Array
    sums: optax.Updates
    inner: optax.OptState


def accumulate(
    inner: optax.GradientTransformation,
    every: int | Callable[[jax.Array], jax.Array | int],
    *,
    skip_nonfinite: bool = True,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner` so that it takes one step per `every` calls, on the mean of their gradients.

    The calls form windows of `every`. Inside a window the update is -0.0 (which leaves every float
    as it was when added) and `inner` is not run. The last call of a window runs `inner` on the mean
    of the window's finite gradients, so `inner`'s counts and schedules count emissions. A gradient
    with NaN or infinity in any leaf is left out whole, in the sum and in the divisor: the step
    taken is, bit for bit, that of a window without it. A window with nothing finite emits nothing
    and leaves `inner` as it was; the next call opens a new window.

    A bad microbatch still takes a place in its window, so windows and data stay in step. To wait
    for `every` finite ones instead, wrap once more: under `skip_nonfinite(accumulate(tx, k))` a bad
    call changes nothing at all. In `accumulate(skip_nonfinite(tx), k)` the inner guard catches the
    sum that overflows though its terms do not.

    Numerics: the sum is in float32 or better and is divided once, at the emission; the mean is then
    cast to the gradient's dtype. A window of one finite microbatch gives its gradient bit for bit.
    The choice between sum and old sum is a select per entry, in the pass that adds; the emission is
    a `lax.cond` on a scalar, which becomes a select under `vmap`. `inner`'s state keeps the dtypes
    of its `init`, whatever the gradients' are.

    Average gradients over devices before: the test knows no axis name, the sums count as
    replicated, and an `inner` that communicates would wait for ever for a device that emits
    nothing. For gradients that differ between devices see `majority_vote.distributed_lion`.

    Memory: one `accumulator_dtype` copy of the parameters. `tiger` and momentum SGD can do without.

    Args:
      inner: any transformation; extra arguments of `update` are passed on, those of the window's
        last call.
      every: k >= 1, or a function of `emitted` that gives it for the window that is open (below 1
        counts as 1).
      skip_nonfinite: False lets NaN and infinity into the sum of their own window; the next window
        is clean again.
      accumulator_dtype: of the sums; None is each parameter's dtype, float32 at least.

    Returns:
      A transformation whose state is an `AccumulateState`.

    Raises:
      ValueError: if `every` is an int below 1, or gradients and parameters differ in structure or
        shape.
      TypeError: if `every` is neither int nor callable, or a leaf is not real floating.

    >>> import jax.numpy as jnp, optax
    >>> tx = accumulate(optax.sgd(1.0), 3)
    >>> params = {"w": jnp.zeros(1)}
    >>> state = tx.init(params)
    >>> for g in (1.0, float("nan"), 3.0):
    ...     updates, state = tx.update({"w": jnp.array([g])}, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["w"].tolist(), int(state.skipped))
    [0.0] 0
    [0.0] 1
    [-2.0] 1
    """
    if not callable(every):
        if isinstance(every, bool) or not isinstance(every, numbers.Integral):
            raise TypeError(f"every must be an int or a function of emissions, got {every!r}")
        check_at_least("every", every, 1)
    if accumulator_dtype is not None and not jnp.issubdtype(accumulator_dtype, jnp.floating):
        raise TypeError(f"accumulator_dtype must be floating, got {accumulator_dtype}")
    inner = optax.with_extra_args_support(inner)

    def zero_sum(param: jax.Array) -> jax.Array:
        dtype = accumulator_dtype or jnp.promote_types(param.dtype, jnp.float32)
        return jnp.zeros_like(param, dtype)

    def init_fn(params: optax.Params) -> AccumulateState:
        check_floating(params)
        calls, finite, emitted, skipped = jnp.zeros((4,), jnp.int32)
        return AccumulateState(
            calls=calls,
            finite=finite,
            emitted=emitted,
            skipped=skipped,
            nonfinite_leaves=jnp.zeros((len(jax.tree.leaves(params)),), jnp.bool_),
            sums=jax.tree.map(zero_sum, params),
            inner=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AccumulateState]:
        check_updates(updates, state.sums)
        bad = nonfinite_leaves(updates)
        good = ~jnp.any(bad)
        counts = good if skip_nonfinite else jnp.ones((), jnp.bool_)
        finite = state.finite + counts

        def add(grad: jax.Array, total: jax.Array) -> jax.Array:
            grad = grad.astype(total.dtype)
            # The old sum of a window that has none yet is never read: it may hold anything.
            return jnp.where(counts, jnp.where(state.finite == 0, grad, total + grad), total)

        sums = jax.tree.map(add, updates, state.sums)
        size = every(state.emitted) if callable(every) else every
        last = state.calls + 1 >= size

        # Closures, not operands: an extra argument may be a function. Under jit it is traced once,
        # though both `eval_shape` and `cond` ask for it.
        @jax.jit
        def emit():
            mean = jax.tree.map(
                lambda total, grad: (total / finite).astype(grad.dtype), sums, updates
            )
            new_updates, new_inner = inner.update(mean, state.inner, params, **extra_args)
            return new_updates, jax.tree.map(_keep_dtype, new_inner, state.inner)

        shapes = jax.eval_shape(emit)[0]

        def wait():
            # `full_like` keeps what shard_map knows of axes; both branches must agree on that.
            return jax.tree.map(lambda x: jnp.full_like(x, -0.0), shapes), state.inner

        emits = last & (finite > 0)
        new_updates, new_inner = jax.lax.cond(emits, emit, wait)
        return new_updates, AccumulateState(
            calls=jnp.where(last, 0, state.calls + 1),
            finite=jnp.where(last, 0, finite),
            emitted=jnp.where(emits, optax.safe_increment(state.emitted), state.emitted),
            skipped=jnp.where(good, state.skipped, optax.safe_increment(state.skipped)),
            nonfinite_leaves=bad,
            sums=sums,
            inner=new_inner,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _keep_dtype(new: Any, old: Any) -> jax.Array:
    """`new` in the dtype of `old`; keys and the like pass as they are."""
    new = jnp.asarray(new)
    return new if new.dtype == jnp.result_type(old) else new.astype(jnp.result_type(old))
