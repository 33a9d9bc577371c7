"""The folder of a run: taken by one run at a time, shared by all of its processes."""

import contextlib
import fcntl
import json
import os
import pathlib
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any

from blogjax.train import distributed
from experiments.launch import processes

# A network file system may show a new file to other hosts only after a minute.
_SHARED_SECONDS = 90.0
# And it may keep the lock of a host that was lost until it has missed it for a while.
_LOCK_SECONDS = 120.0


class FolderError(RuntimeError):
    """The work folder cannot be used."""


@contextlib.contextmanager
def hold(workdir: pathlib.Path, overwrite: bool) -> Iterator[None]:
    """Makes the folder, makes sure that it can be written to, and that nobody else is in it."""
    with contextlib.ExitStack() as held:
        distributed.on_first(lambda: _take(workdir, overwrite, held))
        _check_shared(workdir)
        yield


def _take(workdir: pathlib.Path, overwrite: bool, held: contextlib.ExitStack) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise FolderError(f"cannot use {workdir} as a folder: it is a file")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with _lock(workdir) as lock:
            if overwrite and (workdir / "config.json").exists():
                number = 1
                while (aside := workdir.with_name(f"{workdir.name}.old{number}")).exists():
                    number += 1
                workdir.rename(aside)
                print(f"the older run is now {aside}")
                workdir.mkdir()
                lock.enter_context(_lock(workdir))
            probe = workdir / ".probe"
            probe.write_bytes(bytes(2**20))
            probe.unlink()
            # With what was entered, until the run is over.
            held.push(lock.pop_all())
    except OSError as error:
        raise FolderError(f"cannot write to {workdir}: {error}") from error


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[contextlib.ExitStack]:
    """Keeps other processes out of a folder; closes what is entered into the stack."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context((folder / ".lock").open("w"))
        deadline = time.monotonic() + (0.0 if processes.alone() else _LOCK_SECONDS)
        told = False
        while not _locked(file, folder):
            if time.monotonic() >= deadline:
                raise FolderError(f"another process is running in {folder}")
            if not told:
                print(f"another process is running in {folder}, or was lost: waiting", flush=True)
                told = True
            time.sleep(0.5)
        yield stack


def _locked(file: IO[str], folder: pathlib.Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems know no locks
        print(f"{folder} cannot be locked ({error}): see to it that no other run is in it")
    return True


def _check_shared(workdir: pathlib.Path) -> None:
    """Makes sure that what the first process writes is seen by all.

    Raises:
      FolderError: on all processes.
    """
    if processes.alone():
        return
    token = distributed.on_first(lambda: uuid.uuid4().hex)
    mark = workdir / f".shared-{token}"
    distributed.on_first(mark.touch)
    deadline = time.monotonic() + _SHARED_SECONDS
    # The list of names, for a network file system may remember for long that a name was not there.
    while not (seen := _sees(mark)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    (unseen,) = distributed.any_process(not seen)
    distributed.on_first(lambda: mark.unlink(missing_ok=True))
    if unseen:
        who = "another process does" if seen else "this process does"
        raise FolderError(f"{who} not see what process 0 writes to {workdir}; all must share it")


def _sees(mark: pathlib.Path) -> bool:
    try:
        return mark.name in os.listdir(mark.parent)
    except OSError:
        return False


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """One of the folder's own files; raises `FolderError` where it is damaged."""
    try:
        record = json.loads(path.read_text())
        if isinstance(record, dict):
            return record
    except ValueError:
        pass
    raise FolderError(f"{path} is damaged; delete it, or choose another --workdir")
