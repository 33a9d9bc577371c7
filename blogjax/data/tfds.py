"""Any data set of TensorFlow Datasets, without TensorFlow: in memory, or streamed while training.

    train = tfds.batches("cifar10", "train[:90%]", 128, seed=0)
    test = tfds.evaluation_batches("cifar10", "test", 100)

Data lies where users of TFDS expect it: in `data_dir`, else in `$TFDS_DATA_DIR`, else in
`~/tensorflow_datasets`. (blogjax's own digits lie in `blogjax.data.cache`.) What was prepared on
another machine and copied there is found by its name, also where the code of its builder is not
installed. It must be stored as array_record, which is what `prepare` writes; the default of TFDS,
tfrecord, cannot be read one by one.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from blogjax.data import streaming, tfds_prepare
from blogjax.data.batches import Batches, EvaluationBatches
from blogjax.data.streaming import StreamedBatches, StreamedEvaluationBatches
from blogjax.data.tfds_prepare import DatasetUnavailableError as DatasetUnavailableError

Example = Mapping[str, Any]
Folder = str | os.PathLike[str] | None


@dataclasses.dataclass(frozen=True)
class Description:
    """What is known of a split without reading an example.

    Attributes:
      name: data set, configuration and version, as in "coco/2017:1.1.0".
      split: as it was asked for.
      num_examples: how many examples the split has.
      splits: name -> number of examples of all the splits there are.
      shapes: feature -> shape; None stands for sizes that vary. Names of nested features are
        joined, as in "objects/bbox".
      dtypes: feature -> dtype once decoded; object for text.
      num_classes: feature -> number of classes, for the features that are a class.
      folder: where the data lies.
    """

    name: str
    split: str
    num_examples: int
    splits: dict[str, int]
    shapes: dict[str, tuple[int | None, ...]]
    dtypes: dict[str, np.dtype]
    num_classes: dict[str, int]
    folder: pathlib.Path


class TfdsSource:
    """The examples of one split by number; made by `source`.

    `len(examples)`, `examples[i]` and `examples.__getitems__([i, j])`; safe to share by threads.
    Each example is a new dict. Numbers are arrays of the feature's dtype, classes int32, images
    uint8 `[height, width, channels]`; text is bytes, and nested features are what TFDS makes of
    them.

    Raises:
      IndexError: outside of 0 to `len() - 1`.
      DatasetUnavailableError: for a record that is damaged, with its number and the folder.
    """

    def __init__(
        self,
        records: Any,
        features: Any,
        names: Sequence[str],
        what: str,
        transform: Callable[[Example], Example] | None = None,
    ):
        self._records, self._features, self._what = records, features, what
        self._names, self._transform = list(names), transform
        self._dtypes = {}
        for name, feature in features.items():
            info = feature.get_tensor_info()
            if hasattr(feature, "num_classes"):
                self._dtypes[name] = np.dtype(np.int32)  # as everywhere here; TFDS has int64
            elif not isinstance(info, Mapping) and info.np_dtype not in (object, np.str_):
                self._dtypes[name] = np.dtype(info.np_dtype)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[Example]:
        indices = [int(index) for index in indices]
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"no example {index} among the {len(self)} of {self._what}")
        try:
            records = self._records.__getitems__(indices)
        except Exception:  # which one it is only shows when they are read one by one
            records = map(self._read, indices)
        return [self._decode(*pair) for pair in zip(indices, records, strict=True)]

    def _read(self, index: int) -> bytes:
        with self._told(index):
            return self._records[index]

    def _decode(self, index: int, record: bytes) -> Example:
        with self._told(index):
            decoded = self._features.deserialize_example_np(record)
            example = {name: decoded[name] for name in self._names if name in decoded}
            for name, dtype in self._dtypes.items():
                with contextlib.suppress(ValueError):  # ragged: stays a list
                    if example.get(name) is not None:
                        example[name] = np.asarray(example[name], dtype)
        if self._transform is None:
            return example
        try:
            return self._transform(example)
        except Exception as error:
            error.add_note(f"while transforming example {index} of {self._what}")
            raise

    @contextlib.contextmanager
    def _told(self, index: int):
        try:
            yield
        except Exception as error:
            raise DatasetUnavailableError(
                f"example {index} of {self._what} cannot be read: {error}"
            ) from error


def prepare(name: str, data_dir: Folder = None, *, timeout: float = 3.0) -> pathlib.Path:
    """Downloads and writes a data set, once; afterwards only finds it.

    TensorFlow is not needed, nor used where it is not installed: images are encoded by Pillow.
    Any number of processes may call this at once: one prepares, the others wait.

    Args:
      name: as TFDS names it: "cifar10", "coco/2017", "imagenet_resized/32x32:0.1.0".
      data_dir: see the top of this module.
      timeout: how many seconds the hosts may take to answer; all are asked at once.

    Returns:
      The folder of the version.

    Raises:
      ValueError: if there is no such data set, with the nearest names.
      DatasetUnavailableError: if it can neither be read nor prepared, with what to do elsewhere:
        no host that its builder has noted answers, downloading failed, it has to be downloaded by
        hand, its builder needs a package, or it is there in a form without random access.
      ImportError: if tensorflow-datasets is not installed.
      OSError: if the folder cannot be written.

    >>> from blogjax.data import cache, digits
    >>> digits.prepare() == prepare("digits8", cache.cache_dir("datasets"))
    True
    """
    root = tfds_prepare.root_folder(data_dir)
    return pathlib.Path(tfds_prepare.prepared_builder(name, root, timeout).data_dir)


def source(
    name: str,
    split: str,
    data_dir: Folder = None,
    *,
    features: Sequence[str] | None = None,
    transform: Callable[[Example], Example] | None = None,
) -> TfdsSource:
    """Returns the examples of a split by number, preparing the data set where that is not done.

    Args:
      name: as in `prepare`.
      split: a split of the data set, a part of one ("train[:90%]", "test[100:200]"), or a sum
        ("train+test").
      data_dir: as in `prepare`.
      features: what to decode; None for all there is.
      transform: example -> example, applied to what was decoded; for features that vary in size,
        for instance. It must depend on the example alone.

    Raises:
      ValueError: for an unknown split or feature, with those there are; else as `prepare`.
      DatasetUnavailableError: as `prepare`; if files of the split are missing.

    >>> from blogjax.data import cache, digits
    >>> _ = digits.prepare()
    >>> examples = source("digits8", "test[:50]", cache.cache_dir("datasets"))
    >>> len(examples), examples[7]["image"].shape, examples[7]["label"].dtype
    (50, (8, 8, 1), dtype('int32'))
    """
    builder, split_info = _split(name, split, data_dir)
    known = builder.info.features
    names = list(known) if features is None else list(features)
    unknown = [feature for feature in names if feature not in known]
    if unknown or not names:
        raise ValueError(f"no features {unknown} in {name}: there are {', '.join(sorted(known))}")
    for part in split_info.file_instructions:
        if not os.path.exists(part.filename):
            raise DatasetUnavailableError(
                f"{name} in {builder.data_dir} is not whole: {os.path.basename(part.filename)} is "
                "missing. Copy it again, or delete that folder to have it prepared anew"
            )
    tfds = tfds_prepare.import_tfds()
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return TfdsSource(
        builder.as_data_source(split, deserialize_method=raw),
        tfds.features.FeaturesDict({feature: known[feature] for feature in names}),
        names,
        f"{_full_name(builder)} [{split}] in {builder.data_dir}",
        transform,
    )


def load(
    name: str,
    split: str,
    data_dir: Folder = None,
    *,
    features: Sequence[str] | None = ("image", "label"),
    transform: Callable[[Example], Example] | None = None,
) -> dict[str, np.ndarray]:
    """Reads a split into memory.

    Arguments are those of `source`.

    Returns:
      feature -> `[n, ...]`, with images in uint8 and classes in int32.

    Raises:
      ValueError: if a feature is text or nested, or its shape varies, with the shapes; else as
        `source`.
      DatasetUnavailableError: as `source`.

    >>> from blogjax.data import cache, digits
    >>> _ = digits.prepare()
    >>> arrays = load("digits8", "test", cache.cache_dir("datasets"))
    >>> arrays["image"].shape, arrays["image"].dtype
    ((360, 8, 8, 1), dtype('uint8'))
    """
    examples = source(name, split, data_dir, features=features, transform=transform)
    return streaming.decode_all(examples)


def describe(name: str, split: str, data_dir: Folder = None) -> Description:
    """Says what a split holds without reading it, preparing the data set where that is not done.

    Arguments and errors are those of `source`.

    >>> from blogjax.data import cache, digits
    >>> _ = digits.prepare()
    >>> digits8 = describe("digits8", "train", cache.cache_dir("datasets"))
    >>> digits8.num_examples, digits8.shapes["image"], digits8.num_classes
    (1287, (8, 8, 1), {'label': 10})
    """
    builder, split_info = _split(name, split, data_dir)
    known = builder.info.features
    tensors = dict(_flat(known.get_tensor_info()))
    classes = {feature: getattr(known[feature], "num_classes", None) for feature in known}
    dtypes = {feature: np.dtype(info.np_dtype) for feature, info in tensors.items()}
    dtypes |= {feature: np.dtype(np.int32) for feature in classes if classes[feature] is not None}
    return Description(
        name=_full_name(builder),
        split=split,
        num_examples=split_info.num_examples,
        splits={each: info.num_examples for each, info in builder.info.splits.items()},
        shapes={feature: tuple(info.shape) for feature, info in tensors.items()},
        dtypes=dtypes,
        num_classes={each: count for each, count in classes.items() if count is not None},
        folder=pathlib.Path(builder.data_dir),
    )


def batches(
    name: str,
    split: str,
    batch_size: int,
    data_dir: Folder = None,
    *,
    seed: int,
    features: Sequence[str] | None = ("image", "label"),
    transform: Callable[[Example], Example] | None = None,
    in_memory: bool | None = None,
    max_bytes: int = 2**31,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
    ahead: int = 2,
) -> Batches | StreamedBatches:
    """Returns endless shuffled batches of a split, the same ones from memory and streamed.

    Args:
      name: as in `source`.
      split: as in `source`.
      batch_size: as in `blogjax.data.batches.Batches`.
      data_dir: as in `source`.
      seed: as in `Batches`.
      features: as in `source`.
      transform: as in `source`.
      in_memory: whether to decode the split into memory; None does so if it takes at most
        `max_bytes`, judged by its first example.
      max_bytes: see `in_memory`.
      process_index: as in `Batches`.
      process_count: as in `Batches`.
      threads, ahead: as in `blogjax.data.streaming.StreamedBatches`, if streamed.

    Raises:
      ValueError: as `load`, `Batches` and `StreamedBatches`.
      DatasetUnavailableError: as `source`.

    >>> from blogjax.data import cache, digits
    >>> _ = digits.prepare()
    >>> where = cache.cache_dir("datasets")
    >>> loaded, streamed = (
    ...     batches("digits8", "train", 64, where, seed=0, in_memory=way) for way in (True, False)
    ... )
    >>> np.array_equal(loaded(100)["image"], streamed(100)["image"])
    True
    """
    examples = source(name, split, data_dir, features=features, transform=transform)
    where: Any = {"seed": seed, "process_index": process_index, "process_count": process_count}
    if _fits(examples, in_memory, max_bytes):
        return Batches(streaming.decode_all(examples), batch_size, **where)
    return StreamedBatches(examples, batch_size, threads=threads, ahead=ahead, **where)


def evaluation_batches(
    name: str,
    split: str,
    batch_size: int,
    data_dir: Folder = None,
    *,
    features: Sequence[str] | None = ("image", "label"),
    transform: Callable[[Example], Example] | None = None,
    in_memory: bool | None = None,
    max_bytes: int = 2**31,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
    ahead: int = 2,
) -> EvaluationBatches | StreamedEvaluationBatches:
    """Returns every example of a split once, in order; arguments and errors are those of `batches`.

    >>> from blogjax.data import cache, digits
    >>> _ = digits.prepare()
    >>> test = evaluation_batches("digits8", "test", 100, cache.cache_dir("datasets"))
    >>> len(test), test(3)["weight"].sum()
    (4, np.float32(60.0))
    """
    examples = source(name, split, data_dir, features=features, transform=transform)
    where: Any = {"process_index": process_index, "process_count": process_count}
    if _fits(examples, in_memory, max_bytes):
        return EvaluationBatches(streaming.decode_all(examples), batch_size, **where)
    return StreamedEvaluationBatches(examples, batch_size, threads=threads, ahead=ahead, **where)


def _fits(examples: TfdsSource, in_memory: bool | None, max_bytes: int) -> bool:
    return streaming.nbytes(examples) <= max_bytes if in_memory is None else in_memory


def _split(name: str, split: str, data_dir: Folder) -> tuple[Any, Any]:
    """The builder of a data set that is on the disk, and what TFDS knows of a part of it."""
    builder = tfds_prepare.prepared_builder(name, tfds_prepare.root_folder(data_dir))
    splits = builder.info.splits
    reason = ""
    try:
        found = splits[split]
        if found.num_examples:
            return builder, found
    except (KeyError, ValueError, AssertionError) as error:
        if "[" in split:
            reason = f". {str(error).splitlines()[0]}"
    there = ", ".join(f"{each} ({info.num_examples})" for each, info in splits.items())
    raise ValueError(
        f"no examples in the split {split!r} of {name}: there are {there}, parts like "
        f"'train[:90%]' and sums like 'train+test'{reason}"
    )


def _full_name(builder: Any) -> str:
    config = builder.builder_config_name
    return f"{builder.name}{f'/{config}' if config else ''}:{builder.version}"


def _flat(tensors: Any, prefix: str = ""):
    for name, info in tensors.items():
        if isinstance(info, Mapping):
            yield from _flat(info, f"{prefix}{name}/")
        else:
            yield prefix + name, info
