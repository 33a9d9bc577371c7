import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.special import log_softmax, rel_entr

from blogjax.core.random import fold_in_rows
from blogjax.gradients.virtual_adversarial import vat_loss, virtual_adversarial_perturbation

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 5))
MLP = {"in": RNG.normal(size=(5, 8)), "out": RNG.normal(size=(8, 4))}
KEYS = fold_in_rows(jax.random.key(0), jnp.arange(6))

vap = jax.jit(
    virtual_adversarial_perturbation,
    static_argnums=0,
    static_argnames=("iterations", "per_example"),
)
vat = jax.jit(
    vat_loss, static_argnums=0, static_argnames=("iterations", "per_example", "stop_target")
)


def keys():
    return jax.random.clone(KEYS)


def mlp(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def linear(w, x):
    return x @ w


def as_jax(tree, dtype=jnp.float32):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def divergence(params, x, r):
    """KL(p(x) || p(x + r)) of one example of the MLP, in numpy."""
    f = lambda x: log_softmax(np.tanh(x @ params["in"]) @ params["out"])  # noqa: E731
    return rel_entr(np.exp(f(x)), np.exp(f(x + r))).sum()


def hessian_by_differences(params, x, h=1e-4):
    """Of the divergence at r = 0, dense, by second differences of its values."""
    d = x.size
    out = np.empty((d, d))
    for i in range(d):
        for j in range(d):
            a, b = h * np.eye(d)[i], h * np.eye(d)[j]
            terms = [divergence(params, x, s * a + t * b) * s * t for s in (1, -1) for t in (1, -1)]
            out[i, j] = sum(terms) / (4 * h * h)
    return out


def test_direction_is_the_top_eigenvector_of_the_dense_hessian(x64):
    params, x = as_jax((MLP, X), jnp.float64)
    r = np.asarray(vap(mlp, params, x, keys(), epsilon=0.7, iterations=60))
    np.testing.assert_allclose(np.linalg.norm(r, axis=1), 0.7, rtol=1e-12)
    for i in range(6):
        values, vectors = np.linalg.eigh(hessian_by_differences(MLP, X[i]))
        assert values[-1] > 1.3 * values[-2]
        assert abs(vectors[:, -1] @ r[i]) / 0.7 > 1 - 1e-6


@pytest.mark.slow  # seconds of compiling
def test_iterations_are_those_of_the_power_method(x64):
    """One step and three with the Hessian that jax makes, from the noise of none."""
    params, x = as_jax((MLP, X), jnp.float64)

    def own(x, r):
        clean, moved = (jax.nn.log_softmax(mlp(params, z)) for z in (x, x + r))
        return jnp.sum(jnp.exp(clean) * (clean - moved))

    dense = np.asarray(jax.jit(jax.vmap(jax.hessian(own, argnums=1)))(x, jnp.zeros_like(x)))
    expected = np.asarray(vap(mlp, params, x, keys(), epsilon=1.0, iterations=0))
    for n in (1, 2, 3):
        expected = np.einsum("bij,bj->bi", dense, expected)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        if n != 2:
            r = vap(mlp, params, x, keys(), epsilon=1.0, iterations=n)
            np.testing.assert_allclose(r, expected, atol=1e-9)


@given(seed=st.integers(0, 99), epsilon=st.sampled_from([0.0, 0.1, 1.0, 30.0]))
def test_length_and_loss_against_numpy(seed, epsilon):
    rng = np.random.default_rng(seed)
    values, params = (
        2 * rng.normal(size=(6, 5)),
        {k: 2 * rng.normal(size=v.shape) for k, v in MLP.items()},
    )
    x, weights = as_jax((values, params))
    r = np.asarray(vap(mlp, weights, x, keys(), epsilon=epsilon), np.float64)
    np.testing.assert_allclose(np.linalg.norm(r, axis=1), epsilon, rtol=1e-5)
    expected = [divergence(params, a, b) for a, b in zip(values, r, strict=True)]
    loss = vat(mlp, weights, x, keys(), epsilon=epsilon)
    np.testing.assert_allclose(loss, expected, rtol=1e-3, atol=3e-6)


def test_sure_predictions_still_have_a_direction():
    """Two classes, H = p (1 - p) (w1 - w0)(w1 - w0)': at a margin of 30, 1 - p = 1e-13.

    Erratum: in float32 the post's finite difference, and the second derivative that jax takes of
    the divergence, are what rounding leaves of 1 - 1, and point elsewhere.
    """
    w = np.array([[1.0, 4.0], [2.0, -2.0], [3.0, 3.0]])
    direction = (w[:, 0] - w[:, 1]) / np.linalg.norm(w[:, 0] - w[:, 1])

    def sure(margin, x):
        return x @ as_jax(w) + jnp.stack([margin, jnp.zeros(())])[None]

    @jax.jit
    def usual(margin, u):
        def kl(r):
            clean, moved = (jax.nn.log_softmax(sure(margin, z)) for z in (jnp.zeros((1, 3)), r))
            return jnp.sum(jnp.exp(clean) * (clean - moved))

        return jax.grad(kl)(10 * u), jax.jvp(jax.grad(kl), (jnp.zeros((1, 3)),), (u,))[1]

    for margin in (0.0, 30.0, 60.0):
        r = vap(sure, jnp.array(margin), jnp.zeros((6, 3)), keys(), epsilon=1.0)
        np.testing.assert_allclose(np.abs(r @ direction), 1, rtol=1e-5)
        for found in usual(margin, jnp.array([[0.6, 0.3, 0.7]])):
            found = np.asarray(found[0], np.float64)
            cosine = abs(found @ direction) / np.linalg.norm(found)
            assert cosine < 0.8 if margin else cosine > 0.999


def test_a_model_that_ignores_its_input_is_perturbed_by_noise():
    flat = lambda w, x: jax.nn.relu(x @ w - 100.0)  # noqa: E731
    w = jnp.ones((5, 3))
    x = as_jax(X)
    r = vap(flat, w, x, keys(), epsilon=1.0, iterations=3)
    np.testing.assert_array_equal(r, vap(flat, w, x, keys(), epsilon=1.0, iterations=0))
    loss = lambda w: jnp.sum(vat_loss(flat, w, x, keys(), epsilon=1.0))  # noqa: E731
    value, grad = jax.jit(jax.value_and_grad(loss))(w)
    assert value == 0 and not np.any(grad)


def test_gradient_by_finite_differences(x64):
    """r is a constant, and the clean prediction too unless it is asked for."""
    params, x = as_jax((MLP, X), jnp.float64)
    r = np.asarray(vap(mlp, params, x, keys(), epsilon=1.0))

    def loss(params, stop):
        own = keys()
        return jnp.sum(vat_loss(mlp, params, x, own, epsilon=1.0, stop_target=stop))

    both = jax.jit(lambda p: [jax.grad(loss)(p, stop) for stop in (True, False)])(params)
    f = lambda p, x: log_softmax(np.tanh(x @ p["in"]) @ p["out"], axis=1)  # noqa: E731

    def value(weights, stop):
        return rel_entr(np.exp(f(MLP if stop else weights, X)), np.exp(f(weights, X + r))).sum()

    for stop, grads in zip((True, False), both, strict=True):
        for name in MLP:
            direction = RNG.normal(size=MLP[name].shape)
            up, down = (
                value({**MLP, name: MLP[name] + h * direction}, stop) for h in (1e-5, -1e-5)
            )
            found = np.sum(np.asarray(grads[name]) * direction)
            np.testing.assert_allclose(found, (up - down) / 2e-5, rtol=1e-6)


def test_training_needs_no_second_derivative():
    """A kernel that can be differentiated once is enough."""
    identity = jax.custom_jvp(lambda x: x)

    @identity.defjvp
    def _(primals, tangents):
        raise AssertionError("differentiated twice")

    kernel = jax.custom_jvp(lambda w, x: jnp.square(x @ w))

    @kernel.defjvp
    def _(primals, tangents):
        (w, x), (dw, dx) = primals, tangents
        return kernel(w, x), 2 * identity(x @ w) * (dx @ w + x @ dw)

    w, x = as_jax((RNG.normal(size=(5, 3)), X))
    loss = lambda w: jnp.sum(vat_loss(kernel, w, x, keys(), epsilon=0.1))  # noqa: E731
    assert np.isfinite(jax.jit(jax.grad(loss))(w)).all()


def test_impossible_classes_count_nothing():
    """Logits of -inf, as masked classes have them: finite, and as if they were not there."""
    w = as_jax(RNG.normal(size=(5, 4)))
    masked = lambda w, x: (x @ w).at[:, 2].set(-jnp.inf)  # noqa: E731
    without = lambda w, x: x @ w[:, jnp.array([0, 1, 3])]  # noqa: E731

    @jax.jit
    def both(w, x, keys):
        own = jax.random.clone
        total = lambda w, f: jnp.sum(vat_loss(f, w, x, own(keys), epsilon=1.0))  # noqa: E731
        return [jax.value_and_grad(total)(w, f) for f in (masked, without)]

    (value, grad), (other, other_grad) = both(w, as_jax(X), keys())
    np.testing.assert_allclose(value, other, rtol=1e-5)
    np.testing.assert_allclose(grad, other_grad, rtol=1e-5, atol=1e-6)


def test_positions_of_a_sequence_are_added():
    """`[B, T, K]` logits: the divergence of the sequence, and H the sum over its positions."""
    w = RNG.normal(size=(2, 3))
    per_token = lambda w, x: x @ w  # noqa: E731
    x = RNG.normal(size=(6, 4, 2))
    r = np.asarray(vap(per_token, as_jax(w), as_jax(x), keys(), epsilon=0.5, iterations=80))
    np.testing.assert_allclose(np.linalg.norm(r.reshape(6, -1), axis=1), 0.5, rtol=1e-5)
    for i in range(6):
        p = np.exp(log_softmax(x[i] @ w, axis=-1))
        tops = [np.linalg.eigvalsh(w @ (np.diag(q) - np.outer(q, q)) @ w.T)[-1] for q in p]
        assert np.argmax(np.linalg.norm(r[i], axis=1)) == np.argmax(tops)
    clean, moved = (log_softmax(z @ w, axis=-1) for z in (x, x + r))
    expected = rel_entr(np.exp(clean), np.exp(moved)).sum((1, 2))
    loss = vat(per_token, as_jax(w), as_jax(x), keys(), epsilon=0.5, iterations=80)
    np.testing.assert_allclose(loss, expected, rtol=1e-3)


def test_an_embedding_matrix_as_a_whole(x64):
    """The post's recipe: one direction for the table, from the divergences of all examples."""
    tokens = np.array([[0, 1], [1, 1], [3, 1]])
    table, head = RNG.normal(size=(5, 2)), RNG.normal(size=(2, 3))
    predict = lambda w, table: table[tokens].mean(1) @ w  # noqa: E731
    arrays = as_jax((head, table), jnp.float64)
    r = vap(predict, *arrays, jax.random.key(0), epsilon=0.5, iterations=300, per_example=False)
    jacobian = np.zeros((3, 3, 5, 2))  # example, class, row, entry
    for i, row in enumerate(tokens):
        for token in row:
            jacobian[i, :, token] += head.T / 2
    p = np.exp(log_softmax(table[tokens].mean(1) @ head, axis=1))
    fisher = np.stack([np.diag(q) - np.outer(q, q) for q in p])
    flat = jacobian.reshape(3, 3, 10)
    hessian = np.einsum("bki,bkl,blj->ij", flat, fisher, flat)
    top = np.linalg.eigh(hessian)[1][:, -1]
    np.testing.assert_allclose(abs(top @ np.asarray(r).ravel()), 0.5, rtol=1e-6)
    assert not np.any(np.asarray(r)[[2, 4]][np.abs(np.asarray(r)[[2, 4]]) > 1e-12])
    loss = vat(predict, *arrays, jax.random.key(0), epsilon=0.5, per_example=False)
    assert loss.shape == (3,)


def test_numbers_follow_the_rows_on_any_devices():
    params, x = as_jax((MLP, np.concatenate([X, X[:2]])))
    own = fold_in_rows(jax.random.key(0), jnp.arange(8))
    whole = vap(mlp, params, x, jax.random.clone(own), epsilon=1.0)
    split = NamedSharding(Mesh(np.array(jax.devices()), ("d",)), P("d"))
    there = vap(
        mlp,
        params,
        jax.device_put(x, split),
        jax.device_put(jax.random.clone(own), split),
        epsilon=1.0,
    )
    np.testing.assert_allclose(there, whole, rtol=1e-5, atol=1e-6)
    part = vap(mlp, params, x[4:6], own[4:6], epsilon=1.0)
    np.testing.assert_allclose(part, whole[4:6], rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # seconds of compiling
def test_narrow_inputs():
    for dtype in (jnp.bfloat16, jnp.float16):
        params, x = as_jax((MLP, X), dtype)
        r = vap(mlp, params, x, keys(), epsilon=0.5)
        assert r.dtype == dtype
        exact = vap(mlp, *as_jax((params, x)), keys(), epsilon=0.5)
        np.testing.assert_allclose(r.astype(jnp.float32), exact, atol=0.03)
    loss = vat(mlp, params, x, keys(), epsilon=0.5)
    assert loss.dtype == jnp.float32 and np.isfinite(loss).all()
    # H is far below float16's range, the smallest of which is 6e-8.
    sure = lambda w, x: x @ w + jnp.array([[30.0, 0.0]], x.dtype)  # noqa: E731
    w = jnp.array([[3.0, 0.0], [4.0, 0.0]], jnp.float16)
    r = vap(sure, w, jnp.zeros((6, 2), jnp.float16), keys(), epsilon=1.0)
    np.testing.assert_allclose(np.abs(r.astype(jnp.float32)), [[0.6, 0.8]] * 6, atol=0.01)


def test_nan_is_not_taken_for_an_impossible_class():
    w, x = as_jax((RNG.normal(size=(5, 3)), X))
    loss = vat(linear, w, x.at[1, 2].set(jnp.nan), keys(), epsilon=1.0)
    np.testing.assert_array_equal(np.isnan(loss), np.arange(6) == 1)


@pytest.mark.slow  # seconds of compiling
def test_one_key_for_all_devices():
    """Each of two then draws the same noise for its own three rows."""
    w, x = as_jax((RNG.normal(size=(5, 3)), X))

    def one(w, x, key):
        return virtual_adversarial_perturbation(linear, w, x, key, epsilon=1.0)

    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    mapped = jax.shard_map(one, mesh=mesh, in_specs=(P(), P("d"), P()), out_specs=P("d"))
    there = jax.jit(mapped)(w, x, jax.random.key(0))
    for i in (0, 3):
        here = vap(linear, w, x[i : i + 3], jax.random.key(0), epsilon=1.0)
        np.testing.assert_allclose(there[i : i + 3], here, rtol=1e-5)


def test_bad_input():
    w, x = jnp.ones((5, 3)), as_jax(X)
    with pytest.raises(ValueError, match=r"at least 2 classes, got shape \(6, 1\).*\[0, z\]"):
        vat_loss(lambda w, x: x[:, :1], w, x, keys(), epsilon=1.0)
    for wrong, got in (((X,), "<class 'tuple'>"), (jnp.ones((6, 3), int), "int32")):
        with pytest.raises(TypeError, match=f"one real and floating array of logits, got {got}"):
            vat_loss(lambda w, x, wrong=wrong: wrong, w, x, keys(), epsilon=1.0)
    run = lambda n: vat_loss(linear, w, x, keys(), epsilon=1.0, iterations=n)  # noqa: E731
    for f, n in ((jax.jit(run), 1), (run, 1.5)):
        with pytest.raises(TypeError, match=r"iterations is .* must be an integer known when"):
            f(n)
    with pytest.raises(ValueError, match="iterations=-1 must be at least 0"):
        vat_loss(linear, w, x, keys(), epsilon=1.0, iterations=-1)
    with pytest.raises(ValueError, match=r"epsilon=-1\.0 must be at least 0"):
        vat_loss(linear, w, x, keys(), epsilon=-1.0)
    for n in (0, 1):
        with pytest.raises(ValueError, match=r"shape \(6, \.\.\., classes\), got \(6,\)"):
            vat_loss(lambda w, x: x[:, 0], w, x, keys(), epsilon=1.0, iterations=n)
    with pytest.raises(ValueError, match=r"keys of shape \(6,\) do not lead the shape \(3, 5\)"):
        vat_loss(linear, w, x[:3], keys(), epsilon=1.0)
    with pytest.raises(TypeError, match="x is int32"):
        vat_loss(linear, w, jnp.arange(6), keys(), epsilon=1.0)
