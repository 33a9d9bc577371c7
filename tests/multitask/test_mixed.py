import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import lsq_linear
from task_matrices import excess, in_batches_of, many, objective, shortest, slsqp

from blogjax.multitask.gram import gram
from blogjax.multitask.mixed import mixed_weights

PRIMARY = (True, False, True, False)


@functools.cache
def programs():
    """Every use of four tasks, compiled together."""
    uses = {"two": PRIMARY, "all": (True,) * 4, "one": (False, True, False, False)}

    def all_of(g):
        matrix = gram(g)
        found = {name: mixed_weights(matrix, use) for name, use in uses.items()}
        return found | {"dropped": mixed_weights(matrix, PRIMARY, drop_zero=True)}

    return in_batches_of(60, jax.jit(jax.vmap(all_of)))


def gradients_without_extremes():
    g = many(4, 10, seed=3)
    return g / np.linalg.norm(g, axis=2, keepdims=True) * np.float32([1, 2, 0.5, 1])[:, None]


def least(gradients, primary):
    """`|u|^2` at the optimum, by scipy's BVLS: only the primary tasks' sum is held at 1."""
    g, chosen = np.asarray(gradients, float), np.asarray(primary, float)
    wanted = np.append(np.zeros(g.shape[1]), 1.0)
    x = lsq_linear(np.vstack([g.T, chosen]), wanted, (0, np.inf), "bvls", tol=1e-15).x
    return objective([x / (chosen @ x)], g[None])[0]


@pytest.mark.slow  # seconds of compiling
def test_the_optimum():
    gradients = gradients_without_extremes()
    weights = np.asarray(programs()(gradients)["two"], float)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights[:, [0, 2]].sum(1), 1, rtol=1e-6)
    optimum = np.array([least(g, PRIMARY) for g in gradients])
    assert excess(weights, gradients, optimum).max() < 1e-6
    u = np.einsum("nk,nkd->nd", weights, gradients.astype(float))
    rates = np.einsum("nkd,nd->nk", gradients, u)
    assert rates[:, [1, 3]].min() > -1e-5
    assert (rates[:, [0, 2]] - np.square(u).sum(1)[:, None]).min() > -1e-5


def test_the_oracle_by_another_solver():
    for g in gradients_without_extremes()[::10]:
        x = slsqp(g, PRIMARY, np.array([0.5, 0, 0.5, 0]))
        assert abs(objective([x], g[None])[0] - least(g, PRIMARY)) < 1e-6


def test_all_primary_is_min_norm_and_one_is_primary_auxiliary():
    gradients = gradients_without_extremes()
    found = programs()(gradients)
    assert excess(found["all"], gradients, np.array([shortest(g) for g in gradients])).max() < 1e-6
    one = np.asarray(found["one"], float)
    assert (one[:, 1] == 1).all()
    optimum = np.array([least(g, [False, True, False, False]) for g in gradients])
    # Nearly opposite gradients with large coefficients: eps of what cancels is left.
    cancels = np.square(one * np.linalg.norm(gradients, axis=2)).sum(1)
    assert ((objective(one, gradients) - optimum) / cancels).max() < 1e-6


def test_zero_gradients():
    """A primary one takes all the weight, or is dropped; an auxiliary one is left out."""
    g = np.zeros((3, 4, 10), np.float32)
    g[0, [0, 1, 3], [0, 1, 1]] = 1  # the primary task 2 has none
    g[1, [0, 2], [0, 1]] = [1, 2]  # no auxiliary one has any
    found = programs()(g)
    assert found["two"][0].tolist() == [0, 0, 1, 0]
    np.testing.assert_allclose(found["dropped"][0], [1, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(found["two"][1], [0.8, 0, 0.2, 0], rtol=1e-6)
    assert found["two"][2].tolist() == [0.5, 0, 0.5, 0]
    assert found["dropped"][2].tolist() == [0, 0, 0, 0]


# Numbers of tasks, such as [0, 1, 2], would be taken for False, True, True.
@pytest.mark.parametrize("primary", [[True], [True] * 4, [False] * 3, [0, 1, 2], "abc"])
def test_bad_input(primary):
    with pytest.raises(ValueError, match="a bool for each of 3 tasks, one of them True"):
        mixed_weights(jnp.eye(3), primary)


@pytest.mark.slow  # seconds of compiling
def test_gradients_of_any_size_that_has_a_square():
    """Two opposite primary gradients, and an auxiliary one of another size that they spare."""
    for own, other in ((1e-16, 1e-19), (1e-19, 1e15), (1e18, 1e-18)):
        matrix = np.diag([own * own, own * own, other * other])
        matrix[0, 1] = matrix[1, 0] = -own * own
        found = mixed_weights(jnp.array(matrix, jnp.float32), [True, True, False])
        np.testing.assert_allclose(found, [0.5, 0.5, 0], rtol=1e-6)
