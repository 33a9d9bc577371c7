import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blogjax.multitask.pcgrad import pcgrad_weights


def loop(gradients, orders):
    """The paper's algorithm on the gradients themselves, in float64."""
    total = np.zeros(gradients.shape[1])
    for i, order in enumerate(orders):
        v = gradients[i].astype(float)
        for j in order:
            if j != i and v @ gradients[j] < 0:
                v = v - (v @ gradients[j]) / (gradients[j] @ gradients[j]) * gradients[j]
        total += v
    return total


@jax.jit
def drawn(gradients, seeds):
    """Combined gradients for many seeds."""
    one = lambda seed: pcgrad_weights(gradients @ gradients.T, key=jax.random.key(seed))  # noqa: E731
    return jax.vmap(one)(seeds) @ gradients


def test_every_result_is_one_of_the_loops_and_all_are_equally_likely():
    """Three tasks have two orders of the others each: eight results, whatever the key."""
    # Here a projected gradient may even oppose the one that it was.
    gradients = np.array([[0.7, -1.0], [-1.6, -2.9], [-0.4, 1.2]], np.float32)
    others = [[j for j in range(3) if j != i] for i in range(3)]
    choices = [list(itertools.permutations(rest)) for rest in others]
    expected = np.stack([loop(gradients, orders) for orders in itertools.product(*choices)])
    apart = np.linalg.norm(expected[:, None] - expected[None], axis=2)[np.triu_indices(8, 1)]
    assert apart.min() > 1e-3
    found = np.asarray(drawn(gradients, np.arange(2000)))
    distance = np.linalg.norm(found[:, None] - expected[None], axis=2)
    assert distance.min(1).max() < 1e-5
    counts = np.bincount(distance.argmin(1), minlength=8)
    assert (np.abs(counts - 250) < 5 * np.sqrt(250)).all()


def test_two_tasks_need_no_key():
    gradients = np.array([[1.0, 0.0], [-2.0, 2.0]])
    weights = jax.jit(pcgrad_weights)(jnp.asarray(gradients @ gradients.T, jnp.float32))
    np.testing.assert_allclose(
        weights @ gradients, loop(gradients, [[1], [0]]), rtol=1e-6, atol=1e-6
    )
    assert pcgrad_weights(jnp.array([[3.0]])).tolist() == [1.0]


def test_without_conflict_it_is_the_sum():
    weights = pcgrad_weights(jnp.array([[1.0, 0.5], [0.5, 1.0]]))
    assert weights.tolist() == [1, 1]


def test_three_tasks_need_a_key():
    with pytest.raises(ValueError, match="3 tasks is random: pcgrad needs a key"):
        pcgrad_weights(jnp.eye(3))
