"""Memory and operations of the training step of configs/ddpm.py:cifar10, from XLA; nothing is run.

    python -m benchmarks.cifar10_program [--batch_size=128] [--dtype=float32]

The step is compiled for the devices at hand and for the shapes alone, so that a machine on which it
would not fit can tell as well. Writes benchmarks/results/cifar10_program.json, one entry for each
device, batch size and dtype.
"""

import argparse
import json
import time
from typing import Any

import jax

from benchmarks.machine import RESULTS, surroundings, write
from blogjax.train import mesh as meshes
from blogjax.train.compiled import compile_task
from blogjax.train.profiling import describe_program
from blogjax.train.state import sizes
from configs.ddpm import get_config
from experiments.diffusion.model import build


def main() -> None:
    """Compiles, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    config: Any = get_config("cifar10")
    config.data.batch_size = options.batch_size
    config.model.dtype = options.dtype
    plan = build(config, (32, 32, 3), 10)
    compiled = compile_task(plan.task, plan.mesh)
    split = meshes.batch_sharding(plan.mesh)
    shapes = {"image": ((32, 32, 3), "uint8"), "label": ((), "int32"), "row": ((), "int32"),
              "weight": ((), "float32")}  # fmt: skip
    batch = {
        name: jax.ShapeDtypeStruct((options.batch_size, *shape), dtype, sharding=split)
        for name, (shape, dtype) in shapes.items()
    }
    key = jax.device_put(jax.random.key(0), meshes.replicated(plan.mesh))
    began = time.perf_counter()
    program = compiled.step.lower(compiled.abstract, batch, key).compile()
    seconds = time.perf_counter() - began
    around = surroundings()
    entry = {
        "command": f"python -m benchmarks.cifar10_program --batch_size={options.batch_size} "
        f"--dtype={options.dtype}",
        "parameters": sizes(compiled.abstract)["params"].entries,
        "state_bytes": sum(s.bytes for s in sizes(compiled.abstract).values()),
        "step_on_each_device": describe_program(program),
        "compile_seconds": round(seconds, 1),
        **around,
    }
    path = RESULTS / "cifar10_program.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record[f"{around['devices']}, batch {options.batch_size}, {options.dtype}"] = entry
    write("cifar10_program", record)
    print(json.dumps(entry, indent=2))


if __name__ == "__main__":
    main()
