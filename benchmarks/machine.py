"""What a benchmark's figures were taken with."""

import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"
CORES = 2


def settle() -> float:
    """Binds this process to `CORES` cores and returns the load; warns where others are at work.

    To be called before anything is compiled: XLA takes all the cores it may run on.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) > CORES:
        os.sched_setaffinity(0, cores[:CORES])
    load = round(os.getloadavg()[0], 2)
    if load > 0.5:
        print(f"warning: other work is running here (load {load}), the figures will be wrong")
    return load


def surroundings(packages: Sequence[str] = ("jax", "jaxlib", "flax", "optax")) -> dict[str, Any]:
    """Machine and versions."""
    import jax

    devices = jax.devices()
    return {
        "machine": f"{os.cpu_count()} x {platform.machine()} cores, {platform.system()}",
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in packages},
        },
    }


def write(name: str, record: Mapping[str, Any]) -> pathlib.Path:
    """Writes `results/<name>.json`."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path
