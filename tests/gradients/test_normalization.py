"""GN and GraN: closed forms, slopes by numpy's own backward pass, the post's objections, zeros."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from blogjax.gradients.input_gradient import value_and_input_gradient
from blogjax.gradients.normalization import gradient_normalize

KINDS = ("gn", "gran")


def linear(params, x):
    return x.reshape(x.shape[0], -1) @ params["w"] + params["b"]


def network(params, x, act=jax.nn.leaky_relu):
    for w, b in params[:-1]:
        x = act(x @ w + b)
    w, b = params[-1]
    return (x @ w + b)[:, 0]


def weights(sizes=(3, 16, 16, 1), seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(0, a**-0.5, (a, b)).astype(dtype), rng.normal(0, 0.3, (1, b)).astype(dtype))
        for a, b in itertools.pairwise(sizes)
    ]


def numpy_leaky_network(params, x):
    """Value and input gradient in float64, written out: the oracle of the slopes."""
    h, slopes = np.asarray(x, np.float64), []
    for w, b in params[:-1]:
        z = h @ w + b
        slopes.append(np.where(z > 0, 1.0, 0.01))
        h = slopes[-1] * z
    w, b = params[-1]
    value, back = (h @ w + b)[:, 0], np.broadcast_to(w[:, 0], h.shape)
    for (w, _), slope in zip(params[-2::-1], slopes[::-1], strict=True):
        back = (back * slope) @ w.T
    return value, back


def naive(kind, value, norm, eps):
    return value / (norm + abs(value) + eps) if kind == "gn" else value * norm / (norm**2 + eps)


@jax.jit
def _linear_critics(params, x, eps, lipschitz):
    options = {"lipschitz": lipschitz}
    given, own = (
        {k: gradient_normalize(linear, kind=k, **options, **more)(params, x) for k in KINDS}
        for more in ({"eps": eps}, {})
    )
    return given, own


@pytest.mark.parametrize("eps", [0.0, 0.7])
def test_a_linear_critic_is_the_closed_form(eps):
    """Also with eps and K traced, as under `vmap` over them."""
    rng = np.random.default_rng(1)
    x, w, b = rng.normal(size=(5, 2, 3)), rng.normal(size=6), 0.3
    params = {"w": jnp.asarray(w, jnp.float32), "b": b}
    given, own = _linear_critics(params, jnp.asarray(x, jnp.float32), eps, 2.5)
    value, norm = x.reshape(5, 6) @ w + b, np.linalg.norm(w)
    for kind in KINDS:
        np.testing.assert_allclose(given[kind], 2.5 * naive(kind, value, norm, eps), rtol=2e-6)
        default = {"gn": 0.0, "gran": 0.1}[kind]
        np.testing.assert_allclose(own[kind], 2.5 * naive(kind, value, norm, default), rtol=2e-6)
    assert np.isfinite(jax.grad(lambda e: _linear_critics(params, x, e, 2.5)[0]["gran"].sum())(eps))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_slopes_of_a_piecewise_linear_critic(x64, dtype):
    params = weights()
    x = np.random.default_rng(2).normal(size=(200, 3)).astype(dtype)
    value, back = numpy_leaky_network(params, x)
    n = np.linalg.norm(back, axis=1)
    expected = {"gn": (n / (n + abs(value))) ** 2, "gran": n**2 / (n**2 + 0.1)}
    cast = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)
    for kind in KINDS:
        normalized = gradient_normalize(network, kind=kind)
        slope = jax.jit(lambda x, f=normalized: value_and_input_gradient(f, cast, x)[1])(x)
        slope = np.linalg.norm(np.asarray(slope, np.float64), axis=1)
        np.testing.assert_allclose(
            slope, expected[kind], atol=1e-6 if dtype == np.float32 else 1e-12
        )
        assert slope.max() <= 1 + 1e-6
    assert expected["gn"].min() < 0.5 < expected["gn"].max()  # not all at one end


@pytest.mark.parametrize("kind", KINDS)
def test_on_piecewise_linear_critics_the_slope_needs_no_second_derivative(x64, kind):
    """n / (n + |D|)^2 grad D, or n / (n^2 + eps) grad D; and all that is derived from it."""
    params = weights((3, 4, 1))
    x = np.random.default_rng(2).normal(size=(5, 3))

    def slope_and_more(params, x, short):
        f = gradient_normalize(network, kind=kind, piecewise_linear=short)

        def total(params, x):
            value, slope = value_and_input_gradient(f, params, x)
            return jnp.sum(value) + jnp.sum(slope**2), slope

        return jax.grad(total, (0, 1), has_aux=True)(params, x)

    both = jax.jit(lambda p, x: [slope_and_more(p, x, short) for short in (True, False)])
    short, full = both(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), short, full)
    value, back = numpy_leaky_network(params, x)
    n = np.linalg.norm(back, axis=1)
    factor = {"gn": n / (n + abs(value)) ** 2, "gran": n / (n**2 + 0.1)}[kind]
    np.testing.assert_allclose(short[1], factor[:, None] * back, rtol=1e-12)


def test_the_short_way_by_x_takes_one_derivative_and_is_another_for_smooth_critics():
    once = jax.custom_jvp(lambda x: x)

    @once.defjvp
    def _(primals, tangents):
        raise AssertionError("differentiated twice")

    sine = jax.custom_jvp(lambda k, x: jnp.sin(k * x[:, 0]))

    @sine.defjvp
    def _(primals, tangents):
        (k, x), (dk, dx) = primals, tangents
        slope = once(jnp.cos(k * x[:, 0]))
        return sine(k, x), slope * (k * dx[:, 0] + dk * x[:, 0])

    x = np.float32(np.pi / 6) + jnp.array([[-1e-1], [1e-2], [1e-1]])
    short, full = (gradient_normalize(sine, piecewise_linear=short) for short in (True, False))
    found = jax.jit(jax.grad(lambda x: short(3.0, x).sum()))(x)
    s, c = np.sin(3 * np.float64(x)), np.cos(3 * np.float64(x))
    np.testing.assert_allclose(found, 9 * abs(c) * c / (3 * abs(c) + abs(s)) ** 2, rtol=1e-4)
    with pytest.raises(AssertionError, match="differentiated twice"):
        jax.grad(lambda x: full(3.0, x).sum())(x)


def test_a_smooth_critic_breaks_the_bound(x64):
    """D = sin(3x): the slope of the quotient goes to 9 at the peak, from both sides."""
    sine = gradient_normalize(lambda k, x: jnp.sin(k * x[:, 0]))
    slope_of = jax.jit(lambda x: value_and_input_gradient(sine, 3.0, x)[1][:, 0])
    x = np.pi / 6 + np.array([-1e-1, -1e-4, 1e-4, 1e-1])
    slope = slope_of(jnp.asarray(x)[:, None])
    s, c = np.sin(3 * x), np.cos(3 * x)
    # The quotient rule, by hand, with |s| = s and n' = -9 s sign(c).
    top = 3 * c * (3 * abs(c) + s) - s * (-9 * s * np.sign(c) + 3 * c)
    np.testing.assert_allclose(slope, top / (3 * abs(c) + s) ** 2, rtol=1e-12)
    assert np.all(np.abs(slope[1:3]) > 8.98) and np.all(np.abs(slope) < 9)


def test_the_quotient_jumps_at_a_kink():
    """The post's objection. D = relu(x) + 2 relu(x - 1) is 1 at x = 1, its slope goes 1 to 3."""

    def kink(params, x):
        return (jax.nn.relu(x) + 2 * jax.nn.relu(x - 1))[:, 0]

    x = jnp.array([[1 - 1e-5], [1 + 1e-5]])
    gn, gran = jax.jit(lambda x: [gradient_normalize(kink, kind=k)(None, x) for k in KINDS])(x)
    np.testing.assert_allclose(gn, [0.5, 0.25], atol=2e-5)
    np.testing.assert_allclose(gran, [1 / 1.1, 3 / 9.1], atol=2e-5)
    np.testing.assert_allclose(gran, [0.909, 0.330], atol=5e-4)


