import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from scipy.integrate import solve_ivp

from blogjax.gradients.adversarial import fast_gradient
from blogjax.gradients.sharpness import (
    flooding,
    gradient_norm_penalty,
    implicit_gradient_regularization,
    sam_gradient,
)

SAM = jax.jit(sam_gradient, static_argnums=0, static_argnames=("has_aux",))
GNP = jax.jit(gradient_norm_penalty, static_argnums=0)
IGR = jax.jit(implicit_gradient_regularization, static_argnums=0, static_argnames=("has_aux",))

RNG = np.random.default_rng(0)
ROOT = RNG.normal(size=(4, 4))
H = ROOT @ ROOT.T / 4 + 0.1 * np.eye(4)
THETA = RNG.normal(size=4)


def quadratic(theta, scale=1.0):
    return scale * theta @ (jnp.asarray(H, theta.dtype) @ theta) / 2


def quartic(theta):
    """L = theta' H theta / 2 + sum theta^4 / 4: g = H theta + theta^3, H + 3 diag(theta^2)."""
    return quadratic(theta) + jnp.sum(theta**4) / 4


def slope(theta):
    return H @ theta + theta**3


def curvature(theta):
    return H + 3 * np.diag(theta**2)


def tree_loss(params, x, y):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["in"]) @ params["out"] - y))


TREE = {"in": RNG.normal(size=(3, 5)), "out": RNG.normal(size=5)}
BATCH = RNG.normal(size=(16, 3)), RNG.normal(size=16)


def as_jax(tree, dtype=jnp.float32):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def tree_slope(params, x, y):
    """float64 numpy: the gradient of `tree_loss`."""
    hidden = np.tanh(x @ params["in"])
    residual = 2 * (hidden @ params["out"] - y) / len(y)
    inner = residual[:, None] * params["out"] * (1 - hidden**2)
    return {"in": x.T @ inner, "out": hidden.T @ residual}


def sam_np(params, x, y, rho, names=("in", "out")):
    g = tree_slope(params, x, y)
    size = np.sqrt(sum(np.sum(g[k] ** 2) for k in names))
    moved = {k: v + rho * g[k] / size * (k in names) for k, v in params.items()}
    return tree_slope(moved, x, y)


@given(seed=st.integers(0, 99), rho=st.sampled_from([0.0, 0.05, 2.0]), e=st.integers(-55, 40))
def test_sam_on_a_quadratic(seed, rho, e):
    """H (theta + rho H theta / |H theta|), at sizes of g where squares leave float32."""
    theta = np.random.default_rng(seed).normal(size=4)
    value, grads = SAM(quadratic, as_jax(theta), 2.0**e, rho=rho)
    g = H @ theta
    np.testing.assert_allclose(value, 2.0**e * theta @ g / 2, rtol=1e-5)
    expected = 2.0**e * H @ (theta + rho * g / np.linalg.norm(g))
    np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=2.0**e * 1e-5)


def test_sam_of_a_tree_has_one_norm_and_a_mask_says_what_moves():
    params, batch = as_jax((TREE, BATCH))
    cases = [
        (True, ("in", "out")),
        ({"in": True, "out": False}, ("in",)),
        (lambda p: {k: k == "out" for k in p}, ("out",)),
    ]
    for mask, names in cases:
        value, grads = jax.jit(
            lambda p, m=mask: sam_gradient(tree_loss, p, *batch, rho=0.3, mask=m)
        )(params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            grads,
            sam_np(TREE, *BATCH, 0.3, names),
        )
        np.testing.assert_allclose(value, tree_loss(params, *batch), rtol=1e-6)


def test_a_mask_of_the_embedding_is_fgm_of_the_post():
    """The gradient of all parameters where `fast_gradient` has moved one of them."""
    params, batch = as_jax((TREE, BATCH))
    moved = lambda p, w, *b: tree_loss({**p, "in": w}, *b)  # noqa: E731

    @jax.jit
    def both(params):
        r = fast_gradient(moved, params, params["in"], *batch, epsilon=0.5, per_example=False)
        mask = {"in": True, "out": False}
        _, grads = sam_gradient(tree_loss, params, *batch, rho=0.5, mask=mask)
        return grads, jax.grad(tree_loss)({**params, "in": params["in"] + r}, *batch)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *both(params))


