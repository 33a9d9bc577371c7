"""What a benchmark's figures were taken with."""

import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


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
