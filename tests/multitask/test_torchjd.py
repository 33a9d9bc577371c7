"""Combined gradients against TorchJD's on fixed matrices; `benchmarks/peers/torchjd_fixture.py`."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from task_matrices import gram64
from test_pcgrad import loop

from blogjax.multitask.cagrad import cagrad_weights
from blogjax.multitask.min_norm import min_norm_weights
from blogjax.multitask.primary_auxiliary import primary_auxiliary_weights
from blogjax.multitask.upgrad import upgrad_weights

FIXTURE = json.loads((pathlib.Path(__file__).parent / "fixtures" / "torchjd.json").read_text())
MATRICES = FIXTURE["matrices"]


@pytest.fixture(params=MATRICES)
def case(request):
    found = MATRICES[request.param]
    return {name: x if name == "orders" else np.array(x, float) for name, x in found.items()}


@functools.cache
def padded_program():
    """Six tasks, of which some have no gradient: those change nothing but UPGrad's factor 1 / K."""
    combiners = {
        "MGDA": functools.partial(min_norm_weights, drop_zero=True),
        "UPGrad": upgrad_weights,
        "DualProj of the first": primary_auxiliary_weights,
    }
    return jax.jit(lambda matrix: {name: c(matrix) for name, c in combiners.items()})


def combined(name, gradients):
    padded = np.zeros((6, gradients.shape[1]))
    padded[: len(gradients)] = gradients
    weights = padded_program()(gram64(padded).astype(np.float32))[name]
    factor = 6 / len(gradients) if name == "UPGrad" else 1
    return factor * np.asarray(weights, float) @ padded


def excess(case):
    """TorchJD's `|u|^2` above ours, relative to ours: by default, and after 100000 iterations."""
    u = combined("MGDA", case["gradients"])
    size = max(u @ u, 1e-3 * np.square(case["gradients"]).sum(1).mean())
    vectors = case["MGDA, default"], case["MGDA, 100000 iterations"]
    return [(v @ v - u @ u) / size for v in vectors]


def close(found, expected, gradients, tolerance):
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(gradients, axis=1).max()


@pytest.mark.parametrize("name", ["UPGrad", "DualProj of the first"])
def test_projections(case, name):
    """It adds 1e-13 of the trace to the matrix and solves by quadprog in float64."""
    gradients = case["gradients"]
    close(combined(name, gradients), case[name], gradients, 1e-5)


def test_min_norm(case):
    """Its Frank and Wolfe ends above the optimum and never below."""
    default, many = excess(case)
    assert -1e-6 < many < 2e-4
    assert -1e-6 < default < 0.15


def test_how_inexact_frank_and_wolfe_are():
    """By 14 % of the optimum on the post's own example, by 2e-4 after 100000 iterations."""
    case = {name: np.array(x) for name, x in MATRICES["post 8907"].items() if name != "orders"}
    default, many = excess(case)
    assert 0.13 < default < 0.15
    assert 1e-4 < many < 2e-4


@pytest.mark.slow
def test_cagrad(case):
    """It minimises the dual by an interior point method, which leaves up to 5e-5 of the vector."""
    gradients = case["gradients"]
    weights = cagrad_weights(gram64(gradients).astype(np.float32), c=0.5)
    close(np.asarray(weights, float) @ gradients, case["CAGrad, c=0.5"], gradients, 1e-4)


def test_pcgrad(case):
    """With its orders; `test_pcgrad` compares the same loop with ours."""
    gradients = case["gradients"]
    close(loop(gradients, case["orders"]), case["PCGrad"], gradients, 1e-12)


def test_provenance():
    assert FIXTURE["versions"]["torchjd"]
    assert (pathlib.Path(__file__).parents[2] / FIXTURE["script"]).is_file()
    assert len(MATRICES) == 8