def test_gradient_norm_penalty(x64):
    """Exact on a quadratic; elsewhere what it misses of grad (L + alpha rho |g|) is O(rho^2)."""
    theta = as_jax(THETA, jnp.float64)
    g = H @ THETA
    for alpha in (0.0, 0.3, 1.0):
        value, grads = GNP(quadratic, theta, rho=0.5, alpha=alpha)
        np.testing.assert_allclose(grads, g + alpha * 0.5 * H @ g / np.linalg.norm(g), rtol=1e-12)
        np.testing.assert_allclose(value, THETA @ g / 2, rtol=1e-12)
    g, missed = slope(THETA), []
    for rho in (0.1, 0.01, 0.001):
        expected = g + 0.3 * rho * curvature(THETA) @ g / np.linalg.norm(g)
        missed.append(np.linalg.norm(GNP(quartic, theta, rho=rho, alpha=0.3)[1] - expected))
    np.testing.assert_allclose(np.log10(np.divide(missed[:-1], missed[1:])), 2, atol=0.1)


def test_zero_gradients_are_finite_and_optax_sam_is_not():
    """Erratum of optax 0.2.8: g / |g| is NaN at a minimum, and the parameters with it."""
    zero = {"w": jnp.zeros(4)}
    loss = lambda p: quadratic(p["w"])  # noqa: E731
    for method, options in (
        (sam_gradient, {"rho": 0.1}),
        (gradient_norm_penalty, {"rho": 0.1, "alpha": 0.5}),
        (implicit_gradient_regularization, {"learning_rate": 0.1}),
    ):
        value, grads = jax.jit(lambda p, m=method, o=options: m(loss, p, **o))(zero)
        assert value == 0 and not np.any(grads["w"])
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    tx = optax.contrib.sam(optax.sgd(0.1), ascent, sync_period=2, opaque_mode=True)

    @jax.jit
    def both(params):
        grad_fn = lambda p, _: jax.grad(loss)(p)  # noqa: E731
        updates, _ = tx.update(grad_fn(params, 0), tx.init(params), params, grad_fn=grad_fn)
        return updates["w"], sam_gradient(loss, params, rho=0.1)[1]["w"]

    assert np.isnan(both(zero)[0]).all()
    # Elsewhere the two agree: optax's sgd steps down the gradient that sam_gradient gives.
    theirs, ours = both({"w": as_jax(THETA)})
    np.testing.assert_allclose(theirs, -0.1 * ours, rtol=1e-5)


def test_dead_networks_and_nan():
    dead = lambda w, x: jnp.mean(jax.nn.relu(x @ w - 100.0))  # noqa: E731
    value, grads = SAM(dead, jnp.ones(3), jnp.ones((2, 3)), rho=0.1)
    assert value == 0 and not np.any(grads)
    lost = lambda w: jnp.sum(w["a"]) * jnp.nan + jnp.sum(w["b"] ** 2)  # noqa: E731
    _, grads = SAM(lost, {"a": jnp.ones(2), "b": jnp.ones(2)}, rho=0.1)
    assert np.isnan(grads["b"]).all()


METHODS = {
    "sam": (sam_gradient, {"rho": 0.3}),
    "penalty": (gradient_norm_penalty, {"rho": 0.3, "alpha": 0.4}),
    "implicit": (implicit_gradient_regularization, {"learning_rate": 0.3}),
}


def expected_np(name):
    """float64: the gradients that `METHODS` give of `tree_loss`."""
    plain, there = tree_slope(TREE, *BATCH), sam_np(TREE, *BATCH, 0.3)
    if name == "sam":
        return there
    if name == "penalty":
        return {k: 0.6 * plain[k] + 0.4 * there[k] for k in TREE}
    ends = [
        tree_slope({k: v + h * plain[k] for k, v in TREE.items()}, *BATCH) for h in (1e-5, -1e-5)
    ]
    return {k: plain[k] + 0.15 * (ends[0][k] - ends[1][k]) / 2e-5 for k in TREE}


