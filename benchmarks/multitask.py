"""Many losses at once: the solve for the weights, and a whole step, beside TorchJD and others.

    python -m benchmarks.multitask [--repeats=9] [--solve-repeats=15] [--quick]

Solves (`multitask_solves`): the shortest vector in the convex hull of 2 to 32 gradients, seconds
and accuracy, beside a jitted no-op of the same shapes, Frank and Wolfe's iteration in numpy and
jitted, LibMTL's, TorchJD's, quadprog and scipy's SLSQP.
Steps (`multitask_steps`): 2, 8 and 32 tasks on an MLP and on the digits U-Net's encoder, beside K
separate backward passes in JAX and TorchJD in PyTorch (README.md: bench environment; what needs
PyTorch or quadprog is left out where it is not installed, and where JAX has a GPU).

Before a step is timed, losses and Gram matrix must agree with ours. A repeat measures everybody,
one after the other, in turning order; ratios are medians and quartiles over the repeats. On a CPU
everyone has two cores. `peak_bytes` are of temporaries and results: XLA's from the compiled
programs, PyTorch's the most that its tensors held at once.
Writes benchmarks/results/multitask.json, one entry for each kind of device; `--quick`, a look of
a minute or two at fewer tasks, writes nothing.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Mapping
from typing import Any

import jax

from benchmarks import multitask_solves as solves
from benchmarks import multitask_steps as steps
from benchmarks.machine import CORES, RESULTS, settle, surroundings, write
from benchmarks.peers.multitask_torch import MGDA, PACKAGES, UPGRAD, UPGRAD_ONE, Peers, peers

QUICK = (2, 8)  # tasks of a quick look
EXCESS = 1e-6  # targets: of the objective, in float32
DISPATCHES, AT = 10.0, 8  # a solve over a no-op's dispatch, for so many tasks
FASTER = 2.0  # times TorchJD
GROWTH = 1.1  # scan's peak, the greatest over the least by number of tasks
# What may differ between two implementations, relative to the norm.
APART = 1e-3


def case(model: str, tasks: int, repeats: int, others: Peers | None) -> dict[str, dict[str, Any]]:
    """One model and number of tasks: checks, measures, prints.

    Raises:
      SystemExit: if a contender computes something else.
    """
    losses, params, batch = steps.problem(model, tasks)
    players: dict[str, Any] = dict(steps.contenders(losses, params, batch))
    if others is not None:
        players |= others.load(model, params, batch, steps.CHANNELS, steps.RATE)
    found = steps.differences(players)
    for name, gap in found.items():
        if not gap <= APART:
            sys.exit(f"error: '{name}' does not compute what ours does: {gap} ({model}, {tasks})")
    table = steps.rows(players, steps.measure(players, repeats))
    for name, gap in found.items():
        table[name]["difference"] = float(f"{gap:.1e}")
    steps.show(f"{model}, {tasks} tasks", table)
    return table


def targets(
    solved: Mapping[int, Mapping[str, Any]], stepped: Mapping[tuple[str, int], Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What was to be reached, what was, and whether that is it."""
    found: dict[str, dict[str, Any]] = {}

    def put(name: str, target: float, value: float, most: bool) -> None:
        met = value <= target if most else value >= target
        found[name] = {"target": target, "found": value, "met": bool(met)}

    worst = max(table[solves.OURS]["greatest excess"] for table in solved.values())
    put("objective above the optimum, at most", EXCESS, worst, True)
    if AT in solved:
        dispatches = solved[AT][solves.OURS]["over a no-op"][0]
        put(f"a solve of {AT} tasks over a no-op, at most", DISPATCHES, dispatches, True)
    for (model, tasks), table in stepped.items():
        if MGDA in table:
            here = f"{model}, {tasks} tasks: times"
            put(f"{here} TorchJD MGDA, at least", FASTER, table[MGDA]["times ours"][0], False)
            best = min(table[name]["times ours"][0] for name in (UPGRAD, UPGRAD_ONE))
            put(f"{here} TorchJD UPGrad, the better of two, at least", FASTER, best, False)
    for model in dict.fromkeys(model for model, _ in stepped):
        peaks = [t[steps.SCAN]["peak_bytes"] for (m, _), t in stepped.items() if m == model]
        growth = round(max(peaks) / min(peaks), 3)
        put(f"{model}: scan's peak by tasks, greatest over least, at most", GROWTH, growth, True)
    return found


def main() -> None:
    """Checks, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--solve-repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="fewer tasks, nothing is written")
    options = parser.parse_args()
    load = settle()
    there = all(importlib.util.find_spec(name) for name in PACKAGES)
    with_torch = there and jax.default_backend() == "cpu"
    repeats = min(options.repeats, 2) if options.quick else options.repeats
    solve_repeats = min(options.solve_repeats, 3) if options.quick else options.solve_repeats
    solved: dict[int, dict[str, Any]] = {}
    stepped: dict[tuple[str, int], dict[str, Any]] = {}
    with peers(CORES) if with_torch else contextlib.nullcontext(None) as others:
        for tasks in QUICK if options.quick else solves.TASKS:
            solved[tasks] = solves.run(tasks, solve_repeats, others)
            solves.show(tasks, solved[tasks])
        for model in steps.MODELS:
            for tasks in QUICK if options.quick else steps.TASKS:
                stepped[model, tasks] = case(model, tasks, repeats, others)
    reached = targets(solved, stepped)
    for name, target in reached.items():
        print(f"{name} {target['target']:g}: found {target['found']:g}, met: {target['met']}")
    if options.quick:
        print("a quick look: nothing is written")
        return
    around = surroundings()
    if with_torch:
        around["versions"] |= {name: importlib.metadata.version(name) for name in PACKAGES}
    record = {
        "benchmark": "weights for K gradients, and a step with them: medians and quartiles of the "
        "repeats",
        "command": f"python -m benchmarks.multitask --repeats={options.repeats} "
        f"--solve-repeats={options.solve_repeats}",
        "PyTorch": "measured" if with_torch else "left out",
        "targets": reached,
        **{f"a solve, {tasks} tasks": table for tasks, table in solved.items()},
        **{f"a step, {m}, {tasks} tasks": table for (m, tasks), table in stepped.items()},
        "load before": load,
        **around,
    }
    path = RESULTS / "multitask.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    write("multitask", records | {around["devices"]: record})


if __name__ == "__main__":
    main()
