import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optimiser_steps import run_steps

from blogjax.optim.skip_nonfinite import nonfinite_leaves, skip_nonfinite

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": {"c": jnp.array([[0.5]])}}
BAD = [jnp.nan, jnp.inf, -jnp.inf]


def gradients(step: int):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), PARAMS)


def poison(grads, value):
    return {"a": grads["a"].at[1].set(value), "b": grads["b"]}


def run(tx, sequence):
    return run_steps(tx, PARAMS, sequence)


@given(st.lists(st.sampled_from([None, *BAD]), min_size=1, max_size=6))
def test_a_bad_step_is_as_if_it_never_was(faults):
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    sequence = [
        gradients(i) if fault is None else poison(gradients(i), fault)
        for i, fault in enumerate(faults)
    ]
    params, state = run(skip_nonfinite(inner), sequence)
    good = [gradients(i) for i, fault in enumerate(faults) if fault is None]
    expected, expected_inner = PARAMS, inner.init(PARAMS)
    if good:
        expected, expected_inner = run(inner, good)
    chex.assert_trees_all_equal(params, expected)
    chex.assert_trees_all_equal(state.inner, expected_inner)
    assert state.skipped == len(faults) - len(good)


def test_a_skipped_step_keeps_the_sign_of_zero():
    params = {"w": jnp.array([-0.0, 0.0, 1.0])}
    tx = skip_nonfinite(optax.sgd(0.1))
    updates, _ = tx.update({"w": jnp.array([1.0, jnp.nan, 1.0])}, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert np.asarray(after["w"]).tobytes() == np.asarray(params["w"]).tobytes()


def test_the_leaves_at_fault_are_named_and_forgotten_after_a_good_step():
    tx = skip_nonfinite(optax.sgd(0.1))
    state = tx.init(PARAMS)
    _, state = tx.update(poison(gradients(0), jnp.nan), state, PARAMS)
    assert state.nonfinite_leaves.tolist() == [True, False]
    _, state = tx.update(gradients(1), state, PARAMS)
    assert state.nonfinite_leaves.tolist() == [False, False]
    assert state.skipped == 1


def test_every_leaf_counts():
    tree = {"f": jnp.ones(2), "i": jnp.arange(3), "n": jnp.array(jnp.inf), "z": jnp.array(1 + 0j)}
    assert nonfinite_leaves(tree).tolist() == [False, False, True, False]
    assert nonfinite_leaves({}).shape == (0,)


def test_dtypes_of_the_inner_result_are_kept():
    """A bf16 gradient may become a float32 update; both branches must agree on that."""
    cast = optax.GradientTransformation(
        lambda p: optax.EmptyState(),
        lambda u, s, p=None: (jax.tree.map(lambda x: x.astype(jnp.float32), u), s),
    )
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    tx = skip_nonfinite(cast)
    for value in (1.0, jnp.nan):
        updates, _ = tx.update({"w": jnp.full(2, value, jnp.bfloat16)}, tx.init(params), params)
        assert updates["w"].dtype == jnp.float32


def test_extra_arguments_reach_the_inner_transformation():
    scale_by_value = optax.GradientTransformationExtraArgs(
        lambda p: optax.EmptyState(),
        lambda u, s, p=None, *, value, fn: (jax.tree.map(lambda x: fn(x) * value, u), s),
    )
    tx = skip_nonfinite(scale_by_value)
    updates, _ = tx.update(gradients(0), tx.init(PARAMS), PARAMS, value=3.0, fn=jnp.negative)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: -3 * x, gradients(0)))


@pytest.mark.parametrize("fault", [None, jnp.nan])
def test_vmap(fault):
    tx = skip_nonfinite(optax.adam(0.1))
    grads = gradients(0)
    if fault is not None:
        grads = poison(grads, fault)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), grads, gradients(1))
    params = jax.tree.map(lambda a: jnp.stack([a, a]), PARAMS)
    updates, state = jax.vmap(tx.update)(stacked, jax.vmap(tx.init)(params), params)
    alone, _ = tx.update(gradients(1), tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], updates), alone, rtol=1e-6)
    assert state.skipped.tolist() == [0 if fault is None else 1, 0]


def test_the_check_needs_no_buffer():
    """For `sum(0 x)` XLA writes out a leaf of zeros, for `all(isfinite(x))` one of booleans."""
    leaves = [jnp.ones((64, 256)), jnp.ones((128, 128))]
    compiled = jax.jit(nonfinite_leaves).lower(leaves)
    compiled = compiled.compile(compiler_options={"xla_backend_optimization_level": "3"})
    assert compiled.memory_analysis().temp_size_in_bytes < 4096
