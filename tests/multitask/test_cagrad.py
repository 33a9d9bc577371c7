import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from task_matrices import gram64

from blogjax.multitask.cagrad import cagrad_weights


@functools.cache
def compiled(c, rescale=False):
    combiner = functools.partial(cagrad_weights, c=c, rescale=rescale)
    return jax.jit(jax.vmap(combiner))


def weigh(gradients, c, **options):
    matrix = gram64(gradients).astype(np.float32)
    return np.asarray(compiled(c, **options)(matrix), float)


def dual(gradients, c):
    """Least of `<g_w, g> + c |g| |g_w|` over the simplex: the paper's problem, by scipy's SLSQP."""
    g = gradients.astype(float)
    mean, tasks = g.mean(0), len(g)
    radius = c * np.linalg.norm(mean)

    def value(w):
        return (w @ g) @ mean + radius * np.linalg.norm(w @ g)

    def slope(w):
        return g @ (mean + radius * (w @ g) / np.linalg.norm(w @ g))

    found = [
        minimize(value, start, jac=slope, bounds=[(0, 1)] * tasks, method="SLSQP",
                 constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
                 options={"ftol": 1e-14, "maxiter": 500})
        for start in (np.full(tasks, 1 / tasks), *(0.9 * np.eye(tasks) + 0.1 / tasks))
    ]  # fmt: skip
    return min(result.fun for result in found)


def normal(n, tasks, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, tasks, d)).astype(np.float32)


@pytest.mark.parametrize("c", [0.5, pytest.param(0.1, marks=pytest.mark.slow),
                               pytest.param(0.9, marks=pytest.mark.slow)])  # fmt: skip
def test_strong_duality(c):
    """The worst task's rate is the dual's optimum, from within the ball: so both are optimal."""
    gradients = normal(40, 4, 6) * np.float32([1, 2, 0.3, 1])[:, None]
    weights = weigh(gradients, c)
    assert (weights >= 0.25).all()
    u = np.einsum("nk,nkd->nd", weights, gradients)
    mean = gradients.astype(float).mean(1)
    size = np.linalg.norm(mean, axis=1)
    assert (np.linalg.norm(u - mean, axis=1) <= c * size * (1 + 1e-5)).all()
    worst = np.einsum("nkd,nd->nk", gradients, u).min(1)
    expected = [dual(g, c) for g in gradients]
    np.testing.assert_allclose(worst, expected, atol=2e-5 * size.max())


@pytest.mark.slow
def test_no_radius_is_the_mean():
    assert weigh(normal(40, 4, 6), 0.0).tolist() == [[0.25] * 4] * 40


@pytest.mark.slow
def test_the_rescaling_of_the_papers_code():
    gradients = normal(40, 4, 6)
    np.testing.assert_allclose(
        weigh(gradients, 0.5, rescale=True), weigh(gradients, 0.5) / 1.25, rtol=1e-6
    )


def test_gradients_that_cancel_get_no_huge_weights():
    """Two opposite ones: no level above 0 can be reached, and no weights of 1 / eps try it."""
    gradients = np.zeros((40, 4, 6), np.float32)
    gradients[0, :3, :2] = [[1, 0], [-1, 0], [0, 1]]
    gradients[0, 3, 1] = 2
    gradients[1:] = normal(39, 4, 6)
    gradients[1:20, 1] = -gradients[1:20, 0]
    gradients[20:, 3] = -gradients[20:, :3].mean(1)
    weights = weigh(gradients, 0.5)
    np.testing.assert_allclose(weights[0], 0.25, rtol=1e-6)
    assert weights.max() < 1e4
    u = np.einsum("nk,nkd->nd", weights, gradients)
    mean = gradients.mean(1)
    away = np.linalg.norm(u - mean, axis=1)
    # In the combined gradient itself, summed in float32, no more than rounding is left of it.
    assert (away <= 0.51 * np.linalg.norm(mean, axis=1) + 1e-5).all()
    worst = np.einsum("nkd,nd->nk", gradients, u).min(1)
    assert (worst >= np.einsum("nkd,nd->nk", gradients, mean).min(1) - 1e-5).all()


@pytest.mark.parametrize("c", [-0.1, 1.0, 2.0])
def test_radius_out_of_range(c):
    with pytest.raises(ValueError, match=f"c is {c}, but must lie in"):
        cagrad_weights(jnp.eye(2), c=c)
