"""What `fit` costs beside the steps it takes: its rate against that of a bare jitted step.

    python -m benchmarks.loop_overhead [--repeats=7] [--steps=150] [--batch_size=28]

The step is that of configs/ddpm.py, at a batch size that makes it about 20 ms long on two cores.
Bare: the same compiled step in a Python loop over one batch that lies on the device. `fit`: with
all that a run has, batches prepared in a thread, metrics of every step to metrics.jsonl and
TensorBoard, timings, the watch for compilations; without evaluations and checkpoints, whose number
is a matter of the config. Bare and `fit` alternate; the median of the ratios is given. Target: 3%.
Writes benchmarks/results/loop_overhead.json.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax

from benchmarks.machine import surroundings, write
from blogjax.data import digits
from blogjax.data.batches import Batches
from blogjax.train import mesh as meshes
from blogjax.train.compiled import compile_task
from blogjax.train.loop import fit
from blogjax.train.state import init_state
from configs.ddpm import get_config
from experiments.diffusion.model import build

TARGET = 1.03
SKIPPED = 10  # steps at the start that no rate counts


class Clocked:
    """Batches that note when they were asked for."""

    def __init__(self, batches: Batches):
        self.batch_size, self._batches = batches.batch_size, batches
        self.times: list[float] = []

    def __call__(self, step: int) -> Any:
        """The batch of a step."""
        self.times.append(time.perf_counter())
        return self._batches(step)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=28)
    options = parser.parse_args()
    config: Any = get_config()
    config.data.batch_size = options.batch_size
    data = digits.load("train")
    plan = build(config, data["image"].shape[1:], 10)
    batches = Batches(data, options.batch_size, seed=0)
    key = jax.device_put(jax.random.key(0), meshes.replicated(plan.mesh))
    compiled = compile_task(plan.task, plan.mesh)
    batch = meshes.put_batch(batches(0), plan.mesh)
    step = compiled.step.lower(compiled.abstract, batch, key).compile()

    def bare() -> float:
        state: Any = init_state(plan.task, compiled.abstract, plan.mesh, key)
        for _ in range(SKIPPED):
            state, _ = step(state, batch, key)
        jax.block_until_ready(state)
        began = time.perf_counter()
        for _ in range(options.steps):
            state, _ = step(state, batch, key)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / options.steps

    def looped(**how: Any) -> float:
        clocked = Clocked(batches)
        with tempfile.TemporaryDirectory() as folder:
            steps = options.steps + SKIPPED
            fit(plan.task, clocked, steps, mesh=plan.mesh, workdir=pathlib.Path(folder), **how)
        # Batches are asked for a constant number of steps ahead: between the calls lie the steps.
        return (clocked.times[-1] - clocked.times[SKIPPED]) / (len(clocked.times) - 1 - SKIPPED)

    kinds = {"log_every=1": {"log_every": 1}, "log_every=5": {"log_every": 5}}
    seconds: dict[str, list[float]] = {"bare": [], **{kind: [] for kind in kinds}}
    bare()
    looped()
    for _ in range(options.repeats):
        seconds["bare"].append(bare())
        for kind, how in kinds.items():
            seconds[kind].append(looped(**how))
        print({kind: f"{1000 * values[-1]:.2f} ms" for kind, values in seconds.items()}, flush=True)
    ratios = {
        kind: [a / b for a, b in zip(seconds[kind], seconds["bare"], strict=True)] for kind in kinds
    }
    record = {
        "benchmark": "seconds per step of fit over those of the bare compiled step",
        "command": f"python -m benchmarks.loop_overhead --repeats={options.repeats} "
        f"--steps={options.steps} --batch_size={options.batch_size}",
        "median_ratio": {kind: round(statistics.median(r), 4) for kind, r in ratios.items()},
        "target": TARGET,
        "median_ms": {k: round(1000 * statistics.median(v), 3) for k, v in seconds.items()},
        "ratios": {kind: [round(r, 4) for r in values] for kind, values in ratios.items()},
        **surroundings(),
    }
    write("loop_overhead", record)
    print(record["median_ratio"])


if __name__ == "__main__":
    main()
