"""The shortest vector in a convex hull: seconds and accuracy of a solve, by number of tasks.

Everyone is given the same float32 Gram matrices of float32 gradients, of six families, among them
singular ones, equal gradients, scales from 1e-3 to 1e3 and Pareto stationary points. Judged is
`|sum_i w_i g_i|^2` of the gradients in float64 above the optimum, relative to
max(optimum, 1e-3 mean_i |g_i|^2); the optimum is found in float64 by trying every set of tasks up
to 8 of them, by scipy's BVLS beyond.
"""

import importlib.util
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import lsq_linear

from benchmarks.lion_update import spread
from benchmarks.peers import min_norm_solvers as peers
from benchmarks.peers.multitask_torch import Peers
from blogjax.multitask.gram import gram
from blogjax.multitask.min_norm import min_norm_weights

TASKS = (2, 4, 8, 16, 32)
FAMILIES = ("normal", "low rank", "stationary", "conflicting", "scales", "equal")
JUDGED, TIMED = 8, 2  # matrices of each family
ENUMERATED = 8  # tasks up to which all sets are tried
ENOUGH = 0.01  # seconds of one measurement, at least

OURS, NO_OP = "blogjax.min_norm_weights", "jitted no-op"
INSIDE = "blogjax, inside a program"  # many in a row in one program: what a step pays
HANDED = "no-op on another thread"  # XLA hands over what it counts at 1000 operations or more
INSIDE_TURNS = 10
FRANK_WOLFE, JITTED = "Frank-Wolfe, numpy", "Frank-Wolfe, jitted"
LIBMTL = "LibMTL's iteration, numpy"
PROGRAM, REGULARISED = "quadprog", "quadprog, TorchJD's ridge"
SLSQP = "scipy SLSQP"
TORCHJD = "TorchJD's MGDA, PyTorch"

Solver = Callable[[Any], Any]


