"""Skips the updates whose gradients are not finite.

What: a wrapper for any optax transformation. One NaN or infinity anywhere in the gradients turns
  the whole update into zeros and leaves the inner state as it was, bit for bit.
Post: none; a part of the base on which every post's training stands.
Equations: finite = all_i isfinite(g_i); (u, s') = inner(g, s) if finite else (0, s).
Differences from `optax.apply_if_finite`: it never gives up and lets a NaN through; it says which
  leaves were at fault; where the state is donated it is updated in place, see `gating`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blogjax.optim.gating import update_unless


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`.

    Attributes:
      skipped: int32 `[]`, how many updates were skipped so far.
      nonfinite_leaves: bool `[number of leaves]`, in the order of `jax.tree.leaves`, which leaves
        of the last gradients were not finite. All False after a step that was taken.
      inner: state of the wrapped transformation.
    """

    skipped: jax.Array
    nonfinite_leaves: jax.Array
    inner: optax.OptState


def _zero_or_nan(x: jax.Array) -> jax.Array:
    """float32 NaN if `x` holds NaN or infinity, else 0."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros((), jnp.float32)
    # x - x is 0 where x is finite and NaN elsewhere. On a CPU its sum needs no buffer, as 0 x and
    # `all(isfinite(x))` do, and compiles faster than the latter.
    total = jnp.sum(x - x)
    return (total.real + total.imag).astype(jnp.float32)


def has_nonfinite(x: jax.Array) -> jax.Array:
    """Tells, as a bool `[]`, whether an array holds NaN or infinity; integers do not.

    >>> import jax.numpy as jnp
    >>> bool(has_nonfinite(jnp.array([1.0, jnp.inf])))
    True
    """
    return jnp.isnan(_zero_or_nan(x))


def nonfinite_leaves(tree: Any) -> jax.Array:
    """Tells leaf by leaf whether it holds NaN or infinity.

    Args:
      tree: pytree of arrays; integer leaves are always finite.

    Returns:
      bool `[number of leaves]`, in the order of `jax.tree.leaves`.

    >>> import jax.numpy as jnp
    >>> nonfinite_leaves({"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(3)}).tolist()
    [True, False]
    """
    # One comparison serves all leaves: on a CPU that compiles in a fraction of the time.
    sums = [_zero_or_nan(x) for x in jax.tree.leaves(tree)]
    return jnp.isnan(jnp.stack(sums)) if sums else jnp.zeros((0,), jnp.bool_)


def skip_nonfinite(
    inner: optax.GradientTransformation, *, axis_name: str | tuple[str, ...] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner` so that a non-finite gradient changes nothing.

    If every entry of the incoming updates is finite, the result is `inner`'s. Otherwise the result
    is -0.0 and the state of `inner` (moments, schedule counts, accumulated microbatches) stays
    bit-equal to never having seen the step. So do parameters to which the result is added: -0.0 is
    the number that leaves every float as it was, -0.0 itself included.

    Numerics: the test is on the gradients alone; an `inner` that overflows by itself is not
    caught. `inner` is computed in a skipped step too, and the result thrown away by selects inside
    its own kernels (see `gating`), which may round the last bit of a step that is taken otherwise
    than those of the bare `inner`. Use it under `jit`: step by step the selects cost time.

    Args:
      inner: any transformation; extra arguments of `update` are passed on.
      axis_name: mapped axes of which all devices skip if one must. Needed where gradients are not
        the same on all of them: else some would skip and others not, and where `inner` communicates
        the others would take in what a skipping device sends. Also under
        `shard_map(check_vma=True)` on gradients that vary over devices.

    Returns:
      A transformation whose state is a `SkipNonfiniteState`.

    >>> import jax.numpy as jnp, optax
    >>> tx = skip_nonfinite(optax.adam(0.1))
    >>> params = {"w": jnp.ones(2)}
    >>> updates, state = tx.update({"w": jnp.array([1.0, jnp.nan])}, tx.init(params), params)
    >>> updates["w"].tolist(), int(state.skipped), state.nonfinite_leaves.tolist()
    ([-0.0, -0.0], 1, [True])
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> SkipNonfiniteState:
        return SkipNonfiniteState(
            skipped=jnp.zeros((), jnp.int32),
            nonfinite_leaves=jnp.zeros((len(jax.tree.leaves(params)),), jnp.bool_),
            inner=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, SkipNonfiniteState]:
        bad = nonfinite_leaves(updates)
        if axis_name is not None:
            bad = jax.lax.pmax(bad.astype(jnp.int32), axis_name) > 0
        skip = jnp.any(bad)
        # Thrown away or not: derivatives through the step must not meet a NaN.
        updates = jax.tree.map(lambda g: jnp.where(skip, jnp.zeros_like(g), g), updates)
        new_updates, new_inner = update_unless(
            skip, lambda: inner.update(updates, state.inner, params, **extra_args), state.inner
        )
        skipped = jnp.where(skip, optax.safe_increment(state.skipped), state.skipped)
        return new_updates, SkipNonfiniteState(skipped, bad, new_inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
