"""Writes TorchJD's combined gradients for fixed matrices, which tests/multitask compares with.

    python -m benchmarks.peers.torchjd_fixture

It needs `torch`, `torchjd` and what its UPGrad and CAGrad solve with (`quadprog`, `qpsolvers`,
`cvxpy`, `clarabel`), and is to be run again only where the matrices change.
"""

import importlib.metadata
import json
import pathlib
import re
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torchjd.aggregation import (  # pyright: ignore[reportMissingImports]
    MGDA,
    CAGrad,
    DualProj,
    PCGrad,
    UPGrad,
)
from torchjd.linalg import QuadprogProjector  # pyright: ignore[reportMissingImports]

FILE = pathlib.Path(__file__).resolve().parents[2] / "tests/multitask/fixtures/torchjd.json"
PACKAGES = ("torchjd", "torch", "quadprog", "qpsolvers", "cvxpy", "clarabel")
# Its quadratic programs need a positive definite matrix: the least that all of them pass with.
REGULARISATION = 1e-13
SEED = 0


def matrices() -> dict[str, np.ndarray]:
    """Gradients `[K, d]` by name, with few digits, so that the file says all."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).round(2)  # noqa: E731
    scales = np.array([[0.01], [0.1], [10.0], [100.0]])
    return {
        "conflict of two": np.array([[1.0, 0.0], [-1.0, 0.5]]),
        "one of two is shortest": np.array([[1.0, 0.0], [3.0, 1.0]]),
        "post 8907": np.array([[0.0, 2.0, -1.0], [0.0, -1.0, 0.0], [2.0, -3.0, -2.0]]),
        "no conflict": np.abs(normal(3, 4)),
        "normal, 3": normal(3, 4),
        "normal, 5": normal(5, 8),
        "scales": normal(4, 6) * scales,
        "more tasks than entries": normal(6, 3) + np.array([1.0, 0.0, 0.0]),
    }


def outcomes(gradients: torch.Tensor) -> dict[str, Any]:
    """What each of its aggregators makes of the gradients."""
    tasks = gradients.shape[0]
    projector = QuadprogProjector(norm_eps=0.0, reg_eps=REGULARISATION)
    first = torch.eye(tasks, dtype=gradients.dtype)[0]
    torch.manual_seed(SEED)
    orders = [torch.randperm(tasks).tolist() for _ in range(tasks)]
    torch.manual_seed(SEED)
    aggregators = {
        "PCGrad": PCGrad(),  # first: it draws
        "MGDA, default": MGDA(),
        "MGDA, 100000 iterations": MGDA(epsilon=1e-9, max_iters=100_000),
        "UPGrad": UPGrad(projector=projector),
        "DualProj of the first": DualProj(pref_vector=first, projector=projector),
        "CAGrad, c=0.5": CAGrad(c=0.5, norm_eps=1e-12),
    }
    found = {name: aggregator(gradients).tolist() for name, aggregator in aggregators.items()}
    return {"gradients": gradients.tolist(), "orders": orders, **found}


def main() -> None:
    """Writes the file."""
    fixture = {
        "script": "benchmarks/peers/torchjd_fixture.py",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "options": {"dtype": "float64", "reg_eps": REGULARISATION, "norm_eps": 0.0, "seed": SEED},
        "matrices": {name: outcomes(torch.tensor(g)) for name, g in matrices().items()},
    }
    # One line for each vector.
    text = re.sub(r"\[([^\[\]]*)\]", lambda m: f"[{' '.join(m[1].split())}]",
                  json.dumps(fixture, indent=1))  # fmt: skip
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(text + "\n")


if __name__ == "__main__":
    main()
