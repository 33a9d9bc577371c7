"""Parameters as a safetensors file for other programs, and such a file as parameters on any mesh.

The format: https://huggingface.co/docs/safetensors. A leaf's name is its path joined with dots, as
in PyTorch's state dicts and in the files that Hugging Face's Flax models write. The numpy interface
of the package is used: it neither needs a device nor PyTorch, for bfloat16 either.
"""

import os
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from blogjax.train.checkpoint import layout_differences
from blogjax.train.distributed import fetch, on_first
from blogjax.train.mesh import sharding_of

__all__ = ["export_safetensors", "import_safetensors"]

# By the names of the format. Its float8 kinds cannot be read into numpy arrays by the package.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64",
    "C64": "complex64",
}  # fmt: skip
ARRAYS = (jax.Array, np.ndarray, np.generic)


def export_safetensors(
    path: str | os.PathLike[str], params: Any, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a tree of arrays, bit for bit.

    The file appears under its name when it is complete; one that was there is replaced. Arrays are
    gathered one by one from wherever their parts lie. Of several processes, all must call it, and
    the first one writes.

    Args:
      path: ends in `.safetensors` by convention; its folder is made if absent.
      params: tree of arrays. Lists and tuples count as dicts with the keys 0, 1, ...
      metadata: texts about the file, kept in its header. Hugging Face's loaders ask for a
        `format`; `{"format": "flax"}` fits parameters in Flax's layout.

    Raises:
      ValueError: if there are no leaves; if one, which is named, is no array, of a dtype that the
        file cannot hold (random keys, float8), or called as another; if a key is empty or has a
        dot in it; if a text of `metadata` is none.
      OSError: if the file cannot be written; one that was there is as it was.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> export_safetensors(path, {"dense": {"kernel": jax.numpy.ones((2, 3), "bfloat16")}})
    >>> import_safetensors(path)["dense"]["kernel"].shape
    (2, 3)
    """
    named = _named(params, "params", ARRAYS)
    for name, leaf in named.items():
        if leaf.dtype.name not in DTYPES.values():
            raise ValueError(f"{name} is {leaf.dtype}, which the file cannot hold")
    for key, text in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise ValueError(f"metadata must map texts to texts, got {key!r}: {text!r}")
    # One by one: put together, the whole arrays might not fit onto one device. The package takes
    # the memory as it lies, whatever the strides.
    arrays = {name: np.asarray(fetch(leaf), order="C") for name, leaf in named.items()}
    on_first(lambda: _write(pathlib.Path(path).absolute(), arrays, dict(metadata or {})))


def import_safetensors(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Reads the parameters of a file, whoever wrote it.

    The file says what it holds and how long it is, but carries no checksum: a truncated one is
    found, a changed number is not.

    Args:
      path: the file. Its metadata are `safetensors.safe_open(path, "numpy").metadata()`.
      like: tree of arrays, or of `ShapeDtypeStruct`, on any mesh, with the leaves of the file.
        None takes whatever there is.

    Returns:
      A tree like `like`, whose arrays lie where the leaves of `like` do, on the first device where
      these do not say it. Without `like`: nested dicts of numpy arrays, their keys split at dots.

    Raises:
      ValueError: if the file is not whole; if names, shapes or dtypes differ from those of `like`,
        naming both sides; if a dtype is not of numpy's or of JAX's as it is set; if a name is both
        that of a leaf and of a node.
      FileNotFoundError: if there is none.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> export_safetensors(path, {"head": [np.arange(3.0)]})
    >>> import_safetensors(path)
    {'head': {'0': array([0., 1., 2.])}}
    >>> like = {"head": [jax.ShapeDtypeStruct((4,), "float32")]}
    >>> import_safetensors(path, like)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: .../model.safetensors does not fit the tree:
      head.0: float64[3] in the file, float32[4] in the tree
    """
    path = pathlib.Path(path).absolute()
    with _opened(path) as file:
        layout = {name: _layout(path, file, name) for name in sorted(file.keys())}
        if like is None:
            return _nested(path, {name: file.get_tensor(name) for name in layout})
        wanted = _named(like, "like", (*ARRAYS, jax.ShapeDtypeStruct))
        asked = {name: [[*leaf.shape], str(leaf.dtype)] for name, leaf in wanted.items()}
        if layout != asked:
            lines = layout_differences(layout, asked, ("file", "tree"))
            raise ValueError(f"{path} does not fit the tree:\n{lines}")
        read = [_placed(name, file.get_tensor(name), leaf) for name, leaf in wanted.items()]
    return jax.tree.structure(like).unflatten(read)


def _named(tree: Any, what: str, kinds: tuple[type, ...]) -> dict[str, Any]:
    named = {}
    for entries, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = [jax.tree_util.keystr((entry,), simple=True) for entry in entries]
        name = ".".join(keys)
        if not keys or not all(keys) or any("." in key for key in keys):
            raise ValueError(
                f"a leaf's keys become its name, joined with dots: they must be there, not empty "
                f"and without dots; got {keys} in {what}"
            )
        if name == "__metadata__":
            raise ValueError(f"{name} in {what} is a name that the format keeps for itself")
        if name in named:
            raise ValueError(f"two leaves of {what} have the name {name}")
        if not isinstance(leaf, kinds):
            raise ValueError(f"{name} in {what} is no array but {type(leaf).__name__}")
        named[name] = leaf
    if not named:
        raise ValueError(f"{what} has no leaves")
    return named


def _write(path: pathlib.Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(arrays, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"could not write {path}: {error}") from error
        temporary.chmod(mode)  # the package's files are for their owner alone
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a safetensors file")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def _layout(path: pathlib.Path, file: Any, name: str) -> list[Any]:
    part = file.get_slice(name)
    if part.get_dtype() not in DTYPES:
        raise ValueError(f"{name} in {path} is {part.get_dtype()}, which numpy does not have")
    return [list(part.get_shape()), DTYPES[part.get_dtype()]]


def _nested(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():  # sorted: a leaf comes before what would lie below it
        *above, last = name.split(".")
        node = tree
        for n, key in enumerate(above, 1):
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                leaf = ".".join(above[:n])
                raise ValueError(f"{path} has {leaf} and {name}: no tree has both")
        node[last] = array
    return tree


def _placed(name: str, value: np.ndarray, leaf: Any) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        raise ValueError(f"{name} is {value.dtype}, which needs jax.config.jax_enable_x64")
    # Each process puts its own parts; `device_put` would compare the values of all.
    return jax.make_array_from_callback(
        value.shape, sharding_of(leaf), lambda index: np.asarray(value[index])
    )
