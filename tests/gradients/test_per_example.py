"""Norms of per-example gradients, against gradients that are formed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from blogjax.gradients.per_example import (
    layer_signals,
    mlp_layers,
    per_example_gradient_norms,
    squared_norms_by_layer,
)

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
norms = jax.jit(per_example_gradient_norms, static_argnums=2, static_argnames="activation")


def network(seed, widths, biased=True, dtype=np.float64):
    """`biased` for all layers, or one for each."""
    rng = np.random.default_rng(seed)
    biased = [biased] * (len(widths) - 1) if isinstance(biased, bool) else biased
    layers = []
    for i, o, with_bias in zip(widths[:-1], widths[1:], biased, strict=True):
        layer = {"kernel": np.asarray(rng.normal(size=(i, o)) / np.sqrt(i), dtype)}
        layers.append(
            layer | ({"bias": np.asarray(rng.normal(size=o), dtype)} if with_bias else {})
        )
    return layers


def data(seed, size, width, classes=3, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=(size, width)), dtype), rng.integers(0, classes, size)


def run(layers, row, functions):
    """One example."""
    for layer, function in zip(layers, functions, strict=True):
        row = function(jnp.dot(row, layer["kernel"]) + layer.get("bias", 0.0))
    return row


def formed(layers, x, loss, args, functions):
    """Squared norms of gradients that are formed one by one: `[layers, B]` of kernels and biases"""

    def value(layers, row, *own):
        return loss(run(layers, row, functions)[None], *(a[None] for a in own))[0]

    grads = jax.jit(jax.vmap(jax.grad(value), (None, 0, *[0] * len(args))))(layers, x, *args)
    squares = lambda g: np.square(np.asarray(g, np.float64)).reshape(len(x), -1).sum(1)  # noqa: E731
    zero = np.zeros(len(x))
    return (
        np.stack([squares(g["kernel"]) for g in grads]),
        np.stack([squares(g["bias"]) if "bias" in g else zero for g in grads]),
    )


identity = lambda z: z  # noqa: E731


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize(
    ("widths", "biased", "activation"),
    [
        ((4, 6, 3), True, jax.nn.relu),
        ((4, 6, 5, 3), [True, False, True], jax.nn.gelu),
        ((4, 6, 5, 3), True, [jax.nn.relu, jax.nn.softmax, jnp.sin]),  # one sees its whole row
    ],
)
def test_norms_of_gradients_that_are_formed(x64, widths, biased, activation):
    layers, (x, y) = network(1, widths, biased), data(2, 7, 4)
    functions = activation
    if callable(activation):
        functions = [activation] * (len(layers) - 1) + [identity]
    kernels, biases = formed(layers, x, cross_entropy, (y,), functions)

    @jax.jit
    def measured(layers, x, y):
        signals = layer_signals(layers, x, cross_entropy, y, activation=activation)
        norms = per_example_gradient_norms(layers, x, cross_entropy, y, activation=activation)
        return signals, squared_norms_by_layer(layers, signals), norms

    signals, found, norms = measured(layers, x, y)
    np.testing.assert_allclose(found[0], kernels, rtol=1e-12)
    np.testing.assert_allclose(found[1], biases, rtol=1e-12)
    np.testing.assert_allclose(norms, np.sqrt((kernels + biases).sum(0)), rtol=1e-12)
    value = lambda row, own: cross_entropy(run(layers, row, functions), own)  # noqa: E731
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(value)))(x, y)
    np.testing.assert_allclose(signals.losses, values, rtol=1e-12)
    np.testing.assert_allclose(signals.input_gradient, slopes, rtol=1e-11, atol=1e-14)


def test_signals_by_hand():
    # z_1 = 2 x + 1, h_2 = z_1^2, z_2 = 3 h_2, f = z_2^2; at x = 1: z_1 = 3, h_2 = 9, z_2 = 27.
    params = [
        {"kernel": jnp.array([[2.0]]), "bias": jnp.array([1.0])},
        {"kernel": jnp.array([[3.0]]), "bias": None},
    ]
    square = lambda y: jnp.square(y[:, 0])  # noqa: E731
    signals = layer_signals(params, jnp.array([[1.0]]), square, activation=jnp.square)
    assert [h.item() for h in signals.inputs] == [1, 9]
    assert [d.item() for d in signals.deltas] == [2 * 27 * 3 * 2 * 3, 2 * 27]
    assert (signals.input_gradient.item(), signals.losses.item()) == (1944, 729)
    norm = per_example_gradient_norms(params, jnp.array([[1.0]]), square, activation=jnp.square)
    np.testing.assert_allclose(norm, [np.sqrt(972**2 * (1 + 1) + 54**2 * 81)], rtol=1e-6)


@jax.jit
def both(layers, x, y):
    squares = lambda v, w: jnp.square(v - w).sum(axis=1)  # noqa: E731
    functions = [jnp.tanh, identity]

    def value(layers, row, own):
        return squares(run(layers, row, functions)[None], own[None])[0]

    grads = jax.vmap(jax.grad(value), (None, 0, 0))(layers, x, y)
    slow = sum(jnp.square(g).reshape(len(x), -1).sum(1) for g in jax.tree.leaves(grads))
    return per_example_gradient_norms(layers, x, squares, y, activation=jnp.tanh), slow**0.5


@given(st.integers(0, 2**32 - 1), st.floats(-3, 3), st.floats(-3, 3))
def test_norms_at_any_scale(seed, log_x, log_kernel):
    layers, (x, _) = network(seed, (5, 4, 2)), data(seed, 6, 5)
    layers = jax.tree.map(lambda a: np.float32(a * 10**log_kernel), layers)
    x = np.float32(x * 10**log_x)
    fast, slow = both(layers, x, x[:, :2])
    np.testing.assert_allclose(fast, slow, rtol=1e-4, atol=1e-30)


class Net(nn.Module):
    """Dense_0, Dense_1, Dense_2."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.tanh(nn.Dense(3, use_bias=i == 0)(x))
        return nn.Dense(3)(x)