VIEWS = [
    ("sam", "pmap"),
    ("sam", "shard_map"),
    ("sam", "check_vma"),
    ("penalty", "check_vma"),
    ("implicit", "pmap"),
    ("implicit", "check_vma"),
]


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize(("name", "view"), VIEWS)
def test_eight_devices_are_one(name, view):
    """Perturbed by the mean gradient, each on two rows; with jax's own sums of gradients or not."""
    method, options = METHODS[name]
    params, batch = as_jax((TREE, BATCH))

    def with_aux(params, x, y):
        return tree_loss(params, x, y), {"mean": jnp.mean(x), "count": jnp.int32(3)}

    def run(params, x, y):
        return method(with_aux, params, x, y, has_aux=True, axis_name="d", **options)

    if view == "pmap":
        rows = jax.tree.map(lambda a: a.reshape(8, 2, *a.shape[1:]), batch)
        mapped = jax.pmap(run, "d", in_axes=(None, 0, 0), out_axes=None)
        (value, aux), grads = mapped(params, *rows)
    else:
        mesh, specs = Mesh(np.array(jax.devices()), ("d",)), (P(), P("d"), P("d"))
        vma = view == "check_vma"
        mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=vma)
        (value, aux), grads = jax.jit(mapped)(params, *batch)
    for k, expected in expected_np(name).items():
        np.testing.assert_allclose(grads[k], expected, rtol=1e-4, atol=1e-5)
    plain = np.mean((np.tanh(BATCH[0] @ TREE["in"]) @ TREE["out"] - BATCH[1]) ** 2)
    if name == "implicit":
        plain += 0.3 / 4 * sum(np.sum(g**2) for g in tree_slope(TREE, *BATCH).values())
    np.testing.assert_allclose(value, plain, rtol=1e-5)
    np.testing.assert_allclose(aux["mean"], BATCH[0].mean(), rtol=1e-4)
    assert aux["count"] == 3 and aux["count"].dtype == jnp.int32


@pytest.mark.parametrize("check_vma", [True, False])
def test_without_sync_each_device_moves_by_its_own_rows(check_vma):
    """m-SAM: the mean over devices of SAM's gradient on two rows each."""
    params, batch = as_jax((TREE, BATCH))
    mesh = Mesh(np.array(jax.devices()), ("d",))
    body = lambda *a: sam_gradient(tree_loss, *a, rho=0.3, axis_name="d", sync=False)  # noqa: E731
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P(), check_vma=check_vma
    )
    _, grads = jax.jit(mapped)(params, *batch)
    each = [sam_np(TREE, BATCH[0][i : i + 2], BATCH[1][i : i + 2], 0.3) for i in range(0, 16, 2)]
    for k in TREE:
        expected = np.mean([g[k] for g in each], axis=0)
        np.testing.assert_allclose(grads[k], expected, rtol=1e-4, atol=1e-5)
        assert np.abs(expected - sam_np(TREE, *BATCH, 0.3)[k]).max() > 1e-3


def test_down_and_up_is_a_step_down_the_gradient_norm(x64):
    """Flooding's pair, the level between both losses: theta - eps^2/2 grad |g|^2 + O(eps^3)."""
    left = []
    for eps in (0.04, 0.02, 0.01, 0.005):
        theta = as_jax(THETA, jnp.float64)
        level = (quartic(theta) + quartic(theta - eps * slope(THETA))) / 2
        flooded = jax.jit(jax.grad(lambda p, b: flooding(quartic(p), b)))
        for _ in range(2):
            theta = theta - eps * flooded(theta, level)
        expected = THETA - eps**2 * curvature(THETA) @ slope(THETA)
        left.append(np.linalg.norm(theta - expected) / eps**3)
    assert max(left) / min(left) < 1.2 and min(left) > 0.1


