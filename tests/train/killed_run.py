"""Trains a conformance case in a folder and, if told to, kills itself on the way.

    python killed_run.py WORKDIR STEPS [KILL_BEFORE_STEP]

Needs tests/conformance on the path.
"""

import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np
import optax
from task_cases import CASES

from blogjax.train.checkpoint import Best, fingerprints
from blogjax.train.loop import fit

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main(workdir: str, steps: int, kill_before: int | None) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    case = CASES["noisy_regression"]
    batches = case.batches()

    class Killing:
        batch_size = batches.batch_size

        def __call__(self, step: int):
            print(step, flush=True)
            if step == kill_before:
                deadline = time.monotonic() + 30
                while not saved.is_dir() and time.monotonic() < deadline:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            return batches(step)

    saved = pathlib.Path(workdir) / "checkpoints" / "2"
    state = fit(
        case.make(optax.adamw(0.01), None), Killing(), steps, workdir=workdir, save_every=2,
        evaluation=case.evaluation(), evaluate_every=2, render_every=4, best=Best("loss"),
        prefetch_depth=0,
    )  # fmt: skip
    np.save(pathlib.Path(workdir) / "final.npy", sorted(fingerprints(state).items()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