def test_layers_are_in_the_order_of_their_numbers():
    named = {f"Dense_{i}": {"kernel": np.full((1, 1), i, np.float32)} for i in range(12)}
    for params in (named, dict(sorted(named.items())), dict(reversed(named.items()))):
        assert [layer.kernel.item() for layer in mlp_layers(params)] == list(range(12))


@pytest.mark.parametrize(
    ("net", "activation"),
    [(Net(), nn.tanh), (nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)]), nn.relu)],
    ids=["compact", "sequential"],
)
def test_parameters_of_a_linen_network(net, activation):
    x, _ = data(0, 5, 3, dtype=np.float32)
    variables = jax.jit(net.init)(jax.random.key(0), x)
    loss = lambda outputs: jnp.exp(outputs).sum(axis=1)  # noqa: E731
    value = lambda v, row: loss(net.apply(v, row[None]))[0]  # noqa: E731
    grads = jax.jit(jax.vmap(jax.grad(value), (None, 0)))(variables, x)
    expected = sum(np.square(g).reshape(5, -1).sum(1) for g in jax.tree.leaves(grads)) ** 0.5
    for params in (variables, variables["params"]):
        params = dict(reversed(params.items()))  # the order of the mapping means nothing
        found = norms(params, x, loss, activation=activation)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_sums_are_of_float32_whatever_the_network_is():
    first = lambda y: y[:, 0]  # noqa: E731
    for dtype, entry in ((jnp.bfloat16, 1.0), (jnp.float16, 300.0)):
        # 513 is no bfloat16, 300^2 no float16.
        params = [{"kernel": jnp.ones((512, 1), dtype), "bias": jnp.zeros(1, dtype)}]
        x = jnp.full((1, 512), entry, dtype)
        found = norms(params, x, first)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, [np.sqrt(1 + 512 * entry**2)], rtol=1e-6)