@jax.jit
def _scaled_gn(scale, params, x):
    def scaled(params, x):
        return scale * network(params, x, jnp.tanh)

    def loss(params):
        return gradient_normalize(scaled)(params, x)

    return loss(params), jax.grad(lambda params: loss(params).sum())(params)


@given(st.integers(-90, 90), st.integers(0, 3))
def test_gn_does_not_see_the_critics_scale(exponent, seed):
    params = weights((3, 4, 1), seed, np.float32)
    x = np.random.default_rng(seed).normal(size=(5, 3)).astype(np.float32)
    value, grads = _scaled_gn(1.0, params, x)
    scaled, scaled_grads = _scaled_gn(float(2.0**exponent), params, x)
    np.testing.assert_array_equal(scaled, value)
    jax.tree.map(np.testing.assert_array_equal, scaled_grads, grads)
    np.testing.assert_allclose(_scaled_gn(3.3, params, x)[0], value, rtol=1e-5)
    np.testing.assert_allclose(_scaled_gn(-1.0, params, x)[0], -value, rtol=1e-5)


def test_gran_does_see_it():
    def scaled(scale, x):
        return scale * (x @ jnp.array([3.0, 4.0]))

    run = jax.jit(jax.vmap(gradient_normalize(scaled, kind="gran", eps=1.0), (0, None)))
    got = run(jnp.array([1.0, 2.0]), jnp.ones((1, 2)))
    np.testing.assert_allclose(got[:, 0], [7 * 5 / 26, 14 * 10 / 101], rtol=1e-6)


def test_the_gradient_by_the_last_layer_is_orthogonal_to_it(x64):
    params = weights()
    x = np.random.default_rng(3).normal(size=(16, 3))

    def cosine(kind):
        normalized = gradient_normalize(network, kind=kind)
        w, b = jax.jit(jax.grad(lambda p: normalized(p, x).mean()))(params)[-1]
        grad, last = np.append(w, b), np.append(*params[-1])
        return grad @ last / np.linalg.norm(grad) / np.linalg.norm(last)

    assert abs(cosine("gn")) < 1e-14
    assert abs(cosine("gran")) > 1e-3


