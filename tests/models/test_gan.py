from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blogjax.models.gan import (
    DCGANCritic,
    DCGANGenerator,
    MLPCritic,
    MLPGenerator,
    ResNetCritic,
    ResNetGenerator,
)

CRITICS = {
    "mlp": (MLPCritic((8, 4)), (6,)),
    "dcgan": (DCGANCritic((4, 6)), (4, 6, 2)),
    "resnet": (ResNetCritic((4, 4, 6), halvings=1), (4, 6, 2)),
}
GENERATORS = {
    "mlp": (MLPGenerator(6, (8,)), (6,)),
    "dcgan": (DCGANGenerator(2, (8, 4), base=(2, 3)), (4, 6, 2)),
    "resnet": (ResNetGenerator(2, (8, 4), base=(2, 3)), (4, 6, 2)),
}
critics = pytest.mark.parametrize("name", CRITICS)
generators = pytest.mark.parametrize("name", GENERATORS)


def shapes(model, x, **kwargs):
    return jax.eval_shape(lambda key: model.init_with_output(key, x, **kwargs), jax.random.key(0))


def filled(model, x, **kwargs):
    """Parameters of a trained-looking size in every leaf, also where initialisation gives zeros."""
    rng = np.random.default_rng(1)

    def fill(leaf):
        width = max(1, np.prod(leaf.shape[:-1])) ** 0.5
        return jnp.asarray(1.5 * rng.normal(size=leaf.shape) / width, leaf.dtype)

    variables = shapes(model, x, **kwargs)[1]
    stats = jax.tree.map(lambda s: jnp.full(s.shape, 0.7), variables.get("batch_stats", {}))
    return {"params": jax.tree.map(fill, variables["params"])} | (
        {"batch_stats": stats} if stats else {}
    )


