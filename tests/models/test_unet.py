from functools import partial

import chex
import flax.errors
import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from blogjax.models.unet import UNet, ddpm_cifar10
from blogjax.nn.class_embedding import ClassEmbedding
from blogjax.nn.group_norm import group_norm
from blogjax.nn.resampling import Downsample, Upsample
from blogjax.nn.residual_block import ResidualBlock
from blogjax.nn.spatial_attention import SpatialAttention
from blogjax.nn.time_embedding import TimeEmbedding

TINY = UNet(
    channels=4,
    multipliers=(1, 2),
    num_blocks=1,
    attention_resolutions=(2,),
    num_classes=3,
    time_scale=10.0,
)


SMALL = UNet(channels=4, multipliers=(1,), num_blocks=1, num_classes=3)


def inputs(batch=8):
    x = np.random.default_rng(0).normal(size=(batch, 4, 6, 2)).astype(np.float32)
    return x, np.linspace(0, 1, batch, dtype=np.float32), np.arange(batch, dtype=np.int32) % 3


def shapes(model, x, t, labels=None):
    return jax.eval_shape(
        lambda key: model.init_with_output(key, x, t, labels, train=False), jax.random.key(0)
    )


def random_variables(model, *args):
    """Parameters of a trained-looking size in every leaf, also where initialisation gives zeros."""
    _, abstract = shapes(model, *args)
    rng = np.random.default_rng(1)

    def fill(leaf):
        width = max(1, np.prod(leaf.shape[:-1])) ** 0.5
        return jnp.asarray(rng.normal(size=leaf.shape) / width, leaf.dtype)

    return jax.tree.map(fill, abstract)


@pytest.fixture(scope="module")
def variables():
    return random_variables(TINY, *inputs())


@pytest.fixture(scope="module")
def small():
    return random_variables(SMALL, *inputs())


@partial(jax.jit, static_argnums=0)
def apply(model, variables, x, t, labels):
    return model.apply(variables, x, t, labels, train=False)


def count(model, *args):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model, *args)[1]))


def test_the_papers_network_has_its_number_of_parameters():
    # 35.7 M in appendix B of the paper; to the last one, that of the published CIFAR-10 weights.
    args = jnp.zeros((2, 32, 32, 3)), jnp.zeros(2)
    assert count(ddpm_cifar10(), *args) == 35_746_307
    assert ddpm_cifar10(dropout=0.0, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_digits_sized_networks():
    args = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2), jnp.zeros(2, jnp.int32)
    sizes = [
        count(UNet(channels, (1, 2), num_blocks=1, num_classes=11), *args) for channels in (24, 32)
    ]
    assert sizes == [343_417, 608_417]


def test_wiring(variables):
    """The same network laid out flat from blocks that have their own oracles."""
    x, t, labels = inputs()
    p = variables["params"]

    def run(name, module, *args, **kwargs):
        return module.apply({"params": p[name]}, *args, **kwargs)

    @jax.jit
    def by_hand():
        e = run("time", TimeEmbedding(16, 4), 10.0 * jnp.asarray(t))
        e = e + run("class", ClassEmbedding(3, 16), labels)

        def block(name, features, h):
            return run(name, ResidualBlock(features), h, e, train=False)

        def attend(name, h):
            return run(f"{name}_attention", SpatialAttention(), h)

        first = run("conv_in", nn.Conv(4, (3, 3)), x)
        fine = block("down_0_block_0", 4, first)
        halved = run("down_0_resample", Downsample(4), fine)
        coarse = attend("down_1_block_0", block("down_1_block_0", 8, halved))
        h = block("middle_block_1", 8, attend("middle", block("middle_block_0", 8, coarse)))
        h = block("up_1_block_0", 8, jnp.concatenate([h, coarse], -1))
        h = attend("up_1_block_0", h)
        h = block("up_1_block_1", 8, jnp.concatenate([h, halved], -1))
        h = attend("up_1_block_1", h)
        h = run("up_1_resample", Upsample(4), h)
        h = block("up_0_block_0", 4, jnp.concatenate([h, fine], -1))
        h = block("up_0_block_1", 4, jnp.concatenate([h, first], -1))
        h = nn.swish(run("norm_out", group_norm(4), h))
        return run("conv_out", nn.Conv(2, (3, 3)), h)

    out = apply(TINY, variables, x, t, labels)
    assert np.std(out) > 0.1
    np.testing.assert_allclose(out, by_hand(), atol=1e-5)


