"""The source of the running Python's standard library, as bytes: text that is always at hand.

A corpus for byte-level language models of some 9 MB: 256 tokens, nothing to download and nothing
to tokenize. For next-byte prediction with a context of `c` bytes, every byte being a target once:

    batches = Batches({"tokens": windows(load("train"), c + 1, stride=c)}, batch_size, seed=0)
    tokens = batches(step)["tokens"].astype(np.int32)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

The corpus differs between Python versions, so a result belongs to one `fingerprint`. With the
library of CPython 3.11.7, whose fingerprint starts with `3.11.7-748b48d3`, it is

    train       536 files, 8 829 631 bytes
    validation   35 files,   572 058 bytes
    test         35 files,   506 910 bytes

and all three are read within 0.1 s, so nothing is cached.

In it is every `.py` file below the library's folder that is not empty, valid UTF-8 and free of
the byte 0. Left out are

- tests (`test`, `tests`, `idle_test`): about twice the size of the library, and of another kind;
- what is installed beside the library: `site-packages`, `dist-packages` and whatever else no
  `import` can name, such as `config-3.11-x86_64-linux-gnu`;
- what is written for one machine: `_sysconfigdata*`, `sitecustomize*`, `usercustomize*`;
- tables rather than programs: `pydoc_data`, 0.8 MB of generated help, and `encodings`, where 96 of
  122 files follow two templates: one split would hold the answers to the others.
"""

import hashlib
import operator
import os
import pathlib
import platform
import sysconfig

import numpy as np

SPLITS = ("train", "validation", "test")
SEPARATOR = 0

_OTHER_FOLDERS = {"__pycache__", "encodings", "idle_test", "pydoc_data", "test", "tests"}
_OTHER_MODULES = ("_sysconfigdata", "sitecustomize", "usercustomize")


def load(split: str, root: str | os.PathLike[str] | None = None) -> np.ndarray:
    """Returns one split as one run of bytes.

    The files follow each other in the order of `files`, with one `SEPARATOR` between two of them
    (none before the first or after the last). It is the byte 0, which occurs in no Python source:
    a model may take it for the start of a file, and prompt with it.

    Args:
      split: "train", "validation" or "test".
      root: as in `files`.

    Returns:
      uint8 `[n]`, read-only. Cast it before doing arithmetic: uint8 wraps around.

    Raises:
      ValueError: as in `files`.
      FileNotFoundError: as in `files`.

    >>> corpus = load("validation")
    >>> corpus.dtype, len(corpus) > 100_000
    (dtype('uint8'), True)
    """
    return np.frombuffer(bytes([SEPARATOR]).join(files(split, root).values()), np.uint8)


def files(split: str, root: str | os.PathLike[str] | None = None) -> dict[str, bytes]:
    """Returns the source files of one split, for whoever needs to know where each one ends.

    A file's split hangs on its relative path alone: with `h` the SHA-256 of the path, read as one
    big-endian integer, `h mod 20` is 0 for validation, 1 for test and anything else for train. So
    a file that comes or goes moves no other, and a file is in the same split under every Python
    version. That is 90, 5 and 5 percent of the files; of the bytes only roughly.

    Args:
      split: "train", "validation" or "test".
      root: the folder to read instead of the standard library's.

    Returns:
      Path below the root, with forward slashes -> content as it is on the disk, sorted by path (by
      code points of the whole path). A small tree may leave a split empty.

    Raises:
      ValueError: if there is no such split.
      FileNotFoundError: if the folder is missing or holds no `.py` file for any split, as where the
        standard library is packed into an archive or installed without its source.
      OSError: if a folder or file cannot be read.

    >>> sources = files("test")
    >>> all(path.endswith(".py") for path in sources), list(sources) == sorted(sources)
    (True, True)
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r} of the Python source: there are {', '.join(SPLITS)}")
    folder = pathlib.Path(sysconfig.get_path("stdlib") if root is None else root)
    paths = _paths(folder) if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(
            f"no Python source in {folder}: this Python's standard library is packed or stripped; "
            "a Python installed with its library as .py files has it"
            if root is None
            else f"no Python source in {folder}"
        )
    content = {path: (folder / path).read_bytes() for path in paths if _split_of(path) == split}
    return {path: source for path, source in content.items() if _is_text(source)}


def windows(corpus: np.ndarray, length: int, stride: int | None = None) -> np.ndarray:
    """Cuts a corpus into rows of equal length, as a view: however they overlap, nothing is copied.

    Row `i` is `corpus[i * stride : i * stride + length]`. What is left at the end and does not
    fill a row is dropped. Rows run across the files' borders.

    A model of the next byte with a context of `c` needs rows of `c + 1`, their first `c` bytes as
    input and their last `c` as targets; with `stride=c` each byte but the corpus's first is a
    target exactly once (short of the dropped end). With `stride=1` every offset is a row.

    Args:
      corpus: `[m]`, of any dtype.
      length: bytes of a row, at least 1.
      stride: from one row's start to the next one's, at least 1; None for `length`, which makes
        the rows disjoint.

    Returns:
      `[(m - length) // stride + 1, length]`, the corpus's dtype; read-only and sharing its memory.
      Fit for `blogjax.data.batches.Batches`, which copies the rows of one batch at a time.

    Raises:
      ValueError: if the corpus has another rank than 1 or is shorter than one row, or if the
        length or stride is less than 1.

    >>> windows(np.arange(8), 4, stride=3)
    array([[0, 1, 2, 3],
           [3, 4, 5, 6]])
    """
    length = operator.index(length)
    stride = length if stride is None else operator.index(stride)
    if corpus.ndim != 1:
        raise ValueError(f"the corpus has shape {corpus.shape}, but a run of bytes is [m]")
    if length < 1 or stride < 1:
        raise ValueError(f"length {length} and stride {stride} must both be at least 1")
    if len(corpus) < length:
        raise ValueError(f"a corpus of {len(corpus)} bytes holds no window of length {length}")
    return np.lib.stride_tricks.sliding_window_view(corpus, length)[::stride]


def fingerprint(root: str | os.PathLike[str] | None = None) -> str:
    """Names the corpus, to be written beside every number that was measured on it.

    Args:
      root: as in `files`.

    Returns:
      The Python version, a hyphen and 64 hexadecimal digits: the SHA-256 over, for the three
      splits in order, a line with the split's name and size in bytes, then its bytes.

    Raises:
      FileNotFoundError: as in `files`.

    >>> version, digest = fingerprint().split("-")
    >>> len(digest)
    64
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        corpus = load(split, root)
        digest.update(f"{split} {len(corpus)}\n".encode())
        digest.update(corpus.tobytes())
    return f"{platform.python_version()}-{digest.hexdigest()}"


def _paths(root: pathlib.Path) -> list[str]:
    """Relative paths of the candidates, sorted; folders that are left out are not entered."""
    paths = []
    for folder, below, names in os.walk(root, onerror=_refuse):
        below[:] = [name for name in below if name.isidentifier() and name not in _OTHER_FOLDERS]
        for name in names:
            stem, _, ending = name.partition(".")
            if ending == "py" and stem.isidentifier() and not stem.startswith(_OTHER_MODULES):
                paths.append(pathlib.Path(folder, name).relative_to(root).as_posix())
    return sorted(paths)


def _refuse(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that cannot be read


def _split_of(path: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest(), "big") % 20
    return {0: "validation", 1: "test"}.get(bucket, "train")


def _is_text(source: bytes) -> bool:
    if not source or SEPARATOR in source:
        return False
    try:
        source.decode()
    except UnicodeDecodeError:
        return False
    return True
