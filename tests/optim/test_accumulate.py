import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optimiser_steps import run_steps

from blogjax.optim.accumulate import AccumulateState, accumulate
from blogjax.optim.skip_nonfinite import skip_nonfinite

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": {"c": jnp.array([[0.5]])}}
FAULTS = [None, None, None, jnp.nan, jnp.inf, -jnp.inf]


def gradients(step: int, fault=None, params=PARAMS):
    rng = np.random.default_rng(step)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    if fault is not None:
        grads["a"] = grads["a"].at[step % 2].set(fault)
    return grads


def run(tx, sequence, params=PARAMS):
    return run_steps(tx, params, sequence)


def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def scan(tx, params, grads):
    """All steps in one `lax.scan` over the leading axis of the gradients."""

    def step(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), grads)[0]


def window_means(sequence, faults, every):
    """The mean of each window's finite gradients, summed one after the other in numpy float32."""
    means = []
    for start in range(0, len(sequence) - every + 1, every):
        window = range(start, start + every)
        good = [jax.device_get(sequence[i]) for i in window if faults[i] is None]
        if not good:
            continue
        number, total = np.float32(len(good)), good[0]
        for g in good[1:]:
            total = jax.tree.map(lambda a, b: a + b, total, g)
        means.append(jax.tree.map(lambda t, n=number: jnp.asarray(t / n), total))
    return means


INNER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.1, 0.0, 5)))
WINDOWS = {every: accumulate(INNER, every) for every in range(1, 5)}


@settings(max_examples=15)
@given(faults=st.lists(st.sampled_from(FAULTS), min_size=1, max_size=9), every=st.integers(1, 4))
def test_the_steps_of_the_bare_transformation_on_the_means_of_finite_gradients(faults, every):
    sequence = [gradients(i, fault) for i, fault in enumerate(faults)]
    params, state = run(WINDOWS[every], sequence)
    means = window_means(sequence, faults, every)
    expected, expected_inner = run(INNER, means) if means else (PARAMS, INNER.init(PARAMS))
    chex.assert_trees_all_close((params, state.inner), (expected, expected_inner), rtol=1e-6)
    tail = faults[len(faults) - len(faults) % every :]
    assert int(state.calls) == len(tail)
    assert int(state.finite) == tail.count(None)
    assert int(state.emitted) == len(means)
    assert int(state.skipped) == len(faults) - faults.count(None)


def test_a_window_with_bad_microbatches_is_bit_for_bit_one_without_them():
    faults = [None, jnp.nan, None, None, jnp.inf, None, -jnp.inf, None, *[jnp.nan] * 3, None]
    sequence = [gradients(i, fault) for i, fault in enumerate(faults)]
    seen, state = run(WINDOWS[4], sequence)
    without = accumulate(INNER, lambda emitted: jnp.array([3, 2, 1])[emitted])
    good = [g for g, fault in zip(sequence, faults, strict=True) if fault is None]
    expected, other = run(without, good)
    chex.assert_trees_all_equal((seen, state.inner), (expected, other.inner))
    assert state.emitted == other.emitted == 3


def test_a_bad_call_under_skip_nonfinite_changes_nothing_at_all():
    """Parameters and the whole state, position in the window included, bit for bit."""
    tx = skip_nonfinite(accumulate(optax.adam(0.1), 3))
    faults = [None, jnp.nan, None, jnp.inf, None, None, jnp.nan]
    sequence = [gradients(i, fault) for i, fault in enumerate(faults)]
    params, state = run(tx, sequence)
    good = [g for g, fault in zip(sequence, faults, strict=True) if fault is None]
    expected, expected_state = run(tx, good)
    chex.assert_trees_all_equal((params, state.inner), (expected, expected_state.inner))
    assert (int(state.skipped), int(state.inner.emitted), int(state.inner.calls)) == (3, 1, 1)


def test_a_window_without_a_finite_gradient_emits_nothing():
    params = {"w": jnp.array([-0.0, 0.0, 1.0])}
    bad = {"w": jnp.array([1.0, jnp.nan, 1.0])}
    tx = accumulate(optax.adamw(0.1, weight_decay=0.5), 2)
    after, state = run(tx, [bad, bad], params)
    assert np.asarray(after["w"]).tobytes() == np.asarray(params["w"]).tobytes()
    chex.assert_trees_all_equal(state.inner, tx.init(params).inner)
    assert (int(state.emitted), int(state.skipped), int(state.calls)) == (0, 2, 0)
    assert state.nonfinite_leaves.tolist() == [True]
    # The parameters stand still inside a window as well, to the sign of zero.
    after, _ = run(tx, [{"w": jnp.ones(3)}], params)
    assert np.asarray(after["w"]).tobytes() == np.asarray(params["w"]).tobytes()


def test_schedules_count_emissions():
    rates = jnp.array([1.0, 10.0, 100.0])
    tx = accumulate(optax.sgd(lambda count: rates[count]), 2)
    ones = {"w": jnp.ones(1)}
    bad = {"w": jnp.full(1, jnp.nan, jnp.float32)}
    params, state = run(tx, [ones, ones, bad, bad, bad, ones, ones, ones], {"w": jnp.zeros(1)})
    assert params["w"].tolist() == [-111.0]
    assert (int(state.emitted), int(state.skipped)) == (3, 3)


