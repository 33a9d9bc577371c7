"""Input against parameter gradients: the post's inequality, and the one for batches."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from blogjax.gradients.gradient_bound import (
    batch_gradient_bound,
    mlp_gradient_bound,
    power_iteration_norm,
    spectral_norm,
)

ACTIVATIONS = [jax.nn.relu, jnp.tanh, jax.nn.gelu, jax.nn.softplus, jnp.sin]


def network(rng, widths, nets=(), spread=(0.3, 3.0)):
    """Gaussian layers of random scale, with a bias each."""
    layers = []
    for i, o in itertools.pairwise(widths):
        scale = rng.uniform(*spread, (*nets, 1, 1)) / np.sqrt(i)
        kernel = scale * rng.normal(size=(*nets, i, o))
        layers.append({"kernel": kernel, "bias": rng.normal(size=(*nets, o))})
    return layers


def loss(outputs, y):
    """A scalar function of the outputs with curvature of its own."""
    return jnp.sin(outputs).sum(axis=1) + jnp.square(outputs - y).sum(axis=1)


@functools.partial(jax.jit, static_argnums=(2,), static_argnames="activation")
def both(params, x, loss, *args, activation=jnp.tanh):
    """Compiled once for a whole test."""
    forms = (mlp_gradient_bound, batch_gradient_bound)
    return tuple(form(params, x, loss, *args, activation=activation) for form in forms)


def first(outputs):
    return outputs[:, 0]


def one_of(choice):
    return lambda z: jax.lax.switch(choice, ACTIVATIONS, z)


@functools.partial(jax.jit, static_argnums=0)
def many(forms, layers, x, y, choices):
    """Some forms for each of many networks, each with its activation."""

    def one(p, x, y, c):
        return [form(p, x, loss, y, activation=one_of(c)) for form in forms]

    return jax.vmap(one)(layers, x, y, choices)


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("widths", [(3, 2), (5, 4, 2), (4, 6, 3, 2), (3, 5, 1, 4, 2)])
def test_two_thousand_random_networks(x64, widths):
    """1 to 4 layers, five activations, 500 networks each; also for every kernel and bias alone."""
    rng = np.random.default_rng(len(widths))
    layers = network(rng, widths, (500,))
    x, y = rng.normal(size=(500, 2, widths[0])), rng.normal(size=(500, 2, 2))
    (bound,) = many((mlp_gradient_bound,), layers, x, y, np.arange(500) % 5)
    terms = bound.per_layer
    for lhs, rhs in (
        (bound.lhs, bound.rhs),
        (terms.kernel_lhs, terms.kernel_rhs),
        (terms.bias_lhs, terms.bias_rhs),
    ):
        assert np.isfinite(lhs).all() and (lhs >= 0).all()
        assert (lhs <= rhs * (1 + 1e-9) + 1e-12).all()
    ratio = np.asarray(bound.lhs / bound.rhs)
    assert 0.05 < np.median(ratio) < 0.9  # it says something
    with_relu = ratio.reshape(100, 5, 2)[:, 0]
    assert ((with_relu == 0).any() and (with_relu > 0).any()) or len(widths) == 2


NUMPY = {
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0, jax.nn.relu),
    "tanh": (np.tanh, lambda z: 1 / np.cosh(z) ** 2, jnp.tanh),
}


def by_hand(layers, row, y, name):
    """Both sides for one example, written out: `[layers, 2]` of kernels and biases, each.

    Also the inputs with a 1, the bounds of |delta| and the deltas, per layer.
    """
    g, slope, _ = NUMPY[name]
    h, jacobian, inputs, jacobians, slopes = row, np.eye(len(row)), [], [], []
    for i, layer in enumerate(layers):
        inputs.append(h)
        jacobians.append(jacobian)
        z = layer["kernel"].T @ h + layer["bias"]
        last = i == len(layers) - 1
        h, s = (z, np.ones_like(z)) if last else (g(z), slope(z))
        slopes.append(s)
        jacobian = s[:, None] * (layer["kernel"].T @ jacobian)
    by_output = np.cos(h) + 2 * (h - y)
    deltas = []
    for layer, s in zip(layers[::-1], slopes[::-1], strict=True):
        deltas.append(s * by_output)
        by_output = layer["kernel"] @ deltas[-1]
    deltas.reverse()
    lhs, rhs, least = [], [], []
    for layer, h, jacobian, delta in zip(layers, inputs, jacobians, deltas, strict=True):
        below = np.linalg.norm(layer["kernel"], 2) * np.linalg.norm(jacobian, 2)
        least.append(np.linalg.norm(by_output) / below)
        lhs.append([least[-1] ** 2 * (h @ h), least[-1] ** 2])
        rhs.append([np.sum(np.outer(delta, h) ** 2), delta @ delta])
    return np.array(lhs), np.array(rhs), [np.append(h, 1) for h in inputs], least, deltas


@pytest.mark.parametrize(("name", "size"), [("tanh", 4), ("relu", 6)])
def test_both_sides_written_out(x64, name, size):
    rng = np.random.default_rng(0)
    layers = network(rng, (3, 5, 4, 2))
    x, y = rng.normal(size=(size, 3)), rng.normal(size=(size, 2))
    found, batch = both(layers, x, loss, y, activation=NUMPY[name][2])
    rows = [by_hand(layers, a, b, name) for a, b in zip(x, y, strict=True)]
    lhs, rhs = (np.stack([r[side] for r in rows], axis=-1) for side in (0, 1))
    np.testing.assert_allclose(found.lhs, lhs.sum((0, 1)), rtol=1e-9)
    np.testing.assert_allclose(found.rhs, rhs.sum((0, 1)), rtol=1e-9)
    np.testing.assert_allclose(found.per_layer.kernel_lhs, lhs[:, 0], rtol=1e-9)
    np.testing.assert_allclose(found.per_layer.kernel_rhs, rhs[:, 0], rtol=1e-9)
    np.testing.assert_allclose(found.per_layer.bias_lhs, lhs[:, 1], rtol=1e-9)
    np.testing.assert_allclose(found.per_layer.bias_rhs, rhs[:, 1], rtol=1e-9)
    for t, inputs_and_one in enumerate((4, 6, 5)):
        inputs, least = (np.stack([r[k][t] for r in rows]) for k in (2, 3))
        gradient = np.mean([np.outer(r[2][t], r[4][t]) for r in rows], axis=0)
        np.testing.assert_allclose(batch.layer_rhs[t], np.sum(gradient**2), rtol=1e-9)
        s = np.linalg.svd(inputs, compute_uv=False).min() if size <= inputs_and_one else 0
        expected = s**2 / size * np.mean(least**2)
        np.testing.assert_allclose(batch.layer_lhs[t], expected, rtol=1e-8)
    np.testing.assert_allclose(batch.lhs, batch.layer_lhs.sum())
    np.testing.assert_allclose(batch.rhs, batch.layer_rhs.sum())


def test_equality_where_every_layer_has_one_output(x64):
    rng = np.random.default_rng(0)
    layers = network(rng, (4, 1, 1, 1), (50,))
    x, y = rng.normal(size=(50, 3, 4)), rng.normal(size=(50, 3, 1))
    rising = np.where(np.arange(50) % 2, 1, 3)  # tanh and softplus are nowhere flat
    (bound,) = many((mlp_gradient_bound,), layers, x, y, rising)
    np.testing.assert_allclose(bound.lhs, bound.rhs, rtol=1e-9)
    # Any function of an affine map to one number: both sides are slope^2 |w|^2 (1 + |x|^2) / |w|^2.
    layers, x, y = network(rng, (4, 1)), x[0], y[0]
    bound, _ = both(layers, x, loss, y)
    out = x @ layers[0]["kernel"] + layers[0]["bias"]
    slope = (np.cos(out) + 2 * (out - y))[:, 0]
    expected = slope**2 * (1 + np.square(x).sum(1))
    np.testing.assert_allclose(bound.lhs, expected, rtol=1e-12)
    np.testing.assert_allclose(bound.rhs, expected, rtol=1e-12)


def test_the_gradient_of_a_batch_bounds_nothing():
    """W = .5, b = -.5, x = (1, 1), y = (1, -1): nothing moves W, both inputs pull."""
    params = [{"kernel": jnp.array([[0.5]]), "bias": jnp.array([-0.5])}]
    x, y = jnp.array([[1.0], [1.0]]), jnp.array([1.0, -1.0])
    squares = lambda outputs, y: jnp.square(outputs[:, 0] - y)  # noqa: E731
    mean = lambda p, x: squares(x @ p[0]["kernel"] + p[0]["bias"][None], y).mean()  # noqa: E731
    by_params, by_input = jax.jit(jax.grad(mean, (0, 1)))(params, x)
    assert [g.item() for g in jax.tree.leaves(by_params)] == [0, 0]
    assert (2 * by_input).ravel().tolist() == [-1, 1]
    bound, batch = both(params, x, squares, y)
    assert bound.lhs.tolist() == bound.rhs.tolist() == [8, 8]
    assert batch.rhs == 0 and 0 <= batch.lhs < 1e-10


def of_one(params, x, loss, y, **options):
    return batch_gradient_bound(params, x[:1], loss, y[:1], **options)


FORMS = (mlp_gradient_bound, batch_gradient_bound, of_one)


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize(("size", "widths"), [(2, (4, 3, 2)), (4, (6, 5, 4, 2))])
def test_the_batch_form_holds_where_the_naive_one_fails(x64, size, widths):
    rng = np.random.default_rng(size)
    layers = network(rng, widths, (200,))
    x, y = rng.normal(size=(200, size, widths[0])), 3 * rng.normal(size=(200, size, 2))
    choices = np.arange(200) % 5
    alone, batch, single = many(FORMS, layers, x, y, choices)
    assert (batch.lhs > 0).sum() > 150
    assert (batch.lhs <= batch.rhs * (1 + 1e-9)).all()
    assert (batch.layer_lhs <= batch.layer_rhs * (1 + 1e-9)).all()
    assert (batch.lhs <= alone.rhs.mean(axis=1)).all()
    assert (alone.lhs.mean(axis=1) <= alone.rhs.mean(axis=1)).all()
    assert (alone.lhs.mean(axis=1) > batch.rhs).sum() > 10  # the naive form
    np.testing.assert_allclose(single.lhs, alone.lhs[:, 0], rtol=1e-9)
    np.testing.assert_allclose(single.rhs, alone.rhs[:, 0], rtol=1e-9)


def test_layers_without_a_bias():
    rng = np.random.default_rng(0)
    layers = [{"kernel": np.float32(v["kernel"])} for v in network(rng, (3, 3, 1))]
    x = np.float32(rng.normal(size=(4, 3)))
    bound, batch = both(layers, x, first)
    assert not bound.per_layer.bias_lhs.any() and not bound.per_layer.bias_rhs.any()
    np.testing.assert_allclose(bound.lhs, bound.per_layer.kernel_lhs.sum(axis=0), rtol=1e-6)
    assert not batch.layer_lhs.any()
    _, inside = both(layers, x[:3], first)
    assert (inside.layer_lhs > 0).all() and inside.lhs < inside.rhs


def test_dead_networks_have_zero_on_the_left():
    ones = lambda *widths: [  # noqa: E731
        {"kernel": np.ones((i, o), np.float32), "bias": np.ones(o, np.float32)}
        for i, o in itertools.pairwise(widths)
    ]
    dead, zero, spoilt = (ones(2, 3, 3, 1) for _ in range(3))
    dead[0]["bias"] -= 10  # all ReLUs of the first layer are off
    zero[2]["kernel"] *= 0
    spoilt[2]["kernel"][0, 0] = np.nan  # which leaves all h_t finite
    x = np.ones((2, 2), np.float32)
    for params in (dead, zero):
        alone, batch = both(params, x, first, activation=jax.nn.relu)
        for leaf in jax.tree.leaves((alone, batch)):
            assert np.isfinite(leaf).all()
        assert not alone.lhs.any() and batch.lhs == 0
        assert (alone.rhs > 0).all() and batch.rhs > 0
    alone, batch = both(spoilt, x, first, activation=jax.nn.relu)
    assert all(np.isnan(v).all() for v in (alone.lhs, alone.rhs, batch.lhs, batch.rhs))


def test_bfloat16_is_computed_in_float32():
    rng = np.random.default_rng(0)
    layers = jax.tree.map(lambda a: np.asarray(a, jnp.bfloat16), network(rng, (3, 4, 2)))
    x, y = (np.asarray(rng.normal(size=(4, d)), jnp.bfloat16) for d in (3, 2))
    half, wide = both(layers, x, loss, y), both(*jax.tree.map(np.float32, (layers, x)), loss, y)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype("float32")}
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(wide), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.slow  # seconds of compiling
def test_other_norms():
    rng = np.random.default_rng(0)
    layers = jax.tree.map(np.float32, network(rng, (5, 4, 2)))
    x, y = (np.float32(rng.normal(size=(3, d))) for d in (5, 2))
    norms = {
        "exact": spectral_norm,
        "Frobenius": lambda m: jnp.sqrt(jnp.square(m).sum((-2, -1))),
        "few": lambda m: power_iteration_norm(m, 2),
        "many": lambda m: power_iteration_norm(m, 200),
    }
    lhs = lambda norm: mlp_gradient_bound(layers, x, loss, y, activation=jnp.tanh, norm=norm).lhs  # noqa: E731
    found = jax.jit(lambda: {name: lhs(norm) for name, norm in norms.items()})()
    exact = found["exact"]
    assert (found["Frobenius"] < exact).all()
    assert (found["few"] >= exact * (1 - 1e-5)).all() and (found["few"] > exact * 1.0001).any()
    np.testing.assert_allclose(found["many"], exact, rtol=1e-3)


def test_an_orthogonal_kernel_has_spectral_norm_one():
    """The post's objection to the paper, which has the norms near 0 at the start."""
    kernel, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(7, 4)))
    np.testing.assert_allclose(spectral_norm(np.float32(kernel)), 1, rtol=1e-6)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1), st.floats(-30, 36))
