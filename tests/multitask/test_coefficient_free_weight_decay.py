import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blogjax.multitask.coefficient_free_weight_decay import coefficient_free_weight_decay

RNG = np.random.default_rng(0)


def draw(dtype=np.float32):
    return {"a": RNG.normal(size=(3, 4)).astype(dtype), "b": RNG.normal(size=5).astype(dtype)}


def dot(a, b):
    return sum(float(np.sum(np.asarray(x, float) * np.asarray(y, float)))
               for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))  # fmt: skip


def closed_form(g, theta, sign):
    """g + relu(-<g, theta>) / |theta|^2 theta for gradients; the mirror image for updates."""
    factor = max(-sign * dot(g, theta), 0) / dot(theta, theta)
    return jax.tree.map(lambda x, p: x + sign * factor * p, g, theta)


@pytest.mark.parametrize(("of", "sign"), [("gradient", 1), ("update", -1)])
def test_the_closed_form(of, sign):
    tx = coefficient_free_weight_decay(of)
    changed = 0
    for _ in range(30):
        g, theta = draw(), draw()
        found, _ = tx.update(g, tx.init(theta), theta)
        expected = closed_form(g, theta, sign)
        for a, b, before in zip(*map(jax.tree.leaves, (found, expected, g)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
            if sign * dot(g, theta) >= 0:
                np.testing.assert_array_equal(a, before)
        changed += sign * dot(g, theta) < 0
        # The step, -g or d, does not make theta longer, to first order.
        size = np.sqrt(dot(g, g) * dot(theta, theta))
        assert sign * dot(found, theta) > -1e-6 * size
    assert 5 < changed < 25


def test_the_norm_does_not_grow_where_the_loss_would_have_it_grow():
    """The loss -w'x: gradient descent runs away, with it only the direction moves."""
    goal = jnp.array([3.0, 4.0])
    tx = optax.chain(coefficient_free_weight_decay(), optax.sgd(0.01))
    w = jnp.array([1.0, 0.0])
    state = tx.init(w)
    update = jax.jit(tx.update)
    for _ in range(300):
        updates, state = update(-goal, state, w)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(w / jnp.linalg.norm(w), [0.6, 0.8], atol=1e-3)
    assert 1.0 <= float(jnp.linalg.norm(w)) < 1.1


def test_parameters_of_zero():
    zero, g = jax.tree.map(np.zeros_like, draw()), draw()
    tx = coefficient_free_weight_decay()
    found, _ = tx.update(g, tx.init(zero), zero)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(g), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mask", [{"a": True, "b": False}, lambda p: {"a": True, "b": False}],
                         ids=["tree", "function"])  # fmt: skip
def test_mask(mask):
    """The masked leaves pass; theta is what is left."""
    g, theta = draw(), draw()
    g["a"] = -theta["a"] + 0.1 * g["a"]
    tx = coefficient_free_weight_decay(mask=mask)
    found, _ = tx.update(g, tx.init(theta), theta)
    np.testing.assert_array_equal(found["b"], g["b"])
    expected = closed_form({"a": g["a"]}, {"a": theta["a"]}, 1)["a"]
    np.testing.assert_allclose(found["a"], expected, atol=1e-5)
    assert abs(dot({"a": found["a"]}, {"a": theta["a"]})) < 1e-5


def test_parameters_cut_up_over_an_axis():
    theta = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    g = jnp.array([[-1.0, 1.0], [1.0, -1.0]])
    tx = coefficient_free_weight_decay(axis_name="x")
    found = jax.vmap(lambda u, p: tx.update(u, tx.init(p), p)[0], axis_name="x")(g, theta)
    expected = closed_form({"g": g.reshape(-1)}, {"g": theta.reshape(-1)}, 1)["g"]
    np.testing.assert_allclose(found.reshape(-1), expected, rtol=1e-6)


def test_bfloat16_keeps_its_type_and_sums_in_float32():
    theta = {"w": jnp.full(4096, 1.0, jnp.bfloat16)}
    g = {"w": jnp.full(4096, -0.5, jnp.bfloat16)}
    tx = coefficient_free_weight_decay()
    found, _ = tx.update(g, tx.init(theta), theta)
    assert found["w"].dtype == jnp.bfloat16
    assert (found["w"] == 0).all()


def test_nan_stays_to_be_seen():
    theta = jnp.ones(3)
    tx = coefficient_free_weight_decay()
    found, _ = tx.update(jnp.array([1.0, jnp.nan, -5.0]), tx.init(theta), theta)
    assert bool(jnp.isnan(found).all())


def test_bad_input():
    with pytest.raises(ValueError, match="of is 'gradients', but must be 'gradient' or 'update'"):
        coefficient_free_weight_decay("gradients")  # pyright: ignore[reportArgumentType]
    tx = coefficient_free_weight_decay()
    with pytest.raises(ValueError, match="needs params"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    with pytest.raises(ValueError, match=r"\(2, 3\) for a parameter of shape \(3,\)"):
        tx.update(jnp.ones((2, 3)), tx.init(jnp.ones(3)), jnp.ones(3))
