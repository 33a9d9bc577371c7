import math

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blogjax.optim import stochastic_rounding as module
from blogjax.optim.skip_nonfinite import skip_nonfinite
from blogjax.optim.stochastic_rounding import (
    apply_updates_stochastic,
    stochastic_round,
    stochastic_rounding,
)

BF16 = jnp.bfloat16
LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


def neighbours(x):
    """float64: the bfloat16 numbers next to float32 x, towards zero and away from it."""
    below = np.asarray(x, np.float32).view(np.uint32) & 0xFFFF0000
    above = np.where(below == np.asarray(x, np.float32).view(np.uint32), below, below + 0x10000)
    return tuple(
        np.asarray(b, np.uint32).view(np.float32).astype(np.float64) for b in (below, above)
    )


@pytest.mark.parametrize("x", [1.0, 1.00048828125, -1.2345678, 3e-5, -7e37, 1.5e-38, 0.1])
def test_the_mean_over_all_random_numbers_is_exact(x):
    """All 2^16 of them: no statistics."""
    noise = jnp.arange(2**16).astype(jnp.uint16)
    x32 = np.float32(x)
    rounded = np.asarray(module._round(jnp.full(2**16, x32), noise), np.float64)
    assert set(rounded) <= {float(n) for n in neighbours(x32)}
    assert math.fsum(rounded) / 2**16 == float(x32)


@given(st.integers(0, 2**31))
def test_the_result_is_a_neighbour_and_what_fits_stays(seed):
    bits = np.random.default_rng(seed).integers(0, 2**32, 512, dtype=np.uint32)
    exponent = (bits >> 23) & 0xFF
    x = bits[(exponent > 0) & (exponent < 0xFE)][:400].view(np.float32)  # normal, and finite above
    x[::2] = x[::2].astype(ml_dtypes.bfloat16)
    rounded = np.asarray(stochastic_round(jax.random.key(seed), jnp.asarray(x)))
    assert rounded.dtype == ml_dtypes.bfloat16
    below, above = neighbours(x)
    rounded = rounded.astype(np.float64)
    assert np.all((rounded == below) | (rounded == above))
    np.testing.assert_array_equal(rounded[::2], x[::2])
    assert np.array_equal(np.signbit(rounded), np.signbit(x))


def test_mean_and_variance_are_those_of_a_coin():
    """P(up) = (x - a) / (b - a): a z-test of the mean, and independence between entries."""
    x, n = np.float32(1.0 + 0.3 * 2**-7), 200_000
    rounded = np.asarray(stochastic_round(jax.random.key(1), jnp.full(n, x)), np.float64)
    up = (rounded - 1) * 2**7
    p = (float(x) - 1) * 2**7
    deviation = math.sqrt(p * (1 - p) / n)
    assert abs(up.mean() - p) < 4 * deviation
    for lag in (1, 2, n // 2):
        assert abs((up[lag:] * up[:-lag]).mean() - p * p) < 6 * deviation
    other = np.asarray(stochastic_round(jax.random.key(2), jnp.full(n, x)), np.float64)
    assert abs((up * (other - 1) * 2**7).mean() - p * p) < 4 * deviation


def test_special_values():
    x = np.array([np.inf, -np.inf, 0.0, -0.0, LARGEST, -LARGEST], np.float32)
    for seed in range(8):
        rounded = np.asarray(stochastic_round(jax.random.key(seed), jnp.asarray(x)), np.float32)
        assert rounded.tobytes() == x.tobytes()
    # With all bits set, the carry would turn NaN into -0.0.
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001], np.uint32).view(np.float32)
    noise = jnp.full(4, 0xFFFF, jnp.uint16)
    assert np.isnan(np.asarray(module._round(jnp.asarray(nans), noise), np.float32)).all()
    assert np.isnan(np.asarray(module._round(jnp.asarray(nans), noise * 0), np.float32)).all()


