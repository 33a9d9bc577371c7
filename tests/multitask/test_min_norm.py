import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog
from task_matrices import (
    excess,
    family,
    gram64,
    in_batches_of,
    many,
    objective,
    shortest,
    slsqp,
)

from blogjax.multitask.gram import gram
from blogjax.multitask.min_norm import NORMALIZE, min_norm_weights

GRAM = in_batches_of(90, jax.jit(jax.vmap(gram)))
ON_GRAM = in_batches_of(90, jax.jit(jax.vmap(min_norm_weights)))


def weigh(gradients):
    return ON_GRAM(GRAM(gradients))


@pytest.mark.parametrize("tasks", [
    pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(12, marks=pytest.mark.slow), 32
])  # fmt: skip
def test_the_optimum_to_a_millionth(tasks):
    """Gradients and Gram matrix in float32, judged in float64 against scipy's BVLS."""
    gradients = many(tasks, 15, seed=tasks)
    weights = np.asarray(weigh(gradients), np.float64)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    optimum = np.array([shortest(g) for g in gradients])
    assert excess(weights, gradients, optimum).max() < 1e-6
    # At the optimum <g_i, u> >= |u|^2.
    u = np.einsum("nk,nkd->nd", weights, gradients)
    rates = np.einsum("nkd,nd->nk", gradients.astype(float), u) - np.square(u).sum(1)[:, None]
    size = np.square(gradients.astype(float)).sum(2).max(1)
    assert (rates.min(1) / size).min() > -1e-6


def test_the_oracles_agree():
    """scipy's SLSQP finds what its BVLS finds: two other routes to one number."""
    for gradients in many(4, 2, seed=9):
        g = gradients.astype(float) / np.linalg.norm(gradients, axis=1).max()
        x = slsqp(g, np.ones(4), np.full(4, 0.25))
        assert abs(objective([x], g[None])[0] - shortest(g)) < 1e-7


def test_two_tasks_have_a_closed_form():
    """a = clip(<g2, g2 - g1> / |g1 - g2|^2, 0, 1); at the ends exactly 1 and 0."""
    g = np.random.default_rng(0).normal(size=(64, 2, 2)).astype(np.float32)
    difference = (g[:, 1] - g[:, 0]).astype(float)
    a = np.clip(np.einsum("nd,nd->n", g[:, 1], difference) / np.square(difference).sum(1), 0, 1)
    weights = np.asarray(ON_GRAM(gram64(g).astype(np.float32)))
    np.testing.assert_allclose(weights[:, 0], a, atol=1e-5)
    ends = (a == 0) | (a == 1)
    assert 10 < ends.sum() < 54
    np.testing.assert_array_equal(weights[ends], np.stack([a, 1 - a], 1)[ends])


def test_zero_only_where_the_hull_holds_it():
    """scipy's linprog says whether a convex combination of the gradients is zero."""
    rng = np.random.default_rng(4)
    gradients = rng.normal(size=(40, 4, 2)).astype(np.float32)
    u = np.einsum("nk,nkd->nd", weigh(gradients), gradients)
    inside = [
        linprog(np.zeros(4), A_eq=np.vstack([g.T, np.ones(4)]), b_eq=[0, 0, 1]).status == 0
        for g in gradients
    ]
    assert 10 < sum(inside) < 35
    np.testing.assert_array_equal(np.linalg.norm(u, axis=1) < 1e-5, inside)


def test_nearly_equal_and_nearly_opposite_gradients():
    """Differences of 1e-4 drown in a float32 Gram matrix; the objective is lost there only."""
    rng = np.random.default_rng(2)
    twins = np.stack([family("duplicates", 4, rng) for _ in range(20)])
    twins[10:, 2:] = -twins[10:, :2]
    twins += 1e-4 * rng.normal(size=twins.shape).astype(np.float32)
    optimum = np.array([shortest(g) for g in twins])
    assert excess(weigh(twins), twins, optimum).max() < 1e-4


@functools.cache
def normalised():
    def all_of(g, losses):
        matrix = gram(g)
        found = {n: min_norm_weights(matrix, losses=losses, normalize=n) for n in NORMALIZE}
        return found | {"dropped": min_norm_weights(matrix, drop_zero=True)}

    return in_batches_of(24, jax.jit(jax.vmap(all_of)))


