"""Images with many attributes that are there or not, from TFDS: CelebA and its like."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from blogjax.data import tfds

SPLITS = ("train", "validation", "test")
FEATURES = ("image", "attributes")


@dataclasses.dataclass(frozen=True)
class Attributes:
    """A dataset of images with attributes.

    Attributes:
      data: the config's group: name, dir, crop and size.
      names: of the attributes, in the order of the labels.
      shape: of one image, `(size, size, channels)`.
      splits: what train, validation and test are called there.
      in_memory: None decides by size; see `data.tfds.batches`.
    """

    data: Any
    names: tuple[str, ...]
    shape: tuple[int, int, int]
    splits: dict[str, str]
    in_memory: bool | None

    def batches(self, split: str, batch_size: int, seed: int) -> Any:
        """Endless shuffled batches: `image` uint8 `[B, size, size, C]`, `attributes` bool."""
        return tfds.batches(
            self.data.name, self.splits[split], batch_size, seed=seed, **self._options()
        )

    def evaluation(self, split: str, batch_size: int) -> Any:
        """Every image once."""
        return tfds.evaluation_batches(
            self.data.name, self.splits[split], batch_size, **self._options()
        )

    def _options(self) -> dict[str, Any]:
        crop, size = self.data.crop, self.data.size
        return {
            "data_dir": self.data.dir or None,
            "features": FEATURES,
            "transform": functools.partial(flat_example, names=self.names, crop=crop, size=size),
            "in_memory": self.in_memory,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }


def flat_example(
    example: Mapping[str, Any], names: Sequence[str], crop: int, size: int
) -> dict[str, np.ndarray]:
    """Cuts the image's centre, makes it smaller, and puts the attributes in a row.

    Args:
      example: `image` uint8 `[H, W, C]`, and `attributes`, a dict of bools.
      names: the order of the attributes.
      crop: side of the square that is cut out, at most H and W.
      size: side of the result. A pixel of it is the mean of those that it covers, rounded.

    Returns:
      `image` uint8 `[size, size, C]` and `attributes` bool `[A]`.

    >>> image = np.arange(24, dtype=np.uint8).reshape(6, 4, 1)
    >>> found = flat_example({"image": image, "attributes": {"a": True}}, ["a"], crop=4, size=2)
    >>> found["image"][..., 0].tolist(), found["attributes"].tolist()
    ([[6, 8], [14, 16]], [True])
    """
    image = example["image"]
    top, left = (image.shape[0] - crop) // 2, (image.shape[1] - crop) // 2
    centre = image[top : top + crop, left : left + crop].astype(np.float32)
    covers = _covers(crop, size)
    smaller = np.einsum("ph,hwc,qw->pqc", covers, centre, covers, optimize=True)
    return {
        "image": np.rint(smaller).astype(np.uint8),
        "attributes": np.array([bool(example["attributes"][name]) for name in names]),
    }


@functools.lru_cache
def _covers(crop: int, size: int) -> np.ndarray:
    """What share of pixel p of `size` is of pixel h of `crop`: float32 `[size, crop]`."""
    edges = np.linspace(0, crop, size + 1)
    inside = np.minimum(edges[1:, None], np.arange(1, crop + 1)) - np.maximum(
        edges[:-1, None], np.arange(crop)
    )
    return (np.maximum(inside, 0) * size / crop).astype(np.float32)


def open_attributes(data: Any) -> Attributes:
    """Finds, and prepares if need be, the dataset of a config's `data` group.

    Raises:
      ValueError: if the config is wrong: no such dataset, splits or features, or a crop that the
        images do not have.
    """
    if len(data.splits) != len(SPLITS):
        raise ValueError(f"data.splits must name {', '.join(SPLITS)}, got {data.splits}")
    serve = {"memory": True, "grain": False, "auto": None}
    if data.serve not in serve:
        raise ValueError(f"data.serve must be one of {', '.join(serve)}, got {data.serve!r}")
    found = [tfds.describe(data.name, s, data_dir=data.dir or None) for s in data.splits]
    described = found[0]  # the features are those of all splits
    prefix = "attributes/"
    names = tuple(sorted(n.removeprefix(prefix) for n in described.shapes if n.startswith(prefix)))
    wrong = [n for n in names if described.dtypes[prefix + n] != np.bool_]
    shape: Any = described.shapes.get("image", (None,))
    if None in shape or not names or wrong:
        raise ValueError(
            "images of one size and a dict of bools called attributes are needed, but "
            f"{data.name} has {described.shapes}"
        )
    if not 1 <= data.size <= data.crop <= min(shape[:2]):
        raise ValueError(
            f"data.size and data.crop must rise from 1 to {min(shape[:2])}, the shorter side of "
            f"the images, got {data.size} and {data.crop}"
        )
    splits: dict[str, str] = dict(zip(SPLITS, data.splits, strict=True))
    return Attributes(data, names, (data.size, data.size, shape[2]), splits, serve[data.serve])