def examples(shape, n=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def judge(model, variables, x):
    return model.apply(variables, x)


@partial(jax.jit, static_argnums=(0, 3))
def generate(model, variables, z, train):
    if not train:
        return model.apply(variables, z, train=False), {}
    return model.apply(variables, z, train=True, mutable=["batch_stats"])


def count(model, x, **kwargs):
    return sum(x.size for x in jax.tree.leaves(shapes(model, x, **kwargs)[1]["params"]))


def conv(size, inputs, outputs):
    return (size * size * inputs + 1) * outputs


def test_the_published_networks_have_their_numbers_of_parameters():
    """Layer by layer from the papers' tables: z of 128, images of 32 x 32 x 3."""
    z, x = jnp.zeros((2, 128)), jnp.zeros((2, 32, 32, 3))
    dense = 129 * 4 * 4
    dcgan = dense * 512 + 2 * (512 + 256 + 128 + 64)
    dcgan += conv(4, 512, 256) + conv(4, 256, 128) + conv(4, 128, 64) + conv(3, 64, 3)
    assert count(DCGANGenerator(), z, train=True) == dcgan == 3_813_379
    block = 2 * 2 * 256 + 2 * conv(3, 256, 256) + conv(1, 256, 256)
    resnet = dense * 256 + 3 * block + 2 * 256 + conv(3, 256, 3)
    assert count(ResNetGenerator(), z, train=True) == resnet == 4_276_739

    layers = [(3, 3, 64), (4, 64, 128), (3, 128, 128), (4, 128, 256), (3, 256, 256)]
    layers += [(4, 256, 512), (3, 512, 512)]
    dcgan = sum(conv(*layer) for layer in layers) + 4 * 4 * 512 + 1
    assert count(DCGANCritic(), x) == dcgan
    first = conv(3, 3, 128) + conv(3, 128, 128) + conv(1, 3, 128)
    resnet = first + 6 * conv(3, 128, 128) + conv(1, 128, 128) + 129
    assert count(ResNetCritic(), x) == resnet == 1_053_825

    x = jnp.zeros((2, 48, 48, 3))  # STL-10
    resnet = 129 * 6 * 6 * 512
    for i, o in ((512, 256), (256, 128), (128, 64)):
        resnet += 2 * (i + o) + conv(3, i, o) + conv(3, o, o) + conv(1, i, o)
    resnet += 2 * 64 + conv(3, 64, 3)
    assert count(ResNetGenerator(widths=(512, 256, 128, 64), base=6), z, train=True) == resnet
    resnet = 513
    for i, o in ((3, 64), (64, 128), (128, 256), (256, 512)):
        resnet += conv(3, i, o) + conv(3, o, o) + conv(1, i, o)
    assert count(ResNetCritic((64, 128, 256, 512), halvings=4), x) == resnet
    for model, given, shape in [
        (DCGANGenerator(), z, (2, 32, 32, 3)),
        (ResNetGenerator(base=6, widths=(512, 256, 128, 64)), z, (2, 48, 48, 3)),
    ]:
        assert shapes(model, given, train=True)[0].shape == shape


def convolve(x, p, stride=1):
    """A convolution that sees one row beyond each edge (none for 1 x 1), as the papers count."""
    pad = 0 if p["kernel"].shape[0] == 1 else 1
    out = jax.lax.conv_general_dilated(
        x, p["kernel"], (stride, stride), [(pad, pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return out + p["bias"][None, None, None]


def transposed(x, p):
    """Each pixel adds its 4 x 4 patch, two pixels apart; one row is cut off at each edge."""
    b, h, w, _ = x.shape
    kernel = np.asarray(p["kernel"], np.float64)[::-1, ::-1]
    out = np.zeros((b, 2 * h + 2, 2 * w + 2, kernel.shape[-1]))
    for i in range(h):
        for j in range(w):
            patch = np.einsum("bc,pqco->bpqo", np.asarray(x[:, i, j], np.float64), kernel)
            out[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += patch
    return out[:, 1:-1, 1:-1] + np.asarray(p["bias"])


def pooled(x):
    return nn.avg_pool(x, (2, 2), (2, 2))


def upsampled(x):
    return np.repeat(np.repeat(x, 2, 1), 2, 2)


def rectified(x, p, variables=None, name=None):
    """ReLU after batch norm with the averages 0.7, where there is a norm."""
    if variables is not None:
        p = p[name]
        x = (np.asarray(x) - 0.7) / np.sqrt(0.7 + 1e-5) * np.asarray(p["scale"]) + np.asarray(
            p["bias"]
        )
    return np.maximum(x, 0)


def test_wiring_of_the_critics():
    """As the papers draw them: the mean after the 1 x 1 convolution, not before."""
    x = examples((4, 6, 2))
    model = CRITICS["resnet"][0]
    variables = filled(model, x)
    p = variables["params"]
    h = convolve(np.maximum(convolve(x, p["block_0_conv_0"]), 0), p["block_0_conv_1"])
    h = pooled(h) + pooled(convolve(x, p["block_0_shortcut"]))
    inner = convolve(np.maximum(h, 0), p["block_1_conv_0"])
    h = h + convolve(np.maximum(inner, 0), p["block_1_conv_1"])
    inner = convolve(np.maximum(h, 0), p["block_2_conv_0"])
    inner = convolve(np.maximum(inner, 0), p["block_2_conv_1"])
    h = convolve(h, p["block_2_shortcut"]) + inner
    out = np.maximum(h, 0).mean((1, 2)) @ p["out"]["kernel"] + p["out"]["bias"][None]
    assert out.std() > 0.1
    np.testing.assert_allclose(judge(model, variables, x), out[:, 0], rtol=1e-4, atol=1e-5)

    model = CRITICS["dcgan"][0]
    variables = filled(model, x)
    p = variables["params"]
    h = x
    for name, stride in (("conv_0", 1), ("down_0", 2), ("conv_1", 1)):
        h = convolve(h, p[name], stride)
        h = np.where(h > 0, h, 0.1 * h)
    out = h.reshape(5, -1) @ p["out"]["kernel"] + p["out"]["bias"][None]
    np.testing.assert_allclose(judge(model, variables, x), out[:, 0], rtol=1e-4, atol=1e-5)

    x = examples((6,))
    model = CRITICS["mlp"][0]
    variables = filled(model, x)
    p = variables["params"]
    h = x
    for name in ("dense_0", "dense_1"):
        h = np.maximum(h @ p[name]["kernel"] + p[name]["bias"][None], 0)
    out = h @ p["out"]["kernel"] + p["out"]["bias"][None]
    np.testing.assert_allclose(judge(model, variables, x), out[:, 0], rtol=1e-5, atol=1e-6)


def test_wiring_of_the_generators():
    """With the averages of batch norm; the 1 x 1 convolution after the doubling, as drawn."""
    z = examples((3,))
    model = GENERATORS["dcgan"][0]
    variables = filled(model, z, train=True)
    p = variables["params"]
    h = (z @ p["dense"]["kernel"] + p["dense"]["bias"][None]).reshape(5, 2, 3, 8)
    h = rectified(h, p, variables, "norm_0")
    h = rectified(transposed(h, p["up_0"]), p, variables, "norm_1")
    out = np.tanh(convolve(jnp.float32(h), p["conv_out"]))
    np.testing.assert_allclose(generate(model, variables, z, False)[0], out, rtol=1e-4, atol=1e-5)

    model = GENERATORS["resnet"][0]
    variables = filled(model, z, train=True)
    p = variables["params"]
    h = (z @ p["dense"]["kernel"] + p["dense"]["bias"][None]).reshape(5, 2, 3, 8)
    inner = upsampled(rectified(h, p, variables, "block_0_norm_0"))
    inner = rectified(convolve(inner, p["block_0_conv_0"]), p, variables, "block_0_norm_1")
    h = convolve(upsampled(h), p["block_0_shortcut"]) + convolve(inner, p["block_0_conv_1"])
    out = np.tanh(convolve(rectified(h, p, variables, "norm_out"), p["conv_out"]))
    np.testing.assert_allclose(generate(model, variables, z, False)[0], out, rtol=1e-4, atol=1e-5)

    model = GENERATORS["mlp"][0]
    variables = filled(model, z, train=True)
    p = variables["params"]
    h = np.maximum(z @ p["dense_0"]["kernel"] + p["dense_0"]["bias"][None], 0)
    out = h @ p["out"]["kernel"] + p["out"]["bias"][None]
    np.testing.assert_allclose(generate(model, variables, z, False)[0], out, rtol=1e-5, atol=1e-6)


@critics
def test_a_critic_has_no_state_and_judges_every_example_alone(name):
    model, shape = CRITICS[name]
    x = examples(shape)
    assert list(shapes(model, x)[1]) == ["params"]
    variables = filled(model, x)
    whole = judge(model, variables, x)
    assert np.std(whole) > 0.05
    others = np.full_like(x, np.nan)
    others[2] = x[2]
    got = np.asarray(judge(model, variables, others))
    np.testing.assert_allclose(got[2], whole[2], rtol=1e-6)
    assert np.isnan(np.delete(got, 2)).all()


@pytest.mark.parametrize("name", ["dcgan", "resnet"])
def test_batch_norm_trains_by_the_batch_and_keeps_averages(name):
    model, _ = GENERATORS[name]
    z = examples((3,))
    variables = filled(model, z, train=True)
    first = f"{'block_0_' if name == 'resnet' else ''}norm_0"
    _, new = generate(model, variables, z, True)
    p = variables["params"]["dense"]
    h = (z @ p["kernel"] + p["bias"][None]).reshape(-1, 8)
    stats = new["batch_stats"][first]
    np.testing.assert_allclose(stats["mean"], 0.9 * 0.7 + 0.1 * h.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 * 0.7 + 0.1 * h.var(0), rtol=1e-4, atol=1e-6)
    # The statistics decide what is made while training, and only then.
    moved = z + examples((3,), seed=1) * (np.arange(5) > 0)[:, None]
    made = [
        generate(model, variables, x, train)[0][0] for train in (True, False) for x in (z, moved)
    ]
    assert np.abs(made[0] - made[1]).max() > 1e-2
    np.testing.assert_allclose(made[2], made[3], rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("norm", ["group", "none"])
def test_generators_without_batch_norm_have_no_state(norm):
    for kind in (DCGANGenerator, ResNetGenerator):
        model = kind(2, (8, 4), base=(2, 3), norm=norm)
        z = examples((3,))
        assert list(shapes(model, z, train=True)[1]) == ["params"]
        variables = filled(model, z, train=True)
        whole, alone = (generate(model, variables, x, True)[0] for x in (z, z[:1]))
        np.testing.assert_allclose(whole[:1], alone, rtol=1e-4, atol=1e-6)
        names = {k for k in variables["params"] if "norm" in k}
        assert bool(names) == (norm == "group")


@critics
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_of_critics(name, dtype):
    model, shape = CRITICS[name]
    x = jnp.asarray(examples(shape), dtype)
    for asked in (None, jnp.bfloat16):
        out, variables = shapes(model.clone(dtype=asked), x)
        assert out.shape == (5,) and out.dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    narrow = shapes(model.clone(param_dtype=jnp.bfloat16), x)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}


@generators
def test_dtypes_and_shapes_of_generators(name):
    model, shape = GENERATORS[name]
    for dtype in (jnp.float32, jnp.bfloat16):
        z = jnp.asarray(examples((3,)), dtype)
        for asked in (None, jnp.bfloat16):
            out, variables = shapes(model.clone(dtype=asked), z, train=True)
            assert out.shape == (5, *shape) and out.dtype == jnp.float32
            assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
        narrow = shapes(model.clone(param_dtype=jnp.bfloat16), z, train=True)[1]["params"]
        assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}


@critics
def test_narrow_arithmetic_is_near_the_wide_one(name):
    model, shape = CRITICS[name]
    x = examples(shape)
    variables = filled(model, x)
    wide = judge(model, variables, x)
    narrow = judge(model.clone(dtype=jnp.bfloat16), variables, x)
    np.testing.assert_allclose(narrow, wide, atol=0.05 * np.abs(wide).max())
    assert np.abs(narrow - wide).max() > 0


@pytest.mark.parametrize("model", [DCGANCritic((4, 4)), ResNetCritic((4,), halvings=1)])
def test_a_critic_starts_with_a_slope(model):
    """A critic without one gives the generator nothing, and normalisation nothing to divide."""
    x = examples((4, 4, 1))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    slope = jax.jit(jax.grad(lambda x: model.apply(variables, x).sum()))(x)
    assert np.abs(slope).reshape(5, -1).max(1).min() > 0


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (MLPGenerator(2), (2, 3, 1), r"\[B, Z\].*\(2, 3, 1\)"),
        (DCGANGenerator(), (2,), r"\[B, Z\]"),
        (ResNetGenerator(norm="layer"), (2, 3), "'layer'"),  # pyright: ignore
        (ResNetGenerator(widths=(4, 0)), (2, 3), r"\(4, 0, 3\)"),
        (MLPCritic(), (4,), r"\(4,\)"),
        (MLPCritic((0,)), (4, 2), "positive"),
        (DCGANCritic((4, 4, 4)), (2, 6, 8, 1), r"multiples of 4.*\(2, 6, 8, 1\)"),
        (DCGANCritic(()), (2, 6, 8, 1), "at least 1"),
        (ResNetCritic(), (2, 8, 8), r"\[B, H, W, C\].*\(2, 8, 8\)"),
        (ResNetCritic((4,), halvings=2), (2, 8, 8, 1), "between 0 and the 1 blocks, got 2"),
        (ResNetCritic((4, 4)), (2, 8, 6, 1), "multiples of 4"),
    ],
)
def test_bad_input(model, shape, message):
    kwargs = {"train": True} if "Generator" in type(model).__name__ else {}
    with pytest.raises(ValueError, match=message):
        shapes(model, jnp.ones(shape), **kwargs)