def test_a_network_of_bfloat16_is_near_the_wide_one():
    layers, (x, y) = network(1, (8, 16, 3), dtype=jnp.bfloat16), data(2, 7, 8, dtype=jnp.bfloat16)
    found = norms(layers, x, cross_entropy, y, activation=jnp.tanh)
    wide = jax.tree.map(np.float32, (layers, x))
    kernels, biases = formed(*wide, cross_entropy, (y,), [jnp.tanh, identity])
    np.testing.assert_allclose(found, np.sqrt((kernels + biases).sum(0)), rtol=0.05)


def test_no_example_sees_another():
    layers, (x, y) = network(1, (4, 6, 3), dtype=np.float32), data(2, 4, 4, dtype=np.float32)
    alone = norms(layers, x, cross_entropy, y)
    bad = x.copy()
    bad[2] = np.nan
    spoilt = norms(layers, bad, cross_entropy, y)
    assert np.isnan(spoilt[2])
    np.testing.assert_array_equal(np.delete(spoilt, 2), np.delete(alone, 2))
    # A loss and an activation that look at their batch find one row in it.
    centred = lambda outputs: jnp.square(outputs - outputs.mean(axis=0, keepdims=True)).sum(axis=1)  # noqa: E731
    assert norms(layers, x, centred).tolist() == [0, 0, 0, 0]
    functions = (lambda z: z - z.mean(axis=0, keepdims=True), identity)
    per_row = norms(layers, x, cross_entropy, y, activation=functions)
    kernels, biases = formed(layers, x, cross_entropy, (y,), functions)
    np.testing.assert_allclose(per_row, np.sqrt((kernels + biases).sum(0)), rtol=1e-5)


def derivatives(function):
    """Gradient, and its derivative along a direction."""
    return jax.jit(lambda at, along: jax.jvp(jax.grad(function), (at,), (along,)))


def test_where_the_gradient_is_zero_so_are_its_derivatives():
    ones = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
    params = [{"kernel": ones(2, 3), "bias": 0 * ones(3)}, {"kernel": ones(3, 1)}]
    x = np.array([[-1.0, -2.0], [1.0, 2.0]], np.float32)  # the first one's ReLUs are all off
    first = lambda y: y[:, 0]  # noqa: E731
    found = norms(params, x, first)
    assert found[0] == 0 and found[1] > 0
    dead = derivatives(lambda p: norms(p, x, first)[0])(params, params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(dead))
    total = derivatives(lambda p: norms(p, x, first).sum())(params, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(total))
    # An input of zeros, which no ReLU hides: |x| has no derivative there.
    params, x = [{"kernel": ones(2, 1)}], 0 * ones(1, 2)
    at_zero = derivatives(lambda v: norms(v[0], v[1], first)[0])((params, x), (params, x + 1))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(at_zero))


@pytest.mark.slow  # seconds of compiling
def test_first_and_second_derivatives_of_a_penalty_on_the_norms(x64):
    layers, (x, y) = network(1, (2, 3, 3)), data(2, 4, 2)
    flat, unravel = ravel_pytree((layers, x))
    penalty = jax.jit(lambda v: norms(*unravel(v), cross_entropy, y, activation=jnp.tanh).sum())
    along = np.random.default_rng(0).normal(size=flat.shape)
    both, step = derivatives(penalty), 1e-5 * along
    gradient, second = both(flat, along)
    by_values = (penalty(flat + step) - penalty(flat - step)) / 2e-5
    np.testing.assert_allclose(gradient @ along, by_values, rtol=1e-7)
    near = [both(flat + s, along)[0] for s in (step, -step)]
    np.testing.assert_allclose(second, (near[0] - near[1]) / 2e-5, rtol=1e-5, atol=1e-7)


def test_under_jit_and_vmap():
    nets = [network(s, (4, 5, 3), dtype=np.float32) for s in range(3)]
    x, y = data(2, 6, 4, dtype=np.float32)
    one = lambda layers: per_example_gradient_norms(layers, x, cross_entropy, y)  # noqa: E731
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *nets)
    found = jax.jit(jax.vmap(one))(stacked)
    for row, net in zip(found, nets, strict=True):
        np.testing.assert_allclose(row, norms(net, x, cross_entropy, y), rtol=1e-5)


