import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blogjax.nn.spatial_attention import SpatialAttention


def make(num_heads, dtype=None, scale=1.0):
    """A block whose output layer is not zero, and an input of 3 x 4 positions of 8 channels."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 8)), jnp.float32)
    block = SpatialAttention(num_heads, dtype=dtype)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    variables = jax.tree.map(
        lambda s: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype), shapes
    )
    return block, variables, x


def projections(variables, x, num_heads):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    groups = np.asarray(x, np.float64).reshape(2, 12, 2, 4)
    groups = groups - groups.mean(axis=(1, 3), keepdims=True)
    groups = groups / np.sqrt((groups**2).mean(axis=(1, 3), keepdims=True) + 1e-6)
    h = groups.reshape(2, 12, 8) * p["norm"]["scale"] + p["norm"]["bias"]
    qkv = [
        (h @ p[name]["kernel"] + p[name]["bias"]).reshape(2, 12, num_heads, 8 // num_heads)
        for name in ("query", "key", "value")
    ]
    return qkv, p["out"]


@pytest.mark.parametrize("num_heads", [1, 2])
def test_against_loops_and_against_jax(num_heads):
    block, variables, x = make(num_heads, scale=0.5)
    out = jax.jit(block.apply)(variables, x)
    (query, key, value), last = projections(variables, x, num_heads)

    mixed = np.zeros_like(query)
    for b in range(2):
        for head in range(num_heads):
            for i in range(12):
                logits = [query[b, i, head] @ key[b, j, head] for j in range(12)]
                odds = np.exp(np.array(logits) / np.sqrt(8 / num_heads))
                for j in range(12):
                    mixed[b, i, head] += odds[j] / odds.sum() * value[b, j, head]
    by_jax = jax.nn.dot_product_attention(
        *(jnp.asarray(a, jnp.float32) for a in (query, key, value))
    )
    for h in (mixed, np.asarray(by_jax, np.float64)):
        h = h.reshape(2, 12, 8) @ last["kernel"] + last["bias"]
        np.testing.assert_allclose(out, x + h.reshape(x.shape), atol=2e-5)


def test_permuting_positions_permutes_the_output():
    block, variables, x = make(2, scale=0.5)
    order = np.random.default_rng(0).permutation(12)
    apply = jax.jit(block.apply)

    def permute(a):
        return a.reshape(2, 12, 8)[:, order].reshape(a.shape)

    out = apply(variables, x)
    np.testing.assert_allclose(apply(variables, permute(x)), permute(out), atol=1e-5)
    assert np.abs(out - permute(out)).max() > 0.1


def test_softmax_is_float32_under_bfloat16():
    # Logits of the order of 100: in bfloat16 they would be off by 1/4, the weights by a quarter.
    block, variables, x = make(1, jnp.bfloat16, scale=2.0)
    jaxpr = jax.make_jaxpr(block.apply)(variables, x).jaxpr
    seen = [e.outvars[0].aval.dtype for e in jaxpr.eqns if e.primitive.name == "exp"]
    assert seen == [jnp.float32]
    out = jax.jit(block.apply)(variables, x)
    chex.assert_type(out, jnp.bfloat16)


def test_bfloat16_is_close_to_float32():
    block, variables, x = make(2, jnp.bfloat16, scale=0.3)
    wide = jax.jit(block.clone(dtype=None).apply)(variables, x)
    out = jax.jit(block.apply)(variables, x)
    np.testing.assert_allclose(np.asarray(out, np.float32), wide, atol=0.03)


@pytest.mark.slow  # seconds of compiling
def test_starts_as_the_identity_and_still_learns(key):
    block, _, x = make(2)
    variables = jax.jit(block.init)(key, x)
    chex.assert_trees_all_equal(block.apply(variables, x), x)
    grad = jax.grad(lambda v: jnp.square(block.apply(v, x)).sum())(variables)
    assert jnp.abs(grad["params"]["out"]["kernel"]).max() > 0


def test_refusals(key):
    with pytest.raises(ValueError, match="3 heads do not divide 8 channels"):
        SpatialAttention(3).init(key, jnp.zeros((1, 2, 2, 8)))
    with pytest.raises(ValueError, match=r"\(2, 2, 8\)"):
        SpatialAttention().init(key, jnp.zeros((2, 2, 8)))