@given(
    hnp.arrays(np.float32, 4, elements=st.floats(-1e3, 1e3, width=32)),
    hnp.arrays(np.float32, (3, 3), elements=st.floats(-1e3, 1e3, width=32)),
)
def test_gn_lies_between_minus_k_and_k(params, x):
    normalized = _bounded({"w": params[:3], "b": params[3]}, x)
    assert np.all(np.abs(normalized) <= 2 * (1 + 1e-6))


_bounded = jax.jit(gradient_normalize(linear, lipschitz=2.0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_critic_is_finite_to_second_order(kind):
    params = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    critic = gradient_normalize(linear, kind=kind, eps=0.0)
    x = jnp.array([[1.0, 2.0], [0.0, 0.0]])

    def loss(params, x):
        return critic(params, x).sum()

    derivatives = (loss, jax.grad(loss, (0, 1)), jax.hessian(loss))
    for leaf in jax.tree.leaves(jax.jit(lambda *a: [f(*a) for f in derivatives])(params, x)):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_one_dead_example_does_not_touch_the_others(kind):
    """relu(x) is dead at -1: value and slope 0. The formula without guards is NaN there."""

    def critic(w, x):
        return w * jax.nn.relu(x[:, 0])

    def loss(w, x):
        return gradient_normalize(critic, kind=kind, eps=0.0)(w, x)

    x = jnp.array([[-1.0], [2.0]])
    derivatives = (loss, jax.jacrev(loss), jax.jacfwd(jax.jacrev(loss)))
    value, slope, curvature = jax.jit(lambda w, x: [f(w, x) for f in derivatives])(2.0, x)
    expected = {"gn": 4 / 6, "gran": 2.0}[kind]  # D = 2 w, n = w: 2 / 3 and 2, whatever w
    np.testing.assert_allclose(value, [0.0, expected], rtol=1e-6)
    np.testing.assert_allclose(slope, [0.0, 0.0], atol=1e-7)
    np.testing.assert_allclose(curvature, [0.0, 0.0], atol=1e-7)


def test_a_dead_relu_network_with_a_bias_is_its_sign_and_flat():
    def critic(b, x):
        return b + jax.nn.relu(x[:, 0])

    x = jnp.array([[-1.0], [-2.0]])
    for kind, value in (("gn", 1.0), ("gran", 0.0)):
        normalized = gradient_normalize(critic, kind=kind)

        @jax.jit
        def value_and_slopes(b, x, f=normalized):
            return f(b, x), *jax.grad(lambda b, x: f(b, x).sum(), (0, 1))(b, x)

        for b in (0.25, -0.25):
            got, by_bias, by_x = value_and_slopes(b, x)
            np.testing.assert_array_equal(got, value * np.sign([b, b]))
            np.testing.assert_array_equal(by_bias, 0.0)
            np.testing.assert_array_equal(by_x, [[0.0], [0.0]])


@pytest.mark.slow  # seconds of compiling
def test_first_and_second_derivatives_are_those_of_differences(x64):
    def critic(w, x):
        return jnp.sin(x @ w[:2]) + jnp.tanh(x @ w[2:])

    def both(w, x):
        return [gradient_normalize(critic, kind=kind)(w, x) for kind in KINDS]

    w, x = np.random.default_rng(6).normal(size=4), np.array([[0.3, -1.0], [1.1, 0.7]])
    check_grads(jax.jit(both), (w, x), order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_critic_is_normalised_in_float32(dtype):
    """n^2 = 64 * 300^2 is beyond float16."""
    w, x = jnp.full(64, 300.0, dtype), jnp.zeros((2, 64), dtype).at[0, 0].set(0.5)
    got = jax.jit(gradient_normalize(lambda w, x: x @ w))(w, x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [150 / (2400 + 150), 0.0], rtol=1e-6)


def test_under_jit_and_mapped_over_critics_with_labels():
    rng = np.random.default_rng(7)
    many, x = (
        rng.normal(size=(3, 4, 2)).astype(np.float32),
        rng.normal(size=(5, 4)).astype(np.float32),
    )
    labels = np.array([0, 1, 1, 0, 1])

    def choose(w, x, label):
        return jnp.take_along_axis(x @ w, label[:, None], 1)[:, 0]

    got = jax.jit(jax.vmap(gradient_normalize(choose), (0, None, None)))(many, x, labels)
    w = many[:, :, labels].astype(np.float64)
    value, n = np.einsum("bi,kib->kb", x, w), np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(got, value / (n + abs(value)), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "l2"}, r"kind='l2' is unknown; valid: 'gn', 'gran'"),
        ({"eps": -1.0}, r"eps=-1\.0 must be at least 0"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"eps": jnp.ones(4)}, r"eps has shape \(4,\)"),
        ({"lipschitz": 0.0}, r"lipschitz=0\.0 must be above 0"),
        ({"lipschitz": jnp.ones(4)}, r"lipschitz has shape \(4,\)"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gradient_normalize(linear, **options)
