"""Noise schedules: how much signal and how much noise is left at every time.

What: x_t = A_t x_0 + B_t e with A_t^2 + B_t^2 = 1, for integer t = 0..T or for t in [0, 1].
Post: https://kexue.fm/archives/9119 and https://kexue.fm/archives/9181 (continuous time)
Papers: Ho et al. 2020 (arXiv 2006.11239); Nichol & Dhariwal 2021 (arXiv 2102.09672)
Equations: x_t = a_t x_{t-1} + b_t e, a_t^2 + b_t^2 = 1; A_t = a_1 ... a_t, A_0 = 1, B_0 = 0.

    here   Ho et al.           here   Ho et al.
    a_t    sqrt(alpha_t)       A_t    sqrt(alphabar_t)
    b_t    sqrt(beta_t)        B_t    sqrt(1 - alphabar_t)

Differences from the post: none in the mathematics. A schedule keeps log A_t, summed in float64 on
the host, because sqrt(1 - A_t^2) in float32 is 7e-4 wrong at t = 1; B_t is sqrt(-expm1(2 log A_t)).
"""

import abc
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from blogjax.diffusion.checks import check_choice, concrete

Spacing = Literal["trailing", "leading", "quadratic"]


def sqrt_one_minus_exp(x: jax.Array) -> jax.Array:
    """Returns `sqrt(1 - exp(2 x))` for x <= 0, to full precision; at 0 the gradient is 0, not NaN.

    >>> round(float(sqrt_one_minus_exp(jnp.float32(-1e-10))) * 1e5, 5)
    1.41421
    """
    zero = x == 0
    return jnp.where(zero, 0.0, jnp.sqrt(-jnp.expm1(2 * jnp.where(zero, -1.0, x))))


class Schedule(abc.ABC):
    """What every schedule can say about a time t, a scalar or an array of any shape.

    A time outside of the schedule raises ValueError where its value is known, and gives NaN under
    tracing; it is never moved to the nearest valid one. Every answer is float32, of the shape of t.
    """

    @property
    @abc.abstractmethod
    def num_steps(self) -> int | None:
        """T for integer times, None for continuous time."""

    @property
    def final_time(self) -> int | float:
        """The time of pure noise: T for integer times, 1.0 for continuous time."""
        return 1.0 if self.num_steps is None else self.num_steps

    @abc.abstractmethod
    def log_signal_at(self, t: ArrayLike) -> jax.Array:
        """Returns log A_t."""

    @abc.abstractmethod
    def log_ratio(self, t: ArrayLike, s: ArrayLike) -> jax.Array:
        """Returns log(A_t / A_s), to full precision also for neighbours; t and s of one shape."""

    def signal(self, t: ArrayLike) -> jax.Array:
        """A_t."""
        return jnp.exp(self.log_signal_at(t))

    def noise(self, t: ArrayLike) -> jax.Array:
        """B_t = sqrt(1 - A_t^2)."""
        return sqrt_one_minus_exp(self.log_signal_at(t))

    def log_snr(self, t: ArrayLike) -> jax.Array:
        """Returns log(A_t^2 / B_t^2); infinite at t = 0."""
        log_signal = self.log_signal_at(t)
        return 2 * log_signal - jnp.log(-jnp.expm1(2 * log_signal))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseSchedule(Schedule):
    """A schedule of integer times 0..T. Make one with the constructors below.

    Attributes:
      log_signal: `[T + 1]` float32, log A_t, rounded.
      log_signal_tail: `[T + 1]` float32, what the rounding took away. With it log(A_t / A_{t-1}) is
        right to 1e-6 also where log A is a thousand times its last step.

    Times must be of an integer dtype: anything else raises ValueError.

    >>> schedule = linear_beta_schedule(1000)
    >>> round(float(schedule.noise(1)), 6), round(float(schedule.signal(1000)), 6)
    (0.01, 0.006353)
    >>> schedule.signal(1001)
    Traceback (most recent call last):
    ...
    ValueError: time 1001 is outside of this schedule's 0..1000
    """

    log_signal: jax.Array
    log_signal_tail: jax.Array

    @property
    def num_steps(self) -> int:
        """T."""
        return self.log_signal.shape[0] - 1

    def _index(self, t: ArrayLike) -> jax.Array:
        known = concrete(t)
        if known is not None and np.issubdtype(known.dtype, np.integer):
            outside = known[(known < 0) | (known > self.num_steps)]
            if outside.size:
                raise ValueError(
                    f"time {outside.flat[0]} is outside of this schedule's 0..{self.num_steps}"
                )
        index = jnp.asarray(t)
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(
                f"times have dtype {index.dtype}, but this schedule has the integer times "
                f"0..{self.num_steps}"
            )
        return index.astype(jnp.int32)  # so that an unsigned 0 minus 1 is -1

    def _take(self, values: jax.Array, t: ArrayLike) -> jax.Array:
        # A gather would otherwise clamp a time that is too large and count from the end for -1.
        return values.at[self._index(t)].get(
            mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
        )

    def log_signal_at(self, t: ArrayLike) -> jax.Array:
        """Returns log A_t."""
        return self._take(self.log_signal, t)

    def log_ratio(self, t: ArrayLike, s: ArrayLike) -> jax.Array:
        """Returns log(A_t / A_s)."""
        head = self._take(self.log_signal, t) - self._take(self.log_signal, s)
        return head + (self._take(self.log_signal_tail, t) - self._take(self.log_signal_tail, s))

    def step_signal(self, t: ArrayLike) -> jax.Array:
        """a_t, for t = 1..T."""
        return jnp.exp(self.log_ratio(t, self._index(t) - 1))

    def step_noise(self, t: ArrayLike) -> jax.Array:
        """b_t, for t = 1..T."""
        return sqrt_one_minus_exp(self.log_ratio(t, self._index(t) - 1))


