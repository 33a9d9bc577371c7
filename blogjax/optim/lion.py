"""Lion: the sign of an interpolated momentum, found by a search over programs.

What: `scale_by_lion` and `lion` with optax's signature, defaults and state, updated in place; a
  cautious variant; the two rules that turn other hyper-parameters into Lion's.
Post: https://kexue.fm/archives/9473
Papers: Chen et al. 2023 (arXiv 2302.06675); Liang et al. 2024 (arXiv 2411.16085) for `cautious`
Equations: c_t = b1 m_{t-1} + (1 - b1) g_t; m_t = b2 m_{t-1} + (1 - b2) g_t;
  theta_t = theta_{t-1} - lr_t (sign(c_t) + wd theta_{t-1}); sign(0) = 0.
Differences from the post: none in the mathematics. The new momentum is computed first and
  c_t = (1 - r) g_t + r m_t, r = b1 / b2, is read from it. With c_t from the old momentum, XLA on a
  CPU keeps a copy of it, since two kernels read what one of them overwrites.
Differences from `optax.lion`: no copy and no temporary buffer where the state is donated, which
  makes a step on a CPU faster (on a GPU both are one kernel); the momentum keeps the dtype it was
  made with; integer, complex, broadcasting and mismatched leaves and rates outside [0, 1) are
  refused; `mode` and `cautious` reach `lion`.
"""

from collections.abc import Callable
from typing import Any, Literal, TypedDict, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from blogjax.optim.checks import (
    check_at_least,
    check_floating,
    check_fraction,
    check_mu_dtype,
    check_rate,
    check_updates,
)

Mode = Literal["hard", "smooth", "refined"]


def _reads_new_momentum(b1: Any, b2: Any) -> bool:
    """Whether c_t can be read from m_t; JAX arrays, of which nothing is known, are taken to.

    Otherwise r > 1 and rounding errors of g_t are amplified; at b2 = 0 no trace of m_{t-1} is left.
    """
    if isinstance(b1, jax.Array) or isinstance(b2, jax.Array):
        return True
    return b2 >= b1


