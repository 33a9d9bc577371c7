"""Lion's update alone, on given gradients, beside optax.lion, optax.adamw and lion-pytorch.

    python -m benchmarks.lion_update [--repeats=11] [--steps=10] [--parameters=50000000]

50 million float32 parameters in 12 and in 1000 leaves; on a CPU everyone has two cores. Contenders:

  blogjax.lion          parameters and state donated; momentum in float32 or bfloat16
  optax.lion            the same, and once more without donation
  optax.adamw, sgd      `sgd` with momentum; its decay is decoupled, like everyone's
  lion-pytorch          eager and `foreach`, in a process of its own (README.md: bench environment;
                        left out where it is not installed, and where JAX has a GPU)
  triad                 x <- x / 2 + y in place in 12 leaves: the bandwidth that can be had

First all Lions must agree after one step and after three. Then a repeat measures all contenders,
one after the other, in turning order. Speeds are optax.lion's seconds over the contender's, GB/s
count the bytes that must be moved (`NEEDED`): both are medians over the repeats.
Writes benchmarks/results/lion_update.json, one entry for each kind of device, number of
parameters and value of XLA_FLAGS.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.machine import CORES, RESULTS, settle, surroundings, write
from benchmarks.peers.lion_process import EAGER, FOREACH, PACKAGES, peers
from blogjax.optim.lion import lion

CASES = (12, 1000)
LR, DECAY, BETAS = 1e-4, 1.0, (0.9, 0.99)
CHECKED = (1, 3)  # steps after which results are compared
LIMIT = 150.0  # seconds after which no further repeat of one case is begun

OURS, OURS16 = "blogjax.lion", "blogjax.lion, bf16 momentum"
OPTAX, OPTAX16 = "optax.lion", "optax.lion, bf16 momentum"
KEPT = "optax.lion, not donated"
ADAMW, SGD = "optax.adamw", "optax.sgd, momentum"
TRIAD, SAME = "triad", "triad, same leaves"

# Bytes per parameter: everything that is needed read once, everything that changes written once.
NEEDED = {OURS: 20, OURS16: 16, OPTAX: 20, OPTAX16: 16, KEPT: 20, ADAMW: 28, SGD: 20, TRIAD: 12,
          SAME: 12, EAGER: 20, FOREACH: 20}  # fmt: skip
SPEEDS = {12: 2.2, 1000: 2.0}  # targets, times optax.lion
SPEED16 = 1.5  # target with bf16 momentum, times optax.lion with the same
# What may differ between two Lions: the share of signs, where the two terms cancel and rounding
# decides (see `scale_by_lion`), and the rest relative to its greatest entry.
FLIPS = {"float32": 1e-5, "bfloat16": 5e-3}
APART = {"float32": 2.0**-21, "bfloat16": 2.0**-6}  # four units in the last place, and two

Leaves = list[Any]


def inputs(parameters: int, leaves: int) -> tuple[Leaves, Leaves]:
    """Parameters and gradients on the host, normal, in leaves of one size."""
    rng = np.random.default_rng(leaves)
    draw = functools.partial(rng.standard_normal, parameters // leaves, np.float32)
    return [np.float32(0.02) * draw() for _ in range(leaves)], [draw() for _ in range(leaves)]


def optimisers() -> dict[str, optax.GradientTransformation]:
    """The transformations, all with the same learning rate and decay."""
    bf16: dict[str, Any] = {"mu_dtype": jnp.bfloat16}
    rates: dict[str, Any] = {"b1": BETAS[0], "b2": BETAS[1], "weight_decay": DECAY}
    decay = optax.add_decayed_weights(DECAY)
    return {
        OURS: lion(LR, **rates),
        OURS16: lion(LR, **rates, **bf16),
        OPTAX: optax.lion(LR, **rates),
        OPTAX16: optax.lion(LR, **rates, **bf16),
        KEPT: optax.lion(LR, **rates),
        ADAMW: optax.adamw(LR, weight_decay=DECAY),
        SGD: optax.chain(optax.trace(0.9), decay, optax.scale_by_learning_rate(LR)),
    }


def _page_faults() -> int:
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return 0


def update(
    tx: optax.GradientTransformation | None, params: Leaves, state: Any, grads: Leaves
) -> tuple[Leaves, Any]:
    """What is compiled; without a transformation the triad."""
    if tx is None:
        return jax.tree.map(lambda x, y: 0.5 * x + y, params, grads), state
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state  # type: ignore


class Compiled:
    """A contender of JAX: one update of all leaves as one program, and what XLA says of it.

    Args:
      tx: None for the triad.
      params: start values on the host.
      grads: on the device, of the same shapes.
      donated: whether the program may overwrite parameters and state.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation | None,
        params: Leaves,
        grads: Leaves,
        donated: bool = True,
    ):
        self._tx, self._start, self._grads = tx, params, grads
        self.params, self.state = self._begin()
        jitted = jax.jit(functools.partial(update, tx), donate_argnums=(0, 1) if donated else ())
        began = time.perf_counter()
        self._program = jitted.lower(self.params, self.state, grads).compile()
        seconds = time.perf_counter() - began
        self.faults: list[float] = []
        self.facts = {**describe(self._program, params), "compile_seconds": round(seconds, 2)}

    def _begin(self) -> tuple[Leaves, Any]:
        params = [jnp.array(p) for p in self._start]
        return params, () if self._tx is None else self._tx.init(params)

    def after(self, steps: int) -> tuple[Leaves, Leaves]:
        """Parameters and momenta so many steps after the start; the gradients move on by a leaf."""
        self.params, self.state = self._begin()
        for turn in range(steps):
            grads = self._grads[turn:] + self._grads[:turn]
            self.params, self.state = self._program(self.params, self.state, grads)
        momenta = self.state[0].mu
        return [np.array(p) for p in self.params], [np.array(m, np.float32) for m in momenta]

    def seconds(self, steps: int) -> float:
        """Seconds per step."""
        params, state = self._program(self.params, self.state, self._grads)
        jax.block_until_ready((params, state))
        before, began = _page_faults(), time.perf_counter()
        for _ in range(steps):
            params, state = self._program(params, state, self._grads)
        jax.block_until_ready((params, state))
        seconds = (time.perf_counter() - began) / steps
        self.faults.append((_page_faults() - before) / steps)
        self.params, self.state = params, state
        return seconds


