"""Panels of curves over a logarithmic axis, two in a row."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.launch.pictures import save_figure


@dataclasses.dataclass(frozen=True)
class Line:
    """Measured points, joined.

    Attributes:
      label: for the legend, which lists the labels of all panels once.
      x, y: `[n]`.
      colour: of matplotlib.
      mark: indices of points to ring.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    mark: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
      title, xlabel, ylabel: texts.
      lines: what was measured.
      log_y: whether the vertical axis is logarithmic; the horizontal one always is.
      curves: `{label: (x, y)}`, what a formula says, dotted.
      levels: `{label: y}`, across the whole panel, dotted.
      ticks: of the horizontal axis; None for powers of ten.
    """

    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    log_y: bool = False
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    levels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ticks: Sequence[float] | None = None


def draw_panels(path: pathlib.Path, panels: Sequence[Panel]) -> None:
    """Draws the panels as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(10.4, 3.8 * rows), squeeze=False)
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        for line in panel.lines:
            (handles[line.label],) = axis.plot(line.x, line.y, "o-", color=line.colour, ms=4)
            chosen = list(line.mark)
            axis.plot(line.x[chosen], line.y[chosen], "o", ms=10, mfc="none", color=line.colour)
        formulas = [
            *(axis.plot(x, y, "k:", label=name)[0] for name, (x, y) in panel.curves.items()),
            *(axis.axhline(y, color="k", ls=":", label=name) for name, y in panel.levels.items()),
        ]
        axis.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel, xscale="log")
        axis.set_yscale("log" if panel.log_y else "linear")
        if panel.ticks is not None:
            axis.set_xticks(panel.ticks, [f"{v:g}" for v in panel.ticks])
            axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if formulas:
            axis.legend(handles=formulas, fontsize=8, frameon=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", bbox_to_anchor=(0.5, 1.0),
        ncols=len(handles), frameon=False,
    )  # fmt: skip
    figure.tight_layout()
    save_figure(figure, path, dpi=110)
