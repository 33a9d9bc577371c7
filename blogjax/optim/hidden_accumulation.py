"""Gradient accumulation hidden in the momentum, which needs no buffer.

What: `hidden_momentum`, a momentum that takes in the gradients of k microbatches one by one;
  `emit_every`, which lets every k-th update through; made of them, SGDM and Adam. For any other
  optimiser, at the cost of a buffer, see `accumulate`.
Post: https://kexue.fm/archives/8634
Equations: over k microbatches, t = 0, 1, ..., c_t = 1 where t % k = 0 and 0 elsewhere:
  m_t = ((b - 1) c_t + 1) m_{t-1} + (1 - b) g_t / k; theta moves only where (t + 1) % k = 0.
  Adam: v_t = ((b2 - 1) c_t + 1) v_{t-1} + (1 - b2) g_t^2 / k, the powers of the bias correction
  count updates.
Differences from the post: none in the momentum. Adam's eps stands outside of the root, as in the
  paper and in optax. The post's second proposal, b -> 1 - (1 - b) / k in any optimiser and an
  update at every k-th microbatch, is `optax.chain(optax.scale_by_adam(...), emit_every(k, ...))`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from blogjax.optim import checks
from blogjax.optim.gating import update_unless
from blogjax.optim.skip_nonfinite import has_nonfinite


class HiddenMomentumState(NamedTuple):
    """State of `hidden_momentum`: which of the k microbatches comes next, and the momentum."""

    position: jax.Array
    mu: optax.Updates


def hidden_momentum(
    b: ArrayLike,
    accumulate_steps: ArrayLike = 1,
    mu_dtype: DTypeLike | None = None,
    *,
    keep_on_nonfinite: bool = False,
) -> optax.GradientTransformation:
    """Momentum that accumulates k microbatches in itself, so that no buffer is needed.

    The result is `m_t`, and at the end of every k microbatches the `b m + (1 - b) g` of their mean
    gradient g, exactly. In between it is of no use: let `emit_every` follow.

    Numerics: float32 or better; the momentum keeps its dtype, and the result is the momentum as
    stored. In bfloat16 a microbatch whose share is below half a unit in the last place of the
    momentum is lost: for large k take `mu_dtype=float32`.

    Args:
      b: decay per k microbatches, in `[0, 1)`.
      accumulate_steps: k.
      mu_dtype: dtype of the momentum; None takes each parameter's own.
      keep_on_nonfinite: leaves the momentum of a leaf as it is, bit for bit, where that leaf's
        gradient holds NaN or infinity.

    Raises:
      ValueError, TypeError: as `tiger`.

    >>> import jax.numpy as jnp
    >>> tx = hidden_momentum(0.5, accumulate_steps=2)
    >>> state = tx.init(jnp.zeros(1))
    >>> _, state = tx.update(jnp.array([1.0]), state)
    >>> tx.update(jnp.array([3.0]), state)[0].tolist()
    [1.0]
    """
    checks.check_rate("b", b)
    checks.check_mu_dtype(mu_dtype)
    checks.check_steps("accumulate_steps", accumulate_steps)

    def init_fn(params: optax.Params) -> HiddenMomentumState:
        checks.check_floating(params)
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=mu_dtype or p.dtype), params)
        return HiddenMomentumState(jnp.zeros((), jnp.int32), mu)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, HiddenMomentumState]:
        del params
        checks.check_updates(updates, state.mu)
        first = state.position == 0

        def step(g: jax.Array, m: jax.Array) -> jax.Array:
            keep = has_nonfinite(g) if keep_on_nonfinite else None
            return _take_in(g, m, b, accumulate_steps, first, keep)

        mu = jax.tree.map(step, updates, state.mu)
        result = jax.tree.map(
            lambda g, m: m.astype(jnp.promote_types(g.dtype, m.dtype)), updates, mu
        )
        return result, HiddenMomentumState(_next(state.position, accumulate_steps), mu)

    return optax.GradientTransformation(init_fn, update_fn)


def _take_in(
    x: jax.Array,
    moment: jax.Array,
    b: ArrayLike,
    k: ArrayLike,
    first: jax.Array,
    keep: jax.Array | None = None,
) -> jax.Array:
    """The moment after one of k microbatches; where `keep`, as it was."""
    dtype = jnp.result_type(x.dtype, moment.dtype, jnp.float32)
    decay = jnp.where(first, jnp.asarray(b, dtype), 1)
    added = jnp.asarray((1 - b) / k, dtype) * x.astype(dtype)
    new = (decay * moment.astype(dtype) + added).astype(moment.dtype)
    return new if keep is None else jnp.where(keep, moment, new)


def _next(position: jax.Array, k: ArrayLike) -> jax.Array:
    """The next place among the k; `inject_hyperparams` may have made k a float array."""
    return (position + 1) % jnp.asarray(k).astype(position.dtype)


class EmitEveryState(NamedTuple):
    """State of `emit_every`: which of the k microbatches comes next, and the inner state."""

    position: jax.Array
    inner: optax.OptState


def emit_every(
    accumulate_steps: ArrayLike, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Lets every k-th update of `inner` through; the others become -0.0 and leave it unchanged.

    So schedules inside count updates, not microbatches. For `inner` take what follows the
    momentum: decay, scales, the learning rate. -0.0 is the number that changes no float. Extra
    arguments are passed on. `inner` is computed in every call, and communicates in every call if it
    does at all; the results are thrown away in place, see `gating`.

    >>> import jax.numpy as jnp, optax
    >>> tx = emit_every(2, optax.scale(-1.0))
    >>> first, state = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))
    >>> second, state = tx.update(jnp.ones(1), state)
    >>> first.tolist(), second.tolist()
    ([-0.0], [-1.0])
    """
    checks.check_steps("accumulate_steps", accumulate_steps)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> EmitEveryState:
        return EmitEveryState(jnp.zeros((), jnp.int32), inner.init(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, EmitEveryState]:
        position = _next(state.position, accumulate_steps)
        new, new_inner = update_unless(
            position != 0,
            lambda: inner.update(updates, state.inner, params, **extra_args),
            state.inner,
        )
        return new, EmitEveryState(position, new_inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def accumulating_sgdm(
    learning_rate: optax.ScalarOrSchedule,
    b: ArrayLike = 0.9,
    *,
    accumulate_steps: ArrayLike,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum `m = b m + (1 - b) g` that accumulates k microbatches without a buffer.

    Exactly the steps on the mean gradients of k microbatches each. optax's momentum has no factor
    1 - b: `optax.sgd(lr (1 - b), momentum=b)` takes the same steps. Args and errors: see `tiger`.

    >>> import jax.numpy as jnp
    >>> tx = accumulating_sgdm(1.0, 0.5, accumulate_steps=2)
    >>> _, state = tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))
    >>> tx.update(jnp.array([3.0]), state)[0].tolist()
    [-1.0]
    """
    return optax.chain(
        hidden_momentum(b, accumulate_steps, mu_dtype),
        emit_every(accumulate_steps, optax.scale_by_learning_rate(learning_rate)),
    )


class AccumulatingAdamState(NamedTuple):
    """State of `accumulating_adam`, before the part that waits.

    Attributes:
      position: int32 `[]`, which of the k microbatches comes next.
      emitted: int32 `[]`, updates so far.
      mu: momentum.
      nu: mean of the squared gradients, float32 or better.
    """

    position: jax.Array
    emitted: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def accumulating_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    accumulate_steps: ArrayLike,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam that approximately accumulates k microbatches without a buffer.

    The momentum is exactly that of the mean gradients. The second moment cannot be: for the square
    of the mean it takes the mean of the squares. Microbatches are noisier than their mean, so steps
    are smaller where the noise dominates, by up to `sqrt(k)`; where all k agree they are Adam's.

    Numerics: float32 or better. The second moment is float32 also for parameters of half precision:
    in bfloat16 a share of `(1 - b2) / k` would never move it. Args and errors: see `tiger` and
    `optax.adam`.

    >>> import jax.numpy as jnp
    >>> tx = accumulating_adam(1.0, accumulate_steps=2)
    >>> _, state = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
    >>> tx.update(jnp.array([2.0]), state)[0].round(3).tolist()
    [-1.0]
    """
    checks.check_rate("b1", b1)
    checks.check_rate("b2", b2)
    checks.check_mu_dtype(mu_dtype)
    k = accumulate_steps
    tail = emit_every(k, optax.scale_by_learning_rate(learning_rate))

    def init_fn(params: optax.Params) -> AccumulatingAdamState:
        checks.check_floating(params)
        wide = lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32))  # noqa: E731
        return AccumulatingAdamState(
            position=jnp.zeros((), jnp.int32),
            emitted=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=mu_dtype or p.dtype), params),
            nu=jax.tree.map(wide, params),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AccumulatingAdamState]:
        del params
        checks.check_updates(updates, state.mu)
        first, position = state.position == 0, _next(state.position, k)
        mu = jax.tree.map(lambda g, m: _take_in(g, m, b1, k, first), updates, state.mu)
        nu = jax.tree.map(
            lambda g, v: _take_in(jnp.square(g.astype(v.dtype)), v, b2, k, first), updates, state.nu
        )
        number = optax.safe_increment(state.emitted)  # of this window's update, when it comes
        correct1, correct2 = (jnp.asarray(1 - b**number) for b in (b1, b2))

        def direction(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            dtype = jnp.promote_types(m.dtype, v.dtype)
            m_hat = m.astype(dtype) / correct1.astype(dtype)
            v_hat = v.astype(dtype) / correct2.astype(dtype)
            step = m_hat / (jnp.sqrt(v_hat) + jnp.asarray(eps, dtype))
            return step.astype(jnp.promote_types(g.dtype, m.dtype))

        new = jax.tree.map(direction, updates, mu, nu)
        emitted = jnp.where(position == 0, number, state.emitted)
        return new, AccumulatingAdamState(position, emitted, mu, nu)

    return optax.chain(optax.GradientTransformation(init_fn, update_fn), tail)
