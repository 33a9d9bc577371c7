import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blogjax.multitask.aggregate import aggregate
from blogjax.multitask.combiner import check_losses
from blogjax.multitask.gradient_normalized import gradient_normalized_weights
from blogjax.multitask.min_norm import min_norm_weights
from blogjax.multitask.pcgrad import pcgrad_weights
from blogjax.optim.lion import lion

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5, 0.5]])}
GRADIENTS = {"a": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "b": jnp.array([[[0.0, 4.0]], [[0.0, 0.0]]])}
# Norms 5 and 1: what the sum of the unit vectors is, by hand.
UNITS = {"a": np.array([0.6, 1.0]), "b": np.array([[0.0, 0.8]])}


def same(found, expected, **tolerances):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **({"rtol": 1e-6, "atol": 1e-7} | tolerances))


@pytest.mark.parametrize("optimiser", [optax.sgd(0.1, momentum=0.9), lion(0.1)],
                         ids=["sgd", "lion"])  # fmt: skip
def test_first_link_of_a_chain(optimiser):
    """The same as the optimiser alone on the combined gradient, step after step."""
    tx = optax.chain(aggregate(gradient_normalized_weights), optimiser)
    params, state = PARAMS, tx.init(PARAMS)
    other, alone = PARAMS, optimiser.init(PARAMS)
    update = jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
        updates, alone = optimiser.update(jax.tree.map(jnp.asarray, UNITS), alone, other)
        other = optax.apply_updates(other, updates)
    same(params, other)
    assert any(np.any(p != q) for p, q in zip(params.values(), PARAMS.values(), strict=True))


def test_leaves_that_are_not_shared_are_summed():
    tx = aggregate(gradient_normalized_weights, shared={"a": True, "b": False})
    updates, _ = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
    same(updates, {"a": np.array([1.0, 1.0]), "b": np.array([[0.0, 4.0]])})


def test_losses_reach_the_combiner():
    def by_loss(matrix, *, key=None, losses=None):
        assert key is None
        return check_losses(losses, matrix, "by_loss")

    tx = optax.chain(aggregate(by_loss), optax.sgd(1.0))
    gradients, losses = jnp.array([[2.0, 0.0], [0.0, 8.0]]), jnp.array([2.0, 4.0])
    updates, _ = tx.update(gradients, tx.init(jnp.zeros(2)), jnp.zeros(2), losses=losses)
    np.testing.assert_allclose(updates, [-4.0, -32.0], rtol=1e-6)
    with pytest.raises(ValueError, match="by_loss needs the losses"):
        tx.update(gradients, tx.init(jnp.zeros(2)), jnp.zeros(2))


def test_every_step_draws_anew():
    """The key in the state moves on; the same seed gives the same; without one there is none."""
    gradients = jnp.array([[1, 0.2, 0], [-0.9, 0.5, 0.3], [-0.3, -1, 0.4]])

    @jax.jit
    def run(seed_state):
        def step(state, _):
            updates, state = tx.update(gradients, state)
            return state, updates

        return jax.lax.scan(step, seed_state, length=30)[1]

    tx = aggregate(pcgrad_weights, seed=1)
    first = np.asarray(run(tx.init(None)))
    assert 3 <= len(np.unique(first.round(4), axis=0)) <= 8
    np.testing.assert_array_equal(first, run(tx.init(None)))
    other = np.asarray(run(aggregate(pcgrad_weights, seed=2).init(None)))
    assert np.any(other != first)
    assert aggregate(min_norm_weights).init(None).key is None
    with pytest.raises(ValueError, match="pcgrad needs a key"):
        aggregate(pcgrad_weights).update(gradients, aggregate(pcgrad_weights).init(None))


def test_no_key_is_used_twice():
    """With jax's check of that, which the tests run under."""

    def random(matrix, *, key=None, losses=None):
        assert key is not None
        return jax.random.normal(key, (len(matrix),))

    tx = aggregate(random, seed=0)
    state, found = tx.init(None), []
    for _ in range(3):
        updates, state = tx.update(jnp.ones((1, 1)), state)
        found.append(updates.item())
    assert len(set(found)) == 3


def test_averaged_over_the_axis_before_anything_is_multiplied():
    """Gradients that cancel in part, and losses: a combiner sees the means of both."""
    here = jnp.array([[[3.0, 4.0], [0.0, 2.0]], [[3.0, -4.0], [0.0, 0.0]]])
    losses = jnp.array([[1.0, 10.0], [3.0, 30.0]])

    def by_products(matrix, *, key=None, losses=None):
        return jnp.diagonal(matrix) + check_losses(losses, matrix, "by_products")

    tx = aggregate(by_products, axis_name="x")
    step = lambda g, v: tx.update(g, tx.init(None), losses=v)[0]  # noqa: E731
    found = jax.vmap(step, axis_name="x")(here, losses)
    # The means are (3, 0), (0, 1) and 2, 20, so the weights 9 + 2 and 1 + 20.
    np.testing.assert_allclose(found, [[33, 21], [33, 21]], rtol=1e-6)


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (PARAMS, r"a has .*\(2,\).*\(2,\).*leading axis of tasks"),
        ({"a": jnp.ones((2, 2)), "b": jnp.ones((3, 1, 2))}, "b has 3 tasks, but a has 2"),
        ({"a": jnp.ones((2, 3)), "b": jnp.ones((2, 1, 2))}, r"a has .*\(2, 3\).*\(2,\)"),
        (jnp.ones(2), r"\(root\) has updates of shape \(2,\)"),
        ({"a": jnp.ones((0, 2)), "b": jnp.ones((0, 1, 2))}, "at least one task"),
    ],
)
def test_bad_gradients(gradients, message):
    tx = aggregate(gradient_normalized_weights)
    params = PARAMS if isinstance(gradients, dict) else jnp.ones(2)
    with pytest.raises(ValueError, match=message):
        tx.update(gradients, tx.init(params), params)
