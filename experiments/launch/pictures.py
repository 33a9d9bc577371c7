"""Pictures of a run: images in labelled columns, and curves."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blogjax.train.distributed import is_first
from blogjax.train.reporting import read_metrics, tile_images


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(
    figure: Any, path: pathlib.Path, dpi: int = 110, colours: int | None = None
) -> None:
    """Writes a figure without margins and closes it; of several processes the first one does.

    Args:
      figure: of matplotlib.
      path: of the PNG.
      dpi: pixels per inch.
      colours: size of a palette, which where colours are few takes a third of the bytes.
    """
    if is_first():
        from PIL import Image

        figure.savefig(path, dpi=dpi, bbox_inches="tight")
        if colours is not None:
            with Image.open(path) as picture:
                small = picture.convert("RGB").quantize(colours, Image.Quantize.MAXCOVERAGE)
            small.save(path, optimize=True)
    _pyplot().close(figure)


def class_columns(
    images: np.ndarray, labels: np.ndarray, num_classes: int, rows: int
) -> np.ndarray:
    """The first images of each class, one column per class.

    Args:
      images: `[n, h, w, c]`.
      labels: `[n]`, in `0 .. num_classes - 1`.
      num_classes: number of columns.
      rows: at most so many; fewer if a class has fewer.

    Returns:
      `[rows, num_classes, h, w, c]`.

    >>> class_columns(np.zeros((6, 8, 8, 1)), np.arange(6) % 3, 3, rows=5).shape
    (2, 3, 8, 8, 1)
    """
    chosen = [images[labels == c][:rows] for c in range(num_classes)]
    rows = min(len(column) for column in chosen)
    return np.stack([column[:rows] for column in chosen], axis=1)


def image_panels(
    path: pathlib.Path,
    panels: Mapping[str, np.ndarray],
    *,
    columns: Sequence[str],
    rows: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Draws grids of images side by side, with a label over each column.

    Args:
      path: of the PNG.
      panels: `{title: [rows, columns, h, w, c]}` in [0, 1]; all of one layout.
      columns: the columns' labels.
      rows: labels left of the first panel's rows.
      title: over everything.
    """
    plt = _pyplot()
    first = next(iter(panels.values()))
    size = 0.42 * first.shape[0], 0.42 * first.shape[1]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(size[1] * len(panels) + 0.9, size[0] + 1.1), squeeze=False
    )
    for axis, (name, images) in zip(axes[0], panels.items(), strict=True):
        n, m, h, w, c = images.shape
        grid = tile_images(images.reshape(n * m, h, w, c), columns=m)
        axis.imshow(grid.squeeze(-1) if c == 1 else grid, cmap="gray", vmin=0, vmax=1)
        axis.set_xticks([(w + 1) * (i + 0.5) for i in range(m)], columns, fontsize=9)
        axis.xaxis.tick_top()
        axis.set_yticks([])
        if rows is not None and axis is axes[0][0]:
            axis.set_yticks([(h + 1) * (i + 0.5) for i in range(n)], rows, fontsize=9)
        axis.tick_params(length=0)
        axis.set_title(name, fontsize=11, pad=8)
        for spine in axis.spines.values():
            spine.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=12)
    figure.tight_layout()
    save_figure(figure, path, dpi=110)


def curves(
    path: pathlib.Path,
    runs: Mapping[str, pathlib.Path],
    panels: Sequence[Mapping[str, Any]] = (),
    window: int = 20,
) -> None:
    """Draws the losses of runs, then further panels.

    Args:
      path: of the PNG.
      runs: `{label: folder with metrics.jsonl}`.
      panels: each `{"title", "xlabel", "ylabel", "lines": {label: (x, y)}, "levels": {label: y}}`.
      window: how many records the bold line of the training loss averages.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, 1 + len(panels), figsize=(4.6 * (1 + len(panels)), 3.6))
    axes = np.atleast_1d(axes)
    for i, (label, folder) in enumerate(runs.items()):
        suffix = f" ({label})" if len(runs) > 1 else ""
        train = read_metrics(folder / "metrics.jsonl", "train")
        evaluated = read_metrics(folder / "metrics.jsonl", "evaluate")
        axes[0].plot(train["step"], train["loss"], color=f"C{i}", alpha=0.25, lw=0.8)
        if len(train["step"]) >= 2 * window:
            smooth = np.convolve(train["loss"], np.ones(window) / window, "valid")
            middle = train["step"][window // 2 :][: len(smooth)]
            axes[0].plot(middle, smooth, color=f"C{i}", label=f"train{suffix}")
        if "loss" in evaluated:
            axes[0].plot(
                evaluated["step"], evaluated["loss"], "o--", color=f"C{i}", ms=4,
                label=f"validation{suffix}",
            )  # fmt: skip
        if len(train["loss"]):
            low, high = np.nanpercentile(train["loss"], [2, 98])
            below, above = (0, high) if i == 0 else axes[0].get_ylim()
            axes[0].set_ylim(min(low, below), max(high, above))
    axes[0].set(title="loss", xlabel="step")
    for axis, panel in zip(axes[1:], panels, strict=True):
        for i, (label, (x, y)) in enumerate(panel["lines"].items()):
            axis.plot(x, y, "o-", color=f"C{i}", label=label, ms=4)
        for label, y in panel.get("levels", {}).items():
            axis.axhline(y, color="gray", ls=":", label=label)
        axis.set_xscale("log")
        ticks = sorted({v for x, _ in panel["lines"].values() for v in x})
        axis.set_xticks(ticks, [f"{v:g}" for v in ticks])
        axis.minorticks_off()
        axis.set(title=panel["title"], xlabel=panel["xlabel"], ylabel=panel.get("ylabel", ""))
    for axis in axes:
        axis.grid(alpha=0.3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    save_figure(figure, path, dpi=110)