def test_memory_is_that_of_the_activations():
    layers, x = network(0, (256, 256, 256), dtype=np.float32), jnp.zeros((64, 256))
    memory = norms.lower(layers, x, lambda y: y.sum(axis=1)).compile().memory_analysis()
    gradients = 64 * sum(leaf.size * 4 for leaf in jax.tree.leaves(layers))
    assert memory.temp_size_in_bytes < gradients / 20


KERNEL, X = jnp.ones((2, 3)), jnp.ones((4, 2))
GOOD = [{"kernel": KERNEL}]


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (KERNEL, r"sequence or a mapping of layers, got .*Array"),
        ("kernel", r"sequence or a mapping of layers, got .*str"),
        ([], r"at least one layer, got none"),
        ({}, r"at least one layer, got none"),
        ([KERNEL], r"layer 0 must be a mapping of kernel and bias, got .*Array"),
        ({"Dense_0": {"weight": KERNEL}}, r"Dense_0 must be .*, got \['weight'\]"),
        ([{"kernel": KERNEL, "scale": 1}], r"got \['kernel', 'scale'\]"),
        ({"Dense_0": {}, "Conv_1": {}}, r"such as Dense_0, Dense_1; got \['Conv_1', 'Dense_0'\]"),
        ({"a_1": {}, "a_01": {}}, r"got \['a_01', 'a_1'\]"),
        ({"hidden": {}}, r"got \['hidden'\]"),
        ([{"kernel": jnp.ones((2, 3, 1))}], r"must be \[in, out\], got shape \(2, 3, 1\)"),
        ([{"kernel": KERNEL, "bias": jnp.ones((1, 3))}], r"\(1, 3\), but its .* needs \(3,\)"),
        (GOOD + GOOD, r"of layer 1 has 2 inputs, but the layer before it has 3 outputs"),
    ],
)
def test_parameters_of_another_layout_are_refused(params, match):
    with pytest.raises(ValueError, match=match):
        mlp_layers(params)


@pytest.mark.parametrize(
    ("x", "loss", "args", "activation", "match"),
    [
        (X[0], jnp.sum, (), jnp.tanh, r"x must be \[B, 2\] .*, got shape \(2,\)"),
        (X[:, :1], jnp.sum, (), jnp.tanh, r"x must be \[B, 2\] .* \(2, 3\), got shape \(4, 1\)"),
        (X, lambda y: y, (), jnp.tanh, r"shape \(1,\) for a batch of one, got \(1, 3\)"),
        (X, jnp.sum, (), jnp.tanh, r"shape \(1,\) for a batch of one, got \(\)"),
        (X, jnp.add, (jnp.ones(3),), jnp.tanh, r"4 of them, got an array of shape \(3,\)"),
        (X, jnp.add, (1.0,), jnp.tanh, r"4 of them, got an array of shape \(\)"),
        (X, jnp.sum, (), [jnp.tanh] * 2, r"2 activations for 1 layers"),
        (X, jnp.sum, (), [jnp.sum], r"must keep the shape \(3,\) of its row, got \(\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, loss, args, activation, match):
    with pytest.raises(ValueError, match=match):
        layer_signals(GOOD, x, loss, *args, activation=activation)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="the kernel of layer 0 must be real and floating, got int"):
        mlp_layers([{"kernel": jnp.ones((2, 3), int)}])
    with pytest.raises(TypeError, match="x must be real and floating, got uint8"):
        layer_signals(GOOD, X.astype("uint8"), jnp.sum)
    with pytest.raises(TypeError, match="the loss must be real and floating, got int32"):
        layer_signals(GOOD, X, lambda y: jnp.zeros(len(y), int))


@pytest.mark.parametrize("activation", ["tanh", None, [jnp.tanh, "relu"]])
def test_what_is_no_activation_is_refused(activation):
    with pytest.raises(TypeError, match="must be a function or a sequence of functions, got "):
        layer_signals([{"kernel": jnp.eye(2)}] * 2, X, jnp.sum, activation=activation)