def test_power_iteration_is_never_above(m, n, seed, log_scale):
    matrix = np.zeros((2, 6, 6), np.float32)  # one shape to compile; zeros change no norm
    matrix[:, :m, :n] = np.random.default_rng(seed).normal(size=(2, m, n)) * 10**log_scale
    found = POWER(matrix)
    exact = np.linalg.norm(np.float64(matrix), 2, axis=(-2, -1))
    assert (found <= exact * (1 + 1e-5)).all() and (found >= 0.9 * exact).all()
    rank_one = matrix[:, :, :1] * (matrix[:, :1, :] / 10**log_scale)
    exact = np.linalg.norm(np.float64(rank_one), axis=(-2, -1))
    np.testing.assert_allclose(POWER(rank_one), exact, rtol=1e-5)


POWER = jax.jit(power_iteration_norm)


@pytest.mark.parametrize("norm", [spectral_norm, power_iteration_norm])
def test_norms_of_narrow_and_of_empty_matrices(norm):
    matrices = [jnp.full((3, 301), 300, dtype) for dtype in (jnp.bfloat16, jnp.float16)]
    matrices += [jnp.zeros((2, 0, 3)), jnp.zeros((2, 3, 0))]
    *narrow, no_rows, no_columns = jax.jit(lambda each: [norm(m) for m in each])(matrices)
    for found in narrow:  # 300^2 is no float16, 301 no bfloat16
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, 300 * np.sqrt(3 * 301), rtol=1e-5)
    assert no_rows.tolist() == no_columns.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"\[..., m, n\], got shape \(3,\)"):
        norm(jnp.ones(3))


