"""Pictures of descents in the plane of `two_losses`."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.launch.pictures import save_figure
from experiments.multitask.two_losses import STARTS, front, losses
from experiments.multitask.walks import NAMES

COLOURS = ("C0", "C1", "C2", "C3", "C4")  # of the starts


def mean_loss(across: np.ndarray) -> np.ndarray:
    """Of both losses on the square grid of these coordinates, `[b, a]`."""
    import jax

    grid = np.stack(np.meshgrid(across, across), axis=-1)
    return np.asarray(jax.jit(jax.vmap(jax.vmap(losses)))(np.float32(grid))).mean(axis=-1)


def draw_paths(path: pathlib.Path, paths: Mapping[str, np.ndarray], steps: int) -> None:
    """One panel for each combiner: its paths over the mean loss, and the front.

    Args:
      path: of the PNG.
      paths: for each key of `NAMES` `[starts, points, 2]`.
      steps: how many they took.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection
    from matplotlib.colors import PowerNorm

    across = np.linspace(-11, 11, 221)
    values, pareto = mean_loss(across), front(101)
    figure, axes = plt.subplots(2, 4, figsize=(13, 6.7), layout="constrained")
    shade = None
    for axis, (name, rows) in zip(axes.flat, paths.items(), strict=True):
        axis.contour(
            across, across, values, np.arange(-16, 9, 2), colors="0.75", linewidths=0.8,
            linestyles="solid", zorder=0,
        )  # fmt: skip
        axis.plot(*pareto.T, color="0.35", lw=9, alpha=0.45, solid_capstyle="butt", zorder=1)
        for row in rows:
            shade = LineCollection(
                list(np.stack([row[:-1], row[1:]], axis=1)), cmap="plasma", lw=2.6, zorder=2,
                array=np.linspace(0, steps, len(row) - 1), capstyle="round",
                norm=PowerNorm(0.5, 0, steps),  # most arrive in the first third
            )  # fmt: skip
            axis.add_collection(shade)
        axis.plot(*rows[:, 0].T, "o", ms=8, color="k", zorder=3)
        axis.plot(*rows[:, -1].T, "X", ms=11, color="C2", mec="k", mew=1.0, zorder=4)
        axis.set_title(NAMES[name], fontsize=17)
        axis.set(xlim=(-11, 11), ylim=(-11, 11), xticks=[], yticks=[])
        axis.set_aspect("equal")
    assert shade is not None
    bar = figure.colorbar(shade, ax=axes, shrink=0.7, pad=0.01, aspect=30)
    ticks = [0, steps // 10, steps // 2, steps]
    bar.set_ticks(ticks, labels=[f"{tick:,}".replace(",", " ") for tick in ticks], fontsize=13)
    bar.set_label("step", fontsize=15)
    figure.suptitle(
        "from five starts (dots) to the ends (crosses), over the mean loss; grey band: Pareto "
        "front", fontsize=16,
    )  # fmt: skip
    save_figure(figure, path, dpi=100, colours=256)


def draw_ends(
    path: pathlib.Path, arms: Mapping[str, Mapping[str, Any]], float64: np.ndarray
) -> None:
    """Where on the front the paths from the usual starts arrive, and where they end.

    Args:
      path: of the PNG.
      arms: for each key of `NAMES` `place`, None for paths that do not arrive, and `end`.
      float64: where min-norm ends in float64, the first coordinates.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9.5, 5.2), layout="constrained")
    for row, name in enumerate(NAMES):
        axis.axhline(row, color="0.8", lw=1, zorder=0)
        absent = 0
        for i, colour in enumerate(COLOURS):
            height = row + 0.1 * (2 - i)
            place, end = arms[name]["place"][i], arms[name]["end"][i][0]
            if place is None:
                absent += 1
                axis.plot(8 + 0.5 * absent, row, "x", ms=9, mew=2.2, color=colour)
                continue
            axis.plot([place, end], [height, height], color=colour, lw=1.6)
            axis.plot(place, height, "o", ms=9, mfc="w", mec=colour, mew=2)
            axis.plot(end, height, "o", ms=7, color=colour)
            if name == "min_norm":
                axis.plot(float64[i], height, "|", ms=17, mew=2.2, color="k", zorder=5)
    for start, colour in zip(STARTS, COLOURS, strict=True):
        axis.plot([], [], "s", ms=9, color=colour, label=f"from ({start[0]:g}, {start[1]:g})")
    axis.plot([], [], "o", ms=9, mfc="w", mec="k", mew=2, label="arrival")
    axis.plot([], [], "o", ms=7, color="k", label="last step")
    axis.plot([], [], "|", ms=15, mew=2.2, color="k", label="last step, float64")
    axis.plot([], [], "x", ms=9, mew=2.2, color="k", label="not arrived")
    axis.set_yticks(range(len(NAMES)), list(NAMES.values()), fontsize=13)
    axis.set_xticks([-7, 0, 7, 9], ["least L2", "least mean", "least L1", "not\narrived"])
    axis.tick_params(axis="x", labelsize=13)
    axis.invert_yaxis()
    axis.set_xlim(-7.6, 10.4)
    axis.set_title("where on the Pareto front paths arrive and end", fontsize=15)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=5, frameon=False, fontsize=11,
                columnspacing=1.2, handletextpad=0.3)  # fmt: skip
    save_figure(figure, path, dpi=100)
