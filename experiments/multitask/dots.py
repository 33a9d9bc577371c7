"""The picture of methods that meet one loss at two scales."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.launch.pictures import save_figure

PANELS = {
    "class": ("class", "right, % of test images"),
    "parity": ("parity", "right, % of test images"),
    "ink": ("ink", "squared error, % of the variance (log scale)"),
}


def draw(path: pathlib.Path, methods: Mapping[str, str], measured: Sequence[Any]) -> None:
    """One panel for each task: a row for each method, a mark for each seed and scale.

    Args:
      path: of the PNG.
      methods: labels by the names of the methods, the first on top.
      measured: for each seed `{method: {scale: {task: share in [0, 1]}}}`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(12.6, 3.6), sharey=True)
    names = list(measured[0][next(iter(methods))])
    handles: dict[str, Any] = {}
    for axis, (task, (title, xlabel)) in zip(axes, PANELS.items(), strict=True):
        for row, method in enumerate(methods):
            for i, (scale, marker) in enumerate(zip(names, "os", strict=True)):
                x = np.array([100 * seed[method][scale][task] for seed in measured])
                y = np.full(len(x), row + (-0.16, 0.16)[i])
                label = f"loss of the ink times {scale.removesuffix('x')}"
                axis.plot([x.min(), x.max()], y[:2] if len(x) > 1 else [y[0]] * 2, f"C{3 * i}-")
                (handles[label],) = axis.plot(
                    x, y, marker, color=f"C{3 * i}", ms=6, alpha=0.6, mew=0
                )
        axis.set_yticks(range(len(methods)), methods.values())
        axis.set(title=title, xlabel=xlabel, ylim=(len(methods) - 0.5, -0.5))
        if task == "ink":
            axis.set_xscale("log")
            axis.axvline(100, color="k", ls=":", lw=1)
        else:
            chance = {"class": 10, "parity": 50}[task]
            axis.axvline(chance, color="k", ls=":", lw=1)
            axis.set_xlim(min(chance, 100 * _least(measured, task)) - 3, 103)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    from matplotlib.lines import Line2D

    handles["a guess from the prior"] = Line2D([], [], color="k", ls=":", lw=1)
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=3,
        frameon=False,
    )  # fmt: skip
    figure.tight_layout()
    save_figure(figure, path, dpi=100)


def _least(measured: Sequence[Any], task: str) -> float:
    return min(
        scale[task] for seed in measured for method in seed.values() for scale in method.values()
    )
