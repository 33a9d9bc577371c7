"""Stochastic rounding: bfloat16 parameters that small updates still move.

What: adds float32 updates to bfloat16 parameters and rounds up or down at random so that the mean
  is right; as a function in the place of `optax.apply_updates`, and as a wrapper for loops that
  call `optax.apply_updates` themselves.
Post: https://kexue.fm/archives/9512 (which says that a sign optimiser can train in half precision)
Equations: x = p + u in float32; a <= x <= b its neighbours in bfloat16;
  P(p' = b) = (x - a) / (b - a), so E p' = x.
Differences from the post: there half precision is called safe because lr 6e-8 is still above the
  smallest number. The range is safe, the resolution is not: bfloat16 has 8 significant bits, and
  rounding to nearest drops every update below 2^-9 of its weight. At lr 1e-4 weights above 2^-5
  never move, and smaller ones move by up to twice too much. Momentum does not need this: rounding
  it to nearest changes the sign of very few updates.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blogjax.core.random import Key
from blogjax.optim.checks import check_floating, check_updates, require_params


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
      step: int32 `[]`, updates so far; with the wrapper's key it gives the random numbers.
      inner: state of the wrapped transformation, made for float32 parameters.
    """

    step: jax.Array
    inner: optax.OptState


def _check_key(key: Key) -> None:
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"a typed key is needed, from jax.random.key, got {type(key).__name__}"
            f" of dtype {getattr(key, 'dtype', None)}"
        )
    if key.shape:
        raise ValueError(f"one key is needed, got keys of shape {key.shape}")


