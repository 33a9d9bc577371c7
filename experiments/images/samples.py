"""Samples of a trained model: kept in files, as bytes, and drawn beside real images.

The files are such that any tool can compute an FID from them, and a run that is stopped goes on
with the next one.
"""

import pathlib
from collections.abc import Callable, Iterable

import jax
import numpy as np

MOST_REAL = 10_000  # held-out images that samples are compared with, and training ones


def unit(images: np.ndarray) -> np.ndarray:
    """Bytes as pixels in [-1, 1].

    >>> unit(np.array([0, 255], np.uint8)).tolist()
    [-1.0, 1.0]
    """
    return images.astype(np.float32) / 127.5 - 1


def in_files(
    folder: pathlib.Path, num: int, starts: Iterable[int], draw: Callable[[int], np.ndarray]
) -> np.ndarray:
    """All samples of a model, uint8 `[num, H, W, C]`, each batch kept in a file of its own.

    Args:
      folder: of the files; batches that lie there are read, not drawn.
      num: how many samples there should be.
      starts: the number of each batch's first sample.
      draw: `draw(first) -> [n, H, W, C]` in [-1, 1]; what lies outside is clipped.

    Raises:
      ValueError: if there are not `num` samples in the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for first in starts:
        path = folder / f"{first:06d}.npy"
        if not path.exists():
            images = draw(first)
            pixels = np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
            if jax.process_index() == 0:
                temporary = path.with_suffix(".tmp")
                with temporary.open("wb") as file:
                    np.save(file, pixels)
                temporary.replace(path)
            parts.append(pixels)
        else:
            parts.append(np.load(path))
    samples = np.concatenate(parts)
    if len(samples) != num:
        raise ValueError(f"{folder} holds {len(samples)} samples where {num} were asked for")
    return samples


def draw_grid(
    path: pathlib.Path, samples: np.ndarray, real: np.ndarray, size: int = 8, kind: str = "images"
) -> None:
    """Draws the first samples and the first held-out images, at most `size` in a row.

    Args:
      path: of the PNG.
      samples: `[n, H, W, C]` in [0, 1].
      real: `[m, H, W, C]` in [0, 1].
      size: of the square.
      kind: what the images are, for the title.
    """
    from experiments.launch.pictures import image_panels

    size = min(size, int(np.sqrt(min(len(samples), len(real)))))
    grids = {
        "samples of the model": samples[: size**2],
        f"real {kind}, held out": real[: size**2],
    }
    image_panels(
        path,
        {n: g.reshape(size, size, *g.shape[1:]) for n, g in grids.items()},
        columns=[""] * size,
    )
