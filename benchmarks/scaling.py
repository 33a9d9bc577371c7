"""Memory and communication of a step on 8 and 64 devices: by formula, and as XLA compiles it.

    python -m benchmarks.scaling [--keep]

Predicts from the shapes of the parameters what lies on a device and what it sends; compiles a
choice of the same steps for 8 virtual CPU devices, for shapes alone, and reads buffers and
collectives. Nothing is run. Writes benchmarks/results/scaling.json, after every compilation, and
the tables of docs/scaling.md. With `--keep` what the record already has is not compiled again: only
the formulas are evaluated, and the tables written anew.
"""

import argparse
import dataclasses
import json
import math
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import scaling_programs
from benchmarks.collectives import Collective, sent_by_kind
from benchmarks.machine import RESULTS, surroundings, write
from benchmarks.scaling_model import Layout, memory, traffic
from benchmarks.scaling_tables import document

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "scaling.md"
DEVICES = 8
LAYOUTS = [Layout(8, 1), Layout(1, 8), Layout(64, 1), Layout(8, 8), Layout(1, 64)]


class Case(NamedTuple):
    """A step to be compiled; `batch` is a share of the network's own."""

    network: str
    size: str
    precision: str
    optimizer: str
    layout: Layout
    batch: float = 1.0

    @property
    def key(self) -> dict[str, Any]:
        """By which the record knows it."""
        data, fsdp = self.layout
        return {**self._asdict(), "layout": f"{data} x {fsdp}"}


# A U-Net takes a minute or more to compile, a vote on it, or on a billion, several.
CASES = [
    Case("stack", "small", "float32", "adamw", Layout(8, 1)),
    Case("stack", "small", "float32", "lion", Layout(1, 8)),
    Case("stack", "small", "float32", "adamw", Layout(2, 4)),
    Case("stack", "small", "mixed", "lion", Layout(8, 1)),
    Case("stack", "small", "mixed", "adamw", Layout(1, 8)),
    Case("stack", "small", "bfloat16", "lion", Layout(1, 8)),
    Case("stack", "small", "float32", "lion", Layout(1, 8), 1 / 32),
    Case("stack", "small", "float32", "vote", Layout(8, 1)),
    Case("stack", "full", "float32", "adamw", Layout(8, 1)),
    Case("stack", "full", "float32", "adamw", Layout(8, 1), 0.5),
    Case("stack", "full", "float32", "adamw", Layout(1, 8)),
    Case("stack", "full", "float32", "adamw", Layout(1, 8), 0.5),
    Case("stack", "full", "float32", "lion", Layout(8, 1)),
    Case("stack", "full", "mixed", "lion", Layout(1, 8)),
    Case("stack", "full", "bfloat16", "lion", Layout(8, 1)),
    Case("ddpm", "full", "float32", "adamw", Layout(8, 1)),
    Case("ddpm", "full", "mixed", "adamw", Layout(1, 8)),
    Case("ddpm", "small", "float32", "adamw", Layout(8, 1)),
    Case("ddpm", "small", "float32", "adamw", Layout(2, 4)),
    Case("ddpm", "small", "bfloat16", "lion", Layout(1, 8)),
    Case("ddpm", "small", "float32", "vote", Layout(8, 1)),
]


def main() -> None:
    """Predicts, compiles, and writes record and tables."""
    parser = argparse.ArgumentParser(description="Memory and communication of a step.")
    parser.add_argument("--keep", action="store_true")
    keep = parser.parse_args().keep
    jax.config.update("jax_num_cpu_devices", DEVICES)
    path = RESULTS / "scaling.json"
    older = json.loads(path.read_text()) if keep and path.exists() else {}
    found = {json.dumps(entry["case"]): entry for entry in older.get("read", [])}
    record = {
        "benchmark": "memory and communication of a step, by formula and as compiled for a CPU",
        "command": "python -m benchmarks.scaling",
        "predicted": {name: predict(network) for name, network in scaling_programs.FULL.items()},
        "read": [],
        **surroundings(),
    }
    for case in CASES:
        key = json.dumps(case.key)
        if key not in found:
            found[key] = read(case)
            print(key, f"{found[key]['seconds']} s", flush=True)
        record["read"] = [entry for c in CASES if (entry := found.get(json.dumps(c.key)))]
        write("scaling", record)
    DOCUMENT.write_text(document(DOCUMENT.read_text(), record))
    print(f"tables written to {DOCUMENT.name}")


def predict(network: scaling_programs.Network) -> dict[str, Any]:
    """Bytes on a device and bytes sent in a step, for all layouts, dtypes and optimisers."""
    shapes = scaling_programs.parameter_shapes(network)
    ema = network.ema_decay is not None
    rows = []
    for layout in LAYOUTS:
        for precision in ("float32", "mixed", "bfloat16"):
            for optimizer in ("adamw", "lion") + (("vote",) if layout.fsdp == 1 else ()):
                rows.append({
                    "layout": f"{layout.data} x {layout.fsdp}",
                    "precision": precision,
                    "optimizer": optimizer,
                    "memory": memory(shapes, layout, precision, optimizer, ema=ema),
                    "sent": traffic(shapes, layout, precision, optimizer),
                    "sent_without_reduce_scatter": traffic(
                        shapes, layout, precision, optimizer, reduce_scatter=False
                    ),
                })  # fmt: skip
    return {
        "name": network.name,
        "parameters": sum(math.prod(shape) for shape in shapes),
        "leaves": len(shapes),
        "rows": rows,
    }


def read(case: Case) -> dict[str, Any]:
    """Compiles a step and puts what XLA says of it beside the formulas."""
    sizes = {"full": scaling_programs.FULL, "small": scaling_programs.SMALL}
    network = sizes[case.size][case.network]
    network = dataclasses.replace(network, batch=int(network.batch * case.batch))
    shapes = scaling_programs.parameter_shapes(network)
    step = scaling_programs.compile_step(network, case.precision, case.optimizer, case.layout)
    how = (shapes, case.layout, case.precision, case.optimizer)
    predicted = memory(*how, ema=network.ema_decay is not None)
    return {
        "case": case.key,
        "parameters": sum(math.prod(shape) for shape in shapes),
        "batch": network.batch,
        "predicted": {"memory": predicted, "sent": traffic(*how, reduce_scatter=False)},
        "memory": step.memory,
        "state": step.state,
        "partitioned": summary(step.partitioned),
        "compiled": summary(step.compiled),
        "seconds": step.seconds,
    }


def summary(found: Sequence[Collective]) -> dict[str, dict[str, float]]:
    """How many collectives of each kind a step meets, and the bytes they send."""
    numbers = Counter[str]()
    for collective in found:
        numbers[collective.kind] += collective.times
    sent = sent_by_kind(found)
    return {kind: {"number": n, "sent": sent[kind]} for kind, n in sorted(numbers.items())}


if __name__ == "__main__":
    main()
