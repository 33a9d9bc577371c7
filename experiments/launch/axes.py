"""What a panel needs before it can be drawn: scales, ticks, ranges, and fewer points."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

BUCKETS = 300  # about one per pixel of a panel


@dataclasses.dataclass(frozen=True)
class Scale:
    """Maps values to pixels: `low` to `start`, `high` to `end`; beyond them, to the nearer one.

    With `log` equal ratios are equal distances, and what is not positive is at `start`.
    NaN stays NaN.

    >>> Scale(0.0, 10.0, 100.0, 200.0)(np.array([0.0, 2.5, 99.0])).tolist()
    [100.0, 125.0, 200.0]
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: np.ndarray | float) -> np.ndarray:
        """Pixels, of the values' shape."""
        values = np.clip(np.asarray(values, np.float64), self.low, self.high)
        low, high = self.low, self.high
        if self.log:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Where to write what."""
        values = (log_ticks if self.log else ticks)(self.low, self.high, 6)
        return list(zip(values, tick_labels(values, self.log), strict=True))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """The numbers in `[low, high]` that a person would write at an axis.

    They are 1, 2 or 5 times a power of ten apart, at the smallest such distance that is at least
    `(high - low) / count`: between 2 and `count + 1` numbers for `count >= 5`.

    Raises:
      ValueError: unless `low < high`, both finite, and `count >= 1`.

    >>> ticks(0.0, 1000.0)
    [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]
    >>> ticks(0.13, 0.57)
    [0.2, 0.3, 0.4, 0.5]
    """
    if not 1e-300 < high - low < math.inf or count < 1:
        raise ValueError(f"no ticks between low={low} and high={high} with count={count}")
    least = (high - low) / count
    exponent = math.floor(math.log10(least))
    power = 10.0**exponent
    factor = next((f for f in (1, 2, 5) if f * power >= least * (1 - 1e-9)), 10)
    step = factor * power
    numbers = range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)
    # Integers over powers of ten are rounded once: 0.3, not 3 * 0.1.
    down, up = 10 ** max(-exponent, 0), 10 ** max(exponent, 0)
    values = (n * factor * up / down for n in numbers)
    return sorted({v for v in values if low <= v <= high})


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Powers of ten in `[low, high]`, their exponents as round as `ticks`.

    Raises:
      ValueError: unless `0 < low < high`.

    >>> log_ticks(0.02, 300.0)
    [0.1, 1.0, 10.0, 100.0]
    """
    if not 0 < low < high:
        raise ValueError(f"no logarithmic ticks between low={low} and high={high}")
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    step = next(
        s for e in range(4) for s in (10**e, 2 * 10**e, 5 * 10**e) if last - first < s * count
    )
    values = (10.0**e for e in range(first, last + 1) if e % step == 0)
    return [v for v in values if low <= v <= high]


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def tick_labels(values: Sequence[float], log: bool = False) -> list[str]:
    """Labels of one axis, all written in the same way and short.

    >>> tick_labels([0.0, 0.25, 0.5]), tick_labels([0.0, 20000.0])
    (['0', '0.25', '0.50'], ['0', '20k'])
    >>> tick_labels([0.0, 0.0002]), tick_labels([0.01, 1e5], log=True)
    (['0', '2·10⁻⁴'], ['10⁻²', '10⁵'])
    """
    largest = max((abs(v) for v in values), default=0.0)
    if log and (largest > 1e3 or min(values, default=1.0) < 1e-3):
        return [_power(round(math.log10(v))) for v in values]
    if log:
        return [f"{v:g}" for v in values]
    unit, end = 0, ""
    if largest >= 1e15 or 0 < largest < 1e-3:
        unit = math.floor(math.log10(largest) + 1e-9)
        end = f"·{_power(unit)}"
    elif largest >= 1e4:
        unit = 3 * int(math.log10(largest) / 3 + 1e-9)
        end = {3: "k", 6: "M", 9: "G", 12: "T"}[unit]
    # A float of 10^unit would be zero or infinite at the ends of the range.
    scaled = [v / 10.0 ** (unit - unit // 2) / 10.0 ** (unit // 2) for v in values]
    size = max((abs(v) for v in scaled), default=0.0)
    digits = next(
        (d for d in range(6) if all(abs(round(v, d) - v) < 1e-7 * size for v in scaled)), 6
    )
    return [f"{s:.{digits}f}{end}" if v else "0" for v, s in zip(values, scaled, strict=True)]


def robust_range(values: np.ndarray) -> tuple[float, float]:
    """The range of the finite values, without the few that would flatten all others.

    From 20 values on, the outermost hundredth at either end (at least one value) counts only where
    it adds no more to the range than the rest has.

    Raises:
      ValueError: if no value is finite.

    >>> robust_range(np.array([*range(100), 1e6]))
    (0.0, 99.0)
    >>> robust_range(np.array([*range(100), 150.0]))
    (0.0, 150.0)
    """
    ordered = np.sort(values[np.isfinite(values)])
    n = len(ordered)
    if n == 0:
        raise ValueError(f"none of {len(values)} values is finite")
    spare = _spare(n)
    first, low, high, last = (float(ordered[i]) for i in (0, spare, n - 1 - spare, n - 1))
    span = high - low
    if span == 0:
        return first, last
    return first if low - first <= span else low, last if last - high <= span else high


def _spare(n: int) -> int:
    return max(1, n // 100) if n >= 20 else 0


def axis_range(values: np.ndarray, may_log: bool = True) -> tuple[float, float, bool]:
    """Where an axis begins and ends, and whether it is logarithmic.

    It is, where it may be, if the values, but for outliers, are positive and span more than two
    decades.

    >>> axis_range(np.array([0.5, 4.0]))
    (0.0, 4.14, False)
    >>> axis_range(np.array([1.0, 10.0, 1000.0]))[2]
    True
    """
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if may_log and len(positive) and len(finite) - len(positive) <= _spare(len(finite)):
        low, high = robust_range(np.log10(positive))
        if high - low > 2:
            pad = 0.03 * (high - low)
            return max(10.0 ** (low - pad), 1e-307), 10.0 ** min(high + pad, 307.0), True
    low, high = robust_range(finite)
    size = max(abs(low), abs(high))
    if high - low < 1e-5 * size or size < 1e-280:  # as good as constant
        return (
            (0.0, 1.0, False) if size < 1e-280 else (min(2 * low, 0.0), max(2 * high, 0.0), False)
        )
    pad = 0.04 * (high - low)
    return 0.0 if 0 <= low < 0.25 * high else low - pad, high + pad, False


def thin(x: np.ndarray, y: np.ndarray, buckets: int = BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """Leaves out points that nobody would see: of each bucket its extremes and a NaN stay.

    Args:
      x: `[n]`.
      y: `[n]`.
      buckets: runs of equally many points.

    Returns:
      At most `3 * buckets + 2` of the points in their order, all of them if `n <= 2 * buckets`;
      the first, the last, the smallest and the largest are among them.

    >>> thin(np.arange(100.0), np.sin(np.arange(100.0)), buckets=2)[0].tolist()
    [0.0, 11.0, 33.0, 55.0, 77.0, 99.0]
    """
    n = len(y)
    if n <= 2 * buckets:
        return x, y
    kept = {0, n - 1}
    edges = np.linspace(0, n, buckets + 1).astype(int)
    for first, last in itertools.pairwise(edges):
        part = y[first:last]
        finite = np.isfinite(part)
        if finite.any():
            kept |= {first + np.where(finite, part, math.inf).argmin()}
            kept |= {first + np.where(finite, part, -math.inf).argmax()}
        if not finite.all():
            kept |= {first + finite.argmin()}
    index = np.array(sorted(kept))
    return x[index], y[index]


def moving_average(
    x: np.ndarray, y: np.ndarray, window: int, points: int = BUCKETS
) -> tuple[np.ndarray, np.ndarray]:
    """Means over `window` records around `points` of them; at the ends the window is cut off.

    NaN is left out; where there is nothing else, the mean is NaN.

    >>> moving_average(np.arange(5.0), np.array([0.0, 3.0, 6.0, np.nan, 0.0]), 3)[1].tolist()
    [1.5, 3.0, 4.5, 3.0, 0.0]
    """
    centres = np.unique(np.linspace(0, len(y) - 1, min(points, len(y))).round().astype(int))
    half = window // 2
    means = []
    for i in centres:
        part = y[max(i - half, 0) : i + half + 1]
        part = part[~np.isnan(part)]
        means.append(part.mean() if len(part) else math.nan)
    return x[centres], np.array(means)
