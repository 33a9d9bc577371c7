import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls
from task_matrices import FAMILIES, family, gram64, in_batches_of, objective

from blogjax.multitask.gram import gram
from blogjax.multitask.primary_auxiliary import (
    agreeing_examples,
    primary_auxiliary_weights,
    project_conflicts,
)

POST = [(0, 2, -1), (0, -1, 0), (2, -3, -2)]


@functools.cache
def compiled(primary=0):
    combiner = functools.partial(primary_auxiliary_weights, primary=primary)
    return in_batches_of(60, jax.jit(jax.vmap(lambda g: combiner(gram(g)))))


def weigh(gradients, primary=0):
    """For up to five tasks: auxiliary gradients of zero change nothing, so one shape is enough."""
    g = np.asarray(gradients, np.float32)
    padded = np.zeros((len(g), 5, 12), np.float32)
    padded[:, : g.shape[1], : g.shape[2]] = g
    return compiled(primary)(padded)[:, : g.shape[1]]


def iteration_of_the_post(gradients, rounds):
    """Re-solves for the coefficient of the most violated constraint, in exact arithmetic."""
    g = [[Fraction(x) for x in row] for row in gradients]
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    coefficients = [Fraction(0)] * (len(g) - 1)

    def direction(without=None):
        u = g[0]
        for i, c in enumerate(coefficients):
            if i != without:
                u = [x + c * y for x, y in zip(u, g[i + 1], strict=True)]
        return u

    for _ in range(rounds):
        u = direction()
        rates = [dot(row, u) for row in g[1:]]
        worst = rates.index(min(rates))
        rest, row = direction(without=worst), g[worst + 1]
        coefficients[worst] = max(Fraction(0), -dot(row, rest) / dot(row, row))
    return coefficients, dot(direction(), direction())


def test_the_iteration_of_the_post_stops_short():
    """At 689/289, feasible and unmoved by more rounds; the optimum is 1."""
    found = [iteration_of_the_post(POST, rounds) for rounds in (2, 3, 50)]
    assert found[0] == found[1] == found[2]
    assert found[0] == ([Fraction(22, 17), Fraction(4, 17)], Fraction(689, 289))
    exact, _ = nnls(np.array(POST[1:], float).T, -np.array(POST[0], float))
    np.testing.assert_allclose(exact, [2, 0], atol=1e-12)
    weights = weigh([POST])
    np.testing.assert_allclose(weights[0], [1, 2, 0], rtol=1e-6, atol=0)
    np.testing.assert_allclose(objective(weights, [POST]), 1.0, rtol=1e-5)


def families():
    rng = np.random.default_rng(0)
    g = np.stack([family(name, 5, rng) for name in FAMILIES for _ in range(10)])
    return g / np.where(g.any(2), np.linalg.norm(g, axis=2), 1).max(1)[:, None, None]


def test_the_optimum():
    """Against scipy's nnls on the explicit gradients, in float64."""
    gradients = families()
    weights = np.asarray(weigh(gradients), float)
    assert (weights[:, 0] == 1).all()
    assert (weights >= 0).all()
    optimum = np.array([nnls(g[1:].T.astype(float), -g[0].astype(float))[1] ** 2
                        for g in gradients])  # fmt: skip
    assert (objective(weights, gradients) - optimum).max() < 1e-6
    # It never climbs the primary loss: <u, g_0> = |u|^2. No auxiliary one either.
    u = np.einsum("nk,nkd->nd", weights, gradients.astype(float))
    norms = np.linalg.norm(gradients, axis=2)
    size = (weights * norms).sum(1, keepdims=True)
    rates = np.einsum("nkd,nd->nk", gradients, u) / norms / size
    assert rates[:, 1:].min() > -1e-6
    assert np.where(weights > 0, np.abs(rates), 0)[:, 1:].max() < 1e-6
    descent = np.einsum("nd,nd->n", u, gradients[:, 0]) - np.square(u).sum(1)
    assert (np.abs(descent) / size[:, 0] ** 2).max() < 1e-6


def test_one_auxiliary_task_has_a_closed_form():
    """`relu(-<g_0, g_1>) / |g_1|^2`."""
    g = np.random.default_rng(1).normal(size=(60, 2, 12)).astype(np.float32)
    matrix = gram64(g)
    expected = np.maximum(-matrix[:, 0, 1], 0) / matrix[:, 1, 1]
    assert 10 < (expected > 0).sum() < 50
    np.testing.assert_allclose(weigh(g)[:, 1], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(weigh(g)[:, 1] == 0, expected == 0)


@pytest.mark.slow
def test_any_task_can_be_the_primary_one():
    g = np.random.default_rng(2).normal(size=(60, 5, 12)).astype(np.float32)
    order = [1, 2, 3, 0, 4]
    there, here = weigh(g[:, order], primary=3), weigh(g)
    np.testing.assert_allclose(there, here[:, order], rtol=1e-4, atol=1e-6)
    assert (there[:, 3] == 1).all()


def test_one_task():
    assert primary_auxiliary_weights(jnp.array([[5.0]])).tolist() == [1.0]


@pytest.mark.parametrize("primary", [-1, 3, 7])
def test_primary_out_of_range(primary):
    with pytest.raises(ValueError, match=f"primary is {primary}, but there are 3 tasks"):
        primary_auxiliary_weights(jnp.eye(3), primary=primary)


PROJECT = jax.jit(project_conflicts)


def tree(x, dtype=jnp.float32):
    """The entries of the last axis, in two leaves."""
    x = jnp.asarray(x, dtype)
    return {"a": x[..., :2], "b": x[..., 2:].reshape(*x.shape[:-1], 2, 2)}


def test_a_projection_is_its_own():
    g = np.random.default_rng(8).normal(size=(3, 6))
    g[1] -= g[0]
    once = PROJECT(tree(g[0]), tree(g[1:]))
    twice = PROJECT(once, tree(g[1:]))
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    coefficients, _ = nnls(g[1:].T, -g[0])
    expected = tree(g[0] + coefficients @ g[1:])
    assert coefficients.max() > 0.1
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_without_conflict_the_gradient_stays_to_the_bit():
    g = np.abs(np.random.default_rng(8).normal(size=(3, 6)))
    gradient = tree(g[0])
    projected = PROJECT(gradient, tree(g[1:]))
    for a, b in zip(jax.tree.leaves(projected), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_projection_of_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4,\)"):
        project_conflicts(jnp.ones(4), jnp.ones((2, 3)))


def test_examples_that_agree():
    products = jnp.array([2.0, -1.0, 0.0, jnp.nan, 1e-30])
    assert agreeing_examples(products).tolist() == [1, 0, 0, 0, 1]
    assert agreeing_examples(products.astype(jnp.bfloat16)).dtype == jnp.float32
