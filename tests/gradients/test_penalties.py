"""Penalties: closed forms, finite differences in float64, moments of the points, zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from blogjax.core.random import fold_in_rows
from blogjax.gradients.penalties import (
    dragan_points,
    gradient_penalty,
    input_gradient_penalty,
    interpolate,
    parameter_gradient_penalty,
    r1_penalty,
    r2_penalty,
)


def linear(w, x):
    return x.reshape(x.shape[0], -1) @ w


def wave(w, x):
    """A smooth critic whose gradient is known: w cos(w . x)."""
    return jnp.sin(x @ w)


def wave_slope(w, x):
    return np.abs(np.cos(x @ w)) * np.linalg.norm(w)


vectors = hnp.arrays(np.float32, 3, elements=st.floats(-4, 4, width=16))
rows = hnp.arrays(np.float32, (5, 3), elements=st.floats(-4, 4, width=16))


@jax.jit
def _all(w, x):
    return (
        gradient_penalty(wave, w, x),
        gradient_penalty(wave, w, x, target=0.5, one_sided=True),
        r1_penalty(wave, w, x),
        r2_penalty(wave, w, x),
    )


@given(vectors, rows)
def test_critics_penalties_are_the_closed_forms(w, x):
    n = wave_slope(w.astype(np.float64), x.astype(np.float64))
    expected = ((n - 1) ** 2, np.maximum(n - 0.5, 0) ** 2, n**2 / 2, n**2 / 2)
    for got, want in zip(_all(w, x), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4)


def test_a_norm_runs_over_all_axes_of_an_image():
    w = np.arange(12.0)
    got = gradient_penalty(linear, jnp.asarray(w), jnp.ones((2, 2, 3, 2)))
    np.testing.assert_allclose(got, 2 * [(np.sqrt((w**2).sum()) - 1) ** 2], rtol=1e-6)


NORMS = [(ord, power) for ord in (1, 2, float("inf")) for power in (1, 2)]


def squared_error(w, x, y):
    return (x @ w - y) ** 2


@jax.jit
def _loss_norms(w, x, y):
    return [input_gradient_penalty(squared_error, w, x, y, ord=o, power=p) for o, p in NORMS]


@given(vectors, rows)
def test_a_losss_penalties_are_numpys_norms(w, x):
    y = np.arange(5, dtype=np.float32)
    slope = 2 * (x.astype(np.float64) @ w - y)[:, None] * w
    for got, (ord, power) in zip(_loss_norms(w, x, y), NORMS, strict=True):
        want = np.linalg.norm(slope, ord, axis=1) ** power
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


def test_inputs_without_entries_have_no_slope():
    w, x = jnp.ones(0), jnp.ones((2, 0))
    norms = lambda x: [  # noqa: E731
        input_gradient_penalty(linear, w, x, ord=ord, power=power) for ord, power in NORMS
    ]
    np.testing.assert_array_equal(jax.jit(norms)(x), np.zeros((6, 2)))


def test_reductions():
    w, x, y = jnp.array([1.0, 2.0]), jnp.eye(2), jnp.zeros(2)  # gradients 2 w and 4 w
    wanted = {"none": [20.0, 80.0], "mean": 50.0, "sum": 100.0}

    @jax.jit
    def all_of_them(w, x, y):
        penalty = input_gradient_penalty
        return [penalty(squared_error, w, x, y, reduction=reduction) for reduction in wanted]

    for got, want in zip(all_of_them(w, x, y), wanted.values(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_derivatives_are_those_of_differences(x64, order):
    def critic(w, x, y):
        return jnp.sin(x @ w[:2]) + jnp.tanh(x @ w[2:]) * y

    y = jnp.array([0.5, -1.0])

    def penalties(w):
        return [
            gradient_penalty(critic, w, x, y),
            gradient_penalty(critic, w, x, y, target=0.1, one_sided=True),
            r1_penalty(critic, w, x, y),
            r2_penalty(critic, w, x, y),
            *(input_gradient_penalty(critic, w, x, y, ord=o, power=p) for o, p in NORMS),
            parameter_gradient_penalty(lambda w: critic(w, x, y).mean(), w)[None],
        ]

    def mixed(w):
        return sum((i + 1) * jnp.sum(p) for i, p in enumerate(penalties(w))) / 10

    x, w = np.array([[0.3, -1.0], [1.1, 0.7]]), np.random.default_rng(6).normal(size=4)
    check_grads(jax.jit(mixed), (w,), order=order, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_r2_passes_nothing_to_the_generator():
    def by_fake(penalty):
        return jax.grad(lambda x: penalty(wave, jnp.ones(2), x).sum())

    fake = jnp.array([[0.2, 0.4]])
    np.testing.assert_array_equal(by_fake(r2_penalty)(fake), [[0.0, 0.0]])
    assert np.all(by_fake(r1_penalty)(fake) != 0)


def test_a_zero_critic_is_finite_to_second_order():
    x = jnp.array([[1.0, 2.0], [0.0, 0.0]])

    def penalties(w):
        critic = [gradient_penalty(linear, w, x), gradient_penalty(linear, w, x, one_sided=True)]
        return jnp.stack([*critic, *_norms_at_zero(w)])

    def _norms_at_zero(w):
        return [input_gradient_penalty(linear, w, x, ord=o, power=p) for o, p in NORMS]

    w = jnp.zeros(2)
    functions = (penalties, jax.jacrev(penalties), jax.jacfwd(jax.jacrev(penalties)))
    value, slope, curvature = jax.jit(lambda w: [f(w) for f in functions])(w)
    np.testing.assert_array_equal(value, [[1.0, 1.0]] + 7 * [[0.0, 0.0]])
    np.testing.assert_array_equal(slope, np.zeros((8, 2, 2)))
    assert np.all(np.isfinite(curvature))
    squared = 2 + NORMS.index((2, 2))
    np.testing.assert_array_equal(curvature[squared], 2 * np.stack(2 * [np.eye(2)]))


def test_dead_relu_and_live_examples_side_by_side():
    def critic(w, x):
        return w * jax.nn.relu(x[:, 0])

    x = jnp.array([[-1.0], [2.0]])

    def value(w):
        return gradient_penalty(critic, w, x)

    both = jax.jit(lambda w: (value(w), jax.jacrev(value)(w)))(3.0)
    np.testing.assert_array_equal(both, [[1.0, 4.0], [0.0, 4.0]])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_gradients_are_squared_in_float32(dtype):
    @jax.jit
    def penalties(w, x):
        return (
            gradient_penalty(linear, w, x),
            r1_penalty(linear, w, x),
            input_gradient_penalty(linear, w, x, ord=1),
            input_gradient_penalty(linear, w, x),
        )

    found = penalties(jnp.full(64, 300.0, dtype), jnp.zeros((2, 64), dtype))
    wanted = (2399.0**2, 2400.0**2 / 2, 19200.0**2, 2400.0**2)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, [want, want], rtol=1e-6)


def test_under_jit_and_mapped_over_critics():
    many = np.random.default_rng(0).normal(size=(3, 2))
    x = np.random.default_rng(1).normal(size=(4, 2))
    got = jax.jit(jax.vmap(lambda w: gradient_penalty(wave, w, jnp.asarray(x, jnp.float32))))(many)
    want = [(wave_slope(w, x) - 1) ** 2 for w in many]
    np.testing.assert_allclose(got, want, atol=1e-5)


def keys_of(row):
    return fold_in_rows(jax.random.key(3), jnp.asarray(row))


def test_interpolated_points_lie_on_their_segment():
    row = np.arange(400)
    real, fake = jnp.full((400, 2, 3), 5.0), jnp.full((400, 2, 3), 1.0)
    u = (interpolate(keys_of(row), real, fake) - 1) / 4
    np.testing.assert_allclose(u, np.broadcast_to(u[:, :1, :1], u.shape), atol=1e-6)
    flat = np.sort(u[:, 0, 0])  # Kolmogorov: 1.63 / sqrt(400) is passed by chance in 1 of 100
    assert abs(flat - np.linspace(0, 1, 400)).max() < 1.63 / 20
    flipped = interpolate(keys_of(row[::-1]), real, fake)[::-1]
    np.testing.assert_allclose(flipped, 1 + 4 * u, rtol=1e-6)
    swapped = (interpolate(keys_of(row), fake, real) - 1) / 4
    np.testing.assert_allclose(u + swapped, np.ones((400, 2, 3)), atol=1e-6)


def test_points_keep_their_dtype():
    narrow, wide = jnp.ones((3, 2), jnp.bfloat16), jnp.zeros((3, 2))
    same = interpolate(jax.random.key(0), narrow, narrow)
    assert same.dtype == jnp.bfloat16
    np.testing.assert_array_equal(same, narrow)
    assert interpolate(jax.random.key(0), narrow, wide).dtype == jnp.float32
    assert dragan_points(jax.random.key(0), narrow).dtype == jnp.bfloat16


@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_moments_of_dragans_points(noise):
    points = jax.jit(lambda row, x: dragan_points(keys_of(row), x, noise=noise, scale=0.5, std=4.0))
    real = jnp.full((4000, 2), 3.0)
    moved = (np.asarray(points(np.arange(4000), real)) - 3) / 2
    # a u: mean 1/4, variance 1/9 - 1/16, and the common a gives covariance 1/3 / 4 - 1/16.
    mean, cov = (0.25, [[7 / 144, 1 / 48], [1 / 48, 7 / 144]])
    if noise == "normal":
        mean, cov = 0.0, np.eye(2)
    np.testing.assert_allclose(moved.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(moved.T), cov, atol=0.005 if noise == "uniform" else 0.07)
    again = points(np.arange(4000)[::-1], real)[::-1]
    np.testing.assert_allclose((again - 3) / 2, moved, atol=1e-6)


def test_dragan_takes_the_batchs_deviation():
    real = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) * [1, 2, 3, 4]
    real = jnp.asarray(real, jnp.float32)
    got = dragan_points(jax.random.key(1), real)
    want = dragan_points(jax.random.key(1), real, std=np.asarray(real, np.float64).std())
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert not np.any(got == real)


HESSIAN = np.array([[2.0, 0.5], [0.5, 1.0]], np.float32)


def quadratic(params, scale):
    theta = jnp.stack([params["a"], params["b"][0]])
    return scale * theta @ HESSIAN @ theta / 2


@pytest.mark.parametrize("method", ["exact", "difference"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_parameter_penalty_of_a_quadratic(method, dtype):
    theta = np.array([1.0, -3.0])
    params = {"a": jnp.asarray(theta[0], dtype), "b": jnp.asarray(theta[1:], dtype)}

    def penalty(params, scale):
        return parameter_gradient_penalty(quadratic, params, scale, method=method, step=0.1)

    value, slope = jax.jit(jax.value_and_grad(penalty))(params, 2.0)
    gradient = 2 * HESSIAN @ theta
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, gradient @ gradient, rtol=1e-6)
    want = 2 * 2 * HESSIAN @ gradient
    assert slope["a"].dtype == dtype
    rtol = 4e-3 if dtype == jnp.bfloat16 else 2e-4
    np.testing.assert_allclose([float(slope["a"]), float(slope["b"][0])], want, rtol=rtol)


@pytest.mark.slow  # seconds of compiling
def test_by_the_batch_the_exact_penalty_is_right_and_the_difference_refuses():
    params = {"a": jnp.array(1.0), "b": jnp.array([-3.0])}

    def penalty(scale, method):
        return parameter_gradient_penalty(quadratic, params, scale, method=method)

    gradient = HESSIAN @ [1.0, -3.0]
    by_scale = jax.grad(penalty)(2.0, "exact")
    np.testing.assert_allclose(by_scale, 2 * 2 * gradient @ gradient, rtol=1e-6)
    for wrap in (lambda f: f, lambda f: jax.jit(f, static_argnums=1)):
        with pytest.raises(ValueError, match=r"'difference' .* of shape \(\): take .*'exact'"):
            jax.grad(wrap(penalty))(2.0, "difference")

    # Also where the loss closes over it, under jit or not.
    def closed(scale):
        return parameter_gradient_penalty(
            lambda p: quadratic(p, scale), params, method="difference"
        )

    for function in (closed, jax.jit(closed)):
        with pytest.raises(ValueError, match=r"one that it closes over, of shape \(\): take"):
            jax.grad(function)(2.0)

    def forward(a):
        return parameter_gradient_penalty(quadratic, params | {"a": a}, 1.0, method="difference")

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(forward, (1.0,), (1.0,))


def test_the_differences_error_is_of_first_order_in_the_step(x64):
    def loss(theta):
        return jnp.sum(jnp.exp(theta) * jnp.array([1.0, 2.0]))

    theta = np.array([0.3, -0.7])
    gradient = np.exp(theta) * [1, 2]
    slope = jax.jit(
        jax.grad(lambda t, r: parameter_gradient_penalty(loss, t, method="difference", step=r))
    )
    errors = [np.abs(slope(theta, r) - 2 * gradient**2).max() for r in (0.1, 0.05, 1e-5)]
    assert 1.9 < errors[0] / errors[1] < 2.2
    assert errors[2] < 2e-4


@pytest.mark.parametrize("method", ["exact", "difference"])
@pytest.mark.parametrize("trace", [jax.jit, jax.checkpoint])
def test_the_derivative_may_be_taken_when_the_trace_is_over(trace, method):
    """sum_i (w_{r_i})^2: the penalty is 4 sum w^2 over the rows, its gradient 8 w on them."""

    def penalty(w, rows, step):
        loss = lambda w: jnp.sum(w[rows] ** 2)  # noqa: E731
        return parameter_gradient_penalty(loss, w, method=method, step=step)

    rows = jnp.array([2, 0])
    slope = jax.grad(trace(penalty))(jnp.array([1.0, 2.0, 3.0]), rows, 0.01)
    np.testing.assert_allclose(slope, [8.0, 0.0, 24.0], rtol=1e-3)


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_parameters_are_real_numbers(method):
    def penalty(params):
        return parameter_gradient_penalty(lambda p: p["a"] ** 2, params, method=method)

    assert penalty({"a": 3.0, "none": None}) == 36
    with pytest.raises(TypeError, match="parameter steps is int32, but must be real and floating"):
        penalty({"a": jnp.float32(3.0), "steps": jnp.int32(1)})


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_the_parameter_penalty_at_a_minimum(method):
    def penalty(theta):
        return parameter_gradient_penalty(lambda t: jnp.sum(t**2), theta, method=method)

    value, slope = jax.jit(jax.value_and_grad(penalty))(jnp.zeros(3))
    assert value == 0
    np.testing.assert_array_equal(slope, np.zeros(3))
    many = jax.vmap(penalty)(jnp.array([[0.0, 0.0], [1.0, 2.0]]))
    np.testing.assert_allclose(many, [0.0, 20.0], rtol=1e-6)


def by(step):
    return {"method": "difference", "step": step}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: gradient_penalty(linear, jnp.ones((3, 1)), x), r"\(1, 1\)"),
        (
            lambda x: gradient_penalty(linear, jnp.ones(3), x, target=x),
            r"target has shape \(4, 3\)",
        ),
        (lambda x: r1_penalty(lambda w, x: x.mean(), None, x), r"shape \(\)"),
        (lambda x: input_gradient_penalty(linear, jnp.ones(3), x, ord=3), "ord=3 .* 1, 2, inf"),
        (lambda x: input_gradient_penalty(linear, jnp.ones(3), x, power=3), "power=3"),
        (
            lambda x: input_gradient_penalty(linear, jnp.ones(3), x, reduction="max"),
            "'none', 'mean'",
        ),
        (lambda x: parameter_gradient_penalty(linear, jnp.ones(3), x), r"loss has shape \(4,\)"),
        (lambda x: parameter_gradient_penalty(linear, x, x, method="fd"), "'exact', 'difference'"),
        (lambda x: parameter_gradient_penalty(jnp.sum, x, **by(x)), r"step has shape \(4, 3\)"),
        (lambda x: parameter_gradient_penalty(jnp.sum, x, **by(0.0)), "step=0.0 must be above 0"),
        (lambda x: interpolate(jax.random.key(0), x, x[:2]), r"\(4, 3\).*\(2, 3\)"),
        (lambda x: dragan_points(jax.random.key(0), x, noise="cube"), "'uniform', 'normal'"),
        (lambda x: dragan_points(jax.random.key(0), x, std=x), r"std has shape \(4, 3\)"),
        (lambda x: dragan_points(jax.random.split(jax.random.key(0), 3), x), r"\(3,\).*\(4"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((4, 3)))


def test_integers_are_refused():
    images = jnp.ones((4, 3), jnp.uint8)
    for call in (
        lambda: interpolate(jax.random.key(0), images, images),
        lambda: dragan_points(jax.random.key(0), images),
        lambda: r1_penalty(linear, jnp.ones(3), images),
    ):
        with pytest.raises(TypeError, match="x is uint8"):
            call()
