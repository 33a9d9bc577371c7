import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blogjax.gradients.adversarial import fast_gradient, projected_gradient

fgm = jax.jit(fast_gradient, static_argnums=0, static_argnames=("norm", "per_example"))
pgd = jax.jit(
    projected_gradient, static_argnums=0, static_argnames=("steps", "norm", "per_example")
)

RNG = np.random.default_rng(0)
X, W, Y = RNG.normal(size=(8, 5)), RNG.normal(size=5), np.sign(RNG.normal(size=8))


def logistic(params, x, y):
    return jnp.logaddexp(0.0, -y * (x @ params))


def logistic_np(w, x, y):
    return np.logaddexp(0.0, -y * (x @ w))


def mlp(params, x, y):
    hidden = jnp.tanh(x @ params["in"])
    return jnp.square(hidden @ params["out"] - y)


MLP = {"in": RNG.normal(size=(5, 7)), "out": RNG.normal(size=7)}


def as_jax(tree, dtype=jnp.float32):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def test_closed_form_of_a_linear_model():
    """The logistic loss is worst at margin m - eps |w|_dual, where every method must arrive."""
    x, w, y = as_jax((X, W, Y))
    for norm, r, dual in (
        ("l2", -Y[:, None] * W / np.linalg.norm(W), np.linalg.norm(W)),
        ("linf", -Y[:, None] * np.sign(W), np.abs(W).sum()),
    ):
        fast = fgm(logistic, w, x, y, epsilon=0.3, norm=norm)
        np.testing.assert_allclose(fast, 0.3 * r, rtol=1e-5, atol=1e-7)
        worst = np.logaddexp(0.0, -(Y * (X @ W) - 0.3 * dual))
        np.testing.assert_allclose(logistic(w, x + fast, y), worst, rtol=1e-4)
        slow = pgd(
            logistic, w, x, y, epsilon=0.3, steps=6, step_size=0.1, norm=norm,
            keys=jax.random.key(1),
        )  # fmt: skip
        if norm == "linf":  # from anywhere in the ball six steps of .1 lead to the corner
            np.testing.assert_allclose(slow, 0.3 * r, rtol=1e-5, atol=1e-7)
        assert np.all(logistic(w, x + slow, y) <= worst * (1 + 1e-5))


def penalised(w, x, y, eps, power):
    """Gradient by w of the mean of L + eps/2 |grad_x L|^2 or L + eps |grad_x L|, by hand."""
    s = 1 / (1 + np.exp(y * (x @ w)))
    slope = -(s * (1 - s) * y)[:, None] * x  # of s
    size = np.linalg.norm(w)
    plain = -(s * y)[:, None] * x
    if power == 2:
        extra = (s * size**2)[:, None] * slope + (s**2)[:, None] * w
    else:
        extra = size * slope + s[:, None] * w / size
    return np.mean(plain, 0), np.mean(plain + eps * extra, 0)


@pytest.mark.parametrize(("norm", "power"), [("none", 2), ("l2", 1)])
def test_training_on_fgm_is_a_gradient_penalty_to_second_order(x64, norm, power):
    """The post's equivalence: the penalty's effect falls as eps, what it misses as eps^2."""
    w, x, y = as_jax((W, X, Y), jnp.float64)

    @jax.jit
    def step(eps):
        def loss(w):
            r = fast_gradient(logistic, w, x, y, epsilon=eps, norm=norm)
            return jnp.mean(logistic(w, x + r, y))

        return jax.grad(loss)(w)

    missed, effect = [], []
    for eps in (0.1, 0.01, 0.001):
        plain, expected = penalised(W, X, Y, eps, power)
        missed.append(np.linalg.norm(step(eps) - expected))
        effect.append(np.linalg.norm(step(eps) - plain))
    np.testing.assert_allclose(np.log10(np.divide(missed[:-1], missed[1:])), 2, atol=0.1)
    np.testing.assert_allclose(np.log10(np.divide(effect[:-1], effect[1:])), 1, atol=0.1)
    assert missed[2] < 1e-3 * effect[2]


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("norm", ["l2", "linf"])
@given(seed=st.integers(0, 99), epsilon=st.sampled_from([0.0, 0.01, 0.5, 3.0]), start=st.booleans())
def test_pgd_stays_in_ball_and_box_and_raises_the_loss(norm, seed, epsilon, start):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.uniform(-1, 1, size=(8, 5)), jnp.float32)
    params, y = as_jax((MLP, Y))

    options = {"norm": norm, "clip_range": (-1.0, 1.0)}
    if start:
        options["keys"] = jax.random.split(jax.random.key(seed), 8)
    sizes = {"epsilon": epsilon, "steps": 8, "step_size": epsilon / 4}
    r = np.asarray(pgd(mlp, params, x, y, **sizes, **options))
    size = np.linalg.norm(r, 2 if norm == "l2" else np.inf, axis=1)
    assert np.all(size <= epsilon * (1 + 1e-6) + 1e-7)
    assert np.all(np.abs(x + r) <= 1 + 1e-6)
    before, after = mlp(params, x, y), mlp(params, x + r, y)
    assert np.all(after >= before - 1e-5) or start or epsilon == 3.0
    assert epsilon == 0 or np.mean(after) > np.mean(before)


