import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blogjax.optim.normalize import centralize_gradients, normalize_gradients

SHAPES = {"conv": (2, 3, 4), "kernel": (5, 3), "bias": (4,), "gain": ()}
SCOPES = ("global", "leaf", "row")


def gradients(seed=0, scales=(1.0, 1.0, 1.0, 1.0), dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        k: jnp.asarray(s * rng.normal(size=shape), dtype)
        for (k, shape), s in zip(SHAPES.items(), scales, strict=True)
    }


def apply(tx, grads, params=None):
    return jax.jit(lambda g: tx.update(g, tx.init(g), params)[0])(grads)


def oracle(scope, grads, eps=0.0):
    """float64 loops; None where a norm is 0."""
    grads = {k: np.asarray(g, np.float64) for k, g in grads.items()}
    norm = lambda x: np.sqrt(np.sum(np.square(x)))  # noqa: E731
    whole = np.sqrt(sum(norm(g) ** 2 for g in grads.values()))
    out = {}
    for k, g in grads.items():
        if scope == "global":
            out[k] = g / (whole + eps) if whole else g * 0
        elif scope == "leaf" or g.ndim < 2:
            out[k] = g / (norm(g) + eps) if norm(g) else g * 0
        else:
            out[k] = np.stack([r / (norm(r) + eps) if norm(r) else r * 0 for r in g])
    return out


EXPONENTS = st.tuples(*[st.integers(-60, 60)] * 4)


