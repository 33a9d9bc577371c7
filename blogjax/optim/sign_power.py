"""Powers between the sign of the momentum and the momentum itself: from Tiger to SGD.

What: `scale_by_sign_power` and the power alone, `sign_power`; an exponent that follows the learning
  rate, `gamma_from_rate`.
Post: https://kexue.fm/archives/9512 (future work)
Equations: m_t = b m_{t-1} + (1 - b) g_t; u_t = sign(m_t) |m_t|^(1 - gamma_t), entry by entry;
  gamma_t = (alpha_t / alpha_0)^power, which falls from 1 (Tiger) to 0 (SGD with momentum).
Differences from the post: gamma_t is held in [0, 1], and at 1 while the learning rate warms up,
  which the post leaves open.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from blogjax.optim.checks import check_at_least, check_floating, check_fraction
from blogjax.optim.hidden_accumulation import hidden_momentum


def _power(x: jax.Array, gamma: ArrayLike) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    exponent = 1 - jnp.clip(jnp.asarray(gamma, wide.dtype), 0, 1)
    size = jnp.abs(wide)
    # `pow` may be off by a bit where it should do nothing; sign(0) takes care of 0^0 = 1.
    size = jnp.where(exponent == 1, size, size**exponent)
    return (jnp.sign(wide) * size).astype(x.dtype)


def sign_power(gamma: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Replaces each entry x by `sign(x) |x|^(1 - gamma)`.

    For a momentum that comes in from elsewhere. Tiger with a power, over k microbatches:

        tail = optax.chain(sign_power(gamma), scale_by_param_rms(), optax.scale_by_learning_rate(a))
        tx = optax.chain(hidden_momentum(b, k), emit_every(k, tail))

    Numerics, args and errors: see `scale_by_sign_power`.

    >>> import jax.numpy as jnp
    >>> tx = sign_power(0.5)
    >>> tx.update(jnp.array([4.0, -9.0, 0.0]), tx.init(jnp.zeros(3)))[0].tolist()
    [2.0, -3.0, 0.0]
    """
    check_fraction("gamma", gamma)

    def init_fn(params: optax.Params) -> optax.OptState:
        check_floating(params)
        if callable(gamma):
            return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        check_floating(updates, "gradient")
        now = gamma(state.count) if callable(gamma) else gamma
        if callable(gamma):
            state = optax.ScaleByScheduleState(jnp.asarray(optax.safe_increment(state.count)))
        return jax.tree.map(lambda x: _power(x, now), updates), state

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_sign_power(
    gamma: optax.ScalarOrSchedule, b: ArrayLike = 0.965, mu_dtype: DTypeLike | None = None
) -> optax.GradientTransformation:
    """Momentum of the gradients, and of it `sign(m) |m|^(1 - gamma)`.

    gamma = 1 is the sign (Tiger, Signum), gamma = 0 the momentum (SGD). In between the size of a
    step depends on that of the gradients, as `s^(1 - gamma)` for gradients times s: so does the
    learning rate that fits. Follow with decay, `scale_by_param_rms` and the learning rate.

    Numerics: the power is taken in float32 or better of the momentum as stored, and has the dtype
    to which gradient and momentum promote. Zero stays zero for every gamma, and gamma = 0 changes
    no bit. Infinities keep their sign, and NaN goes through.

    Args:
      gamma: a number in `[0, 1]`, or a function of the count of updates, whose values are clipped
        to `[0, 1]`.
      b: decay of the momentum, in `[0, 1)`; the default is Tiger's.
      mu_dtype: dtype of the momentum; None takes each parameter's own.

    Raises:
      ValueError: for `b` or a number `gamma` out of range, and gradients whose tree or shapes
        differ from the parameters'.
      TypeError: for integer or complex leaves.

    >>> import jax.numpy as jnp, optax
    >>> tx = scale_by_sign_power(optax.linear_schedule(1.0, 0.0, 2), b=0.0)
    >>> state = tx.init(jnp.zeros(2))
    >>> for _ in range(3):
    ...     updates, state = tx.update(jnp.array([4.0, -9.0]), state)
    ...     print(updates.tolist())
    [1.0, -1.0]
    [2.0, -3.0]
    [4.0, -9.0]
    """
    return optax.chain(hidden_momentum(b, mu_dtype=mu_dtype), sign_power(gamma))


def gamma_from_rate(
    learning_rate: optax.Schedule, peak: int = 0, power: float = 1.0
) -> optax.Schedule:
    """The post's exponent without a schedule of its own: `(alpha_t / alpha_peak)^power`.

    Args:
      learning_rate: the schedule that is also used for the steps.
      peak: count of updates at which the warm-up is over; up to there gamma is 1.
      power: 2 and 1/2 are the post's other proposals; positive.

    Returns:
      A function of the count of updates, with values in `[0, 1]`.

    Raises:
      ValueError: if the rate at `peak` is not positive, or `power` is not.
      TypeError: if the rate is no schedule; a constant one leaves gamma at 1.

    >>> import optax
    >>> rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, warmup_steps=10, decay_steps=110)
    >>> gamma = gamma_from_rate(rate, peak=10)
    >>> [round(float(gamma(t)), 2) for t in (0, 10, 35, 60, 110)]
    [1.0, 1.0, 0.85, 0.5, 0.0]
    """
    if not callable(learning_rate):
        raise TypeError(f"learning_rate must be a schedule, got {learning_rate!r}")
    check_at_least("peak", peak, 0)
    if not power > 0:
        raise ValueError(f"power is {power}, but must be positive")
    with jax.ensure_compile_time_eval():
        highest = jnp.asarray(learning_rate(peak))
    if not isinstance(highest, Tracer) and not highest > 0:
        raise ValueError(
            f"learning_rate is {highest} at count {peak}, but must be positive where gamma is 1: "
            "let peak be the count at which the warm-up is over"
        )
    return lambda count: jnp.clip(learning_rate(jnp.maximum(count, peak)) / highest, 0, 1) ** power
