"""Runs of one model by several seeds, each in its own folder; finished ones are read back."""

import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.launch.result import write_json


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
        stored = folder / "measured.json"
        if not stored.exists():
            write_json(stored, measure(seed, folder))
        measured.append(json.loads(stored.read_text()))
    return folders, measured


def copy_pictures(
    workdir: pathlib.Path, folders: Mapping[str, pathlib.Path], names: Iterable[str]
) -> None:
    """Puts the first seed's pictures in the run's folder, where it is not there already."""
    first = next(iter(folders.values()))
    if first != workdir:
        for name in names:
            shutil.copy(first / name, workdir / name)
