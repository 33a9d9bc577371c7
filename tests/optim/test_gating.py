"""An update that happens or does not: against the two sides computed apart."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from optimiser_steps import normal

from blogjax.optim.gating import update_unless
from blogjax.optim.lion import lion


def bits(tree):
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return [(x.dtype, np.asarray(plain(x)).tobytes()) for x in jax.tree.leaves(tree)]


def start():
    """Made anew for each use: a key is used once."""
    return {
        "count": jnp.int32(7),
        "key": jax.random.key(3),
        "mu": jnp.array([-0.0, 1e-3, jnp.inf]),
        "half": jnp.array([-0.0, 3.0], jnp.bfloat16),
        "seen": jnp.array(True),
        "none": None,
    }


def everything(state, x):
    """Every kind of leaf; results that follow from the new state, through calls and loops too."""
    mu = jax.jit(lambda m: 0.5 * m + x)(state["mu"])
    key, own = jax.random.split(state["key"])
    noise = jax.random.normal(own, (3,))
    total = jax.lax.fori_loop(0, 3, lambda i, c: c + mu, jnp.zeros(3))
    updates = {"a": noise * jnp.sign(mu), "b": jax.nn.relu(total).astype(jnp.bfloat16), "n": None}
    new = {"count": state["count"] + 1, "key": key, "mu": mu, "half": state["half"] * 2}
    return updates, new | {"seen": ~state["seen"], "none": None}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("value", [2.0, jnp.nan])
def test_either_side_bit_for_bit(value, jit):
    def step(skip, state, x):
        return update_unless(skip, lambda: everything(state, x), state)

    step = jax.jit(step) if jit else step
    taken = step(jnp.array(False), start(), value)
    assert bits(taken) == bits((jax.jit(everything) if jit else everything)(start(), value))
    updates, state = step(jnp.array(True), start(), value)
    assert bits(state) == bits(start())
    # The key that a skipped step gives back may be used by the next one.
    assert bits(step(jnp.array(False), state, value)) == bits(taken)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, taken[0])
    for x in jax.tree.leaves(updates):
        assert np.all(x == 0) and np.all(np.signbit(np.float32(x)))


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 9))
def test_a_skipped_step_is_as_if_it_never_was(skips, seed):
    grads = jnp.asarray(normal(seed, 6, 4), jnp.float32)
    params, state = GATED(jnp.array(skips), grads)
    expected, m = np.zeros(4), np.zeros(4)
    for skip, g in zip(skips, np.asarray(grads), strict=True):
        if not skip:
            m = 0.5 * m + g
            expected = expected - m
    np.testing.assert_allclose(params, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state[0].trace, m, rtol=1e-5, atol=1e-6)


@jax.jit
def GATED(skips, grads):
    tx = optax.sgd(1.0, momentum=0.5)

    def step(carry, now):
        params, state = carry
        skip, g = now
        updates, state = update_unless(skip, lambda: tx.update(g, state), state)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.zeros(4), tx.init(jnp.zeros(4))
    return jax.lax.scan(step, start, (skips, grads))[0]


@pytest.mark.parametrize("skip", [False, True])
def test_a_number_that_is_in_the_state_twice_belongs_to_two_old_ones(skip):
    def update():
        new = state["a"] + state["b"]
        return 10 * new, {"a": new, "b": new, "c": state["a"], "d": jnp.float32(5)}

    state = {k: jnp.float32(i) for i, k in enumerate("abcd", start=1)}
    updates, after = update_unless(jnp.array(skip), update, state)
    expected = [1, 2, 3, 4] if skip else [3, 3, 1, 5]
    assert [float(x) for x in after.values()] == expected
    assert float(updates) == (0 if skip else 30)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("old", "new"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_state_that_changes_its_dtype_has_the_new_one(old, new, skip):
    def update():
        m = state.astype(new) + jnp.ones(2, new)
        return m * jnp.full(2, 2, new), m

    state = jnp.full(2, 1.5, old)
    updates, after = update_unless(jnp.array(skip), update, state)
    assert updates.dtype == after.dtype == jnp.dtype(new)
    assert after.tolist() == ([1.5, 1.5] if skip else [2.5, 2.5])


def test_weak_types_stay_out_of_the_state():
    _, after = update_unless(jnp.array(False), lambda: (jnp.ones(1), 1.0), jnp.float32(0))
    assert not after.weak_type and after == 1


@pytest.mark.parametrize("make", [
    lambda: lion(0.1), lambda: optax.adamw(0.1), lambda: optax.sgd(0.1, momentum=0.9),
], ids=["lion", "adamw", "sgd"])  # fmt: skip
def test_nothing_is_copied_where_the_state_is_donated(make):
    """Neither by the branch, nor because the parameters are made from the old state."""
    tx = make()

    def step(skip, params, state, grads):
        updates, state = update_unless(skip, lambda: tx.update(grads, state, params), state)
        return optax.apply_updates(params, updates), state

    params = [jnp.ones((64, 256)), jnp.ones((128, 128))]
    lowered = jax.jit(step, donate_argnums=(1, 2)).lower(
        jnp.array(True), params, tx.init(params), params
    )
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": "3"})
    assert re.findall(r"\[\d[\d,]+\]\S* copy\(", compiled.as_text()) == []
    assert "conditional(" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096


def test_one_skip_per_row_under_vmap():
    step = lambda skip, m, g: update_unless(skip, lambda: (m + g, m + g), m)  # noqa: E731
    m, g = jnp.arange(3.0), jnp.ones(3)
    updates, after = jax.vmap(step)(jnp.array([False, True, False]), m, g)
    assert updates.tolist() == [1, 0, 3] and after.tolist() == [1, 1, 3]


def test_replicated_and_split_leaves_on_a_mesh():
    """Leaves that vary over different axes, and a skip that varies over none."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    state = {"x": jnp.arange(4.0), "y": jnp.arange(2.0), "both": jnp.ones(3)}
    specs = {"x": P("x"), "y": P("y"), "both": P()}

    def body(skip, state):
        new = jax.tree.map(lambda s: jax.jit(lambda t: 2 * t + 1)(s), state)
        return update_unless(skip, lambda: (jax.tree.map(jnp.negative, new), new), state)

    step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(P(), specs), out_specs=(specs, specs)))
    for skip in (False, True):
        updates, after = step(jnp.array(skip), state)
        expected = state if skip else jax.tree.map(lambda s: 2 * s + 1, state)
        chex.assert_trees_all_equal(after, expected)
        factor = 0 if skip else -1
        chex.assert_trees_all_equal(updates, jax.tree.map(lambda s: factor * s, expected))  # noqa: B023