def from_betas(betas: ArrayLike) -> NoiseSchedule:
    """The schedule with b_t^2 = `betas[t - 1]`.

    Args:
      betas: `[T]`, known on the host; every value in (0, 1).

    Returns:
      A `NoiseSchedule` of T steps.

    Raises:
      ValueError: if `betas` is not a vector, is empty, or has a value outside of (0, 1) or NaN.

    >>> [round(float(a), 4) for a in from_betas([0.5, 0.5]).signal(jnp.array([0, 1, 2]))]
    [1.0, 0.7071, 0.5]
    """
    beta = np.asarray(betas, np.float64)
    if beta.ndim != 1 or beta.size == 0:
        raise ValueError(f"betas must be a vector [T] with T >= 1, got shape {beta.shape}")
    bad = np.flatnonzero(~((beta > 0) & (beta < 1)))
    if bad.size:
        raise ValueError(f"betas must be in (0, 1), got {beta[bad[0]]} at t = {bad[0] + 1}")
    log_signal = np.concatenate([[0.0], np.cumsum(0.5 * np.log1p(-beta))])
    head = log_signal.astype(np.float32)
    return NoiseSchedule(jnp.asarray(head), jnp.asarray((log_signal - head).astype(np.float32)))


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")


def linear_beta_schedule(
    num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> NoiseSchedule:
    """The schedule of Ho et al. 2020: b_t^2 goes linearly from `beta_start` to `beta_end`.

    The two ends mean what they say for every `num_steps`: with fewer than 1000 steps, raise
    `beta_end` or A_T will be far from 0.

    >>> linear_beta_schedule(1000).num_steps
    1000
    """
    _check_num_steps(num_steps)
    return from_betas(np.linspace(beta_start, beta_end, num_steps))


def post_schedule(num_steps: int = 1000) -> NoiseSchedule:
    """The schedule of post 9119: a_t = sqrt(1 - 0.02 t / T), so b_t^2 = 0.02 t / T.

    A_T is exp(-T / 200) to first order: 0.0065 for T = 1000, but 0.37 for T = 200.

    >>> round(float(post_schedule().signal(1000)), 7)
    0.006482
    """
    _check_num_steps(num_steps)
    return from_betas(0.02 * np.arange(1, num_steps + 1) / num_steps)


def cosine_schedule(
    num_steps: int, offset: float = 0.008, max_beta: float = 0.999
) -> NoiseSchedule:
    """The schedule of Nichol & Dhariwal 2021: A_t^2 = f(t) / f(0), each b_t^2 at most `max_beta`.

    f(t) = cos^2(pi / 2 (t / T + offset) / (1 + offset)).

    >>> cosine_schedule(100).num_steps
    100
    """
    _check_num_steps(num_steps)
    angle = (np.arange(num_steps + 1) / num_steps + offset) / (1 + offset) * np.pi / 2
    signal_squared = np.cos(angle) ** 2
    return from_betas(np.minimum(1 - signal_squared[1:] / signal_squared[:-1], max_beta))


class ContinuousSchedule(Schedule):
    """A schedule of real times in [0, 1]; t is cast to float32. Made by the constructors below."""

    @property
    def num_steps(self) -> None:
        """None: there is no smallest step."""
        return None

    def _time(self, t: ArrayLike) -> jax.Array:
        known = concrete(t)
        if known is not None and not np.all((known >= 0) & (known <= 1) | np.isnan(known)):
            outside = known[(known < 0) | (known > 1)]
            raise ValueError(f"time {outside.flat[0]} is outside of this schedule's [0, 1]")
        time = jnp.asarray(t, jnp.float32)
        return jnp.where((time >= 0) & (time <= 1), time, jnp.nan)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _ContinuousPostSchedule(ContinuousSchedule):
    rate: float = dataclasses.field(metadata={"static": True})

    def log_signal_at(self, t: ArrayLike) -> jax.Array:
        return -self.rate * jnp.square(self._time(t))

    def log_ratio(self, t: ArrayLike, s: ArrayLike) -> jax.Array:
        t, s = self._time(t), self._time(s)
        return -self.rate * (t - s) * (t + s)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _ContinuousCosineSchedule(ContinuousSchedule):
    # A(t) = sin(w_t) / sin(w_0), with w falling linearly: near w = 0 a sine keeps its digits.
    start: float = dataclasses.field(metadata={"static": True})
    end: float = dataclasses.field(metadata={"static": True})

    def log_signal_at(self, t: ArrayLike) -> jax.Array:
        return self.log_ratio(t, jnp.zeros_like(self._time(t)))

    def log_ratio(self, t: ArrayLike, s: ArrayLike) -> jax.Array:
        t, s = self._time(t), self._time(s)
        at_t, at_s = (self.start * (1 - u) + self.end * u for u in (t, s))
        half_step = 0.5 * (self.end - self.start) * (t - s)
        change = 2 * jnp.cos(0.5 * (at_t + at_s)) * jnp.sin(half_step) / jnp.sin(at_s)
        near = jnp.abs(change) < 0.5  # sin(at_t) / sin(at_s) - 1, without subtracting
        far = jnp.log(jnp.sin(at_t)) - jnp.log(jnp.sin(at_s))
        return jnp.where(near, jnp.log1p(jnp.where(near, change, 0.0)), far)


def continuous_post_schedule() -> ContinuousSchedule:
    """A(t) = exp(-5 t^2), the limit of `post_schedule` for T = 1000 (post 9181).

    >>> round(float(continuous_post_schedule().signal(1.0)), 6)
    0.006738
    """
    return _ContinuousPostSchedule(5.0)


def continuous_cosine_schedule(
    offset: float = 0.008, min_log_snr: float = -20.0
) -> ContinuousSchedule:
    """A(t) = cos(u_t) / cos(u_0) with u_t linear in t and u_0 = pi / 2 offset / (1 + offset).

    In the paper u_1 = pi / 2, where log A is infinite. Here u_1 stops a little before, where the
    log signal-to-noise ratio is `min_log_snr`; nothing is clipped and log A falls strictly.

    Raises:
      ValueError: if `offset` is not in [0, 1) or `min_log_snr` is not negative and finite.

    >>> round(float(continuous_cosine_schedule().log_snr(1.0)), 3)
    -20.0
    """
    if not 0 <= offset < 1:
        raise ValueError(f"offset must be in [0, 1), got {offset}")
    if not -np.inf < min_log_snr < 0:
        raise ValueError(f"min_log_snr must be negative and finite, got {min_log_snr}")
    start = np.pi / 2 / (1 + offset)
    last_signal = np.exp(-0.5 * np.log1p(np.exp(-min_log_snr)))
    return _ContinuousCosineSchedule(float(start), float(np.arcsin(last_signal * np.sin(start))))


def timesteps(schedule: Schedule, steps: int, spacing: Spacing = "trailing") -> np.ndarray:
    """The times a sampler of `steps` steps visits: descending, `steps + 1` of them, the last one 0.

    With S = `steps` and i = 1..S, counted from the data: trailing i T / S (starts at T), leading
    1 + (i - 1) T / S (ends with the step 1 -> 0), quadratic T (i / S)^2 (small steps near the
    data). Integer times are rounded down, quadratic ones up. Continuous time has T = 1; leading,
    which counts in steps of 1, does not exist there.

    Returns:
      numpy `[steps + 1]`: int32 for integer times, float32 for continuous time.

    Raises:
      ValueError: if `steps` is not in [1, T], if `spacing` is unknown, or if two quadratic times
        would coincide (from about 2 sqrt(T) steps on).

    >>> timesteps(post_schedule(1000), 4).tolist()
    [1000, 750, 500, 250, 0]
    >>> timesteps(post_schedule(1000), 4, "leading").tolist()
    [751, 501, 251, 1, 0]
    >>> timesteps(continuous_post_schedule(), 4, "quadratic").tolist()
    [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """
    check_choice("spacing", spacing, ("trailing", "leading", "quadratic"))
    final = schedule.num_steps
    if steps < 1 or (final is not None and steps > final):
        raise ValueError(
            f"steps = {steps} must be in 1..{final or 'any'}, the schedule's num_steps"
        )
    i = np.arange(steps, -1, -1, dtype=np.int64)
    if final is None:
        if spacing == "leading":
            raise ValueError("spacing='leading' needs integer times, this schedule is continuous")
        return ((i / steps) ** (2 if spacing == "quadratic" else 1)).astype(np.float32)
    if spacing == "trailing":
        times = i * final // steps
    elif spacing == "leading":
        times = np.where(i == 0, 0, 1 + (i - 1) * final // steps)
    else:
        times = -(-(i**2) * final // steps**2)
    if np.any(times[:-1] <= times[1:]):
        raise ValueError(
            f"{steps} quadratic steps of {final} times coincide near the data; take fewer"
        )
    return times.astype(np.int32)
