"""Pictures of GANs in the plane."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blogjax.data.toy2d import Toy2D
from experiments.launch.pictures import save_figure

NAMES = {
    "none": "none",
    "clip": "clipped weights",
    "sn": "spectral norm",
    "gp": "gradient penalty",
    "gn": "GN",
    "gran": "GraN",
    "direction": "direction of gradient",
}
COLOURS = {
    "none": "0.55", "clip": "C2", "sn": "C4", "gp": "C0", "gn": "C3", "gran": "C1",
    "direction": "C5",
}  # fmt: skip


def draw_arms(
    path: pathlib.Path,
    data: Toy2D,
    shown: Mapping[str, Mapping[str, np.ndarray]],
    measured: Sequence[Mapping[str, Any]],
    extent: float,
) -> None:
    """One panel for each arm, and one of all along training.

    Args:
      path: of the PNG.
      data: with modes.
      shown: for each arm the critic's `values`, `[side, side]`, on the square, and `samples`.
      measured: for each seed figures by arm: `modes`, `w2`, and `along` training `step` and
        `near`. Titles are those of the first seed, from which `shown` is; curves are means.
      extent: half the side of the square.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(13, 7.7))
    for axis, (name, panel) in zip(axes.flat, shown.items(), strict=False):
        values, own = panel["values"], measured[0][name]
        low, high = np.quantile(values, [0.01, 0.99])
        levels = np.linspace(low, high, 13) if high > low else [low - 1, low + 1]
        across = np.linspace(-extent, extent, len(values))
        axis.contourf(across, across, values, levels, cmap="PuOr", extend="both", alpha=0.75)
        axis.contour(
            across, across, values, levels, colors="k", linewidths=0.4, alpha=0.4,
            linestyles="solid",
        )  # fmt: skip
        axis.plot(*panel["samples"].T, "o", ms=1.6, color="k", mew=0, alpha=0.7)
        if data.modes is not None:
            axis.plot(*data.modes.T, "o", ms=15, mfc="none", mec="w", mew=1.8)
        far = "" if own["w2"] is None else f", W2 {own['w2']:.2f}"
        axis.set_title(f"{NAMES[name]}\n{own['modes']} modes{far}", fontsize=14)
        axis.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[])
        axis.set_aspect("equal")
    axis = axes.flat[-1]
    for name in shown:
        near = np.mean([m[name]["along"]["near"] for m in measured], axis=0)
        axis.plot(measured[0][name]["along"]["step"], near, color=COLOURS[name], lw=2)
        axis.plot([], [], color=COLOURS[name], lw=2, label=NAMES[name])
    axis.set_title("share of samples\nnear a mode", fontsize=14)
    axis.set_xlabel("step", fontsize=12)
    axis.set_ylim(0, 1)
    axis.tick_params(labelsize=11)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        fontsize=10, frameon=False, loc="lower right", bbox_to_anchor=(1.05, 0.13),
        labelspacing=0.0, handlelength=1.0,
    )  # fmt: skip
    figure.suptitle(
        "critics after training (dark violet: most real), generated points, circles around the "
        "modes", fontsize=15,
    )  # fmt: skip
    figure.tight_layout()
    save_figure(figure, path, dpi=100, colours=256)
