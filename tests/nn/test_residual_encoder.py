import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blogjax.nn.residual_block import ResidualBlock
from blogjax.nn.residual_encoder import ResidualEncoder

X = np.float32(np.random.default_rng(0).normal(size=(2, 4, 8, 3)))


def trained_looking(shapes):
    """Parameters that are nowhere zero, unlike those that training starts from."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: np.float32(rng.normal(size=s.shape) / 4), shapes)


def test_against_its_parts_in_float64():
    """Convolution, halving, last norm and mean by hand; the block has a test of its own."""
    encoder = ResidualEncoder(channels=4, multipliers=(1, 2))
    p = trained_looking(jax.eval_shape(encoder.init, jax.random.key(0), X)["params"])
    out = jax.jit(encoder.apply)({"params": p}, X)

    def block(name, features, h):
        module = ResidualBlock(features)
        found = module.apply({"params": p[name]}, np.float32(h), None, train=False)
        return np.asarray(found, np.float64)

    padded = np.pad(np.float64(X), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel, bias = (np.float64(p["conv_in"][name]) for name in ("kernel", "bias"))
    h = bias + sum(
        padded[:, i : i + 4, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3)
    )
    h = block("level_0_block_0", 4, h)
    squares = [h[:, i::2, j::2] for i in range(2) for j in range(2)]
    dense = p["resample_1"]["dense"]
    h = np.concatenate(squares, axis=-1) @ np.float64(dense["kernel"]) + dense["bias"]
    h = block("level_1_block_0", 8, h)
    groups = h.reshape(2, 8, 2, 4)  # two groups of four channels
    groups = groups - groups.mean(axis=(1, 3), keepdims=True)
    groups = groups / np.sqrt((groups**2).mean(axis=(1, 3), keepdims=True) + 1e-6)
    h = groups.reshape(2, 8, 8) * p["norm_out"]["scale"] + p["norm_out"]["bias"]
    expected = (h / (1 + np.exp(-h))).mean(axis=1)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert set(p) == {"conv_in", "level_0_block_0", "resample_1", "level_1_block_0", "norm_out"}


@pytest.mark.parametrize("resample", ["space_to_depth", "strided"])
def test_bfloat16_inside_float32_outside(resample):
    encoder = ResidualEncoder(4, (1, 1, 3), num_blocks=2, resample=resample, dtype=jnp.bfloat16)
    out, variables = jax.eval_shape(encoder.init_with_output, jax.random.key(0), X)
    assert (out.shape, out.dtype) == ((2, 12), np.float32)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    assert sum("block" in name for name in variables["params"]) == 6
    assert len(variables["params"]["resample_2"]) == 1


@pytest.mark.parametrize(
    ("changes", "x", "message"),
    [
        ({"channels": 0}, X, "0 channels"),
        ({"multipliers": ()}, X, r"multipliers \(\)"),
        ({"multipliers": (1, 0)}, X, r"multipliers \(1, 0\)"),
        ({"num_blocks": 0}, X, "0 blocks"),
        ({"multipliers": (1, 1, 1, 1)}, X, "4 and 8 are not both multiples of 8"),
        ({}, X[0], "x must be floating"),
        ({}, X.astype(np.uint8), "x must be floating"),
        ({"resample": "pool"}, X, "'pool'"),
    ],
)
def test_what_it_refuses(changes, x, message):
    encoder = ResidualEncoder(**{"channels": 4, "multipliers": (1, 2), **changes})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(encoder.init, jax.random.key(0), x)
