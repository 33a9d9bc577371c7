"""Curves and number lines as inline SVG, for pages that load nothing and run nothing.

Shapes carry classes; colours, fonts and widths are the page's CSS, so that one drawing serves light
and dark. All coordinates are finite and inside the view box, whatever the data hold.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal
from xml.etree import ElementTree as ET

import numpy as np

WIDTH, HEIGHT = 340, 210
TOP, RIGHT, BOTTOM = 12, 18, 38
CHARACTER = 7  # a generous width of a digit at the font size of the axes
COLOURS = 6  # the page defines c0 .. c5
BUCKETS = 300  # about one per pixel of a panel

Style = Literal["raw", "mean", "line", "points"]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
      label: what it is, for those who cannot see it.
      x: float64 `[n]`, finite and not descending.
      y: float64 `[n]`; NaN leaves a gap.
      style: `raw` is thin, `mean` bold; `points` are few and marked.
      colour: number of the series.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    style: Style = "line"
    colour: int = 0


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


def axis_range(values: np.ndarray) -> tuple[float, float, bool]:
    """Where an axis begins and ends, and whether it is logarithmic.

    It is if the values, but for outliers, are positive and span more than two decades.

    >>> axis_range(np.array([0.5, 4.0]))
    (0.0, 4.14, False)
    >>> axis_range(np.array([1.0, 10.0, 1000.0]))[2]
    True
    """
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if len(positive) and len(finite) - len(positive) <= _spare(len(finite)):
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


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _add(parent: ET.Element, tag: str, text: str = "", **attributes: object) -> ET.Element:
    names = {"kind": "class"}
    values = {
        names.get(k, k.replace("_", "-")): _px(v) if isinstance(v, float) else str(v)
        for k, v in attributes.items()
    }
    element = ET.SubElement(parent, tag, values)
    element.text = text or None
    return element


def _root(width: int, height: int, kind: str, summary: str) -> ET.Element:
    attributes = {"viewBox": f"0 0 {width} {height}", "class": kind, "role": "img"}
    root = ET.Element("svg", {**attributes, "aria-label": summary})
    _add(root, "title", summary)
    return root


def _pieces(x: np.ndarray, y: np.ndarray) -> list[str]:
    """The points of each run without gaps; a lone point is there twice, to be seen as a dot."""
    finite = np.flatnonzero(np.isfinite(y))
    runs = np.split(finite, np.flatnonzero(np.diff(finite) > 1) + 1) if len(finite) else []
    runs = [np.repeat(run, 2) if len(run) == 1 else run for run in runs]
    return [" ".join(f"{_px(x[i])},{_px(y[i])}" for i in run) for run in runs]


def _summary(title: str, curves: Sequence[Curve]) -> str:
    parts = [title]
    for curve in curves:
        good = np.isfinite(curve.y)
        if good.any():
            x, y = curve.x[good], curve.y[good]
            ends = f"{y[0]:.3g} at {x[0]:g}, {y[-1]:.3g} at {x[-1]:g}"
            parts.append(f"{curve.label}: {ends}, lowest {y.min():.3g}, highest {y.max():.3g}")
    return "; ".join(parts)


def _axes(root: ET.Element, along: Scale, up: Scale, xlabel: str) -> None:
    left, bottom = along.start, up.start
    for value, label in up.ticks():
        y = float(up(value))
        _add(root, "line", kind="grid", x1=left, x2=along.end, y1=y, y2=y)
        _add(root, "text", label, kind="ylabel", x=left - 6, y=y + 4)
    values = [v for v in ticks(along.low, along.high) if v == round(v)]  # there is no half step
    for value, label in zip(values, tick_labels(values), strict=True):
        x = float(along(value))
        _add(root, "line", kind="tick", x1=x, x2=x, y1=bottom, y2=bottom + 4)
        _add(root, "text", label, kind="xlabel", x=x, y=bottom + 16)
    _add(root, "line", kind="axis", x1=left, x2=along.end, y1=bottom, y2=bottom)
    _add(root, "text", xlabel, kind="xlabel", x=(left + along.end) / 2, y=bottom + 31)


def _beyond(root: ET.Element, curves: Sequence[Curve], along: Scale, up: Scale) -> list[str]:
    """Marks what the vertical axis leaves out, and says so."""
    notes = []
    for side, edge, toward in (("above", up.end, 6.0), ("below", up.start, -6.0)):
        out = [(c, c.y > up.high if side == "above" else c.y < up.low) for c in curves]
        values = np.concatenate([c.y[where] for c, where in out])
        if not len(values):
            continue
        # One mark where several would lie on one another.
        for x in sorted({round(float(v) / 8) * 8 for c, where in out for v in along(c.x[where])}):
            x = min(max(x, along.start), along.end)
            points = ((x - 4, edge + toward), (x, edge), (x + 4, edge + toward))
            _add(root, "polygon", kind="beyond", points=" ".join(f"{a:g},{b:g}" for a, b in points))
        extreme = f"up to {values.max():.3g}" if side == "above" else f"down to {values.min():.3g}"
        plural = "" if len(values) == 1 else "s"
        notes.append(f"{len(values)} value{plural} {side} the panel, {extreme}")
    return notes


def chart(title: str, curves: Sequence[Curve], xlabel: str = "step") -> tuple[str, list[str]]:
    """Draws curves into one panel.

    The vertical axis is that of `axis_range` over all values but those of means; what lies beyond
    it is marked at the edge.

    Returns:
      The `<svg>` element, and what is to be told below it.

    Raises:
      ValueError: if no value is finite.

    >>> steps = np.arange(10.0)
    >>> svg, notes = chart("loss", [Curve("seed 0", steps, steps**2)])
    >>> svg[:4], notes
    ('<svg', [])
    """
    shown = [c for c in curves if c.style != "mean"]
    low, high, log = axis_range(np.concatenate([np.empty(0), *(c.y for c in shown)]))
    up = Scale(low, high, float(HEIGHT - BOTTOM), float(TOP), log)
    steps = np.concatenate([c.x for c in shown])
    first, last = float(steps.min()), float(steps.max())
    first = 0.0 if 0 <= first <= last / 2 else first
    left = 10.0 + CHARACTER * max((len(label) for _, label in up.ticks()), default=1)
    along = Scale(first, max(last, first + 1), left, float(WIDTH - RIGHT))
    root = _root(WIDTH, HEIGHT, "chart", _summary(title, shown))
    _axes(root, along, up, xlabel)
    order = ("raw", "mean", "line", "points")
    for curve in sorted(curves, key=lambda c: order.index(c.style)):
        x, y = thin(curve.x, curve.y)
        x, y = along(x), up(y)
        kind = f"{curve.style} c{curve.colour % COLOURS} d{curve.colour % 4}"
        for points in _pieces(x, y):
            _add(root, "polyline", kind=kind, points=points)
        if curve.style == "points" and len(y) <= 60:
            for cx, cy in zip(x[np.isfinite(y)], y[np.isfinite(y)], strict=True):
                _add(root, "circle", kind=f"c{curve.colour % COLOURS}", cx=cx, cy=cy, r=2.5)
    notes = ["logarithmic"] if log else []
    notes += _beyond(root, shown, along, up)
    missing = sum(int((~np.isfinite(c.y)).sum()) for c in shown)
    if missing:
        at = min(float(c.x[~np.isfinite(c.y)][0]) for c in shown if not np.isfinite(c.y).all())
        notes.append(f"{missing} not finite, first at {xlabel} {at:g}")
    return ET.tostring(root, encoding="unicode"), notes


def number_line(value: float, spread: float | None, low: float, high: float) -> str:
    """A claim's interval as a band, its value as a dot, one and two spreads as bars.

    Infinite edges are open ends. Empty where there is nothing to compare: no finite value, or no
    finite edge.

    >>> number_line(0.5, None, float("-inf"), float("inf"))
    ''
    """
    edges = [e for e in (low, high) if math.isfinite(e)]
    if not edges or not math.isfinite(value):
        return ""
    reach = 2 * spread if spread is not None and math.isfinite(spread) else 0.0
    inner = [*edges, value - reach, value + reach]
    first, last = min(inner), max(inner)
    margin = 0.22 * (last - first) or 0.5 * abs(value) or 1.0
    line = Scale(first - margin, last + margin, 8.0, 212.0)
    described = f"wanted {low:g} to {high:g}, measured {value:.3g}"
    root = _root(220, 40, "numberline", described.replace("inf", "infinity"))
    start, end = (float(line(e)) for e in (low, high))
    _add(root, "rect", kind="wanted", x=start, y=6.0, width=max(end - start, 1.0), height=16.0)
    _add(root, "line", kind="axis", x1=line.start, x2=line.end, y1=14.0, y2=14.0)
    close = len(edges) == 2 and end - start < 60  # labels that would lie on one another
    for edge in edges:
        x, half = float(line(edge)), CHARACTER / 2 * len(f"{edge:g}")
        _add(root, "line", kind="edge", x1=x, x2=x, y1=4.0, y2=24.0)
        if close:
            x += -half - 3 if edge == low else half + 3
        _add(root, "text", f"{edge:g}", x=min(max(x, half), 220 - half), y=37.0)
    for times, kind in ((2, "two"), (1, "one")):
        if reach:
            x1, x2 = (float(line(value + sign * times * reach / 2)) for sign in (-1, 1))
            _add(root, "line", kind=f"spread {kind}", x1=x1, x2=x2, y1=14.0, y2=14.0)
    _add(root, "circle", kind="value", cx=float(line(value)), cy=14.0, r=4.5)
    return ET.tostring(root, encoding="unicode")
