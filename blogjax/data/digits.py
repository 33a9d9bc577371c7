"""The handwritten digits that ship with scikit-learn, as a TensorFlow Datasets builder.

1797 images of 8 x 8 pixels with 17 grey levels, ten classes; nothing is downloaded. They are the
test half of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998, UCI Machine
Learning Repository, https://archive.ics.uci.edu/dataset/80).

That half is ordered by writer: a contiguous cut puts different writers, and so different
distributions, on its two sides. The splits here are stratified by class and shuffled with seed 0.

For the numbers to expect: in the pixels that `load` returns, the Frechet distance of train to test
is 0.407, and the median distance of a test image to its nearest train image is 2.08 (in [0, 1]
pixels a quarter and a half of that). Samples that come clearly closer are memorised.
"""

import contextlib
import functools
import hashlib
import io
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import numpy as np

from blogjax.data import cache, splits

SPLITS = {"train": 1287, "validation": 150, "test": 360}
VERSION = "1.0.0"
_NAME = "digits8"


def load(split: str, data_dir: str | os.PathLike[str] | None = None) -> dict[str, np.ndarray]:
    """Returns one split as arrays, preparing the data first where that has not been done.

    Args:
      split: "train" (1287 examples), "validation" (150) or "test" (360).
      data_dir: as in `prepare`.

    Returns:
      `image`: float32 `[n, 8, 8, 1]` in [-1, 1], grey level / 8 - 1 (level 0 is paper, 16 is ink);
      `label`: int32 `[n]`, the digit. The order is the same on every machine.

    Raises:
      ValueError: if there is no such split.
      ImportError: if the packages that read the data are not installed.

    >>> digits = load("test")
    >>> digits["image"].shape, digits["label"].shape
    ((360, 8, 8, 1), (360,))
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r} of the digits: there are {', '.join(SPLITS)}")
    root = _root(data_dir)
    arrays = _read(root, split)
    if arrays is None:
        prepare(root)
        arrays = _read(root, split)
        if arrays is None:
            raise RuntimeError(f"the digits in {_folder(root)} changed while they were read")
    image, label = arrays
    return {"image": image.astype(np.float32) / 8 - 1, "label": label.astype(np.int32)}


def prepare(data_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Writes the prepared data set, once; afterwards only checks that it is whole.

    Every split is decoded and its SHA-256 compared with the one noted when it was written. A data
    set that is damaged or half written is written anew, with one line on stderr. Any number of
    processes may call this at once: one writes, in a folder aside that is then renamed into place,
    and the others wait.

    Args:
      data_dir: the TFDS root, which holds `digits8/1.0.0/`; None for the folder `datasets` in the
        cache (see `blogjax.data.cache.cache_dir`).

    Returns:
      The folder of the prepared data set.

    Raises:
      ImportError: if the packages that write the data are not installed.
      OSError: if the folder cannot be written.

    >>> prepare().name
    '1.0.0'
    """
    root = _root(data_dir)
    folder = _folder(root)
    if _is_whole(root):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with cache.locked(root / f".{_NAME}.lock"):
        if _is_whole(root):  # another process has just finished
            return folder
        if folder.exists():
            print(f"blogjax: {folder} is damaged; preparing it anew", file=sys.stderr)
        for abandoned in root.glob(f".{_NAME}-*"):  # by a process that was killed while it wrote
            shutil.rmtree(abandoned)
        aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{_NAME}-", dir=root))
        try:
            _write(aside)
            if not _is_whole(aside):
                raise RuntimeError(f"the digits just written to {aside} cannot be read back")
            folder.parent.mkdir(exist_ok=True)
            if folder.exists():
                folder.rename(aside / "damaged")
            _folder(aside).rename(folder)
        finally:
            shutil.rmtree(aside)
    return folder