def _round(x: jax.Array, noise: jax.Array) -> jax.Array:
    """Rounds float32 `x` to bfloat16; away from zero if the dropped bits + `noise` carry.

    `noise` is uint16. Over its 2^16 values the mean is x exactly.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + noise.astype(jnp.uint32)) >> 16
    rounded = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
    # The carry of a NaN with all bits set would run into the sign and make it -0.0.
    return jnp.where(jnp.isnan(x), jnp.asarray(jnp.nan, jnp.bfloat16), rounded)


def _noise(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """Uniform uint16; neighbours share a 32-bit word, which is three times as fast on a CPU."""
    *lead, last = shape or (1,)
    words = jax.random.bits(key, (*lead, -(-last // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
    return halves.reshape(*lead, halves.shape[-2] * 2)[..., :last].reshape(shape)


def stochastic_round(key: Key, x: jax.Array) -> jax.Array:
    """Rounds to bfloat16 without bias: up or down, with the nearer neighbour the likelier.

    The probability has the resolution of the 16 bits that are dropped, so the mean of the result is
    x exactly, wherever both neighbours are finite. What bfloat16 can represent stays as it is,
    zeros with their sign, infinities and NaN. Between the largest finite bfloat16, 3.39e38, and
    2^128 the upper neighbour is infinity, as in rounding to nearest.

    Args:
      key: a scalar typed key.
      x: float32, any shape; other floating dtypes are cast to float32 first.

    Returns:
      bfloat16, like `x`. One 16-bit random number is drawn per entry.

    Raises:
      TypeError: if `key` is not a typed key or `x` not real floating.
      ValueError: if `key` is not a scalar.

    >>> import jax
    >>> x = jax.numpy.full(10000, 1 + 2.0**-9)  # a quarter of the way from 1 to 1 + 2^-7
    >>> rounded = stochastic_round(jax.random.key(0), x)
    >>> sorted(set(rounded.tolist())), abs((rounded == 1).mean() - 0.75) < 0.01
    ([1.0, 1.0078125], Array(True, dtype=bool))
    """
    _check_key(key)
    check_floating(x, "number")
    return _round(x.astype(jnp.float32), _noise(key, x.shape))


def apply_updates_stochastic(
    key: Key, params: optax.Params, updates: optax.Updates
) -> optax.Params:
    """Adds updates to parameters; bfloat16 ones are rounded stochastically.

    Where a parameter is bfloat16, `p' = stochastic_round(p + u)` with the sum in float32, so
    `E p' = p + u` up to float32's own rounding of the sum. Leaves of any other dtype get what
    `optax.apply_updates` gives them, `p + u` rounded to nearest. `None` leaves stay `None`.

    Leaf i, in the order of `jax.tree.leaves`, uses `fold_in(key, i)`. Give a new key in each step,
    as in `fold_in(key, step)`. With JAX's default kind of key the result does not depend on how
    arrays are split over devices.

    Give the updates in float32: an update that is bfloat16 itself has been rounded to nearest
    before, and `optax.lion` on bfloat16 gradients returns such; `stochastic_rounding` avoids it.

    Args:
      key: a scalar typed key.
      params: tree of real floating arrays.
      updates: tree of the same structure and shapes; dtypes may differ.

    Returns:
      Like `params`, dtypes included.

    Raises:
      TypeError: if `key` is not a typed key, or a leaf is not real floating.
      ValueError: if `key` is not a scalar, or the trees differ in structure or shapes.

    >>> import jax, jax.numpy as jnp, optax
    >>> params = {"w": jnp.ones(10000, jnp.bfloat16)}
    >>> updates = {"w": jnp.full(10000, 1e-3)}
    >>> float(optax.apply_updates(params, updates)["w"].astype(jnp.float32).mean())  # none moves
    1.0
    >>> moved = apply_updates_stochastic(jax.random.key(0), params, updates)["w"]
    >>> round(float(moved.astype(jnp.float32).mean()), 4), moved.dtype
    (1.001, dtype(bfloat16))
    """
    _check_key(key)
    check_floating(params)
    check_updates(updates, params)
    leaves, structure = jax.tree.flatten(params)
    new = []
    for i, (p, u) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True)):
        if p.dtype == jnp.bfloat16:
            total = p.astype(jnp.float32) + u.astype(jnp.float32)
            new.append(stochastic_round(jax.random.fold_in(key, i), total))
        else:
            new.append((p + u).astype(p.dtype))
    return jax.tree.unflatten(structure, new)


def _widen(tree: Any) -> Any:
    """bfloat16 leaves as float32, the others as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def stochastic_rounding(
    inner: optax.GradientTransformation, key: Key
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner` so that `optax.apply_updates` rounds bfloat16 parameters stochastically.

    `inner` sees bfloat16 parameters and gradients as float32, so its own arithmetic, weight decay
    for one, and its updates are float32 too. For a bfloat16 parameter the wrapper then returns the
    float32 number `u' = p' - p` with `p'` from `apply_updates_stochastic`. `optax.apply_updates`
    adds in float32 and rounds to nearest, which gives p' back exactly. It must be the outermost of
    what changes updates: anything that scales u' afterwards undoes it. `skip_nonfinite` and
    `accumulate` may go around it.

    State: `inner`'s is made for float32 parameters and so is float32, unless `inner` is told
    otherwise (`mu_dtype=jnp.bfloat16`); its dtypes cannot drift when the gradients' differ from the
    parameters', which breaks `lax.scan` with plain optax. The random numbers of update t are those
    of `fold_in(key, t)`: a checkpoint of the state resumes them, given the same key here.

    Numerics: leaves that are not bfloat16 pass through as `inner` made them. Where p or p' is
    not finite, u itself is returned, and with it optax's result.

    Cost: 16 random bits per bfloat16 entry. On a CPU they are most of the step: Lion on bfloat16
    takes about 2.5 times as long as without.

    Args:
      inner: any transformation; extra arguments of `update` are passed on.
      key: a scalar typed key.

    Returns:
      A transformation whose state is a `StochasticRoundingState`; `update` needs `params`.

    Raises:
      TypeError: if `key` is not a typed key, or a leaf is not real floating.
      ValueError: if `key` is not a scalar, `params` are left out, or trees or shapes differ.

    >>> import jax, jax.numpy as jnp, optax
    >>> params = jnp.ones(10000, jnp.bfloat16)
    >>> tx = stochastic_rounding(optax.sgd(1e-3), jax.random.key(0))
    >>> updates, state = tx.update(jnp.ones_like(params), tx.init(params), params)
    >>> round(float(optax.apply_updates(params, updates).astype(jnp.float32).mean()), 4)
    0.999
    """
    _check_key(key)
    inner = optax.with_extra_args_support(inner)
    # As data, so that the check for keys used twice (`jax_debug_key_reuse`) does not take the next
    # call of a compiled step for the second use of a key.
    data, kind = jax.random.key_data(key), jax.random.key_impl(key)

    def init_fn(params: optax.Params) -> StochasticRoundingState:
        check_floating(params)
        return StochasticRoundingState(jnp.zeros((), jnp.int32), inner.init(_widen(params)))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, StochasticRoundingState]:
        weights = require_params(params, "stochastic_rounding")
        check_updates(updates, weights)
        steps, new_inner = inner.update(_widen(updates), state.inner, _widen(weights), **extra_args)
        own_key = jax.random.fold_in(jax.random.wrap_key_data(data, impl=kind), state.step)
        rounded = apply_updates_stochastic(own_key, weights, steps)

        def difference(p: jax.Array, new: jax.Array, u: jax.Array) -> jax.Array:
            if p.dtype != jnp.bfloat16:
                return u
            step = new.astype(jnp.float32) - p.astype(jnp.float32)
            return jnp.where(jnp.isfinite(step), step, u.astype(jnp.float32))

        new_updates = jax.tree.map(difference, weights, rounded, steps)
        return new_updates, StochasticRoundingState(state.step + 1, new_inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