def test_above_the_largest_number_the_upper_neighbour_is_infinity():
    x = np.float32(LARGEST) + np.float32(2.0**118)  # a quarter of the gap of 2^120
    rounded = np.asarray(stochastic_round(jax.random.key(0), jnp.full(4000, x)), np.float64)
    assert set(rounded) == {LARGEST, np.inf}
    assert abs(np.isinf(rounded).mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)


def test_other_dtypes_are_added_as_optax_does(x64):
    rng = np.random.default_rng(0)
    params = {
        "f16": jnp.asarray(rng.normal(size=9), jnp.float16),
        "f32": jnp.asarray(rng.normal(size=9), jnp.float32),
        "f64": jnp.asarray(rng.normal(size=9), jnp.float64),
        "none": None,
    }
    updates = jax.tree.map(lambda p: jnp.asarray(1e-3 * rng.normal(size=9), jnp.float32), params)
    new = apply_updates_stochastic(jax.random.key(0), params, updates)
    chex.assert_trees_all_equal(new, optax.apply_updates(params, updates))
    chex.assert_trees_all_equal_dtypes(new, params)
    bf16 = apply_updates_stochastic(jax.random.key(0), jnp.ones(4, BF16), jnp.full(4, 1e-3))
    assert bf16.dtype == BF16


def test_leaves_and_keys_have_their_own_random_numbers():
    ones = jnp.ones(1000, BF16)
    params, updates = {"a": ones, "b": ones}, {"a": jnp.full(1000, 3e-3), "b": jnp.full(1000, 3e-3)}
    first = apply_updates_stochastic(jax.random.key(0), params, updates)
    again = apply_updates_stochastic(jax.random.key(0), params, updates)
    other = apply_updates_stochastic(jax.random.key(1), params, updates)
    chex.assert_trees_all_equal(first, again)
    assert (first["a"] != first["b"]).any()
    assert (first["a"] != other["a"]).any()


def train(tx, params, grad, steps):
    def step(carry, _):
        updates, state = tx.update(grad, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), length=steps)[0])()


def test_bf16_drift_in_value_under_scan():
    """1000 steps of 1e-4 from 1: to nearest nothing happens, at random 0.1 on average."""
    params, grad = jnp.ones(4000, BF16), jnp.ones(4000, BF16)
    assert (train(optax.sgd(1e-4), params, grad, 1000)[0] == 1).all()
    after, _ = train(stochastic_rounding(optax.sgd(1e-4), jax.random.key(3)), params, grad, 1000)
    after = np.asarray(after, np.float64)
    # The steps' variances add up to at most 1000 * 1e-4 * 2^-8 (below 1 one unit is 2^-8).
    assert abs(after.mean() - 0.9) < 4 * math.sqrt(0.1 * 2**-8 / 4000)
    assert 0.5 < after.std() / math.sqrt(0.1 * 2**-8) < 1.1


@given(st.sampled_from(["small", "cancelling", "any"]), st.integers(0, 2**31))
def test_the_wrapper_and_optax_give_what_the_function_gives(kind, seed):
    """p + (p' - p) rounds to p' to the bit, also when p and p' are far apart or nearly cancel."""
    rng = np.random.default_rng(seed)
    p = (rng.normal(size=512) * 2.0 ** rng.integers(-60, 60, 512)).astype(ml_dtypes.bfloat16)
    u = rng.normal(size=512) * 2.0 ** -rng.integers(0, 30, 512) * p.astype(np.float64)
    if kind == "cancelling":
        u = -(u + p.astype(np.float64))
    elif kind == "any":
        u = rng.normal(size=512) * 2.0 ** rng.integers(-60, 60, 512)
    u = u.astype(np.float32)
    key = jax.random.key(seed)
    params, updates = jnp.asarray(p), jnp.asarray(u)
    tx = stochastic_rounding(optax.identity(), key)
    steps, state = tx.update(updates, tx.init(params), params)
    assert steps.dtype == jnp.float32 and int(state.step) == 1
    after = np.asarray(optax.apply_updates(params, steps))
    below, above = neighbours(p.astype(np.float32) + u)
    result = after.astype(np.float64)
    assert np.all((result == below) | (result == above))
    expected = apply_updates_stochastic(jax.random.fold_in(key, 0), params, updates)
    np.testing.assert_array_equal(after, expected)


