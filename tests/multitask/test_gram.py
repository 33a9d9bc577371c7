import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from blogjax.multitask.gram import check_tasks, combine, gram

RNG = np.random.default_rng(0)
TREE = {"trunk": {"kernel": RNG.normal(size=(3, 4, 5)), "bias": RNG.normal(size=(3, 5))},
        "head": RNG.normal(size=(3, 7)), "scale": RNG.normal(size=3)}  # fmt: skip


def as_jax(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def flat(*leaves):
    return np.concatenate([np.asarray(x, float).reshape(3, -1) for x in leaves], axis=1)


def test_all_inner_products():
    g = flat(*jax.tree.leaves(as_jax(TREE)))
    found = gram(as_jax(TREE))
    np.testing.assert_allclose(found, g @ g.T, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(found, found.T)


@pytest.mark.parametrize("side", [128, 129, 300])  # one piece, one and a bit, five and a bit
def test_large_leaves_in_pieces(side):
    leaf = np.random.default_rng(side).normal(size=(3, side, side)).astype(np.float32)
    g = leaf.reshape(3, -1).astype(float)
    norms = np.linalg.norm(g, axis=1)
    for found in (gram(leaf), jax.jit(jax.vmap(gram))(leaf[None])[0]):
        np.testing.assert_allclose(found, g @ g.T, atol=1e-6 * np.outer(norms, norms).max())


def test_only_shared_leaves_count():
    """A prefix of the tree is enough; the others are summed with weight 1."""
    shared = {"trunk": True, "head": False, "scale": False}
    tree, weights = as_jax(TREE), jnp.array([0.5, -2.0, 0.0])
    g = flat(tree["trunk"]["bias"], tree["trunk"]["kernel"])
    np.testing.assert_allclose(gram(tree, shared=shared), g @ g.T, rtol=1e-6, atol=1e-5)
    found = combine(tree, weights, shared=shared)
    np.testing.assert_allclose(found["head"], TREE["head"].sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["scale"], TREE["scale"].sum(), rtol=1e-5)
    expected = np.tensordot(np.asarray(weights), TREE["trunk"]["kernel"], 1)
    np.testing.assert_allclose(found["trunk"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert gram(tree, shared=False).tolist() == [[0.0] * 3] * 3


@given(st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3))
def test_the_matrix_tells_the_length_of_every_combination(weights):
    """|sum_i w_i g_i|^2 = w' K w, computed in float64 from the combined gradient."""
    w = np.asarray(weights, np.float32)
    u = flat(*(x[None].repeat(3, 0) for x in jax.tree.leaves(combine(as_jax(TREE), w))))[0]
    expected = w.astype(float) @ np.asarray(gram(as_jax(TREE)), float) @ w
    np.testing.assert_allclose(u @ u, expected, rtol=1e-4, atol=1e-4 * (w @ w) + 1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """4096 equal products, which bfloat16 stops adding at 256, and float16 overflows at 65504."""
    gradients = jnp.full((2, 4096), 10.0, dtype)
    matrix = gram({"a": gradients, "b": gradients})
    assert matrix.dtype == jnp.float32
    np.testing.assert_array_equal(matrix, np.full((2, 2), 2 * 409_600.0))
    u = combine(gradients, jnp.array([1.0, 1.0]))
    assert u.dtype == dtype
    assert (u == 20).all()


def test_float64(x64):
    tree = as_jax(TREE, jnp.float64)
    g = flat(*jax.tree.leaves(TREE))
    np.testing.assert_allclose(gram(tree), g @ g.T, rtol=1e-13)
    assert gram(tree).dtype == jnp.float64


def test_leaves_cut_up_over_devices():
    """`axis_name`: each device has some entries of every gradient; the products are summed."""
    g = RNG.normal(size=(3, 16)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()), ("model",))
    cut = jax.shard_map(lambda x: gram(x, axis_name="model"), mesh=mesh,
                        in_specs=P(None, "model"), out_specs=P())  # fmt: skip
    np.testing.assert_allclose(jax.jit(cut)(g), gram(jnp.asarray(g)), rtol=1e-5, atol=1e-5)


def test_a_weight_of_zero_does_not_hide_nan():
    u = combine(jnp.array([[jnp.nan, 1.0], [1.0, 1.0]]), jnp.array([0.0, 1.0]))
    assert jnp.isnan(u).tolist() == [True, False]


def test_none_is_no_leaf():
    tree = {"a": jnp.ones((2, 3)), "frozen": None}
    assert gram(tree).tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert combine(tree, jnp.ones(2))["frozen"] is None


BAD = {
    "no leaf": ({}, "no leaves"),
    "no axis": ({"a": jnp.ones((2, 3)), "b": {"c": jnp.ones(())}}, "b/c is a scalar"),
    "two lengths": ({"a": jnp.ones((2, 3)), "b": jnp.ones((4, 3))}, "b has 4 tasks, but a has 2"),
    "no task": ({"a": jnp.ones((0, 3))}, r"a of shape \(0, 3\): at least one task"),
    "complex": ({"a": jnp.ones((2, 3), complex)}, "a is complex64, but gradients are real"),
    "integers": ({"a": jnp.ones((2, 3), int)}, "a is int32, but gradients are real"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_gradients(bad):
    tree, message = BAD[bad]
    for use in (check_tasks, gram, lambda tree: combine(tree, jnp.ones(2))):
        with pytest.raises(ValueError, match=message):
            use(tree)


@pytest.mark.parametrize("weights", [jnp.ones(2), jnp.ones((3, 1)), jnp.ones(())])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="for 3 tasks"):
        combine(as_jax(TREE), weights)


@pytest.mark.parametrize(
    "shared", ["trunk", lambda tree: True, {"trunk": 1, "head": 0, "scale": 0}]
)
def test_what_is_shared_is_told_by_bools(shared):
    """Anything else would be true, and count for all leaves."""
    for use in (gram, lambda tree, shared: combine(tree, jnp.ones(3), shared=shared)):
        with pytest.raises(ValueError, match="shared must be bools, got"):
            use(as_jax(TREE), shared=shared)


def test_the_number_of_tasks():
    assert check_tasks(as_jax(TREE)) == 3
