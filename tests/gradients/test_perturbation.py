import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blogjax.gradients.perturbation import random_direction, random_in_ball, steepest_ascent

ascent = jax.jit(steepest_ascent, static_argnames=("norm", "per_example"))

SHAPES = {"image": (4, 3, 2), "code": (4, 5), "gain": (4,)}


def tree(seed=0, exponents=(0, 0, 0), dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        k: jnp.asarray(rng.normal(size=shape) * 2.0**e, dtype)
        for (k, shape), e in zip(SHAPES.items(), exponents, strict=True)
    }


def rows(value, per_example):
    """float64 `[B, entries]`, or `[1, entries]`, all leaves side by side."""
    flat = [np.asarray(x, np.float64).reshape(4, -1) for x in jax.tree.leaves(value)]
    return np.concatenate(flat, axis=1).reshape(4 if per_example else 1, -1)


@pytest.mark.parametrize("per_example", [True, False])
@given(seed=st.integers(0, 99), exponents=st.tuples(*[st.integers(-110, 110)] * 3))
def test_no_direction_of_the_ball_rises_more(per_example, seed, exponents):
    """By duality: <g, r> is the dual norm of g, at |r| = 1; sizes where squares leave float32."""
    g = tree(seed, exponents)
    g["image"], g["code"], g["gain"] = (x.at[1].set(0) for x in (g["image"], g["code"], g["gain"]))
    flat = rows(g, per_example)
    for norm, order, dual in (("l2", 2, 2), ("linf", np.inf, 1)):
        r = ascent(g, norm=norm, per_example=per_example)
        found = rows(r, per_example)
        some = np.abs(flat).sum(1) > 0
        np.testing.assert_allclose(np.linalg.norm(found, order, axis=1), some, rtol=1e-6)
        rise = np.sum(found * flat, axis=1)
        np.testing.assert_allclose(rise, np.linalg.norm(flat, dual, axis=1), rtol=1e-6)


def test_the_smallest_numbers_are_a_direction_or_nothing():
    g = jnp.array([[3e-38, 4e-38], [3e38, -3e38], [1e-42, 1e-42], [0.0, -0.0]])
    r = np.asarray(ascent(g))
    np.testing.assert_allclose(r[0], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(r[1], [0.5**0.5, -(0.5**0.5)], rtol=1e-6)
    assert np.isfinite(r[2]).all() and np.linalg.norm(r[2]) <= 1.0001
    np.testing.assert_array_equal(r[3], [0.0, 0.0])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_nan_stays_within_its_example(norm):
    r = ascent(jnp.ones((2, 2)).at[0, 0].set(jnp.nan), norm=norm)
    assert np.isnan(r[0, 0]) and np.isfinite(r[1]).all()
    whole = ascent(jnp.ones((2, 2)).at[0, 0].set(jnp.nan), norm=norm, per_example=False)
    assert np.isnan(whole[0, 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_gradients_are_squared_in_float32(dtype):
    g = jnp.full((1, 10_000), 300.0, dtype)  # squares overflow float16, their sum stalls bfloat16
    r = ascent(g)
    assert r.dtype == jnp.float32
    np.testing.assert_allclose(r, 0.01, rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (jnp.arange(3), TypeError, "gradient is int32, but must be real and floating"),
        (jnp.ones(3, jnp.complex64), TypeError, "complex64"),
        ({}, ValueError, "holds no array"),
        (jnp.ones(()), ValueError, "per_example=False"),
        ({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}, ValueError, r"\(2, 3\), \(3, 3\)"),
    ],
)
def test_bad_trees(value, error, match):
    with pytest.raises(error, match=match):
        steepest_ascent(value)
    with pytest.raises(ValueError, match="norm='l1' is unknown; valid: l2, linf"):
        steepest_ascent(jnp.ones(3), norm="l1")  # type: ignore[arg-type]


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("per_example", [True, False])
def test_noise_on_the_sphere_and_in_the_ball(key, per_example):
    """Radii of the ball follow U^(1/d): their d-th power has mean 1/2 and variance 1/12."""
    many = 4000
    if per_example:
        like, shape = {"a": jnp.zeros((many, 2, 1)), "b": jnp.zeros((many, 1))}, (many, 3)
    else:
        like, shape = {"a": jnp.zeros((2, 1)), "b": jnp.zeros(1)}, (many, 3)

    def draw(key, method, *options):
        if per_example:
            noise = method(jax.random.split(key, many), like, *options, True)
        else:
            noise = jax.vmap(lambda k: method(k, like, *options, False))(
                jax.random.split(key, many)
            )
        return jnp.concatenate([noise["a"].reshape(many, 2), noise["b"]], axis=1)

    draw = jax.jit(draw, static_argnums=(1, 2))
    for method, *options in ((random_direction,), (random_in_ball, "l2"), (random_in_ball, "linf")):
        key, own = jax.random.split(key)
        noise = np.asarray(draw(own, method, *options))
        assert noise.shape == shape
        assert np.abs(noise.mean(0)).max() < 0.05
        assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.05
        length = np.linalg.norm(noise, np.inf if "linf" in options else 2, axis=1)
        if options:
            assert abs((length**3).mean() - 1 / 2) < 0.02 and length.max() <= 1.00001
            assert abs((length**3).var() - 1 / 12) < 0.01
        else:
            np.testing.assert_allclose(length, 1, rtol=1e-5)


def test_an_example_has_the_noise_of_its_key(key):
    keys = jax.random.split(key, 4)
    like = {"a": jnp.zeros((4, 2)), "b": jnp.zeros((4, 3))}
    draw = jax.jit(random_direction, static_argnums=2)
    whole = draw(keys, like, True)
    part = draw(jax.random.clone(keys)[2:], jax.tree.map(lambda x: x[2:], like), True)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2:], b), whole, part)
