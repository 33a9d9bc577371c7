"""The folder where prepared data is kept between runs, and a lock for those who write to it."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


def cache_dir(*parts: str) -> pathlib.Path:
    """Returns a folder below the cache of blogjax, made if it is missing.

    The cache is `$BLOGJAX_CACHE`, else `$XDG_CACHE_HOME/blogjax`, else `~/.cache/blogjax`; a
    variable that is set to nothing counts as unset. It is safe to delete at any time between runs.

    Args:
      *parts: names of folders below the cache, outermost first.

    Returns:
      An absolute path that exists.

    Raises:
      ValueError: if the parts lead out of the cache.
      OSError: if the folder cannot be made.

    >>> folder = cache_dir("datasets")
    >>> folder.is_dir(), folder.name
    (True, 'datasets')
    """
    if own := os.environ.get("BLOGJAX_CACHE"):
        root = pathlib.Path(own)
    elif shared := os.environ.get("XDG_CACHE_HOME"):
        root = pathlib.Path(shared, "blogjax")
    else:
        root = pathlib.Path("~", ".cache", "blogjax")
    root = root.expanduser().absolute()
    folder = root.joinpath(*parts)
    if ".." in folder.relative_to(folder.anchor).parts or not folder.is_relative_to(root):
        raise ValueError(f"the parts {parts} lead out of the cache {root}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds an exclusive lock between processes (and between threads) while the block runs.

    The lock belongs to the open file, so it goes with the process that held it, however that ends.
    The empty file stays: deleting it would let two holders lock two different files.

    Args:
      path: the lock file, made if it is missing; its folder must exist.

    Raises:
      OSError: if the file cannot be opened for writing.

    >>> with locked(cache_dir() / "example.lock"):
    ...     pass
    """
    import fcntl  # POSIX; imported here so that the rest of the package needs no lock to load

    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