def test_backstitch_is_a_step_down_the_penalised_loss(x64):
    """e1 down, e2 up: a step e1 - e2 down L + e1 e2/(2 (e1 - e2)) |g|^2, up to O(e^3)."""
    left = []
    for eps in (0.04, 0.02, 0.01, 0.005):
        down, up = eps, 0.3 * eps
        theta = THETA - down * slope(THETA)
        theta = theta + up * slope(theta)
        rate = 2 * down * up / (down - up)
        _, grads = IGR(quartic, as_jax(THETA, jnp.float64), learning_rate=rate)
        left.append(np.linalg.norm(theta - (THETA - (down - up) * grads)) / eps**3)
    assert max(left) / min(left) < 1.2 and min(left) > 0.1


def test_gradient_descent_follows_the_modified_flow(x64):
    """What parts it from the flow down L falls as gamma, down L + gamma/4 |g|^2 as gamma^2."""
    plain, modified = [], []
    solve = lambda f: solve_ivp(f, (0, 1), THETA, rtol=1e-10, atol=1e-12).y[:, -1]  # noqa: E731
    flow = solve(lambda _, t: -slope(t))
    for rate in (0.1, 0.05, 0.025, 0.0125):
        theta = THETA
        for _ in range(round(1 / rate)):
            theta = theta - rate * slope(theta)
        step = lambda _, t: -np.asarray(IGR(quartic, jnp.asarray(t), learning_rate=rate)[1])  # noqa: B023, E731
        plain.append(np.linalg.norm(theta - flow))
        modified.append(np.linalg.norm(theta - solve(step)))
    np.testing.assert_allclose(np.log2(np.divide(plain[:-1], plain[1:]))[1:], 1, atol=0.15)
    np.testing.assert_allclose(np.log2(np.divide(modified[:-1], modified[1:]))[1:], 2, atol=0.15)


def test_implicit_regularization_of_a_quadratic(x64):
    """Descent's own eigenvalue is -log(1 - gamma h)/gamma = h + gamma h^2/2 + O(gamma^2)."""
    rates, h = np.linalg.eigh(H)[1], np.linalg.eigvalsh(H)
    missed = []
    for gamma in (0.1, 0.01):
        found = [
            v @ np.asarray(IGR(quadratic, jnp.asarray(v), learning_rate=gamma)[1]) for v in rates.T
        ]
        np.testing.assert_allclose(found, h + gamma * h**2 / 2, rtol=1e-12)
        missed.append(np.abs(-np.log(1 - gamma * h) / gamma - found))
    np.testing.assert_allclose(missed[1] / (0.01**2 * h**3 / 3), 1, rtol=0.1)


def test_implicit_regularization_value_gradient_and_derivatives(x64):
    theta = as_jax(THETA, jnp.float64)
    value, grads = IGR(quartic, theta, learning_rate=0.3)
    g = slope(THETA)
    plain = THETA @ H @ THETA / 2 + np.sum(THETA**4) / 4
    np.testing.assert_allclose(value, plain + 0.3 / 4 * g @ g, rtol=1e-12)
    np.testing.assert_allclose(grads, g + 0.3 / 2 * curvature(THETA) @ g, rtol=1e-12)
    only = lambda t: implicit_gradient_regularization(quartic, t, learning_rate=0.3)[0]  # noqa: E731
    check_grads(jax.jit(only), (theta,), order=2, modes=["rev"], rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(only))(theta), grads, rtol=1e-12)


FLOODED = jax.jit(jax.value_and_grad(flooding))


@given(value=st.floats(-5, 5, width=32), level=st.floats(-5, 5, width=32))
def test_flooding(value, level):
    value, level = np.float32(value), np.float32(level)
    flooded, turned = FLOODED(value, level)
    np.testing.assert_allclose(flooded, np.abs(value - level) + level, rtol=1e-6, atol=1e-6)
    assert turned == (1 if value >= level else -1)
    assert flooded == value or value < level


