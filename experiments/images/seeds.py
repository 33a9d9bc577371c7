"""Runs of one model by several seeds, each in its own folder; finished ones are read back."""

import functools
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from blogjax.train.distributed import is_first
from experiments.launch.result import measured_once


def by_seed(
    seeds: Sequence[int], workdir: pathlib.Path, measure: Callable[[int, pathlib.Path], Any]
) -> tuple[dict[str, pathlib.Path], list[Any]]:
    """Trains and measures once for each seed.

    Args:
      seeds: different numbers.
      workdir: the folder of a single seed, and that of the seeds' folders if there are more.
      measure: `measure(seed, folder)`, what JSON can hold; not called for a seed that has been
        measured before.

    Returns:
      The folders, by the seed's name, and what was measured, in the order of the seeds.
    """
    folders = {f"seed {s}": workdir / f"seed{s}" if len(seeds) > 1 else workdir for s in seeds}
    measured = []
    for seed, folder in zip(seeds, folders.values(), strict=True):
        measured.append(
            measured_once(folder / "measured.json", functools.partial(measure, seed, folder))
        )
    return folders, measured


def copy_pictures(
    workdir: pathlib.Path, folders: Mapping[str, pathlib.Path], names: Iterable[str]
) -> None:
    """Puts the first seed's pictures in the run's folder, where it is not there already."""
    first = next(iter(folders.values()))
    if first != workdir and is_first():
        for name in names:
            shutil.copy(first / name, workdir / name)