def test_shapes_and_dtypes():
    x, t, _ = inputs()
    for dtype, resample in [(None, "space_to_depth"), (jnp.bfloat16, "strided")]:
        model = TINY.clone(dtype=dtype, resample=resample, out_channels=5, num_classes=0)
        for given in (x, jnp.asarray(x, jnp.bfloat16)):
            out, abstract = shapes(model, given, t)
            chex.assert_shape(out, (8, 4, 6, 5))
            chex.assert_type([out, *jax.tree.leaves(abstract)], jnp.float32)
    out, abstract = shapes(TINY.clone(param_dtype=jnp.bfloat16), *inputs())
    chex.assert_type(jax.tree.leaves(abstract), jnp.bfloat16)
    assert out.dtype == jnp.float32 and out.shape == x.shape


def test_output_is_zero_at_initialisation():
    args = inputs()
    out, params = jax.jit(lambda k: SMALL.init_with_output(k, *args, train=False))(
        jax.random.key(0)
    )
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(params["params"]["norm_out"]["scale"]) == 1).all()


def test_a_poisoned_example_poisons_no_other(variables):
    x, t, labels = inputs()
    good = np.asarray(apply(TINY, variables, x, t, labels))
    wrong_x, wrong_t = x.copy(), t.copy()
    wrong_x[1, 0, 0, 0] = wrong_t[1] = np.nan
    wrong_labels = [np.where(np.arange(8) == 1, np.int32(y), labels) for y in (-1, 3, 2**31 - 1)]
    cases = [(wrong_x, t, labels), (x, wrong_t, labels), *((x, t, wrong) for wrong in wrong_labels)]
    for case in cases:
        out = np.asarray(apply(TINY, variables, *case))
        assert np.isnan(out[1]).all()
        np.testing.assert_array_equal(np.delete(out, 1, 0), np.delete(good, 1, 0))


def test_time_and_class_are_seen(variables):
    x, t, labels = inputs()
    x, t, labels = np.repeat(x[:1], 8, 0), np.repeat(t[3:4], 8), np.repeat(labels[:1], 8)
    t[1], labels[2] = 0.9, 2
    out = np.asarray(apply(TINY, variables, x, t, labels))
    np.testing.assert_array_equal(out[3:], np.repeat(out[:1], 5, 0))
    for told in (1, 2):
        assert np.abs(out[told] - out[0]).max() > 1e-2


def test_dropout_only_in_training(small):
    args = inputs()
    dropping = SMALL.clone(dropout=0.3)

    def program(model):
        return str(jax.make_jaxpr(lambda v: model.apply(v, *args, train=False))(small))

    assert program(dropping) == program(SMALL)
    on = jax.jit(lambda v, k: dropping.apply(v, *args, train=True, rngs={"dropout": k}))
    first, second = (np.asarray(on(small, jax.random.key(i))) for i in (1, 2))
    assert np.abs(first - second).max() > 1e-2
    np.testing.assert_array_equal(on(small, jax.random.key(1)), first)
    with pytest.raises(flax.errors.InvalidRngError):
        jax.eval_shape(lambda v: dropping.apply(v, *args, train=True), small)


@pytest.mark.slow
def test_remat_changes_memory_and_nothing_else(small):
    x, t, labels = inputs()
    key = jax.random.key(3)

    def loss(model, v):
        out = model.apply(v, x, t, labels, train=True, rngs={"dropout": jax.random.clone(key)})
        return jnp.sum(jnp.sin(out))

    plain = SMALL.clone(dropout=0.3)
    again = plain.clone(remat=True)
    chex.assert_trees_all_equal_shapes(shapes(plain, *inputs()), shapes(again, *inputs()))
    wanted, found = (jax.jit(jax.value_and_grad(partial(loss, m)))(small) for m in (plain, again))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    chex.assert_trees_all_close(found, wanted, rtol=0, atol=1e-6 * largest)

    def kept(model):  # entries between the way there and the way back
        pull = jax.eval_shape(lambda v: jax.vjp(partial(loss, model), v)[1], small)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept(again) < 0.5 * kept(plain)


def test_one_device_and_eight_agree(small):
    args = inputs()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    out = apply(SMALL, jax.device_put(small, whole), *jax.device_put(args, split))
    assert out.sharding.is_equivalent_to(split, 4)
    np.testing.assert_allclose(out, apply(SMALL, small, *args), atol=1e-6)