def scale_by_lion(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
    *,
    mode: Mode = "hard",
    smooth_beta: ArrayLike = 1.0,
    cautious: ArrayLike | None = None,
) -> optax.GradientTransformation:
    """The direction of Lion, without learning rate and decay.

    `c = b1 m + (1 - b1) g`, then `sign(c)`; the momentum becomes `b2 m + (1 - b2) g`.

    Numerics: computed in float32 or better. The result has the dtype to which gradient and momentum
    promote, the momentum keeps its own from `init` on. With `mode="hard"` and `b1 <= b2`:

    * c is read from the momentum as stored, so a bfloat16 momentum is rounded before the sign is
      taken; about 0.2% of the signs of a noisy gradient then differ from float32's, as they do
      when the old momentum is read. The sign is the one of exact arithmetic wherever |c| exceeds
      4 eps max(|g|, |m|), with eps that of float32.
    * An infinite gradient has its own sign, and the momentum stays infinite from then on. NaN goes
      through. `skip_nonfinite` keeps both out.
    * `b1 == b2` is the sign of the momentum (Signum); `b1 == 0` the sign of the gradient.

    With `b1 > b2`, `mode="smooth"` or `"refined"` the old momentum is read, which costs
    one copy of it. Rates given as JAX arrays (by `optax.inject_hyperparams`) are not looked at: the
    copy is saved, b2 = 0 gives NaN, and with b1 far above b2 signs near c = 0 are noise.

    After the gradients have become zero the sign goes on firing until the momentum is flushed to
    zero: from 1e-3 for ln(1e-3 / 1.2e-38) / -ln(b2) steps, some 8000 at b2 = .99. Rows of a table
    that are rarely touched drift because of it; see `sparse_rows`.

    Args:
      b1: weight of the momentum in c, in `[0, 1)`.
      b2: decay of the momentum, in `[0, 1)`.
      mu_dtype: dtype of the momentum; None takes each parameter's own.
      mode: `"hard"` is `sign(c)`; `"smooth"` is `tanh(smooth_beta c)`; `"refined"` is c clipped to
        `[-1, 1]`.
      smooth_beta: see `mode`.
      cautious: None for plain Lion. A factor in `[0, 1]` multiplies the entries whose update and
        gradient disagree in sign, 0 in the paper; the leaf is then divided by the mean factor,
        which takes a buffer of the size of the parameters.

    Returns:
      A transformation whose state is an `optax.ScaleByLionState`, so checkpoints of `optax.lion`
      load. `update` needs no parameters.

    Raises:
      ValueError: for rates outside `[0, 1)`, an unknown mode, and gradients whose tree or shapes
        differ from the parameters'.
      TypeError: for integer or complex leaves.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_lion()
    >>> state = tx.init({"w": jnp.zeros(3)})
    >>> updates, state = tx.update({"w": jnp.array([2.0, -0.1, 0.0])}, state)
    >>> updates["w"].tolist()
    [1.0, -1.0, 0.0]
    """
    check_rate("b1", b1)
    check_rate("b2", b2)
    check_mu_dtype(mu_dtype)
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}, but must be one of {get_args(Mode)}")
    check_fraction("cautious", cautious)
    from_new = mode == "hard" and _reads_new_momentum(b1, b2)

    def init_fn(params: optax.Params) -> optax.ScaleByLionState:
        check_floating(params)
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=mu_dtype or p.dtype), params)
        return optax.ScaleByLionState(count=jnp.zeros((), jnp.int32), mu=mu)

    def direction(g: jax.Array, m: jax.Array, new_m: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(jnp.promote_types(g.dtype, m.dtype), jnp.float32)
        result = jnp.promote_types(g.dtype, m.dtype)
        g, m, new_m = g.astype(dtype), m.astype(dtype), new_m.astype(dtype)
        if not from_new:
            c = _rate(1 - b1, dtype) * g + _rate(b1, dtype) * m
        else:
            c = _interpolate(g, new_m, b1, b2)
        if mode == "smooth":
            u = jnp.tanh(_rate(smooth_beta, dtype) * c)
        elif mode == "refined":
            u = jnp.clip(c, -1, 1)
        else:
            u = jnp.sign(c)
        if cautious is not None:
            scale = jnp.where(u * g > 0, 1, _rate(cautious, dtype))
            # The floor of the authors' code, for the leaf on which nothing agrees.
            u = u * (scale / jnp.maximum(jnp.mean(scale), 1e-5))
        return u.astype(result)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByLionState]:
        del params
        check_updates(updates, state.mu)
        mu = jax.tree.map(lambda g, m: _decay(g, m, b2), updates, state.mu)
        new_updates = jax.tree.map(direction, updates, state.mu, mu)
        return new_updates, optax.ScaleByLionState(optax.safe_increment(state.count), mu)

    return optax.GradientTransformation(init_fn, update_fn)


