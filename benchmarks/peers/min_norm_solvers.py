"""What others find the shortest vector in a convex hull with, each from the Gram matrix.

Written from their descriptions, in numpy, whose small operations take less time than PyTorch's:

  frank_wolfe         Sener & Koltun 2018 (arXiv:1810.04650), algorithm 2: from the best pair of
                      vertices towards the vertex of the least product, by exact line search
  projected_gradient  what LibMTL (github.com/median-research-group/LibMTL, MGDA) does in its place:
                      the target of the line search is a step against the gradient to the
                      simplex's first face, and shares keep away from 0 and 1 by a thousandth
  quadratic_program   quadprog by way of qpsolvers in float64 on a matrix of trace 1 with a ridge,
                      as TorchJD solves its programs; needs both packages
  slsqp               scipy's sequential quadratic programming in float64
"""

import contextlib
from typing import Any

import numpy as np
from scipy.optimize import minimize

ITERATIONS, STOP = 250, 1e-5  # LibMTL's
PROGRAM_PACKAGES = ("qpsolvers", "quadprog")
RIDGE = 1e-7  # about the least that lets quadprog factor singular matrices in float32
TORCHJD_RIDGE = 1e-4  # its default


def share(square: Any, product: Any, other: Any, clip: float = 0.0) -> Any:
    """The first one's share in the shortest point between two, of which the products are given."""
    if product >= square:
        return 1 - clip
    if product >= other:
        return clip
    return (other - product) / (square + other - 2 * product)


def best_pair(gram: np.ndarray, clip: float = 0.0) -> np.ndarray:
    """Weights `[K]` of the shortest point on an edge; `[1]` for one task."""
    tasks, least = len(gram), np.inf
    weights = np.ones(tasks, gram.dtype) / tasks
    for i in range(tasks):
        for j in range(i + 1, tasks):
            a, b, c = gram[i, i], gram[i, j], gram[j, j]
            s = share(a, b, c, clip)
            length = s * s * a + 2 * s * (1 - s) * b + (1 - s) * (1 - s) * c
            if length < least:
                least, weights = length, np.zeros(tasks, gram.dtype)
                weights[i], weights[j] = s, 1 - s
    return weights


def project(y: np.ndarray) -> np.ndarray:
    """The nearest point of the simplex."""
    descending = np.sort(y)[::-1]
    over = (np.cumsum(descending) - 1) / np.arange(1, len(y) + 1)
    return np.maximum(y - over[np.flatnonzero(descending > over)[-1]], 0)


def _toward(
    gram: np.ndarray, weights: np.ndarray, target: np.ndarray, clip: float = 0.0
) -> np.ndarray:
    ahead = gram @ target
    s = share(weights @ gram @ weights, weights @ ahead, target @ ahead, clip)
    return s * weights + (1 - s) * target


def frank_wolfe(gram: np.ndarray, iterations: int = ITERATIONS, stop: float = STOP) -> np.ndarray:
    """Weights `[K]` in the dtype of `gram`; ends when they move by less than `stop` in all."""
    weights = best_pair(gram)
    if len(gram) < 3:
        return weights
    vertices = np.eye(len(gram), dtype=gram.dtype)
    for _ in range(iterations):
        moved = _toward(gram, weights, vertices[np.argmin(gram @ weights)])
        if np.abs(moved - weights).sum() < stop:
            break
        weights = moved
    return weights


def projected_gradient(
    gram: np.ndarray, iterations: int = ITERATIONS, stop: float = STOP
) -> np.ndarray:
    """As `frank_wolfe`. LibMTL returns nothing if the iterations run out; this what it has."""
    clip, nearly = 0.001, 1e-7
    weights = best_pair(gram, clip)
    if len(gram) < 3:
        return weights
    for _ in range(iterations):
        slope = -(gram @ weights)
        slope = slope - slope.mean()
        with np.errstate(divide="ignore", invalid="ignore"):
            lengths = np.where(slope < 0, -weights / slope, (1 - weights) / slope)
        lengths = lengths[np.isfinite(lengths) & (lengths > nearly)]
        length = lengths.min() if len(lengths) else gram.dtype.type(1)
        moved = _toward(gram, weights, project(weights + length * slope), clip)
        if np.abs(moved - weights).sum() < stop:
            break
        weights = moved
    return weights


def quadratic_program(gram: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Weights `[K]`, float64; NaN where the solver gives up."""
    from qpsolvers import ProblemError, solve_qp  # pyright: ignore[reportMissingImports]

    tasks = len(gram)
    matrix = gram.astype(np.float64)
    matrix = matrix / np.trace(matrix) + ridge * np.eye(tasks)
    found: Any = None
    with contextlib.suppress(ProblemError):
        found = solve_qp(
            matrix, np.zeros(tasks), A=np.ones((1, tasks)), b=np.ones(1), lb=np.zeros(tasks),
            solver="quadprog",
        )  # fmt: skip
    return np.full(tasks, np.nan) if found is None else found


def slsqp(gram: np.ndarray) -> np.ndarray:
    """Weights `[K]`, float64."""
    tasks = len(gram)
    matrix = gram.astype(np.float64)
    matrix = matrix / np.trace(matrix)
    return minimize(
        lambda x: x @ matrix @ x / 2,
        np.full(tasks, 1 / tasks),
        jac=lambda x: matrix @ x,
        bounds=[(0, None)] * tasks,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 200},
    ).x