def test_vmap_and_one_compilation(small):
    traces = 0

    @jax.jit
    def counted(x, t, labels):
        nonlocal traces
        traces += 1
        return SMALL.apply(small, x, t, labels, train=False)

    x, t, labels = inputs()
    many = [(x, t, labels), (-x, t**2, labels[::-1].copy())]
    single = [np.asarray(counted(*args)) for args in many]
    assert traces == 1
    stacked = jax.tree.map(lambda *a: np.stack(a), *many)
    together = jax.jit(jax.vmap(partial(apply, SMALL), in_axes=(None, 0, 0, 0)))(small, *stacked)
    np.testing.assert_allclose(together, np.stack(single), atol=1e-5)


@pytest.mark.slow  # seconds of compiling
def test_gradient_along_random_directions(small, x64):
    model = SMALL.clone(param_dtype=jnp.float64)
    x, t, labels = inputs(batch=2)
    rng = np.random.default_rng(2)
    v = jax.tree.map(lambda a: np.asarray(a, np.float64), (small, x, t))
    weights = rng.normal(size=x.shape)

    def loss(v):
        out = model.apply(v[0], v[1], v[2], labels, train=False)
        assert out.dtype == jnp.float64
        return jnp.sum(weights * jnp.sin(out))

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    _, grad = value_and_grad(v)
    for _ in range(3):
        direction = jax.tree.map(lambda a: rng.normal(size=a.shape), v)
        ahead = value_and_grad(jax.tree.map(lambda a, d: a + 1e-6 * d, v, direction))[0]
        behind = value_and_grad(jax.tree.map(lambda a, d: a - 1e-6 * d, v, direction))[0]
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), grad, direction)))
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-6)


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from primitives(inner)


def test_bfloat16_is_close_and_keeps_its_reductions_in_float32(small):
    args = inputs()
    half = SMALL.clone(dtype=jnp.bfloat16)
    out = np.asarray(apply(half, small, *args))
    wide = np.asarray(apply(SMALL, small, *args))
    assert np.abs(out - wide).mean() < 0.05 * np.std(wide)

    seen: dict[str, set[str]] = {}
    closed = jax.make_jaxpr(lambda v: half.apply(v, *args, train=False))(small)
    for eqn in primitives(closed.jaxpr):
        dtype = eqn.outvars[0].aval.dtype
        if jnp.issubdtype(dtype, jnp.floating):
            seen.setdefault(eqn.primitive.name, set()).add(dtype.name)
    for name in ("exp", "rsqrt", "reduce_sum", "reduce_max", "sin", "cos"):
        assert seen[name] == {"float32"}, name
    assert seen["conv_general_dilated"] == {"bfloat16", "float32"}


def test_refusals():
    x, t, labels = inputs()
    cases = [
        ({}, (x[0], t, labels), r"\(4, 6, 2\)"),
        ({}, (x.astype(np.int32), t, labels), "int32"),
        ({}, (x[:, :3], t, labels), "3 and 6.*multiples of 2"),
        ({"multipliers": (1, 2, 2)}, (x, t, labels), "4 and 6.*multiples of 4"),
        ({}, (x, t[:2], labels), r"\(2,\).*\(8, 4, 6, 2\)"),
        ({}, (x, t[:, None], labels), r"\(8, 1\)"),
        ({}, (x, t, labels[:2]), r"\(2,\).*\(8, 4, 6, 2\)"),
        ({}, (x, t, labels.astype(np.float32)), "float32"),
        ({}, (x, t), "num_classes is 3, but no labels"),
        ({"num_classes": 0}, (x, t, labels), "num_classes is 0, but labels"),
        ({"num_classes": -1}, (x, t), "num_classes.* -1"),
        ({"attention_resolutions": (4, 3)}, (x, t, labels), r"\(4, 3\).*\(4, 2\)"),
        ({"num_heads": 3}, (x, t, labels), "3 heads do not divide 8"),
        ({"channels": 5}, (x, t, labels), "not 5"),
        ({"multipliers": ()}, (x, t, labels), r"multipliers \(\)"),
        ({"num_blocks": 0}, (x, t, labels), "0 blocks"),
        ({"dropout": 1.0}, (x, t, labels), r"1\.0"),
        ({"resample": "bilinear"}, (x, t, labels), "'bilinear'"),
    ]
    for changes, args, match in cases:
        with pytest.raises(ValueError, match=match):
            shapes(TINY.clone(**changes), *args)