def _rate(value: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """A traced float32 rate must not decide the dtype of the result."""
    return jnp.asarray(value, dtype)


def _decay(g: jax.Array, m: jax.Array, b2: ArrayLike) -> jax.Array:
    dtype = jnp.promote_types(jnp.promote_types(g.dtype, m.dtype), jnp.float32)
    new = _rate(b2, dtype) * m.astype(dtype) + _rate(1 - b2, dtype) * g.astype(dtype)
    return new.astype(m.dtype)


def _interpolate(g: jax.Array, new_m: jax.Array, b1: ArrayLike, b2: ArrayLike) -> jax.Array:
    """`b1 m + (1 - b1) g` from the momentum after the step. Not `g + r (new_m - g)`: near c = 0
    that has ten times the wrong signs, and is NaN at an infinite gradient.
    """
    if isinstance(b1, jax.Array) or isinstance(b2, jax.Array):
        r = _rate(b1, g.dtype) / _rate(b2, g.dtype)
        # If 1 - r is 0 or negative, an infinite gradient would cancel its own momentum.
        return jnp.where(jnp.isinf(new_m), new_m, (1 - r) * g + r * new_m)
    if b1 == 0:
        return g
    if b1 == b2:
        return new_m
    r = b1 / b2  # in float64, on the host
    return _rate(1 - r, g.dtype) * g + _rate(r, g.dtype) * new_m


def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    mode: Mode = "hard",
    smooth_beta: ArrayLike = 1.0,
    cautious: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion with decay and learning rate: `theta <- theta - lr_t (sign(c_t) + wd theta)`.

    The decay is decoupled: it never enters the momentum or the sign. It is multiplied by the
    learning rate, as in the paper and in optax: after T steps at rate lr a parameter without
    gradient has shrunk by `(1 - lr wd)^T`, and a schedule of the rate slows the decay too. Where
    the sign stays the same a parameter converges to -sign / wd. Rates from AdamW: `from_adamw`.

    Where state and parameters are donated to the compiled step, both are updated in place: 20 bytes
    are moved per float32 parameter. In bfloat16 parameters the decay of a step is below half a unit
    in the last place and is lost; see `stochastic_rounding`.

    Args:
      learning_rate: a number, or a function of the count of updates; 3 to 10 times below AdamW's.
      b1, b2, mu_dtype, mode, smooth_beta, cautious: as in `scale_by_lion`.
      weight_decay: decay at rate 1, not negative; the default is optax's, the authors' code has 0.
      mask: tree of booleans, or a function of the parameters that returns one: which to decay.

    Returns:
      A transformation with the state of `optax.lion`. `update` needs the parameters.

    Raises:
      ValueError, TypeError: as `scale_by_lion`; also for a negative decay and missing parameters.

    >>> import jax.numpy as jnp, optax
    >>> tx = lion(0.5, weight_decay=0.5)
    >>> params = {"w": jnp.array([1.0, 1.0])}
    >>> updates, state = tx.update({"w": jnp.array([3.0, 0.0])}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [0.25, 0.75]
    """
    check_at_least("weight_decay", weight_decay, 0)
    return optax.chain(
        scale_by_lion(b1, b2, mu_dtype, mode=mode, smooth_beta=smooth_beta, cautious=cautious),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


class LionHparams(TypedDict):
    """The two rates of `lion`, to be passed on as `lion(**rates)`."""

    learning_rate: optax.ScalarOrSchedule
    weight_decay: float


def from_adamw(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float, ratio: float = 10.0
) -> LionHparams:
    """Lion's rates from those that AdamW was tuned to: `lr / ratio` and `wd ratio`.

    The product, on which the strength of the decay depends, stays the same. The authors recommend a
    ratio of 3 to 10; their published pairs have 10.

    Args:
      learning_rate: AdamW's; of a schedule every value is divided.
      weight_decay: AdamW's decay, decoupled and multiplied by the learning rate as in optax.
      ratio: how much smaller Lion's learning rate is; positive.

    Raises:
      ValueError: if `ratio` is not positive.

    >>> rates = from_adamw(0.5, 0.25, ratio=2.0)
    >>> rates["learning_rate"], rates["weight_decay"]
    (0.25, 0.5)
    >>> tx = lion(**rates)
    """
    _check_positive("ratio", ratio)
    rate: optax.ScalarOrSchedule
    if callable(schedule := learning_rate):
        rate = lambda count: schedule(count) / ratio  # noqa: E731
    else:
        rate = schedule / ratio
    return LionHparams(learning_rate=rate, weight_decay=weight_decay * ratio)


def lion_hparams(sigma: float, alpha0: float = 1e-3, kappa: float = 0.0) -> LionHparams:
    """The post's rule: rates from the size that the parameters of a layer have.

    `lr_t = alpha0 sigma / (kappa t + 1)` moves a parameter by alpha0 of its own size;
    `wd = alpha0 / (2 sigma)` makes `lr_t wd = alpha0^2 / (2 (kappa t + 1))`.

    Args:
      sigma: standard deviation at initialisation, `1 / sqrt(width)` for a dense layer; positive.
      alpha0: relative change per step; positive.
      kappa: how fast the rate falls with the count t of updates; 0 keeps it constant.

    Raises:
      ValueError: if `sigma` or `alpha0` is not positive, or `kappa` negative.

    >>> rates = lion_hparams(sigma=0.036, alpha0=1.11e-3)
    >>> print(f"{rates['learning_rate']:.2g} {rates['weight_decay']:.2g}")
    4e-05 0.015
    """
    _check_positive("sigma", sigma)
    _check_positive("alpha0", alpha0)
    check_at_least("kappa", kappa, 0)
    rate = alpha0 * sigma
    return LionHparams(
        learning_rate=(lambda count: rate / (kappa * count + 1)) if kappa else rate,
        weight_decay=alpha0 / (2 * sigma),
    )


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}, but must be positive")
