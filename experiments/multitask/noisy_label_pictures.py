"""Panels of the experiment on noisy labels: shares of steps, accuracies of networks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def histogram(
    axis: Any, edges: np.ndarray, shares: Mapping[str, np.ndarray], title: str, xlabel: str
) -> None:
    """Outlines of histograms over one another, and a line at 0; what is below it lies in the grey.

    Args:
      axis: of matplotlib.
      edges: `[n + 1]`.
      shares: `{name: [n]}`, of the whole.
      title, xlabel: texts.
    """
    axis.axvspan(edges[0] - 1, 0, color="k", alpha=0.06, lw=0)
    for i, (name, share) in enumerate(shares.items()):
        axis.stairs(100 * share, edges, color=f"C{i}", fill=i == 0, alpha=0.3)
        axis.stairs(100 * share, edges, label=name, color=f"C{i}", lw=1.6)
    axis.axvline(0, color="k", lw=0.8)
    filled = edges[:-1][np.sum(list(shares.values()), axis=0) > 0]
    axis.set_xlim(filled.min() - 0.05, filled.max() + 0.1)
    top = 125 * max(float(share.max()) for share in shares.values())  # room for the legend above
    axis.set(title=title, xlabel=xlabel, ylabel="% of the steps", ylim=(0, top))
    axis.legend(fontsize=8, framealpha=0.9, edgecolor="none", loc="upper left")


def accuracies(
    axis: Any, values: Mapping[str, Sequence[np.ndarray]], groups: Sequence[str], title: str,
    xlabel: str,
) -> None:  # fmt: skip
    """One row for each name, in their order from the top, and in it one line of dots per group.

    Args:
      axis: of matplotlib.
      values: `{name: one [n] for each group}`.
      groups: names of the groups.
      title, xlabel: texts.
    """
    rows, height = len(values), 0.56 / len(groups)
    for row, of_groups in enumerate(values.values()):
        for i, x in enumerate(of_groups):
            y = rows - 1 - row + height * ((len(groups) - 1) / 2 - i)
            axis.plot(x, np.full(len(x), y), "o", color=f"C{i}", alpha=0.3, ms=4, mew=0)
            error = 2 * float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else 0.0
            axis.errorbar(
                x.mean(), y, xerr=error, fmt="D", color=f"C{i}", ms=4.5, capsize=3, mec="k",
                label=groups[i] if row == 0 else None,
            )  # fmt: skip
    axis.set_yticks(range(rows), list(values)[::-1])
    axis.set(title=title, xlabel=xlabel, ylim=(-1.2, rows - 0.4))  # room for the legend below
    axis.legend(
        fontsize=8, framealpha=0.9, edgecolor="none", loc="lower center", ncols=len(groups)
    )  # fmt: skip
