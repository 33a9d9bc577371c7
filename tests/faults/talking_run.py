"""Trains a small task and says what it is about to do, so that it can be killed there.

    python talking_run.py WORKDIR STEPS

Lines are `step`, `saving` and `evaluating`. Needs tests/conformance on the path.
"""

import pathlib
import sys

import jax
import numpy as np
import optax
from task_cases import CASES

from blogjax.train.checkpoint import Best, Checkpoints, fingerprints
from blogjax.train.loop import fit

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Saying:
    """Batches that name themselves when they are asked for."""

    def __init__(self, batches, word: str):
        self._batches, self._word = batches, word

    def __getattr__(self, name: str):
        return getattr(self._batches, name)

    def __len__(self) -> int:
        return len(self._batches)

    def __call__(self, step: int):
        print(self._word, flush=True)
        return self._batches(step)


def saving(save):
    def say_and_save(self, *args, **kwargs):
        print("saving", flush=True)
        return save(self, *args, **kwargs)

    return say_and_save


def main(workdir: str, steps: int) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    Checkpoints.save = saving(Checkpoints.save)
    case = CASES["noisy_regression"]
    state = fit(
        case.make(optax.adamw(0.01), None), Saying(case.batches(), "step"), steps,
        workdir=workdir, save_every=3, evaluation=Saying(case.evaluation(), "evaluating"),
        evaluate_every=4, best=Best("loss"), prefetch_depth=0,
    )  # fmt: skip
    np.save(pathlib.Path(workdir) / "final.npy", sorted(fingerprints(state).items()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
