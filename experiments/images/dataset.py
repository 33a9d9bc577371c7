"""The images an experiment trains on: the digits, or any image dataset of TFDS."""

import dataclasses
from typing import Any

import jax
import numpy as np

from blogjax.data import digits, tfds
from blogjax.data.batches import Batches, EvaluationBatches

SPLITS = ("train", "validation", "test")
FEATURES = ("image", "label")


@dataclasses.dataclass(frozen=True)
class Images:
    """A dataset of images with labels.

    Attributes:
      name: "digits", or a name of TFDS.
      shape: of one image, `(H, W, C)`.
      num_classes: of the labels.
      splits: what train, validation and test are called there.
      folder: of TFDS; None for its own default.
      in_memory: None decides by size; see `data.tfds.batches`.
    """

    name: str
    shape: tuple[int, ...]
    num_classes: int
    splits: dict[str, str]
    folder: str | None
    in_memory: bool | None
    _loaded: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict, repr=False)

    def batches(self, split: str, batch_size: int, seed: int) -> Any:
        """Endless shuffled batches."""
        options: dict[str, Any] = {"seed": seed, **_processes()}
        if self.name == "digits":
            return Batches(self.arrays(split), batch_size, **options)
        return tfds.batches(self.name, self.splits[split], batch_size, **options, **self._tfds())

    def evaluation(self, split: str, batch_size: int) -> Any:
        """Every image once."""
        if self.name == "digits":
            return EvaluationBatches(self.arrays(split), batch_size, **_processes())
        return tfds.evaluation_batches(
            self.name, self.splits[split], batch_size, **_processes(), **self._tfds()
        )

    def _tfds(self) -> dict[str, Any]:
        return {"data_dir": self.folder, "features": FEATURES, "in_memory": self.in_memory}

    def first(self, split: str, count: int) -> np.ndarray:
        """The first images of a split, at most `count`; no other is read.

        Raises:
          ValueError: for the digits, which are small.
        """
        if self.name == "digits":
            raise ValueError("the digits are read whole, by `arrays`")
        source = tfds.source(self.name, self.splits[split], self.folder, features=("image",))
        examples = source.__getitems__(range(min(count, len(source))))
        return np.stack([example["image"] for example in examples])

    def arrays(self, split: str) -> dict[str, np.ndarray]:
        """All of a split of the digits: `image` float32 in [-1, 1], and `label`."""
        if split not in self._loaded:
            self._loaded[split] = digits.load(split)
        return self._loaded[split]


def _processes() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def open_images(data: Any) -> Images:
    """Finds, and prepares if need be, the dataset of a config's `data` group.

    Raises:
      ValueError: if the config is wrong: no such dataset, splits or features.
    """
    if len(data.splits) != len(SPLITS):
        raise ValueError(f"data.splits must name {', '.join(SPLITS)}, got {data.splits}")
    serve = {"memory": True, "grain": False, "auto": None}
    if data.serve not in serve:
        raise ValueError(f"data.serve must be one of {', '.join(serve)}, got {data.serve!r}")
    splits: dict[str, str] = dict(zip(SPLITS, data.splits, strict=True))
    if data.name == "digits":
        if data.serve == "grain" or data.dir or splits != {s: s for s in SPLITS}:
            raise ValueError(
                "the digits come from memory, with splits of their own: leave data.dir, "
                "data.serve and data.splits as they are"
            )
        shape, num_classes = digits.load("test")["image"].shape[1:], 10
    else:
        found = [tfds.describe(data.name, s, data_dir=data.dir or None) for s in data.splits]
        described = found[0]  # the features are those of all splits
        shape: Any = described.shapes.get("image", (None,))
        if None in shape or "label" not in described.num_classes:
            raise ValueError(
                f"images of one size and labels are needed, but {data.name} has {described.shapes}"
            )
        num_classes = described.num_classes["label"]
    return Images(data.name, tuple(shape), num_classes, splits, data.dir or None, serve[data.serve])
