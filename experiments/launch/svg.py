"""Curves and number lines as inline SVG, for pages that load nothing and run nothing.

Shapes carry classes; colours, fonts and widths are the page's CSS, so that one drawing serves light
and dark. All coordinates are finite and inside the view box, whatever the data hold.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal
from xml.etree import ElementTree as ET

import numpy as np

from experiments.launch.axes import Scale, axis_range, thin, tick_labels, ticks

WIDTH, HEIGHT = 340, 210
TOP, RIGHT, BOTTOM = 12, 18, 38
CHARACTER = 7  # a generous width of a digit at the font size of the axes
COLOURS = 6  # the page defines c0 .. c5

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


def chart(
    title: str, curves: Sequence[Curve], xlabel: str = "step", may_log: bool = True
) -> tuple[str, list[str]]:
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
    low, high, log = axis_range(np.concatenate([np.empty(0), *(c.y for c in shown)]), may_log)
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