def test_microbatches_give_the_step_of_the_whole_batch():
    """Mean squared error, in float64 by hand: k microbatches of B rows = one batch of k B."""
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(24, 3)), rng.normal(size=24), rng.normal(size=3)
    expected = w - 0.1 * 2 * x.T @ (x @ w - y) / 24
    loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)  # noqa: E731
    parts = [jnp.asarray(a.reshape(4, 6, *a.shape[1:]), jnp.float32) for a in (x, y)]
    start = jnp.asarray(w, jnp.float32)
    sequence = [jax.grad(loss)(start, *part) for part in zip(*parts, strict=True)]
    after, _ = run(accumulate(optax.sgd(0.1), 4), sequence, start)
    np.testing.assert_allclose(after, expected, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "size"), [(jnp.bfloat16, 1000), (jnp.float16, 3000)])
def test_sums_of_half_precision_are_kept_in_float32(dtype, size):
    """The mean of equal numbers is that number; a bfloat16 sum of ones stops at 256."""
    value = jnp.asarray(np.full(2, 1.7), dtype)
    tx = accumulate(optax.sgd(-1.0), size)
    state = tx.init(jnp.zeros(2, dtype))

    def step(carry, _):
        updates, state = tx.update(value, carry[0])
        return (state, carry[1] + updates), None

    (state, total), _ = jax.lax.scan(step, (state, jnp.zeros(2, dtype)), length=size)
    assert state.sums.dtype == jnp.float32
    assert total.dtype == dtype
    assert total.tolist() == value.tolist()


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
def test_accumulator_dtype(dtype):
    tx = accumulate(optax.sgd(1.0), 2, accumulator_dtype=dtype)
    params = {"h": jnp.ones(2, jnp.bfloat16), "f": jnp.ones(2)}
    _, state = run(tx, [params] * 3, params)
    wanted = dtype or jnp.float32
    assert {x.dtype for x in jax.tree.leaves(state.sums)} == {jnp.dtype(wanted)}


def test_float64_is_summed_in_float64(x64):
    tx = accumulate(optax.sgd(-1.0), 2)
    params = jnp.zeros(1)
    after, _ = run(tx, [jnp.array([1.0]), jnp.array([1e-12])], params)
    assert after.tolist() == [0.5 + 5e-13]


def test_the_length_of_a_window_may_follow_the_emissions():
    tx = accumulate(optax.sgd(1.0), lambda emitted: jnp.where(emitted == 0, 1, 3))
    g = [{"w": jnp.array([v])} for v in (1.0, 3.0, 6.0, 9.0)]
    states = []
    params, state = {"w": jnp.zeros(1)}, tx.init({"w": jnp.zeros(1)})
    for x in g:
        updates, state = tx.update(x, state, params)
        params = optax.apply_updates(params, updates)
        states.append((float(params["w"][0]), int(state.emitted)))
    assert states == [(-1.0, 1), (-1.0, 1), (-1.0, 1), (-7.0, 2)]
    always = accumulate(optax.sgd(1.0), lambda emitted: 0)
    assert run(always, g, {"w": jnp.zeros(1)})[0]["w"].tolist() == [-19.0]


def test_without_skipping_a_nan_spoils_its_own_window_only():
    tx = accumulate(optax.identity(), 2, skip_nonfinite=False)
    bad, good = jnp.array([jnp.nan]), jnp.array([2.0])
    state, emitted = tx.init(good), []
    for g in (bad, good, good, good, bad, bad):
        updates, state = tx.update(g, state)
        emitted.append(float(updates[0]))
    np.testing.assert_array_equal(emitted, [0.0, np.nan, 0.0, 2.0, 0.0, np.nan])
    assert (int(state.skipped), int(state.emitted)) == (3, 3)


def test_a_sum_that_overflows_is_caught_by_the_inner_guard():
    huge = jnp.full(1, 3e38)
    params, state = run(accumulate(skip_nonfinite(optax.sgd(1.0)), 2), [huge, huge], jnp.ones(1))
    assert params.tolist() == [1.0]
    assert isinstance(state, AccumulateState)
    assert (int(state.skipped), int(state.inner.skipped)) == (0, 1)