def test_a_box_may_differ_between_channels():
    """Images whose channels were standardised; the loss pulls everything up."""
    x = jnp.zeros((2, 3, 2))
    low, high = jnp.array([-1.0, -0.1]), np.array([0.25, 9.0])
    run = lambda high: projected_gradient(  # noqa: E731
        lambda w, x: x.sum((1, 2)), None, x, epsilon=0.5, steps=2, step_size=0.5, norm="linf",
        clip_range=(low, high),
    )  # fmt: skip
    np.testing.assert_array_equal(jax.jit(run)(high), np.broadcast_to([0.25, 0.5], (2, 3, 2)))
    for shape in ((3,), (2, 1, 3, 2)):
        with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}.*x of shape \(2, 3, 2\)"):
            run(np.ones(shape))
    with pytest.raises(ValueError, match=r"low=\[.*\] above high="):
        run(np.array([1.0, -0.2]))


@pytest.mark.slow  # seconds of compiling
def test_one_step_from_zero_is_fgm_and_more_steps_beat_it():
    params, x, y = as_jax((MLP, X, Y))
    for norm in ("l2", "linf"):
        common = {"epsilon": 0.5, "norm": norm}
        fast = fgm(mlp, params, x, y, **common)
        once = pgd(mlp, params, x, y, steps=1, step_size=0.5, **common)
        np.testing.assert_allclose(once, fast, rtol=1e-6)
        often = pgd(mlp, params, x, y, steps=20, step_size=0.1, **common)
        assert np.mean(mlp(params, x + often, y)) > np.mean(mlp(params, x + fast, y)) + 0.01


def test_pgd_finds_the_top_of_a_hill_and_stays_there():
    """-|x - c|^2: inside the ball its top is the point, outside the projection of it."""
    top = jnp.array([[0.3, 0.0], [3.0, 4.0]])
    hill = lambda c, x: -jnp.sum(jnp.square(x - c), axis=1)  # noqa: E731
    r = pgd(hill, top, jnp.zeros((2, 2)), epsilon=1.0, steps=60, step_size=0.02)
    np.testing.assert_allclose(r, [[0.3, 0.0], [0.6, 0.8]], atol=0.021)
    # A step of a sign would leave 0 along an axis where the gradient is 0.
    assert r[0, 1] == 0


@pytest.mark.slow  # seconds of compiling
def test_random_starts_follow_their_keys():
    params, x, y = as_jax((MLP, X, Y))
    options = {"epsilon": 0.5, "steps": 1, "step_size": 0.0}
    keys = jax.random.split(jax.random.key(0), 8)
    r = pgd(mlp, params, x, y, keys=jax.random.clone(keys), **options)
    part = pgd(mlp, params, x[3:5], y[3:5], keys=keys[3:5], **options)
    np.testing.assert_array_equal(r[3:5], part)
    size = np.linalg.norm(r, axis=1)
    assert size.max() <= 0.5001 and size.min() > 0.05 and np.unique(size).size == 8