def describe(program: Any, params: Leaves) -> dict[str, Any]:
    """What XLA made: kernels over whole leaves, copies, temporaries and bytes per parameter."""
    text = program.as_text()
    results = re.findall(r"= (.*?) fusion\(", text)
    kernels = sum(f"[{params[0].size}]" in result for result in results)
    cost: Any = program.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    moved = cost.get("bytes accessed", 0) / sum(p.size for p in params)  # GPUs do not tell
    return {
        "kernels_per_leaf": round(kernels / len(params), 3),
        "copies": len(re.findall(r" copy(?:-start)?\(", text)),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        **({"bytes_per_parameter_xla": round(moved, 2)} if moved else {}),
    }


def compare(ours: Any, theirs: Any, steps: int, dtype: str) -> dict[str, float]:
    """How far two Lions are apart after so many steps.

    Raises:
      SystemExit: if they are not the same optimiser.
    """
    flips = size = 0
    apart, most = np.zeros(2), np.zeros(2)
    for p, m, q, n in zip(*ours, *theirs, strict=True):
        gap = np.abs(p - q)
        flipped = gap > LR / 2
        flips, size = flips + int(flipped.sum()), size + p.size
        apart = np.maximum(apart, [gap.max(where=~flipped, initial=0), np.abs(m - n).max()])
        most = np.maximum(most, [np.abs(p).max(), np.abs(m).max()])
    found = {
        "share of other signs": flips / (size * steps),
        "else greatest difference of parameters, of the greatest": float(apart[0] / most[0]),
        "greatest difference of momenta, of the greatest": float(apart[1] / most[1]),
    }
    limits = (FLIPS[dtype], APART["float32"], APART[dtype])
    if not all(f <= limit for f, limit in zip(found.values(), limits, strict=True)):
        sys.exit(f"error: these are not the same optimiser: {found}, at most {limits}")
    return found