def builder(data_dir: str | os.PathLike[str] | None = None) -> Any:
    """Returns the TFDS builder `digits8`, for whoever wants more than arrays.

    Features: `image` uint8 `[8, 8, 1]` with grey levels 0 to 16, `label` a class of ten. Files are
    array_record, so `as_data_source` reads them without TensorFlow. Once prepared, TFDS finds the
    data set by its name, too: `tfds.data_source("digits8", split=..., data_dir=...)`.

    Args:
      data_dir: as in `prepare`, which is to be called first.

    Raises:
      ImportError: if tensorflow-datasets is not installed.

    >>> _ = prepare()
    >>> len(builder().as_data_source("train[:10%]"))
    129
    """
    return _builder_class()(data_dir=os.fspath(_root(data_dir)), file_format="array_record")


def _root(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    if data_dir is None:
        return cache.cache_dir("datasets")
    return pathlib.Path(data_dir).expanduser().absolute()


def _folder(root: pathlib.Path) -> pathlib.Path:
    return root / _NAME / VERSION


def _read(root: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Decoded images and labels of a split, or None where they are not what was written."""
    if not _folder(root).is_dir():
        return None
    _builder_class()  # a package that is missing is no damage
    try:
        prepared = builder(root)
        source = prepared.as_data_source(split=split)
        examples = source.__getitems__(list(range(len(source))))
        image = np.stack([example["image"] for example in examples])
        label = np.array([example["label"] for example in examples], np.int64)
        noted = prepared.info.metadata[split]
    except Exception:  # damage surfaces as whatever the layer that met it raises
        return None
    return (image, label) if _digest(image, label) == noted else None


def _is_whole(root: pathlib.Path) -> bool:
    return all(_read(root, split) is not None for split in SPLITS)


def _digest(image: np.ndarray, label: np.ndarray) -> str:
    """Of the decoded arrays: two preparations agree on these, but not on the bytes of the files."""
    shape = repr((image.shape, label.shape)).encode()
    return hashlib.sha256(shape + image.tobytes() + label.astype("<i8").tobytes()).hexdigest()


def _write(root: pathlib.Path) -> None:
    output = io.StringIO()  # TFDS prints and draws progress bars, and has no setting for the former
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        builder(root).download_and_prepare()


def _source_arrays() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed: pip install blogjax[train]"
        ) from error
    pixels, label = datasets.load_digits(return_X_y=True)
    image = np.asarray(pixels, np.uint8).reshape(-1, 8, 8, 1)
    label = np.asarray(label, np.int64)
    chosen = splits.stratified_split(label, SPLITS, seed=0)
    return {name: (image[rows], label[rows]) for name, rows in chosen.items()}


@functools.cache
def _builder_class() -> Any:
    """Defined on first use, because its base class is slow to import and optional to have."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "the digits are read through tensorflow-datasets, which is not installed: "
            "pip install blogjax[train]"
        ) from error

    # Not registered, so that to define it twice is no error: TFDS also finds what is prepared.
    class Digits8(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Handwritten digits of 8 x 8 pixels, stratified splits."""

        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="Handwritten digits of 8 x 8 pixels with grey levels 0 to 16.",
                homepage="https://archive.ics.uci.edu/dataset/80",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                        "label": tfds.features.ClassLabel(num_classes=10),
                    }
                ),
                supervised_keys=("image", "label"),
                disable_shuffling=True,  # the splits are shuffled already
                metadata=tfds.core.MetadataDict(),
            )

        def _split_generators(self, dl_manager):
            del dl_manager  # nothing to download
            arrays = _source_arrays()
            noted: Any = self.info.metadata
            for name, (image, label) in arrays.items():
                noted[name] = _digest(image, label)
            return {name: self._generate_examples(*pair) for name, pair in arrays.items()}

        def _generate_examples(self, image, label):
            for i, (pixels, digit) in enumerate(zip(image, label, strict=True)):
                yield i, {"image": pixels, "label": int(digit)}

    return Digits8