def primitives(jaxpr, inside_cond=False):
    """(name, whether in a branch) of everything in a jaxpr, calls followed."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, inside_cond
        for value in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                below = inside_cond or eqn.primitive.name == "cond"
                yield from primitives(getattr(value, "jaxpr", value), below)


def test_the_inner_update_is_in_one_conditional():
    tx = accumulate(optax.adam(0.1), 4)
    jaxpr = jax.make_jaxpr(tx.update)(gradients(0), tx.init(PARAMS), PARAMS)
    found = list(primitives(jaxpr.jaxpr))
    assert [name for name, _ in found].count("cond") == 1
    assert ("sqrt", True) in found  # Adam's
    assert ("sqrt", False) not in found


@pytest.mark.slow  # seconds of compiling
def test_vmap_over_seeds_with_different_faults():
    tx = accumulate(optax.adam(0.1), 2)
    faults = [[None, jnp.nan, None, None], [None] * 4, [jnp.nan, jnp.nan, None, jnp.inf]]
    each = [[gradients(10 * i + j, f) for j, f in enumerate(row)] for i, row in enumerate(faults)]
    together = jax.vmap(lambda g: scan(tx, PARAMS, g))(stack([stack(row) for row in each]))
    for i, row in enumerate(each):
        params, state = run(tx, row)
        mine = jax.tree.map(lambda x, i=i: x[i], together)
        chex.assert_trees_all_close(mine[0], params, rtol=1e-6)
        chex.assert_trees_all_close(mine[1].inner, state.inner, rtol=1e-6)
        assert int(mine[1].emitted) == int(state.emitted)


def test_eight_devices_agree_with_one():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)}
    sequence = [{"w": jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)} for _ in range(5)]
    sequence[1]["w"] = sequence[1]["w"].at[13, 2].set(jnp.nan)  # on the seventh device only
    tx = accumulate(optax.adamw(0.1), 2)
    expected = run(tx, sequence, params)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = NamedSharding(mesh, P("data"))
    placed = jax.device_put(params, split)
    result = jax.jit(lambda p, g: scan(tx, p, g))(placed, stack(sequence))
    chex.assert_trees_all_close(jax.device_get(result), expected, rtol=1e-6)
    for leaf in (result[0]["w"], result[1].sums["w"], optax.tree.get(result[1].inner, "mu")["w"]):
        assert leaf.sharding.is_equivalent_to(split, 2)


@pytest.mark.slow  # seconds of compiling
def test_under_shard_map_each_device_has_its_own_windows():
    """With jax's check of varying axes on; one device's bad gradient stays its own."""
    tx = accumulate(optax.adam(0.1), 2)
    each = [[gradients(10 * i + j, [None, jnp.nan][i == 3]) for j in range(4)] for i in range(8)]

    def train(sequence):
        one = jax.tree.map(lambda x: x[0], sequence)
        params = jax.tree.map(lambda x: jax.lax.pcast(x, "x", to="varying"), PARAMS)
        state = jax.tree.map(lambda x: jax.lax.pcast(x, "x", to="varying"), tx.init(PARAMS))
        for i in range(4):
            updates, state = tx.update(jax.tree.map(lambda x, i=i: x[i], one), state, params)
            params = optax.apply_updates(params, updates)
        return jax.tree.map(lambda x: x[None], params)

    mesh = Mesh(np.array(jax.devices()), ("x",))
    mapped = jax.jit(jax.shard_map(train, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    params = mapped(stack([stack(row) for row in each]))
    for i in (0, 3, 7):
        expected, _ = run(tx, each[i])
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], params), expected, rtol=1e-6)
    np.testing.assert_array_equal(params["a"][3], PARAMS["a"])


def test_extra_arguments_reach_the_inner_transformation():
    by_value = optax.GradientTransformationExtraArgs(
        lambda p: optax.EmptyState(),
        lambda u, s, p=None, *, value, fn: (jax.tree.map(lambda x: fn(x) * value, u), s),
    )
    tx = accumulate(by_value, 1)
    updates, _ = tx.update(gradients(0), tx.init(PARAMS), PARAMS, value=3.0, fn=jnp.negative)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: -3 * x, gradients(0)))


@pytest.mark.parametrize(
    ("every", "error", "match"),
    [
        (0, ValueError, "every is 0"),
        (2.0, TypeError, "every must"),
        (True, TypeError, "every must"),
    ],
)
def test_bad_windows_are_refused(every, error, match):
    with pytest.raises(error, match=match):
        accumulate(optax.sgd(0.1), every)


def test_bad_trees_are_refused_by_name():
    tx = accumulate(optax.sgd(0.1), 2)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"gradient a has shape \(1, 2\)"):
        tx.update({**PARAMS, "a": jnp.ones((1, 2))}, state, PARAMS)
    with pytest.raises(ValueError, match="has no gradient"):
        tx.update({**PARAMS, "b": None}, state, PARAMS)
    with pytest.raises(TypeError, match="gradient a is int32"):
        tx.update({**PARAMS, "a": jnp.ones(2, jnp.int32)}, state, PARAMS)
    with pytest.raises(TypeError, match="parameter n is int32"):
        tx.init({"n": jnp.arange(3)})
    with pytest.raises(TypeError, match="accumulator_dtype"):
        accumulate(optax.sgd(0.1), 2, accumulator_dtype=jnp.int32)


def test_counting_ends_at_the_largest_number():
    tx = accumulate(optax.sgd(0.1), lambda emitted: jnp.where(emitted < 0, 9, 1))
    state = tx.init(PARAMS)
    state = state._replace(emitted=jnp.int32(2**31 - 1), skipped=jnp.int32(2**31 - 1))
    for fault in (None, jnp.nan):
        _, state = tx.update(gradients(0, fault), state, PARAMS)
    assert state.emitted == state.skipped == 2**31 - 1