def check(contenders: Mapping[str, Any]) -> dict[str, Any]:
    """Compares ours with all other Lions."""
    found = {}
    same = {OURS: (OPTAX, KEPT, EAGER, FOREACH), OURS16: (OPTAX16,)}
    for (ours, others), steps in itertools.product(same.items(), CHECKED):
        result = contenders[ours].after(steps)
        for other in (name for name in others if name in contenders):
            dtype = "bfloat16" if ours == OURS16 else "float32"
            theirs = contenders[other].after(steps)
            found[f"{other}, {steps} steps"] = compare(result, theirs, steps, dtype)
    return found


def measure(contenders: Mapping[str, Any], repeats: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step, by contender, one number per repeat; the order turns."""
    began, names = time.perf_counter(), list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeats):
        if i and time.perf_counter() - began > LIMIT:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(contenders[name].seconds(steps))
        shown = ", ".join(f"{n} {1e3 * seconds[n][-1]:.1f}" for n in (OURS, OPTAX, TRIAD))
        print(f"  {i + 1}/{repeats}, ms: {shown}", flush=True)
    return seconds


def spread(values: Sequence[float], digits: int) -> list[float]:
    """Median and quartiles."""
    return [round(float(q), digits) for q in np.quantile(values, [0.5, 0.25, 0.75])]


def ratios(seconds: Mapping[str, list[float]], over: str, under: str) -> list[float]:
    """Quotients of times, repeat for repeat."""
    return [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]


def row(
    name: str, contender: Any, seconds: Mapping[str, list[float]], parameters: int
) -> dict[str, Any]:
    """What was found about one contender."""
    needed = NEEDED[name] * parameters
    share = [NEEDED[name] / NEEDED[TRIAD] * r for r in ratios(seconds, TRIAD, name)]
    return {
        "ms": spread([1e3 * s for s in seconds[name]], 3),
        "speed": spread(ratios(seconds, OPTAX, name), 3),
        "bytes_per_parameter": NEEDED[name],
        "gigabytes_per_second": round(needed / statistics.median(seconds[name]) / 1e9, 2),
        "share_of_triad": spread(share, 3),
        **contender.facts,
        **({"page_faults": round(statistics.median(contender.faults))} if contender.faults else {}),
        "all_ms": [round(1e3 * s, 3) for s in seconds[name]],
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "ms": lambda r: "{:.2f} [{:.2f} {:.2f}]".format(*r["ms"]),
    "speed": lambda r: f"{r['speed'][0]:.2f}",
    "B/param": lambda r: str(r["bytes_per_parameter"]),
    "GB/s": lambda r: f"{r['gigabytes_per_second']:.1f}",
    "of triad": lambda r: f"{r['share_of_triad'][0]:.0%}",
    "kernels/leaf": lambda r: f"{r['kernels_per_leaf']:g}",
    "copies": lambda r: str(r["copies"]),
    "temp MB": lambda r: f"{r['temporary_bytes'] / 1e6:.1f}",
    "B/param, XLA": lambda r: f"{r['bytes_per_parameter_xla']:g}",
    "faults": lambda r: str(r["page_faults"]),
    "compile s": lambda r: f"{r['compile_seconds']:.2f}",
}


def show(rows: Mapping[str, dict[str, Any]]) -> None:
    """Prints the table."""

    def cell(column: str, found: dict[str, Any]) -> str:
        try:
            return COLUMNS[column](found)
        except KeyError:
            return "-"

    lines = [["", *COLUMNS], *([name, *(cell(c, r) for c in COLUMNS)] for name, r in rows.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print(
            line[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
        )


def run(leaves: int, options: argparse.Namespace, with_torch: bool) -> dict[str, Any]:
    """Everything about one number of leaves."""
    params, grads = inputs(options.parameters, leaves)
    on_device = [jnp.array(g) for g in grads]
    rates = {"lr": LR, "betas": BETAS, "weight_decay": DECAY}
    with peers(params, grads, rates, CORES) if with_torch else contextlib.nullcontext({}) as others:
        contenders: dict[str, Any] = {
            name: Compiled(tx, params, on_device, donated=name != KEPT)
            for name, tx in optimisers().items()
        }
        few, few_grads = inputs(options.parameters, CASES[0])
        contenders[TRIAD] = Compiled(None, few, [jnp.array(g) for g in few_grads])
        if leaves != CASES[0]:
            contenders[SAME] = Compiled(None, params, on_device)
        contenders |= others
        print(f"{leaves} leaves: compiled", flush=True)
        found = check(contenders)
        print(f"{leaves} leaves: all Lions agree", flush=True)
        seconds = measure(contenders, options.repeats, options.steps)
    count = sum(p.size for p in params)
    rows = {name: row(name, c, seconds, count) for name, c in contenders.items()}
    show(rows)
    beside16 = ratios(seconds, OPTAX16, OURS16)
    return {
        "repeats": len(seconds[OURS]),
        "greatest differences": found,
        "speed of bf16 momentum over optax.lion with bf16 momentum": spread(beside16, 3),
        "contenders": rows,
    }


def targets(cases: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """What was to be reached on a CPU and on a GPU, what was, and whether that is it."""
    gpu = jax.default_backend() == "gpu"
    found: dict[str, Any] = {}
    for leaves, case in cases.items():
        ours = case["contenders"][OURS]
        speed16 = case["speed of bf16 momentum over optax.lion with bf16 momentum"][0]
        kernels = ours["kernels_per_leaf"]
        for name, on_gpu, target, value in (
            ("times optax.lion, at least", False, SPEEDS[leaves], ours["speed"][0]),
            ("bf16 momentum, times optax.lion with the same, at least", False, SPEED16, speed16),
            ("temporary bytes, at most", False, 0, ours["temporary_bytes"]),
            ("copies, at most", gpu, 0, ours["copies"]),
            ("kernels per leaf on a GPU, at most", True, 1, kernels),
        ):
            met: Any = value >= target if name.endswith("least") else value <= target
            if on_gpu != gpu:
                value = met = "not measured"
            found[f"{leaves} leaves: {name}"] = {"target": target, "found": value, "met": met}
    return found


def main() -> None:
    """Checks, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--parameters", type=int, default=50_000_000)
    options = parser.parse_args()
    load = settle()
    there = all(importlib.util.find_spec(name.replace("-", "_")) for name in PACKAGES)
    with_torch = there and jax.default_backend() == "cpu"
    cases = {leaves: run(leaves, options, with_torch) for leaves in CASES}
    around, flags = surroundings(), os.environ.get("XLA_FLAGS", "")
    if with_torch:
        around["versions"] |= {name: importlib.metadata.version(name) for name in PACKAGES}
    given = f"XLA_FLAGS={flags} " if flags else ""
    record = {
        "benchmark": "one update of Lion: milliseconds, median and quartiles of the repeats; speed "
        "is optax.lion's time over the contender's",
        "command": f"{given}python -m benchmarks.lion_update --repeats={options.repeats} "
        f"--steps={options.steps} --parameters={options.parameters}",
        "targets": targets(cases),
        "lion-pytorch": "measured" if with_torch else "left out",
        **{f"{leaves} leaves": case for leaves, case in cases.items()},
        "load before": load,
        **around,
    }
    path = RESULTS / "lion_update.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    key = f"{around['devices']}, {options.parameters} parameters"
    records[f"{key}, {flags}" if flags else key] = record
    write("lion_update", records)
    for name, target in record["targets"].items():
        print(f"{name} {target['target']:g}: found {target['found']}, met: {target['met']}")


if __name__ == "__main__":
    main()