def test_the_wrapper_passes_on_what_is_not_finite():
    params = jnp.array([jnp.inf, 1.0, 1.0, -LARGEST], BF16)
    updates = jnp.array([1.0, jnp.nan, -jnp.inf, -1e38])
    tx = stochastic_rounding(optax.identity(), jax.random.key(0))
    steps, _ = tx.update(updates, tx.init(params), params)
    after = np.asarray(optax.apply_updates(params, steps), np.float32)
    np.testing.assert_array_equal(after, [np.inf, np.nan, -np.inf, -np.inf])


def test_the_inner_transformation_sees_float32():
    """lr wd p is below bfloat16's resolution of the update; the decayed step must not lose it."""
    params = jnp.full(4, 0.03, BF16)
    seen = []

    def look(updates, state, params=None):
        seen.extend([updates.dtype, params.dtype])
        return updates, state

    looking = optax.GradientTransformation(lambda p: optax.EmptyState(), look)
    inner = optax.chain(looking, optax.lion(1e-2, weight_decay=1e-2), looking)
    tx = stochastic_rounding(inner, jax.random.key(0))
    tx.update(jnp.ones(4, BF16), tx.init(params), params)
    assert seen == [jnp.float32] * 4


def test_float32_leaves_pass_as_the_inner_transformation_made_them():
    params = {"h": jnp.ones(3, BF16), "f": jnp.ones(3)}
    grads = {"h": jnp.ones(3, BF16), "f": jnp.array([0.1, -0.2, 0.3])}
    tx, plain = stochastic_rounding(optax.adamw(0.1), jax.random.key(0)), optax.adamw(0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = plain.update(grads["f"], plain.init(params["f"]), params["f"])
    np.testing.assert_array_equal(updates["f"], expected)


def test_resuming_continues_the_random_numbers():
    params, grad = jnp.ones(200, BF16), jnp.ones(200, BF16)
    tx = stochastic_rounding(optax.sgd(1e-3), jax.random.key(5))
    step = jax.jit(
        lambda p, s: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(grad, s, p))
    )
    p, s, history = params, tx.init(params), []
    for _ in range(4):
        p, s = step(p, s)
        history.append(jax.device_get((p, s)))
    assert step._cache_size() == 1
    p, s = step(*jax.tree.map(jnp.asarray, history[1]))
    chex.assert_trees_all_equal((p, s), history[2])
    moves = [np.asarray(h[0], np.float32) != 1 for h in history]
    assert (moves[0] != moves[1]).any()


