"""Panels side by side: a dot for every network, lines, and powers of a small number."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.launch.pictures import save_figure

MARKERS = "osD^vP*Xph<>"


@contextlib.contextmanager
def figure(path: pathlib.Path, panels: int) -> Iterator[Sequence[Any]]:
    """Yields so many axes in a row, and writes the PNG at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, panels, figsize=(5.0 * panels, 4.2), squeeze=False)
    yield axes[0]
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    drawn.tight_layout()
    save_figure(drawn, path, dpi=100)


def dots(
    axis: Any, values: Mapping[str, np.ndarray], title: str, xlabel: str, reach: float = 8.0
) -> None:
    """One row for each name, best mean on top: a dot per network, the mean and two errors of it.

    Args:
      axis: of matplotlib.
      values: `{name: [n]}`.
      title, xlabel: texts.
      reach: names whose mean is farther from 0 have it written at the edge instead.
    """
    order = sorted(values, key=lambda name: float(values[name].mean()))
    axis.axvline(0, color="k", lw=0.8)
    for row, name in enumerate(order):
        x = values[name]
        mean, error = float(x.mean()), 2 * float(x.std(ddof=1) / np.sqrt(len(x)))
        if abs(mean) > reach:
            side = np.sign(mean)
            axis.annotate(
                f"{mean:+.0f}", (side * reach, row), (side * (reach - 1.6), row), va="center",
                ha="center", color="C3", arrowprops={"arrowstyle": "->", "color": "C3"},
            )  # fmt: skip
            continue
        height = row + np.linspace(-0.28, 0.28, len(x))  # or equal values would hide one another
        shown = abs(x) <= reach
        axis.plot(x[shown], height[shown], "o", color="C0", alpha=0.35, ms=3.5, mew=0)
        axis.errorbar(mean, row, xerr=error, fmt="D", color="k", ms=5, capsize=4)
    axis.set_yticks(range(len(order)), order)
    low = min([-reach if values[n].mean() < -reach else values[n].min() for n in order])
    high = max([reach if values[n].mean() > reach else values[n].max() for n in order])
    margin = 0.06 * (high - low) or 1.0
    axis.set(title=title, xlabel=xlabel, ylim=(-0.6, len(order) - 0.4))
    axis.set_xlim(max(low, -reach) - margin, min(high, reach) + margin)


def lines(
    axis: Any, x: np.ndarray, values: Mapping[str, np.ndarray], title: str, xlabel: str,
    ylabel: str, level: tuple[str, float] | None = None, log: bool = False,
) -> None:  # fmt: skip
    """A line for each name, over a linear or a logarithmic axis, and a dotted level across."""
    for i, (name, y) in enumerate(values.items()):
        axis.plot(x, y, f"{MARKERS[i % 12]}-", color=f"C{i % 10}", label=name, ms=4, lw=1.2)
    if level is not None:
        axis.axhline(level[1], color="k", ls=":", label=level[0])
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log" if log else "linear")
    if log:
        axis.set_xticks(x, [f"{v:g}" for v in x])
        axis.minorticks_off()
    axis.legend(fontsize=8, framealpha=0.9, edgecolor="none")


def powers(
    axis: Any, x: np.ndarray, values: Mapping[str, np.ndarray], exponents: Mapping[str, float],
    title: str, xlabel: str, ylabel: str,
) -> None:  # fmt: skip
    """Lines over two logarithmic axes, and from the first point of each the power it should be."""
    for i, (name, y) in enumerate(values.items()):
        axis.plot(x, y, "o-", color=f"C{i}", label=name, ms=5)
        power = exponents[name]
        axis.plot(x, y[0] * (x / x[0]) ** power, "k:", label=f"slope {power:g}")
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
    axis.set_xticks(x, [f"{v:g}" for v in x])
    axis.minorticks_off()
    axis.legend(fontsize=8, framealpha=0.9, edgecolor="none")
