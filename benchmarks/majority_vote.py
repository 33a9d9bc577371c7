"""Bytes on the wire: the majority vote beside the all-reduces it replaces, read from the HLO.

    python -m benchmarks.majority_vote [--parameters=50000000] [--devices=8]

Compiles, for virtual CPU devices, the exchange of one step for a tree of 12 leaves, and adds up
what its collectives move. A ring all-reduce of S bytes sends 2 (W - 1) / W S from each of W
devices, an all-gather or all-to-all (W - 1) / W S. The outcome is compared with numpy, entry by
entry. Times on virtual devices say what packing and counting cost, nothing of a network. Writes
benchmarks/results/majority_vote.json.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.machine import surroundings, write

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
WIDTH = 512
PARAMETERS, DEVICES = 50_000_000, 8


def main() -> None:
    """Compiles, checks, measures, prints and writes."""
    parser = argparse.ArgumentParser(description="Bytes sent by a majority vote.")
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument("--devices", type=int, default=DEVICES)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    from blogjax.optim.majority_vote import majority_vote

    tx = majority_vote("devices")
    vote = lambda u: tx.update(u, tx.init(u))[0]  # noqa: E731

    mean = lambda u: jax.lax.pmean(u, "devices")  # noqa: E731
    exchanges = {"float32 all-reduce": mean, "majority vote": vote}
    mesh = Mesh(np.array(jax.devices()[: options.devices]), ("devices",))
    updates = draw(options.parameters, options.devices, mesh)
    total = sum(x.size for x in updates.values()) // options.devices
    programs = {name: compile_for(f, mesh, updates) for name, f in exchanges.items()}
    wire = {}
    for name, program in programs.items():
        taken, also = moved(program.as_text())
        wire[name] = taken
        if also:  # the branch with the second bit
            wire[f"{name}, somebody abstains"] = also
    check(programs["majority vote"], updates)
    sent = {name: ring_bytes(moves, options.devices) for name, moves in wire.items()}
    times = measure(programs, updates, options.repeats)
    most = sent["float32 all-reduce"]
    print(f"{total:,} parameters, {options.devices} devices; sent by each device in a step")
    rows = {}
    for name, moves in wire.items():
        rows[name] = {
            "moved_by_collective": moves,
            "bytes_sent_by_a_device": sent[name],
            "bits_per_parameter": 8 * sent[name] / total,
            "fewer_than_float32": most / sent[name],
        }
        print(f"  {name:34} {sent[name] / 1e6:9.2f} MB  {most / sent[name]:6.2f} x fewer")
    for name, seconds in times.items():
        print(f"  {name:34} {1e3 * statistics.median(seconds):9.1f} ms on virtual devices")
    record = {
        "benchmark": "bytes that an exchange of updates sends, from the compiled program",
        "command": f"python -m benchmarks.majority_vote --parameters={options.parameters} "
        f"--devices={options.devices}",
        "parameters": total,
        "workers": options.devices,
        "exchanges": rows,
        "equal_to_numpy": True,
        "milliseconds_on_virtual_devices": {
            name: [1e3 * s for s in seconds] for name, seconds in times.items()
        },
        **surroundings(),
    }
    if (options.parameters, options.devices) == (PARAMETERS, DEVICES):
        write("majority_vote", record)
    else:
        print("another size than the published one: nothing is written")


def draw(parameters: int, devices: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Twelve leaves of normal numbers, without zeros, different on every device."""
    rows = max(parameters // (12 * WIDTH), 1)
    split = NamedSharding(mesh, PartitionSpec("devices"))

    def leaf(seed: int) -> jax.Array:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((devices, rows, WIDTH), np.float32)
        return jax.device_put(np.where(x == 0, np.float32(1), x), split)

    return {f"leaf_{i}": leaf(i) for i in range(12)}


def compile_for(function: Callable[[Any], Any], mesh: Mesh, updates: Any) -> Any:
    """The exchange as one program; each device gives its own rows and gets the outcome."""

    def exchange(own: Any) -> Any:
        return function(jax.tree.map(lambda x: x[0], own))

    mapped = jax.shard_map(
        exchange,
        mesh=mesh,
        in_specs=PartitionSpec("devices"),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return jax.jit(mapped).lower(updates).compile()


def moved(hlo: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that come out of the collectives, by kind.

    Returns:
      Of a run in which every conditional takes its first branch (False), and of one in which all
      take the other; the second is empty where there is no conditional.
    """
    parts = re.split(r"^(?=(?:ENTRY )?%[\w.-]+ )", hlo, flags=re.M)
    bodies = {m[1]: part for part in parts if (m := re.match(r"(?:ENTRY )?%([\w.-]+) ", part))}
    branches = re.findall(r"branch_computations=\{%([\w.-]+), %([\w.-]+)\}", hlo)
    branches += [(b, a) for a, b in re.findall(
        r"true_computation=%([\w.-]+), false_computation=%([\w.-]+)", hlo
    )]  # fmt: skip
    taken: list[dict[str, int]] = []
    for choice in (0, 1):
        left_out = {pair[1 - choice] for pair in branches}
        taken.append(_bytes("".join(body for name, body in bodies.items() if name not in left_out)))
    return taken[0], taken[1] if branches else {}


def _bytes(hlo: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for result, kind in re.findall(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", hlo):
        for dtype, shape in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", result):
            entries = int(np.prod([int(d) for d in shape.split(",") if d] or [1]))
            found[kind] = found.get(kind, 0) + entries * int(re.sub(r"\D", "", dtype)) // 8
    return found


def ring_bytes(moves: dict[str, int], devices: int) -> float:
    """What each device sends when the collectives run on a ring."""
    share = (devices - 1) / devices
    return sum(share * size * (2 if kind == "all-reduce" else 1) for kind, size in moves.items())


def check(program: Any, updates: dict[str, jax.Array]) -> None:
    """The outcome entry by entry.

    Raises:
      AssertionError: at the first leaf that is not the majority.
    """
    outcome = jax.device_get(program(updates))
    for name, own in updates.items():
        own = np.asarray(own)
        counted = np.sign(np.sign(own).sum(0))
        # Of a tie the device of this turn decides: of the first vote the first.
        np.testing.assert_array_equal(outcome[name], np.where(counted, counted, np.sign(own[0])))


def measure(programs: dict[str, Any], updates: Any, repeats: int) -> dict[str, list[float]]:
    """Seconds of each program, the repeats of all interleaved."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(updates))
            times[name].append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    main()
