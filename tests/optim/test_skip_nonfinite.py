import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optimiser_steps import run_steps

from blogjax.optim.skip_nonfinite import (
    SkipNonfiniteState,
    nonfinite_leaves,
    skip_nonfinite,
)

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": {"c": jnp.array([[0.5]])}}
BAD = [jnp.nan, jnp.inf, -jnp.inf]


def gradients(step: int):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), PARAMS)


def poison(grads, value):
    return {"a": grads["a"].at[1].set(value), "b": grads["b"]}


def run(tx, sequence):
    return run_steps(tx, PARAMS, sequence)


INNER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
GUARDED = skip_nonfinite(INNER)


@given(st.lists(st.sampled_from([None, *BAD]), min_size=1, max_size=6))
def test_a_bad_step_is_as_if_it_never_was(faults):
    sequence = [
        gradients(i) if fault is None else poison(gradients(i), fault)
        for i, fault in enumerate(faults)
    ]
    params, state = run(GUARDED, sequence)
    good = [gradients(i) for i, fault in enumerate(faults) if fault is None]
    expected, clean = run(GUARDED, good) if good else (PARAMS, GUARDED.init(PARAMS))
    chex.assert_trees_all_equal((params, state.inner), (expected, clean.inner))
    # The bare optimiser may be compiled to other kernels, which round differently.
    bare = run(INNER, good) if good else (PARAMS, INNER.init(PARAMS))
    chex.assert_trees_all_close((params, state.inner), bare, rtol=1e-5, atol=1e-7)
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
    tree = [jnp.array(complex(1, np.inf)), jnp.array(complex(np.nan, 1)), jnp.zeros((0, 2))]
    assert nonfinite_leaves(tree).tolist() == [True, True, False]
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


@pytest.mark.slow  # seconds of compiling
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
    """For `sum(0 x)` XLA writes zeros for leaves of one shape, for `all(isfinite(x))` booleans."""
    leaves = [jnp.ones((128, 128)), jnp.ones((128, 128))]
    compiled = jax.jit(nonfinite_leaves).lower(leaves)
    compiled = compiled.compile(compiler_options={"xla_backend_optimization_level": "3"})
    assert compiled.memory_analysis().temp_size_in_bytes < 4096


def test_counting_ends_at_the_largest_number():
    tx = skip_nonfinite(optax.sgd(0.1))
    state = tx.init(PARAMS)._replace(skipped=jnp.int32(2**31 - 1))
    assert tx.update(poison(gradients(0), jnp.nan), state, PARAMS)[1].skipped == 2**31 - 1


@pytest.mark.parametrize("make", [optax.sgd, optax.adam], ids=["sgd", "adam"])
def test_a_derivative_through_a_skipped_step_is_that_of_the_others(make):
    """A `where` behind a NaN has a NaN derivative: the gradient must be replaced before."""

    def final(rate, gradients):
        tx, params = skip_nonfinite(make(rate)), jnp.array([1.0, 2.0])
        state = tx.init(params)
        for g in gradients:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params)

    good = [jnp.array([1.0, -3.0]), jnp.array([0.5, 2.0])]
    bad = jnp.array([jnp.nan, 1.0])
    expected = jax.grad(final)(0.1, good)
    np.testing.assert_allclose(jax.grad(final)(0.1, [good[0], bad, good[1]]), expected, rtol=1e-6)
    h = 1e-2  # the result is linear in the rate
    slope = (final(0.1 + h, good) - final(0.1 - h, good)) / (2 * h)
    np.testing.assert_allclose(expected, slope, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "lbfgs", "adafactor", "muon", "schedule_free", "multisteps", "noisy_sgd", "reduce_on_plateau",
    "masked",
])  # fmt: skip
def test_any_optimiser_of_optax(name):
    """With loops, branches, keys, functions as arguments and leaves that are masked away."""
    loss = lambda p: jnp.sum((p["a"] - 2) ** 2) + jnp.sum(jnp.sin(p["b"]["c"]))  # noqa: E731
    make = {
        "lbfgs": lambda: optax.lbfgs(),
        "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=1, momentum=0.9),
        "muon": lambda: optax.contrib.muon(0.1),
        "schedule_free": lambda: optax.contrib.schedule_free_adamw(0.1),
        "multisteps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=jax.random.key(0)),
        "reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
        "masked": lambda: optax.masked(optax.adam(0.1), {"a": True, "b": False}),
    }[name]

    def walk(tx, bad):
        tx = optax.with_extra_args_support(tx)

        @jax.jit
        def step(params, state, fault):
            value, grads = jax.value_and_grad(loss)(params)
            grads["a"] = grads["a"].at[0].add(fault)
            extra = {"value": value, "grad": grads, "value_fn": loss}
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        params, state, seen = PARAMS, tx.init(PARAMS), []
        for fault in bad:
            params, state = step(params, state, fault)
            inner = state.inner if isinstance(state, SkipNonfiniteState) else state
            seen.append([np.asarray(plain(x)) for x in jax.tree.leaves((params, inner))])
        return seen

    def plain(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    seen = walk(skip_nonfinite(make()), [0.0, 0.0, np.nan, np.inf, 0.0, 0.0])
    for after in seen[2:4]:
        assert [x.tobytes() for x in after] == [x.tobytes() for x in seen[1]]
    good = walk(make(), [0.0] * 4)
    for a, b in zip(seen[:2] + seen[4:], good, strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)