@pytest.mark.parametrize(("new", "match"), [
    ({"m": jnp.ones((1, 3))}, r"new state m has shape \(1, 3\), but state m has shape \(3,\)"),
    ({"m": jnp.ones(3), "v": jnp.ones(3)}, "new state v has no state"),
])  # fmt: skip
def test_a_state_of_another_kind_is_refused(new, match):
    with pytest.raises(ValueError, match=match):
        update_unless(jnp.array(False), lambda: (None, new), {"m": jnp.ones(3)})


@pytest.mark.parametrize("skip", [False, True])
def test_a_loop_never_sees_old_and_new_state_mixed(skip):
    """With the old state in place of the new one the step of this loop would be 0."""

    def update(state):
        new = state + 1
        count = jax.lax.while_loop(lambda c: c < 5, lambda c: c + new - state, state * 0)
        return count, new

    def nested(state):
        return jax.jit(lambda s: jax.lax.cond(s > 0, update, update, s))(state)

    for step in (update, nested):
        count, state = update_unless(jnp.array(skip), lambda s=step: s(jnp.float32(3)), 3.0)
        assert (count, state) == ((-0.0, 3.0) if skip else (5.0, 4.0))


def test_a_side_effect_sees_what_was_computed():
    seen = []

    def update(state):
        new = state + 1
        jax.debug.callback(lambda x: seen.append(float(x)), new * 2)
        return new, new

    jax.block_until_ready(update_unless(jnp.array(True), lambda: update(jnp.float32(3)), 3.0))
    jax.effects_barrier()
    assert seen == [8.0]
