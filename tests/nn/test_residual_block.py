import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blogjax.nn.residual_block import ResidualBlock


def random_parameters(key, module, *args, **kwargs):
    """Parameters of a trained-looking size in every leaf, also where initialisation gives zeros."""
    shapes = jax.eval_shape(lambda k: module.init(k, *args, **kwargs), key)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            jax.random.normal(k, s.shape, s.dtype) / max(1, np.prod(s.shape[:-1])) ** 0.5
            for k, s in zip(keys, leaves, strict=True)
        ],
    )


def swish(x):
    return x / (1 + np.exp(-x))


def norm(x, p, size):
    groups = x.reshape(*x.shape[:-1], -1, size)
    groups = groups - groups.mean(axis=(1, 2, 4), keepdims=True)
    groups = groups / np.sqrt((groups**2).mean(axis=(1, 2, 4), keepdims=True) + 1e-6)
    return groups.reshape(x.shape) * p["scale"] + p["bias"]


def conv(x, p):
    out = np.zeros((*x.shape[:-1], p["kernel"].shape[-1])) + p["bias"]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i in range(3):
        for j in range(3):
            out += padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ p["kernel"][i, j]
    return out


@pytest.mark.parametrize(("features", "told"), [(8, True), (12, True), (12, False)])
def test_against_float64(key, features, told):
    k1, k2, k3 = jax.random.split(key, 3)
    x = jax.random.normal(k1, (2, 4, 6, 8))
    embedding = jax.random.normal(k2, (2, 5)) if told else None
    block = ResidualBlock(features)
    params = random_parameters(k3, block, x, embedding, train=False)
    out = jax.jit(lambda p: block.apply({"params": p}, x, embedding, train=False))(params)

    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    pixels = np.asarray(x, np.float64)
    h = conv(swish(norm(pixels, p["norm_in"], 4)), p["conv_in"])
    if embedding is not None:
        e = swish(np.asarray(embedding, np.float64))
        h = h + (e @ p["embedding"]["kernel"] + p["embedding"]["bias"])[:, None, None]
    h = conv(swish(norm(h, p["norm_out"], 4)), p["conv_out"])
    if features != 8:
        pixels = pixels @ p["shortcut"]["kernel"] + p["shortcut"]["bias"]
    np.testing.assert_allclose(out, pixels + h, atol=2e-5)
    assert ("shortcut" in p) == (features != 8) and ("embedding" in p) == told


def test_starts_as_its_shortcut_and_still_learns(key):
    k1, k2 = jax.random.split(key)
    x, embedding = jax.random.normal(k1, (2, 4, 4, 8)), jnp.ones((2, 5))
    block = ResidualBlock(8)
    apply = jax.jit(lambda p: block.apply({"params": p}, x, embedding, train=False))
    params = jax.jit(lambda k: block.init(k, x, embedding, train=False))(k2)["params"]
    chex.assert_trees_all_equal(apply(params), x)
    grad = jax.grad(lambda p: jnp.square(apply(p)).sum())(params)
    assert jnp.abs(grad["conv_out"]["kernel"]).max() > 0


@pytest.mark.slow  # seconds of compiling
def test_dropout_sits_where_it_leaves_the_mean_alone(key):
    # Only the linear last convolution comes after it, so its average is the output without it.
    k1, k2, k3 = jax.random.split(key, 3)
    x, embedding = jax.random.normal(k1, (1, 2, 2, 4)), jnp.ones((1, 3))
    block = ResidualBlock(4, dropout=0.5)
    params = {"params": random_parameters(k2, block, x, embedding, train=False)}
    plain = block.apply(params, x, embedding, train=False)
    dropped = jax.jit(
        jax.vmap(lambda k: block.apply(params, x, embedding, train=True, rngs={"dropout": k}))
    )(jax.random.split(k3, 4000))
    spread = np.std(np.asarray(dropped, np.float64), axis=0)
    assert spread.min() > 0
    error = np.abs(np.mean(np.asarray(dropped, np.float64), axis=0) - np.asarray(plain))
    assert np.all(error < 5 * spread / 4000**0.5)


def test_the_result_has_the_dtype_asked_for(key):
    x, embedding = jnp.zeros((2, 4, 4, 8)), jnp.zeros((2, 5))
    for features in (8, 12):
        block = ResidualBlock(features, dtype=jnp.bfloat16)
        out, variables = jax.eval_shape(
            lambda k, block=block: block.init_with_output(k, x, embedding, train=False), key
        )
        chex.assert_shape(out, (2, 4, 4, features))
        chex.assert_type(
            [out, *jax.tree.leaves(variables)],
            [jnp.bfloat16] + [jnp.float32] * len(jax.tree.leaves(variables)),
        )


def test_refusals(key):
    x, embedding = jnp.zeros((2, 4, 4, 8)), jnp.zeros((2, 5))
    for bad_x, bad_embedding, dropout, match in [
        (x[0], embedding, 0.0, r"\(4, 4, 8\)"),
        (x, embedding[:1], 0.0, r"\(1, 5\).*2 examples"),
        (x, embedding[0], 0.0, r"\(5,\)"),
        (x, embedding, 1.0, r"\[0, 1\), not 1.0"),
    ]:
        with pytest.raises(ValueError, match=match):
            ResidualBlock(8, dropout).init(key, bad_x, bad_embedding, train=False)