@pytest.mark.parametrize("scope", SCOPES)
@given(exponents=EXPONENTS, seed=st.integers(0, 99), eps=st.sampled_from([0.0, 1e-3, 1.0]))
def test_against_float64_loops(scope, exponents, seed, eps):
    """Leaves of very different sizes, far beyond where squares leave float32."""
    grads = gradients(seed, [2.0**e for e in exponents])
    grads["kernel"] = grads["kernel"].at[2].set(0)
    updates = normalize_gradients(scope, eps=eps).update(grads, optax.EmptyState())[0]
    for k, expected in oracle(scope, grads, eps).items():
        np.testing.assert_allclose(updates[k], expected, rtol=1e-6, atol=1e-37)
        assert updates[k].dtype == jnp.float32


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("scope", SCOPES)
@given(exponent=st.integers(-115, 120))
def test_the_scale_of_the_gradient_does_not_change_a_bit(scope, exponent):
    tx = normalize_gradients(scope)
    grads = jax.tree.map(lambda g: jnp.round(g * 8) / 8, gradients())  # no subnormals at the ends
    scaled = jax.tree.map(lambda g: g * jnp.float32(2.0) ** exponent, grads)
    chex.assert_trees_all_equal(
        tx.update(scaled, tx.init(grads))[0], tx.update(grads, tx.init(grads))[0]
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_norms_are_one(scope):
    updates = apply(normalize_gradients(scope), gradients(3, (1e-12, 1e4, 1.0, 1e-3)))
    squares = {k: np.square(np.asarray(u, np.float64)) for k, u in updates.items()}
    if scope == "global":
        np.testing.assert_allclose(sum(s.sum() for s in squares.values()), 1, rtol=1e-6)
    elif scope == "leaf":
        np.testing.assert_allclose([s.sum() for s in squares.values()], 1, rtol=1e-6)
    else:
        for s in squares.values():
            np.testing.assert_allclose(
                s.sum(tuple(range(1, s.ndim))) if s.ndim > 1 else s.sum(), 1, rtol=1e-6
            )


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("scope", SCOPES)
def test_zero_stays_zero_and_leaves_the_others_alone(scope, eps):
    zeros = jax.tree.map(jnp.zeros_like, gradients())
    tx = normalize_gradients(scope, eps=eps)
    chex.assert_trees_all_equal(apply(tx, zeros), zeros)
    with jax.debug_nans(True):  # not even in between
        tx.update(zeros, tx.init(zeros))
    grads = {**gradients(), "bias": zeros["bias"]}
    with_zero, without = apply(tx, grads), apply(tx, {**grads, "bias": None})
    np.testing.assert_array_equal(with_zero["bias"], zeros["bias"])
    chex.assert_trees_all_close({**with_zero, "bias": None}, without, rtol=1e-6)
    # What is subnormal in float32 may be flushed by the machine: it is zero here.
    np.testing.assert_array_equal(apply(tx, jnp.full(3, 1e-40)), np.zeros(3))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_all_that_shares_its_norm(scope, value):
    grads = gradients()
    grads["kernel"] = grads["kernel"].at[1, 2].set(value)
    updates = apply(normalize_gradients(scope), grads)
    spoiled = {k: np.isnan(u) for k, u in updates.items()}
    if scope == "global":
        assert all(s.all() for s in spoiled.values())
        return
    assert not any(s.any() for k, s in spoiled.items() if k != "kernel")
    rows = [True] * 5 if scope == "leaf" else [False, True, False, False, False]
    assert spoiled["kernel"].all(axis=1).tolist() == rows
    assert spoiled["kernel"].any(axis=1).tolist() == rows


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_has_float32_statistics(scope, dtype):
    """Equal entries: squared in bfloat16, optax is .3% off; in float16 squares overflow at 256."""
    g = {"w": jnp.full((2, 4000), 300.0, dtype)}
    updates = apply(normalize_gradients(scope), g)["w"]
    assert updates.dtype == dtype
    expected = (4000 if scope == "row" else 8000) ** -0.5
    np.testing.assert_array_equal(updates, np.full((2, 4000), expected).astype(dtype))


def test_float64_keeps_its_digits(x64):
    grads = jax.tree.map(lambda g: g.astype(jnp.float64) * 1e200, gradients())
    for scope in SCOPES:
        updates = apply(normalize_gradients(scope), grads)
        for k, expected in oracle(scope, gradients()).items():
            np.testing.assert_allclose(updates[k], expected, rtol=1e-14)
    mixed = {"d": jnp.full(2, 3.0, jnp.float64), "h": jnp.ones(7, jnp.bfloat16)}
    updates = apply(normalize_gradients(), mixed)
    np.testing.assert_allclose(updates["d"], 0.6, rtol=1e-14)
    assert updates["h"].dtype == jnp.bfloat16


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("tx", [normalize_gradients(s) for s in SCOPES] + [centralize_gradients()])
def test_vmap_scan_and_eight_devices_agree(tx):
    rng = np.random.default_rng(0)
    grads = {
        "table": jnp.asarray(rng.normal(size=(16, 4)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=8), jnp.float32),
    }
    expected = apply(tx, grads)
    split = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
    result = apply(tx, jax.device_put(grads, split))
    chex.assert_trees_all_close(jax.device_get(result), expected, rtol=1e-6, atol=1e-7)
    assert result["table"].sharding.is_equivalent_to(split, 2)
    state = tx.init(grads)
    stacked = jax.tree.map(lambda g: jnp.stack([g, -2 * g]), grads)
    mapped = jax.vmap(lambda g: tx.update(g, state)[0])(stacked)
    _, scanned = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, stacked)
    for many in (mapped, scanned):
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], many), expected, rtol=1e-6)


def test_columns_of_a_linen_kernel_lose_their_mean():
    grads = gradients(2)
    updates = apply(centralize_gradients(), grads)
    for k in ("kernel", "conv"):
        g = np.asarray(grads[k], np.float64)
        columns = g.reshape(-1, g.shape[-1])
        expected = np.stack([c - c.sum() / len(c) for c in columns.T], axis=-1).reshape(g.shape)
        np.testing.assert_allclose(updates[k], expected, rtol=1e-5, atol=1e-6)
    for k in ("bias", "gain"):
        np.testing.assert_array_equal(updates[k], grads[k])


