import jax
import numpy as np
from scipy.optimize import nnls
from task_matrices import gram64, many

from blogjax.multitask.upgrad import upgrad_weights

WEIGHTS = jax.jit(jax.vmap(upgrad_weights))


def projected(gradients):
    """The mean of the projections to the dual cone, each by scipy's nnls on the gradients."""
    g = gradients.astype(float)
    return np.mean([row + nnls(g.T, -row)[0] @ g for row in g], axis=0)


def test_the_mean_of_the_projections():
    gradients = many(4, 8)
    norms = np.linalg.norm(gradients, axis=2)
    weights = np.asarray(WEIGHTS(gram64(gradients).astype(np.float32)), float)
    assert (weights >= 0.25).all()
    u = np.einsum("nk,nkd->nd", weights, gradients)
    for found, g, size in zip(u, gradients, norms.max(1), strict=True):
        np.testing.assert_allclose(found, projected(g), atol=2e-3 * size)
        np.testing.assert_allclose(found @ found, projected(g) @ projected(g), atol=2e-5 * size**2)
    rates = np.einsum("nkd,nd->nk", gradients, u) / norms
    assert (rates.min(1) / norms.max(1)).min() > -2e-6


def test_a_task_s_unit_multiplies_its_own_part_only():
    """p(s g_1) = s p(g_1), the other projections stay: linear in the unit."""
    g = np.random.default_rng(3).normal(size=(3, 4, 10))
    g[:] = g[0]
    g[1, 0] *= 2
    g[2, 0] *= 3
    matrix = np.resize(gram64(g), (48, 4, 4)).astype(np.float32)
    u = np.einsum("nk,nkd->nd", WEIGHTS(matrix)[:3], g)
    np.testing.assert_allclose(u[2] - u[1], u[1] - u[0], atol=1e-5)
    assert np.linalg.norm(u[1] - u[0]) > 0.1