def test_power_iteration_over_devices():
    matrix = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    mapped = jax.shard_map(power_iteration_norm, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    np.testing.assert_allclose(jax.jit(mapped)(matrix), POWER(matrix), rtol=1e-6)


def test_power_iteration_falls_short_where_singular_values_are_close():
    matrix = jnp.diag(jnp.linspace(0.95, 1.0, 40))
    iterate = jax.jit(lambda m: [power_iteration_norm(m, k) for k in (1, 20, 2000)])
    estimates = [float(v) for v in iterate(matrix)]
    assert estimates[0] < estimates[1] < 0.9999 < estimates[2] <= 1 + 1e-6
    assert iterate(0 * matrix) == [0, 0, 0]
    assert np.isnan(iterate(np.nan * matrix)).all()


def test_what_cannot_be_bounded_is_refused():
    params = [{"kernel": np.ones((2, 1), np.float32)}]
    with pytest.raises(ValueError, match=r"at least one example, got x of shape \(0, 2\)"):
        batch_gradient_bound(params, jnp.zeros((0, 2)), first)
    empty = jax.eval_shape(lambda x: mlp_gradient_bound(params, x, first), np.zeros((0, 2)))
    assert empty.lhs.shape == (0,) and empty.per_layer.kernel_lhs.shape == (1, 0)
    with pytest.raises(ValueError, match=r"x must be \[B, 2\]"):
        mlp_gradient_bound(params, jnp.ones((3, 3)), first)
    with pytest.raises(ValueError, match="iterations=0 must be at least 1"):
        power_iteration_norm(jnp.ones((3, 3)), 0)