def test_a_part_of_the_parameters_as_in_the_post(x64):
    """The embedding matrix as a whole: eps G / |G|_F, against the sum over tokens by hand."""
    table, head = RNG.normal(size=(6, 3)), RNG.normal(size=3)
    tokens = np.array([[0, 2, 2], [5, 2, 0]])

    def loss(params, table, tokens):
        return jnp.mean(jnp.square(table[tokens].mean(1) @ params - 1.0))

    r = fgm(loss, jnp.asarray(head), jnp.asarray(table), tokens, epsilon=0.5, per_example=False)
    grad = np.zeros_like(table)
    for row in tokens:
        residual = table[row].mean(0) @ head - 1
        for token in row:
            grad[token] += 2 * residual * head / 3 / 2
    np.testing.assert_allclose(r, 0.5 * grad / np.linalg.norm(grad), rtol=1e-12)
    assert np.all(np.asarray(r)[[1, 3, 4]] == 0)


def test_trees_share_one_norm_per_example():
    def loss(params, x):
        return 3 * x["a"][:, 0] + 4 * x["b"]

    x = {"a": jnp.zeros((2, 1)), "b": jnp.zeros(2)}
    r = fgm(loss, None, x, epsilon=1.0)
    np.testing.assert_allclose(r["a"], [[0.6], [0.6]], rtol=1e-6)
    np.testing.assert_allclose(r["b"], [0.8, 0.8], rtol=1e-6)
    slow = pgd(loss, None, x, epsilon=1.0, steps=40, step_size=0.3, keys=jax.random.key(0))
    np.testing.assert_allclose(slow["b"], [0.8, 0.8], atol=0.01)


def test_no_gradient_no_perturbation():
    """A dead network and a flat loss: zeros, also where everything is differentiated."""
    dead = lambda params, x: jax.nn.relu(x @ params - 100.0)  # noqa: E731
    x, w = jnp.ones((3, 2)), jnp.ones(2)
    for norm in ("l2", "linf", "none"):
        assert not np.any(fgm(dead, w, x, epsilon=1.0, norm=norm))
    attack = {"epsilon": 1.0, "steps": 2, "step_size": 1.0}
    assert not np.any(pgd(dead, w, x, **attack))
    total = lambda w: jnp.sum(dead(w, x + fast_gradient(dead, w, x, epsilon=1.0)))  # noqa: E731
    assert not np.any(jax.jit(jax.grad(total))(w))


@pytest.mark.parametrize("method", ["fgm", "pgd"])
def test_is_a_constant_to_differentiation(method):
    params, x, y = as_jax((MLP, X, Y))

    def perturb(params, x, epsilon):
        if method == "fgm":
            return fast_gradient(mlp, params, x, y, epsilon=epsilon)
        options = {"steps": 2, "step_size": epsilon, "clip_range": (-1.0, 1.0)}
        return projected_gradient(mlp, params, x, y, epsilon=epsilon, **options)

    by_all = jax.jit(jax.grad(lambda *a: jnp.sum(perturb(*a)), (0, 1, 2)))
    for g in jax.tree.leaves(by_all(params, x, 0.1)):
        assert not np.any(g)
    # Parameters that the loss closes over, too.
    closed = jax.jit(
        jax.grad(lambda p: fast_gradient(lambda _, x: mlp(p, x, y), 0, x, epsilon=1.0).sum())
    )
    assert not any(np.any(g) for g in jax.tree.leaves(closed(params)))


@pytest.fixture
def once():
    """The identity, which cannot be differentiated."""
    identity = jax.custom_jvp(lambda x: x)

    @identity.defjvp
    def _(primals, tangents):
        raise AssertionError("differentiated")

    return identity


