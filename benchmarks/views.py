"""The losses of one run in the three views: jit, pmap and shard_map, side by side.

    python -m benchmarks.views

The smoke config of configs/ddpm.py on eight virtual CPU devices, with SGD: Adam would hide a wrong
scale of the gradients. Writes benchmarks/results/views.json.
"""

import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.machine import surroundings, write

VIEWS = ("jit", "pmap", "shard_map")


def main() -> None:
    """Trains, prints and writes."""
    jax.config.update("jax_num_cpu_devices", 8)
    from blogjax.train.reporting import read_metrics
    from configs.ddpm import get_config
    from experiments import ddpm
    from experiments.diffusion import model
    from experiments.images import dataset

    model.make_optimizer = lambda optim, steps: optax.sgd(1e-3)
    losses = {}
    for view in VIEWS:
        config: Any = get_config("smoke")
        config.mesh.view = view
        data = dataset.open_images(config.data)
        plan = model.build(config, data.shape, data.num_classes)
        with tempfile.TemporaryDirectory() as folder:
            ddpm.train(plan, config, 0, data, pathlib.Path(folder))
            losses[view] = read_metrics(pathlib.Path(folder) / "metrics.jsonl", "train")["loss"]
    print("step  " + "  ".join(f"{view:>12}" for view in VIEWS))
    for i, row in enumerate(zip(*losses.values(), strict=True)):
        print(f"{i + 1:4d}  " + "  ".join(f"{x:12.7f}" for x in row))
    difference = {v: float(np.max(np.abs(losses[v] / losses["jit"] - 1))) for v in VIEWS[1:]}
    print("largest relative difference to jit:", difference)
    record = {
        "benchmark": "training losses of configs/ddpm.py:smoke with SGD(1e-3)",
        "command": "python -m benchmarks.views",
        "losses": {view: values.tolist() for view, values in losses.items()},
        "largest_relative_difference_to_jit": difference,
        **surroundings(),
    }
    write("views", record)


if __name__ == "__main__":
    main()