def test_flooding_elsewhere():
    assert np.isnan(flooding(jnp.array(jnp.nan), 0.1))
    half = flooding(jnp.array(0.25, jnp.bfloat16), 0.3)
    assert half.dtype == jnp.bfloat16 and abs(half.astype(jnp.float32) - 0.35) < 2e-3
    flooded_sine = jax.jit(lambda x: flooding(jnp.sin(x), 0.8))
    check_grads(flooded_sine, (0.5,), order=2, modes=["rev"])
    with pytest.raises(ValueError, match=r"the loss has shape \(3,\), the level \(\)"):
        flooding(jnp.ones(3), 0.1)
    with pytest.raises(ValueError, match=r"the level \(2,\)"):
        flooding(jnp.array(1.0), jnp.ones(2))


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters(dtype):
    all_of_them = jax.jit(
        lambda p, *b: {n: m(tree_loss, p, *b, **options) for n, (m, options) in METHODS.items()}
    )
    for name, (_, grads) in all_of_them(*as_jax((TREE, *BATCH), dtype)).items():
        for k, expected in expected_np(name).items():
            assert grads[k].dtype == dtype
            np.testing.assert_allclose(grads[k].astype(jnp.float32), expected, atol=0.1)


def test_over_many_distances_and_seeds():
    theta = as_jax(RNG.normal(size=(3, 4)))
    rhos = jnp.array([0.0, 0.1, 1.0])
    many = jax.jit(jax.vmap(lambda t, r: sam_gradient(quadratic, t, rho=r)[1]))(theta, rhos)
    for t, r, grads in zip(theta, rhos, many, strict=True):
        np.testing.assert_allclose(grads, SAM(quadratic, t, rho=r)[1], rtol=1e-5, atol=1e-6)


def test_aux_is_passed_on_and_a_number_is_a_parameter():
    """Whatever aux holds, as under `jax.value_and_grad`; of L = t^2 at t = 3."""
    loss = lambda t: (t**2, {"name": "L", "t": t, "n": 3})  # noqa: E731
    slopes = {"sam": 2 * 3.3, "penalty": 0.6 * 6 + 0.4 * 6.6, "implicit": 6 + 0.15 * 2 * 6}
    for name, (method, options) in METHODS.items():
        (_, aux), slope = method(loss, 3.0, has_aux=True, **options)
        assert aux == {"name": "L", "t": 3.0, "n": 3}
        np.testing.assert_allclose(slope, slopes[name], rtol=1e-6)


def test_bad_input():
    theta = as_jax(THETA)
    for method, options in METHODS.values():
        with pytest.raises(ValueError, match=r"one number for the batch, shape \(\), got \(4,\)"):
            method(lambda t: t**2, theta, **options)
        with pytest.raises(TypeError, match="has_aux=False, so the loss must return one array"):
            method(lambda t: (t @ t, 1), theta, **options)
        with pytest.raises(TypeError, match=r"has_aux=True, so .* return a pair \(value, aux\)"):
            method(quadratic, theta, has_aux=True, **options)
    with pytest.raises(ValueError, match=r"alpha has shape \(4,\), but must be one number"):
        gradient_norm_penalty(quadratic, theta, rho=0.1, alpha=jnp.ones(4))
    with pytest.raises(TypeError, match="True and False, but this one has 'frozen'"):
        sam_gradient(quadratic, theta, rho=0.1, mask="frozen")
    with pytest.raises(TypeError, match="the loss is int32, but must be real and floating"):
        flooding(jnp.int32(0), 0.3)
    with pytest.raises(ValueError, match=r"rho=-0\.1 must be at least 0"):
        sam_gradient(quadratic, theta, rho=-0.1)
    with pytest.raises(ValueError, match=r"learning_rate=-0\.1 must be at least 0"):
        implicit_gradient_regularization(quadratic, theta, learning_rate=-0.1)
    with pytest.raises(ValueError, match="selects no leaf"):
        sam_gradient(quadratic, theta, rho=0.1, mask=False)