def test_training_needs_no_second_derivative(once):
    """A kernel that can be differentiated once is enough."""

    @jax.custom_vjp
    def kernel(w, x):
        return jnp.square(x @ w)

    def backward(kept, g):
        w, x = kept
        slope = once(2 * g * (x @ w))
        return x.T @ slope, slope[:, None] * w[None]

    kernel.defvjp(lambda w, x: (kernel(w, x), (w, x)), backward)
    w, x = as_jax((W, X))

    def trained(w):
        fast = fast_gradient(kernel, w, x, epsilon=0.1)
        slow = projected_gradient(kernel, w, x, epsilon=0.1, steps=2, step_size=0.1)
        return jnp.sum(kernel(w, x + fast) + kernel(w, x + slow))

    assert np.isfinite(jax.jit(jax.grad(trained))(w)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs(dtype):
    params, x, y = as_jax((MLP, X, Y), dtype)
    exact = fgm(mlp, *as_jax((params, x, y)), epsilon=0.5)
    r = fgm(mlp, params, x, y, epsilon=0.5)
    assert r.dtype == dtype
    np.testing.assert_allclose(r.astype(jnp.float32), exact, atol=0.03)
    slow = pgd(mlp, params, x, y, epsilon=0.5, steps=3, step_size=0.3)
    assert slow.dtype == dtype
    assert np.linalg.norm(slow.astype(jnp.float32), axis=1).max() <= 0.505


def test_jit_vmap_and_devices():
    """Over many epsilons at once, and over rows split on eight devices."""
    params, x, y = as_jax((MLP, X, Y))
    one = jax.jit(
        lambda e, x: projected_gradient(mlp, params, x, y, epsilon=e, steps=3, step_size=e / 2)
    )
    epsilons = jnp.array([0.1, 1.0])
    many = jax.jit(jax.vmap(one, in_axes=(0, None)))(epsilons, x)
    split = NamedSharding(Mesh(np.array(jax.devices()), ("d",)), P("d"))
    for e, r in zip(epsilons, many, strict=True):
        np.testing.assert_allclose(r, one(e, x), rtol=1e-4, atol=1e-6)
        there = one(e, jax.device_put(x, split))
        np.testing.assert_allclose(there, one(e, x), rtol=1e-4, atol=1e-6)


def test_numpy_inputs_and_arguments_that_are_no_arrays():
    loss = lambda params, x, y, flag: logistic(params, x, y) if flag else x  # noqa: E731
    r = fast_gradient(loss, W, X, Y, True, epsilon=0.3)
    np.testing.assert_allclose(r, fast_gradient(logistic, *as_jax((W, X, Y)), epsilon=0.3), 1e-5)


def test_bad_input():
    w, x, y = as_jax((W, X, Y))
    options = {"epsilon": 1.0, "steps": 1, "step_size": 1.0}
    with pytest.raises(ValueError, match=r"one number per example, shape \(8,\), got \(\)"):
        fast_gradient(lambda w, x: jnp.mean(x @ w), w, x, epsilon=1.0)
    with pytest.raises(ValueError, match=r"per_example=False asks for, shape \(\), got \(8,\)"):
        fast_gradient(logistic, w, x, y, epsilon=1.0, per_example=False)
    with pytest.raises(ValueError, match="norm='l1' is unknown"):
        fast_gradient(logistic, w, x, y, epsilon=1.0, norm="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm='none' is unknown; valid: l2, linf"):
        projected_gradient(logistic, w, x, y, norm="none", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"epsilon=-1\.0 must be at least 0"):
        fast_gradient(logistic, w, x, y, epsilon=-1.0)
    with pytest.raises(ValueError, match=r"epsilon has shape \(8,\)"):
        fast_gradient(logistic, w, x, y, epsilon=jnp.ones(8))
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        projected_gradient(logistic, w, x, y, **{**options, "steps": 0})
    with pytest.raises(ValueError, match="step_size=nan"):
        projected_gradient(logistic, w, x, y, **{**options, "step_size": float("nan")})
    with pytest.raises(ValueError, match=r"low=1\.0 above high=0\.0"):
        projected_gradient(logistic, w, x, y, clip_range=(1.0, 0.0), **options)
    with pytest.raises(TypeError, match="the loss is int32, but must be real and floating"):
        fast_gradient(lambda w, x: jnp.zeros(8, int), w, x, epsilon=1.0)
    with pytest.raises(TypeError, match=r"steps is 2\.5, but must be an integer known when"):
        projected_gradient(logistic, w, x, y, **{**options, "steps": 2.5})
    with pytest.raises(TypeError, match="of tokens perturb the embeddings"):
        fast_gradient(logistic, w, jnp.arange(8), y, epsilon=1.0)
