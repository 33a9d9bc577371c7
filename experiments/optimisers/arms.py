"""Runs of an experiment that compares several: each in its own folder, finished ones read back."""

import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from blogjax.train.loop import fit
from blogjax.train.task import Batches, Task
from experiments.launch.configs import check_loop
from experiments.launch.result import measured_once


def check_train(train: Any, steps: Mapping[str, int]) -> None:
    """Checks a `train` group of which each arm reads its own number of steps elsewhere.

    Args:
      train: with `seeds`, `log_every`, `save_seconds` and `on_nonfinite`.
      steps: how long the arms run, by the field that says so.

    Raises:
      ValueError: naming the field.
    """
    for name, value in steps.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    fields = {name: train[name] for name in ("seeds", "log_every", "save_seconds", "on_nonfinite")}
    shortest = min(steps.values())  # a profile must lie within every arm
    check_loop(ConfigDict({**fields, "steps": shortest, "evaluate_every": 1, "render_every": 1}))


def run_arm(
    folder: pathlib.Path,
    task: Task,
    batches: Batches,
    steps: int,
    train: Any,
    seed: int,
    measure: Callable[[Any], Mapping[str, Any]],
) -> dict[str, Any]:
    """Trains one arm and measures its last state; a finished arm is read back.

    Args:
      folder: the arm's own; an interrupted one goes on where it was.
      task, batches, steps, seed: as in `fit`.
      train: the config's group.
      measure: `measure(state) -> {name: number or list}`.

    Returns:
      What was measured, as JSON has it: NaN is None.
    """

    def train_and_measure() -> Mapping[str, Any]:
        print(f"\n{folder}", flush=True)
        state = fit(
            task,
            batches,
            steps,
            seed=seed,
            workdir=folder,
            log_every=train.log_every,
            save_seconds=train.save_seconds,
            on_nonfinite=train.on_nonfinite,
            verbose=True,
        )
        return measure(state)

    return measured_once(folder / "measured.json", train_and_measure)


def ratio(above: float | None, below: float | None) -> float:
    """A quotient of what was measured, NaN where either is missing or the divisor is 0.

    >>> ratio(3.0, 2.0), ratio(None, 2.0)
    (1.5, nan)
    """
    return math.nan if above is None or not below else above / below


def binned(keys: np.ndarray, values: np.ndarray, edges: Sequence[float]) -> list[float | None]:
    """Means of `values` by intervals `edges[i] <= key < edges[i + 1]`, None for empty ones.

    >>> binned(np.array([1, 1, 5]), np.array([1.0, 3.0, 7.0]), [1, 2, 4, 8])
    [2.0, None, 7.0]
    """
    if keys.shape != values.shape:
        raise ValueError(f"keys of shape {keys.shape} for values of shape {values.shape}")
    inside = [values[(keys >= a) & (keys < b)] for a, b in itertools.pairwise(edges)]
    return [float(part.mean()) if part.size else None for part in inside]
