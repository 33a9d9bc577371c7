"""Families of task gradients; optima in float64 by other people's solvers and by enumeration."""

import itertools

import jax
import numpy as np
from scipy.optimize import lsq_linear, minimize

FAMILIES = ("normal", "low rank", "stationary", "conflicting", "scales", "duplicates")


def family(name, tasks, rng):
    """Float32 gradients `[tasks, 2 tasks + 2]`."""
    d = 2 * tasks + 2
    g = rng.normal(size=(tasks, d))
    if name == "low rank":
        rank = max(2, tasks // 3)
        g = rng.normal(size=(tasks, rank)) @ rng.normal(size=(rank, d))
    elif name == "stationary":
        g[-1] = -rng.dirichlet(np.ones(tasks - 1)) @ g[:-1]
    elif name == "conflicting":  # all with the first one
        first = rng.normal(size=d)
        g = 0.3 * g - rng.uniform(0.2, 1, size=(tasks, 1)) * first
        g[0] = 2 * first
    elif name == "scales":
        g *= 10 ** rng.uniform(-3, 3, size=(tasks, 1))
    elif name == "duplicates":
        g = g[rng.integers(0, max(1, tasks // 2), size=tasks)]
    return g.astype(np.float32)


def many(tasks, each, seed=0):
    """`each` of every family, `[n, tasks, d]` float32."""
    rng = np.random.default_rng(seed)
    return np.stack([family(name, tasks, rng) for name in FAMILIES for _ in range(each)])


def in_batches_of(size, function):
    """`function` of arrays `[n, ...]` for any n up to `size`, so that it compiles once."""

    def padded(*arrays):
        full = [np.resize(x, (size, *np.shape(x)[1:])) for x in map(np.asarray, arrays)]
        return jax.tree.map(lambda x: np.asarray(x)[: len(arrays[0])], function(*full))

    return padded


def gram64(gradients):
    g = np.asarray(gradients, np.float64)
    return g @ g.swapaxes(-1, -2)


def objective(weights, gradients):
    """`|sum_i w_i g_i|^2` in float64, `[n]`."""
    u = np.einsum("nk,nkd->nd", np.asarray(weights, np.float64), np.asarray(gradients, np.float64))
    return np.einsum("nd,nd->n", u, u)


def excess(weights, gradients, optimum):
    """Objective above the optimum, relative to max(optimum, 1e-3 trace / K)."""
    square = np.square(np.asarray(gradients, np.float64)).sum(-1).mean(-1)
    return (objective(weights, gradients) - optimum) / np.maximum(optimum, 1e-3 * square)


def shortest(gradients):
    """Least `|sum_i a_i g_i|^2` over the simplex, by scipy's BVLS; its nnls cycles on some.

    The least of `|G' x|^2 + (1' x - 1)^2` over x >= 0 lies on the ray through the solution.
    """
    rows = np.unique(np.asarray(gradients, np.float64), axis=0)
    g = rows / np.sqrt(np.square(rows).sum(1).mean())
    system = np.vstack([g.T, np.ones(len(g))])
    wanted = np.append(np.zeros(g.shape[1]), 1.0)
    x = lsq_linear(system, wanted, (0, np.inf), "bvls", tol=1e-15, max_iter=2000).x
    return objective([x / x.sum()], rows[None])[0]


def slsqp(gradients, in_simplex, start):
    """Least `|sum_i x_i g_i|` over x >= 0, those in `in_simplex` with the sum 1, by SLSQP."""
    matrix = gram64(gradients)
    chosen = np.asarray(in_simplex, float)
    return minimize(
        lambda x: x @ matrix @ x / 2,
        start,
        jac=lambda x: matrix @ x,
        bounds=[(0, None)] * len(matrix),
        constraints={"type": "eq", "fun": lambda x: chosen @ x - 1, "jac": lambda x: chosen},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    ).x


def enumerated(matrix, linear):
    """Least `x' K x / 2 + c' x` over x >= 0 by trying every set of free coefficients."""
    best, least = np.zeros(len(linear)), 0.0
    for size in range(1, len(linear) + 1):
        for free in itertools.combinations(range(len(linear)), size):
            part = list(free)
            y = np.linalg.lstsq(matrix[np.ix_(part, part)], -linear[part], rcond=1e-12)[0]
            value = linear[part] @ y / 2
            if (y >= 0).all() and value < least:
                best, least = np.zeros(len(linear)), value
                best[part] = y
    return best, least