@pytest.mark.slow  # seconds of compiling
def test_normalised_hulls():
    """The vector is the shortest of the hull of the quotients, in units that say what they are."""
    gradients = many(4, 3, seed=5)
    losses = np.random.default_rng(1).uniform(0.1, 10, size=gradients.shape[:2])
    norms = np.linalg.norm(gradients.astype(float), axis=2)
    size = {"none": np.ones_like(losses), "l2": norms, "loss": losses, "loss+": losses * norms}
    found = normalised()(gradients, losses.astype(np.float32))
    for name, by in size.items():
        quotients = gradients / by[:, :, None]
        optimum = np.array([shortest(g) for g in quotients])
        shares = np.asarray(found[name], float) * by
        np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
        assert excess(shares, quotients, optimum).max() < 1e-6, name


def test_a_loss_of_zero_counts_as_one():
    gradients = many(4, 1, seed=6)
    ones = np.ones(gradients.shape[:2], np.float32)
    zeroed = ones.copy()
    zeroed[:, 1] = 0
    zeroed[:, 2] = -3
    np.testing.assert_array_equal(
        normalised()(gradients, zeroed)["loss"], normalised()(gradients, ones)["loss"]
    )


def test_zero_gradients():
    """They take all the weight, together; or, dropped, none."""
    gradients = np.zeros((1, 4, 10), np.float32)
    gradients[0, 0, 0], gradients[0, 2, 1] = 1, 2
    assert weigh(gradients)[0].tolist() == [0, 0.5, 0, 0.5]
    dropped = normalised()(np.concatenate([gradients, 0 * gradients]), np.ones((2, 4), np.float32))
    np.testing.assert_allclose(dropped["dropped"][0], [0.8, 0, 0.2, 0], rtol=1e-6)
    assert dropped["dropped"][1].tolist() == [0, 0, 0, 0]
    assert weigh(0 * gradients)[0].tolist() == [0.25] * 4


@pytest.mark.parametrize("normalize", ["loss", "loss+"])
def test_losses_are_needed(normalize):
    with pytest.raises(ValueError, match=f"normalize='{normalize[:4]}.*needs the losses"):
        min_norm_weights(jnp.eye(2), normalize=normalize)
    with pytest.raises(ValueError, match=r"\(3,\) for 2 tasks"):
        min_norm_weights(jnp.eye(2), normalize=normalize, losses=jnp.ones(3))
    with pytest.raises(ValueError, match=r"\(2, 1\) for 2 tasks"):
        min_norm_weights(jnp.eye(2), normalize=normalize, losses=jnp.ones((2, 1)))


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(ValueError, match=r"'l1'.*none, l2, loss, loss\+"):
        min_norm_weights(jnp.eye(2), normalize="l1")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "gram",
    [
        [[4.296093, -1.5048021], [-1.5048021, 0.5270903]],
        [[0.5440203, -1.5202456], [-1.5202456, 4.248272]],
        [[5.9195375, -0.8898457], [-0.8898457, 0.13376471]],
        [[1.1247892e-03, -9.2740744e-02], [-9.2740744e-02, 7.6466274e00]],
    ],
)
def test_opposite_gradients_that_rounding_made_indefinite(gram):
    """Met on a Pareto front: Cholesky's method fails with a ridge of 2 eps."""
    gram = np.array(gram, np.float32)
    lengths = np.sqrt(np.diagonal(gram).astype(np.float64))
    np.testing.assert_allclose(
        min_norm_weights(jnp.array(gram)), lengths[::-1] / lengths.sum(), rtol=1e-3
    )


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("size", [1e-19, 1e-16, 1e18])
def test_gradients_of_any_size_that_has_a_square(size):
    """Vectors that sum to zero, and orthogonal ones, which fill no float32 on the way."""
    matrix = np.array([[4.0, -4.0], [-4.0, 4.0]]) * size * size
    assert min_norm_weights(jnp.array(matrix, jnp.float32)).tolist() == [0.5, 0.5]
    eye = jnp.eye(32) * np.float32(4 * size * size)
    np.testing.assert_allclose(min_norm_weights(eye), 1 / 32, rtol=1e-6)


def test_a_matrix_of_numpy():
    """Its float64 is more than JAX has by default, which would warn."""
    found = min_norm_weights(np.array([[1.0, 0.0], [0.0, 4.0]]))  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(found, [0.8, 0.2], rtol=1e-6)