@pytest.mark.slow  # seconds of compiling
def test_a_key_may_be_traced_and_a_compiled_step_called_again():
    """Also under shard_map, where a key closed over would count as used by the first call."""
    params, grad = jnp.ones((8, 50), BF16), jnp.ones((8, 50), BF16)

    def first(key):
        tx = stochastic_rounding(optax.sgd(3e-3), key)
        updates, _ = tx.update(grad, tx.init(params), params)
        return optax.apply_updates(params, updates)

    keys = jax.random.split(jax.random.key(0), 2)
    both = jax.vmap(first)(keys)
    np.testing.assert_array_equal(both[1], first(keys[1]))
    assert (both[0] != both[1]).any()

    tx = stochastic_rounding(optax.sgd(3e-3), jax.random.key(0))
    mesh = Mesh(np.array(jax.devices()), ("x",))

    def rows(p, state):
        updates, state = tx.update(jnp.ones_like(p), jax.tree.map(lambda x: x[0], state), p)
        return optax.apply_updates(p, updates), jax.tree.map(lambda x: x[None], state)

    step = jax.jit(jax.shard_map(rows, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    states = jax.tree.map(lambda x: jnp.stack([x] * 8), tx.init(params[:1]))
    again = [np.asarray(step(params, states)[0]) for _ in range(2)]
    np.testing.assert_array_equal(*again)
    np.testing.assert_array_equal(again[0][0], again[0][1])  # replicas round alike


def test_a_skipped_step_uses_no_random_numbers():
    params = jnp.ones(200, BF16)
    tx = skip_nonfinite(stochastic_rounding(optax.sgd(1e-3), jax.random.key(5)))
    good, bad = jnp.ones(200, BF16), jnp.full(200, jnp.nan, BF16)
    results = []
    for sequence in ([good, bad, good], [good, good]):
        p, s = params, tx.init(params)
        for g in sequence:
            u, s = tx.update(g, s, p)
            p = optax.apply_updates(p, u)
        results.append((p, s.inner))
    chex.assert_trees_all_equal(*results)


@pytest.mark.slow  # seconds of compiling
def test_eight_devices_and_vmap_over_keys():
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(16, 8)), BF16)
    updates = jnp.asarray(1e-3 * rng.normal(size=(16, 8)), jnp.float32)
    key = jax.random.key(7)
    expected = apply_updates_stochastic(key, params, updates)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere = jax.device_put(key, NamedSharding(mesh, P()))
    for split in (NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "data"))):
        placed = [jax.device_put(x, split) for x in (params, updates)]
        with jax.transfer_guard("disallow"):
            result = jax.jit(apply_updates_stochastic)(everywhere, *placed)
        assert result.sharding.is_equivalent_to(split, 2)
        np.testing.assert_array_equal(result, expected)
    keys = jax.random.split(key, 3)
    many = jax.vmap(apply_updates_stochastic, (0, None, None))(keys, params, updates)
    for k, one in zip(keys, many, strict=True):
        np.testing.assert_array_equal(one, apply_updates_stochastic(k, params, updates))


def test_bad_input_is_refused():
    key, ones = jax.random.key(0), {"w": jnp.ones(3, BF16)}
    with pytest.raises(TypeError, match="typed key"):
        apply_updates_stochastic(jax.random.PRNGKey(0), ones, ones)
    with pytest.raises(TypeError, match="typed key"):
        stochastic_rounding(optax.sgd(0.1), 0)  # pyright: ignore
    with pytest.raises(ValueError, match="one key"):
        stochastic_round(jax.random.split(key), jnp.ones(2))
    with pytest.raises(TypeError, match="int32"):
        stochastic_round(key, jnp.arange(2))
    with pytest.raises(TypeError, match="parameter w is int32"):
        apply_updates_stochastic(key, {"w": jnp.arange(3)}, ones)
    with pytest.raises(ValueError, match=r"w has shape \(1, 3\)"):
        apply_updates_stochastic(key, ones, {"w": jnp.ones((1, 3))})
    with pytest.raises(ValueError, match="parameter w has no gradient"):
        apply_updates_stochastic(key, ones, {"w": None})
    tx = stochastic_rounding(optax.sgd(0.1), key)
    with pytest.raises(TypeError, match="gradient w is int32"):
        tx.update({"w": jnp.arange(3)}, tx.init(ones), ones)
    with pytest.raises(ValueError, match="stochastic_rounding needs the parameters"):
        tx.update(ones, tx.init(ones))


MORE_SHAPES = [(1,), (7,), (3, 1), (2, 3, 5), (4, 0)]


@pytest.mark.parametrize(
    "shape",
    [(), (5, 4), (0,), *(pytest.param(s, marks=pytest.mark.slow) for s in MORE_SHAPES)],
)
def test_any_shape(shape):
    """A third of the way up, each entry by itself: no entry is always up or always down."""
    keys = jax.random.split(jax.random.key(0), 60)
    x = jnp.full(shape, 1 + 2.0**-7 / 3)
    rounded = np.asarray(jax.vmap(stochastic_round, (0, None))(keys, x), np.float64)
    assert rounded.shape == (60, *shape)
    up = (rounded > 1).mean(axis=0)
    assert np.all((up > 0.08) & (up < 0.6))
    first, last = rounded.reshape(60, -1)[:, :1], rounded.reshape(60, -1)[:, -1:]
    assert np.prod(shape, dtype=int) < 2 or (first != last).any()