def family(name: str, tasks: int, rng: np.random.Generator) -> np.ndarray:
    """Gradients `[tasks, 2 tasks + 2]`, float32."""
    entries = 2 * tasks + 2
    g = rng.normal(size=(tasks, entries))
    if name == "low rank":
        rank = max(2, tasks // 3)
        g = rng.normal(size=(tasks, rank)) @ rng.normal(size=(rank, entries))
    elif name == "stationary":  # one is against a mean of the others
        g[-1] = -rng.dirichlet(np.ones(tasks - 1)) @ g[:-1]
    elif name == "conflicting":  # all against the first one
        first = 2 * rng.normal(size=entries)
        g = 0.3 * g - rng.uniform(0.1, 0.5, size=(tasks, 1)) * first
        g[0] = first
    elif name == "scales":
        g *= 10 ** rng.uniform(-3, 3, size=(tasks, 1))
    elif name == "equal":
        g = g[rng.integers(0, max(1, tasks // 2), size=tasks)]
    return g.astype(np.float32)


def families(tasks: int, each: int, seed: int) -> np.ndarray:
    """`[n, tasks, 2 tasks + 2]`."""
    rng = np.random.default_rng(seed)
    return np.stack([family(name, tasks, rng) for name in FAMILIES for _ in range(each)])


def objective(weights: np.ndarray, gradients: np.ndarray) -> float:
    """`|sum_i w_i g_i|^2` in float64, of what the weights are on the simplex."""
    w = np.maximum(np.asarray(weights, np.float64), 0)
    total = w.sum()
    u = (w / total if total > 0 else w + np.nan) @ gradients.astype(np.float64)
    return float(u @ u)


def optimum(gradients: np.ndarray) -> float:
    """The least objective.

    The least of `|G' x|^2 + (1' x - 1)^2` over `x >= 0` lies on the ray through the solution, and
    there is one even at a Pareto stationary point.
    """
    rows = np.unique(gradients.astype(np.float64), axis=0)
    g = rows / np.sqrt(np.square(rows).sum(1).mean())
    if len(rows) > ENUMERATED:
        system = np.vstack([g.T, np.ones(len(g))])
        wanted = np.append(np.zeros(g.shape[1]), 1.0)
        x = lsq_linear(system, wanted, (0, np.inf), "bvls", tol=1e-15, max_iter=2000).x
        return objective(x, rows)
    matrix, best = g @ g.T + 1, np.inf
    for size in range(1, len(rows) + 1):
        for chosen in map(list, itertools.combinations(range(len(rows)), size)):
            x = np.zeros(len(rows))
            x[chosen] = np.linalg.lstsq(matrix[np.ix_(chosen, chosen)], np.ones(size), 1e-13)[0]
            if (x >= 0).all():
                best = min(best, objective(x, rows))
    return best


def excess(weights: np.ndarray, gradients: np.ndarray, least: float) -> float:
    """Objective above the optimum, relative to max(optimum, 1e-3 of the mean square)."""
    square = np.square(gradients.astype(np.float64)).sum(1).mean()
    return (objective(weights, gradients) - least) / max(least, 1e-3 * square)


def frank_wolfe(matrix: jax.Array) -> jax.Array:
    """`min_norm_solvers.frank_wolfe` in JAX, but from equal weights."""
    vertices = jnp.eye(len(matrix), dtype=matrix.dtype)

    def body(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        w, count, _ = state
        products = matrix @ w
        i = jnp.argmin(products)
        a, b, c = w @ products, products[i], matrix[i, i]
        s = jnp.clip((c - b) / jnp.where(a + c > 2 * b, a + c - 2 * b, 1), 0, 1)
        moved = s * w + (1 - s) * vertices[i]
        return moved, count + 1, jnp.abs(moved - w).sum() < peers.STOP

    start = (jnp.full(len(matrix), 1 / len(matrix), matrix.dtype), 0, jnp.zeros((), bool))
    return jax.lax.while_loop(lambda s: ~s[2] & (s[1] < peers.ITERATIONS), body, start)[0]


def solvers() -> dict[str, Solver]:
    """By name; each from a Gram matrix to weights, waited for."""

    def compiled(function: Solver) -> Solver:
        jitted = jax.jit(function)
        return lambda matrix: jitted(matrix).block_until_ready()

    found: dict[str, Solver] = {
        OURS: compiled(min_norm_weights),
        NO_OP: compiled(lambda matrix: matrix[0]),
        HANDED: compiled(lambda matrix: matrix[0] + jnp.sum(matrix[0, 0] * jnp.arange(2048.0))),
        JITTED: compiled(frank_wolfe),
        FRANK_WOLFE: peers.frank_wolfe,
        LIBMTL: peers.projected_gradient,
        SLSQP: peers.slsqp,
    }
    if all(importlib.util.find_spec(name) for name in peers.PROGRAM_PACKAGES):
        found[PROGRAM] = peers.quadratic_program
        found[REGULARISED] = lambda m: peers.quadratic_program(m, peers.TORCHJD_RIDGE)
    return found


def score(found: Sequence[Any], gradients: np.ndarray, least: Sequence[float]) -> dict[str, Any]:
    """Accuracy of weights: the greatest and the middle excess, and how often there are none."""
    over = [excess(w, g, o) for w, g, o in zip(found, gradients, least, strict=True)]
    usable = [e for e in over if np.isfinite(e)]
    return {
        "greatest excess": float(f"{max(usable, default=np.inf):.2e}"),
        "median excess": float(f"{np.median(usable) if usable else np.inf:.2e}"),
        "failed": len(over) - len(usable),
    }


def seconds_per_solve(solve: Solver, matrices: Sequence[Any]) -> float:
    """Mean over the matrices, gone through as often as it takes to be long enough."""
    solve(matrices[0])
    began, turns = time.perf_counter(), 0
    while turns == 0 or time.perf_counter() - began < ENOUGH:
        for matrix in matrices:
            solve(matrix)
        turns += 1
    return (time.perf_counter() - began) / (turns * len(matrices))


def rows(
    seconds: Mapping[str, Sequence[float]], accuracy: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The table of one number of tasks; ratios repeat for repeat."""

    def over(name: str, base: str) -> list[float]:
        return spread([a / b for a, b in zip(seconds[name], seconds[base], strict=True)], 3)

    return {
        name: {
            "us": spread([1e6 * s for s in values], 2),
            "over a no-op": over(name, NO_OP),
            "times ours": over(name, OURS),
            **accuracy.get(name, {}),
        }
        for name, values in seconds.items()
    }


def run(tasks: int, repeats: int, others: Peers | None = None) -> dict[str, dict[str, Any]]:
    """Judges and measures everybody, one after the other, in turning order.

    Args:
      tasks: their number.
      repeats: of the measurements.
      others: PyTorch's process, if there is one.
    """
    gradients = families(tasks, JUDGED, seed=tasks)
    products = jax.jit(gram)
    matrices = [np.asarray(products(g)) for g in gradients]
    contenders = solvers()
    least = [optimum(g) for g in gradients]
    accuracy = {
        name: score([np.asarray(solve(m)) for m in matrices], gradients, least)
        for name, solve in contenders.items()
        if name not in (NO_OP, HANDED)
    }
    timed = [m for i, m in enumerate(matrices) if i % JUDGED < TIMED]
    on_device = [jax.device_put(m) for m in timed]
    many = jax.device_put(np.stack(timed * INSIDE_TURNS))
    mapped = jax.jit(lambda matrices: jax.lax.map(min_norm_weights, matrices))
    contenders[INSIDE] = lambda matrices: mapped(matrices).block_until_ready()
    names = list(contenders)
    if others is not None:
        names.append(TORCHJD)
        accuracy[TORCHJD] = score(others.solves(matrices, 0)[0], gradients, least)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name == TORCHJD and others is not None:
                seconds[name].append(others.solves(timed, 1)[1])
                continue
            if name == INSIDE:
                whole = seconds_per_solve(contenders[name], [many])
                seconds[name].append(whole / len(many))
                continue
            given = on_device if name in (OURS, NO_OP, HANDED, JITTED) else timed
            seconds[name].append(seconds_per_solve(contenders[name], given))
    return rows(seconds, accuracy)


def show(tasks: int, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints a table."""
    columns = ("us", "over a no-op", "times ours", "greatest excess", "median excess", "failed")
    print(f"{f'a solve, {tasks} tasks':34}" + "".join(f"{c:>17}" for c in columns))
    for name, found in table.items():
        cells = [found.get(c, "-") for c in columns]
        cells = [c[0] if isinstance(c, list) else c for c in cells]
        print(f"  {name:32}" + "".join(f"{c:>17}" for c in cells), flush=True)
