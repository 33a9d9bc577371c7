import jax
import jax.numpy as jnp
import numpy as np

from blogjax.multitask.gradient_normalized import gradient_normalized_weights
from blogjax.multitask.gram import combine, gram


@jax.jit
def combined(gradients):
    return combine(gradients, gradient_normalized_weights(gram(gradients)))


def test_the_sum_of_unit_vectors():
    g = np.random.default_rng(0).normal(size=(5, 9)) * [[1e-6], [1], [10], [1e3], [1e8]]
    expected = (g / np.linalg.norm(g, axis=1, keepdims=True)).sum(0)
    np.testing.assert_allclose(combined(jnp.asarray(g, jnp.float32)), expected, atol=1e-6)


def test_any_unit_of_a_loss_gives_the_same_bits():
    rng = np.random.default_rng(1)
    g = rng.normal(size=(5, 9)).astype(np.float32)
    for _ in range(20):
        unit = 2.0 ** rng.integers(-40, 41, size=(5, 1)).astype(np.float32)
        np.testing.assert_array_equal(combined(unit * g), combined(g))


def test_it_is_the_gradient_of_losses_over_their_gradients_norms():
    """`sum_i L_i / stop_gradient(|grad L_i|)`, differentiated by jax."""
    losses = lambda w: jnp.stack([jnp.sum(w**2), 3 * jnp.prod(w), jnp.sin(w[0])])  # noqa: E731

    @jax.jit
    def both(w):
        jacobian = jax.jacrev(losses)(w)
        norms = jnp.linalg.norm(jacobian, axis=1)
        return combined(jacobian), jax.grad(lambda w: jnp.sum(losses(w) / norms))(w)

    found, expected = both(jnp.array([0.3, -0.7]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_two_never_conflict_and_three_do_in_a_third_of_all_cases():
    """The share 36 % of the post's remark that three may fail, for normal triples in R^3."""
    g = np.random.default_rng(2).normal(size=(4000, 3, 3)).astype(np.float32)
    two = jax.vmap(combined)(g[:, :2])
    assert np.einsum("nkd,nd->nk", g[:, :2], two).min() > -1e-6
    three = jax.vmap(combined)(g)
    share = (np.einsum("nkd,nd->nk", g, three) < 0).any(1).mean()
    assert 0.33 < share < 0.39


def test_a_gradient_of_zero_is_left_out():
    g = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(combined(g), [0.6, 0.8], rtol=1e-6)
    assert combined(0 * g).tolist() == [0, 0]
