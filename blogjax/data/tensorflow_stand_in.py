"""Answers for TensorFlow, where it is not installed, while TensorFlow Datasets prepares data.

Reading needs no TensorFlow, and to prepare data little of it is called: file functions, names of
dtypes, the encoder of PNG. These are plain Python, numpy and Pillow here. PNG is lossless, so
what is read later does not depend on who encoded it; JPEG is not, and is left to TensorFlow.
"""

import contextlib
import glob
import importlib
import importlib.util
import io
import os
import shutil
import threading
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

_in_use: list[Any] = []
_in_use_lock = threading.Lock()


class _Part(types.SimpleNamespace):
    """A part of the stand-in; what it lacks is told as the missing package it is."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"tensorflow is not installed, and its {name!r} is called")


class _NeverRaised(Exception):
    pass


@contextlib.contextmanager
def tensorflow_stand_in() -> Iterator[None]:
    """Where TensorFlow is not installed, answers what builders call of it while the block runs.

    Only tensorflow_datasets and its builders meet the stand-in; `import tensorflow` fails as ever.
    May be entered by several threads at once, and inside itself. A call that the stand-in does not
    know raises ImportError, with its name.

    >>> with tensorflow_stand_in():
    ...     from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow
    ...     tensorflow.io.gfile.exists("/")
    True
    """
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    gfile = _Part(
        GFile=open, exists=os.path.exists, isdir=os.path.isdir, listdir=os.listdir,
        glob=glob.glob, walk=os.walk, join=os.path.join, remove=os.remove, rename=os.rename,
        copy=shutil.copy, makedirs=lambda path: os.makedirs(path, exist_ok=True),
    )  # fmt: skip
    bits = [f"{kind}{n}" for kind in ("int", "uint", "float") for n in (8, 16, 32, 64)]
    tensorflow = _Part(
        **{name: getattr(np, name) for name in bits if name != "float8"},
        bool=np.bool_, string=np.object_,
        io=_Part(gfile=gfile),
        image=_Part(encode_png=_encode_png),
        compat=_Part(as_text=lambda text: text.decode() if isinstance(text, bytes) else text),
        errors=_Part(ResourceExhaustedError=_NeverRaised, UnimplementedError=_NeverRaised),
        executing_eagerly=lambda: True,
    )  # fmt: skip
    lazy = importlib.import_module("tensorflow_datasets.core.utils.lazy_imports_utils").tensorflow
    with _in_use_lock:
        _in_use.append(tensorflow)
        lazy.__dict__["_module"] = tensorflow  # where the module is kept, once it is imported
    try:
        yield
    finally:
        with _in_use_lock:
            _in_use.pop()
            if not _in_use:  # the last of those who use it at the same time
                lazy.__dict__.pop("_module", None)


def _encode_png(image: Any) -> Any:
    import PIL.Image

    pixels, file = np.asarray(image), io.BytesIO()
    PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return _Part(numpy=file.getvalue)