def test_the_mean_of_each_outputs_weights_stays():
    """A linear map under SGD: sums over inputs are conserved, which optax.centralize misses."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((32, 5), (32, 3)))
    start = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    sums = {}
    for name, tx in {"ours": centralize_gradients(), "optax": optax.centralize()}.items():
        w = start
        for _ in range(5):
            g = jax.grad(lambda w: jnp.mean((x @ w - y) ** 2))(w)
            w = w - 0.1 * tx.update(g, tx.init(w))[0]
        assert float(jnp.abs(w - start).max()) > 0.01
        sums[name] = np.asarray(w.sum(0) - start.sum(0))
    np.testing.assert_allclose(sums["ours"], 0, atol=1e-6)
    assert np.abs(sums["optax"]).max() > 0.01


def test_the_output_axis():
    """Over the first axis as output it is optax's, which is torch's layout."""
    grads = {k: g for k, g in gradients().items() if g.ndim >= 2}
    chex.assert_trees_all_close(
        apply(centralize_gradients(0), grads),
        apply(optax.centralize(), grads),
        rtol=1e-6,
        atol=1e-7,
    )
    np.testing.assert_allclose(
        apply(centralize_gradients(1), grads)["conv"].sum((0, 2)), np.zeros(3), atol=1e-5
    )


def test_centralized_bf16_has_float32_means():
    """1 + many small numbers: a bfloat16 sum would lose them."""
    g = np.concatenate([[256.0], np.ones(511)])[:, None]
    updates = apply(centralize_gradients(), jnp.asarray(g, jnp.bfloat16))
    np.testing.assert_array_equal(updates, (g - g.mean()).astype(jnp.bfloat16))
    assert updates.dtype == jnp.bfloat16


def test_centralize_then_normalize_in_a_chain():
    tx = optax.chain(centralize_gradients(), normalize_gradients("leaf"), optax.sgd(0.5))
    g = np.array([[1.0, 2.0], [3.0, 8.0]])
    updates = apply(tx, {"kernel": jnp.asarray(g, jnp.float32)})["kernel"]
    centred = g - g.mean(0)
    np.testing.assert_allclose(updates, -0.5 * centred / np.sqrt((centred**2).sum()), rtol=1e-6)


def test_eps_may_be_injected_and_traced():
    grads = gradients(5)
    tx = optax.inject_hyperparams(normalize_gradients, static_args="scope")("leaf", eps=0.5)
    for k, expected in oracle("leaf", grads, 0.5).items():
        np.testing.assert_allclose(apply(tx, grads)[k], expected, rtol=1e-6)


@pytest.mark.parametrize("tx", [normalize_gradients(), centralize_gradients()])
def test_bad_trees_are_refused_by_name(tx):
    grads = gradients()
    state = tx.init(grads)
    assert tx.update({}, state)[0] == {}
    assert tx.update({"none": None}, state)[0] == {"none": None}
    assert tx.update({"w": jnp.ones((0, 3))}, state)[0]["w"].shape == (0, 3)
    with pytest.raises(TypeError, match="gradient kernel is int32"):
        tx.update({**grads, "kernel": jnp.ones((2, 2), jnp.int32)}, state)
    with pytest.raises(ValueError, match=r"gradient bias has shape \(1, 4\)"):
        tx.update({**grads, "bias": jnp.ones((1, 4))}, state, grads)
    with pytest.raises(TypeError, match="parameter kernel is complex64"):
        tx.init({"kernel": jnp.ones(2, jnp.complex64)})


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"scope='rows'.*global, leaf, row"):
        normalize_gradients("rows")  # pyright: ignore
    with pytest.raises(ValueError, match="eps is -1"):
        normalize_gradients(eps=-1.0)
    tx = centralize_gradients(2)
    with pytest.raises(ValueError, match=r"gradient kernel of shape \(5, 3\) has no axis 2"):
        tx.update(gradients(), optax.EmptyState())
