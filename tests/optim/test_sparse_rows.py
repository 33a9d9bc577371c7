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

from blogjax.optim.accumulate import accumulate
from blogjax.optim.skip_nonfinite import skip_nonfinite
from blogjax.optim.sparse_rows import lazy_rows

V, D = 5, 3
FLAGS = {"table": True, "kernel": False}
PATTERN = np.array([[1, 1, 0, 0, 1], [0, 1, 0, 1, 1], [0, 0, 0, 1, 1], [1, 0, 0, 1, 0]], bool)


def start(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=(V, D)), dtype) for k in FLAGS}


def gradients(pattern, dtype=jnp.float32):
    """Both leaves get the same gradients; rows are zero where the pattern is not set."""
    rng = np.random.default_rng(1)
    g = [jnp.asarray(rng.normal(size=(V, D)) * rows[:, None], dtype) for rows in pattern]
    return [{"table": x, "kernel": x} for x in g]


PATTERNS = st.lists(st.lists(st.booleans(), min_size=V, max_size=V), min_size=1, max_size=5)


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("tx", [optax.lion(0.1), optax.sgd(0.1, 0.9)], ids=["lion", "momentum"])
@settings(max_examples=10)
@given(pattern=PATTERNS)
def test_a_row_lives_only_in_the_steps_that_touch_it(tx, pattern):
    """Neither depends on a step count: a row equals the plain optimiser on its own steps alone."""
    pattern = np.array(pattern)
    params, sequence = start(), gradients(pattern)
    after, state = run_steps(lazy_rows(tx, FLAGS), params, sequence)
    moments = [x for x in jax.tree.leaves(state) if x.shape == (V, D)]
    assert len(moments) == 2
    for i in range(V):
        row, own = params["table"][i], tx.init(params["table"][i])
        for g, touched in zip(sequence, pattern[:, i], strict=True):
            if touched:
                update, own = tx.update(g["table"][i], own, row)
                row = optax.apply_updates(row, update)
        np.testing.assert_allclose(after["table"][i], row, rtol=1e-6, atol=1e-7)
        moment = next(x for x in jax.tree.leaves(own) if x.shape == (D,))
        np.testing.assert_allclose(moments[1][i], moment, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_close(
        after["kernel"], run_steps(tx, params, sequence)[0]["kernel"], rtol=1e-6
    )


def test_adam_against_a_float64_loop():
    """Moments stand still in rows that are not touched; the bias correction counts every step."""
    sequence, lr, b1, b2, eps, decay = gradients(PATTERN), 0.1, 0.9, 0.99, 1e-8, 0.01
    tx = lazy_rows(optax.adamw(lr, b1, b2, eps, weight_decay=decay), FLAGS)
    after, _ = run_steps(tx, start(), sequence)
    expected = np.asarray(start()["table"], np.float64)
    m, v = np.zeros((V, D)), np.zeros((V, D))
    for t, g in enumerate(sequence, 1):
        for i in range(V):
            row = np.asarray(g["table"][i], np.float64)
            if not row.any():
                continue
            m[i] = b1 * m[i] + (1 - b1) * row
            v[i] = b2 * v[i] + (1 - b2) * row**2
            direction = m[i] / (1 - b1**t) / (np.sqrt(v[i] / (1 - b2**t)) + eps)
            expected[i] -= lr * (direction + decay * expected[i])
    np.testing.assert_allclose(after["table"], expected, rtol=1e-5)


INNERS = {
    "chain": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.5)),
    "masked": optax.masked(optax.adamw(0.1, weight_decay=0.5), FLAGS),
    "partition": optax.partition(
        {"a": optax.lion(0.1, weight_decay=0.5), "b": optax.sgd(0.1)}, {"table": "a", "kernel": "b"}
    ),
    "inject": optax.inject_hyperparams(optax.lion)(0.1, weight_decay=0.5),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9),
    "bf16 momentum": optax.lion(0.1, mu_dtype=jnp.bfloat16, weight_decay=0.5),
    "skip": skip_nonfinite(optax.adamw(0.1, weight_decay=0.5)),
}


@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS.keys())
def test_untouched_rows_keep_every_bit_of_parameters_and_state(inner):
    tx = lazy_rows(inner, FLAGS)
    params, before = run_steps(tx, start(), gradients(np.ones((2, V), bool)))
    params["table"] = params["table"].at[2].set(jnp.array([-0.0, 0.0, 1e-30]))
    assert jax.tree.structure(before) == jax.tree.structure(inner.init(params))
    grads = gradients(np.array([[1, 0, 0, 1, 0]], bool))[0]
    updates, after = jax.jit(tx.update)(grads, before, params)
    new = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    leaves = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    pairs = [(a, b) for (path, a), b in leaves if "table" in jax.tree_util.keystr(path)]
    assert pairs
    for a, b in [*pairs, (params["table"], new["table"])]:
        changed = [np.asarray(a[i]).tobytes() != np.asarray(b[i]).tobytes() for i in range(V)]
        assert changed == [True, False, False, True, False]
    # Elsewhere nothing is held back: the wrapper is the bare transformation.
    plain, _ = jax.jit(inner.update)(grads, before, params)
    np.testing.assert_allclose(updates["kernel"], plain["kernel"], rtol=1e-6)
    np.testing.assert_allclose(updates["table"][::3], plain["table"][::3], rtol=1e-6)


def test_9736_a_rare_row_drifts_to_one_over_the_decay_and_a_lazy_one_stays():
    """After one visit: p_T = -1/wd + (p_1 + 1/wd) (1 - lr wd)^T, whatever the gradient was."""
    lr, decay, steps = 0.05, 0.1, 3000
    after = {}
    for name, flag in (("plain", False), ("lazy", True)):
        tx = lazy_rows(optax.lion(lr, weight_decay=decay, b2=0.999), flag)
        params, state = run_steps(tx, jnp.ones((2, 1)), [jnp.array([[1e-3], [1e-3]])])
        first = np.asarray(params, np.float64)

        def step(carry, _, tx=tx):
            updates, state = tx.update(jnp.array([[1e-3], [0.0]]), carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, state), length=steps)
        after[name] = np.asarray(params)
    expected = -1 / decay + (first + 1 / decay) * (1 - lr * decay) ** steps
    np.testing.assert_allclose(after["plain"], expected, rtol=1e-4)
    np.testing.assert_allclose(after["lazy"][0], expected[0], rtol=1e-4)
    np.testing.assert_array_equal(after["lazy"][1], first[1].astype(np.float32))
    assert after["plain"][1] < -9.99


def scale_by_row_statistic(shape_of):
    """Counts the steps in state leaves of any shape, to see which of them are kept by row."""

    def add_one(updates, state, params=None):
        return updates, jax.tree.map(lambda s: s + 1, state)

    return optax.GradientTransformation(
        lambda params: jax.tree.map(lambda p: jnp.zeros(shape_of(p.shape)), params), add_one
    )


@pytest.mark.parametrize(
    ("shape_of", "by_row"),
    [
        (lambda s: s, True),
        (lambda s: s[:1], True),
        (lambda s: (s[0], 1), True),
        (lambda s: s[1:], False),
        (lambda s: (), False),
        (lambda s: (s[0], 7), False),
    ],
)
def test_which_state_is_kept_by_row(shape_of, by_row):
    tx = lazy_rows(scale_by_row_statistic(shape_of), FLAGS)
    _, state = run_steps(tx, start(), gradients(PATTERN))
    shape = shape_of((V, D))
    visits = PATTERN.sum(0).reshape((V,) + (1,) * (len(shape) - 1)) if by_row else len(PATTERN)
    np.testing.assert_array_equal(state["table"], np.broadcast_to(visits, shape))
    np.testing.assert_array_equal(state["kernel"], np.full(shape, len(PATTERN)))


def test_statistics_of_a_square_leaf_that_could_be_rows_or_columns_are_refused():
    params = {"table": jnp.ones((4, 4))}
    tx = lazy_rows(optax.scale_by_factored_rms(min_dim_size_to_factor=2), True)
    with pytest.raises(ValueError, match=r"v_row/table of shape \(4,\).*\(4, 4\)"):
        tx.update(params, tx.init(params), params)
    grads = {"table": jnp.ones((4, 2)).at[1].set(0)}
    _, state = run_steps(tx, {"table": jnp.ones((4, 2))}, [grads])
    rows = next(x for x in jax.tree.leaves(state) if x.shape == (4,))
    assert (rows != 0).tolist() == [True, False, True, True]


def test_the_owner_of_a_state_leaf_is_the_longest_path_that_ends_it():
    params = {"table": jnp.ones((V, D)), "block": {"table": jnp.ones((V, D))}}
    tx = lazy_rows(optax.sgd(0.1, 0.9), {"table": True, "block": False})
    g = gradients(PATTERN)[0]["table"]
    _, state = run_steps(
        tx, params, [jax.tree.map(jnp.ones_like, params), {"table": g, "block": {"table": g}}]
    )
    trace = optax.tree.get(state, "trace")
    np.testing.assert_array_equal(trace["table"][2], np.ones(D))
    np.testing.assert_allclose(trace["block"]["table"][2], np.full(D, 0.9), rtol=1e-6)


def test_nan_is_a_gradient():
    grads = {"table": jnp.zeros((V, D)).at[1, 0].set(jnp.nan), "kernel": jnp.zeros((V, D))}
    after, _ = run_steps(lazy_rows(optax.sgd(0.1), FLAGS), start(), [grads])
    assert np.isnan(after["table"]).any(axis=1).tolist() == [False, True, False, False, False]


def test_accumulation_belongs_outside():
    """Row 0 is touched by the first microbatch only; inside, the last one's rows decide."""
    sequence = gradients(np.array([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]], bool))
    params = start()
    outside, _ = run_steps(accumulate(lazy_rows(optax.sgd(0.1), FLAGS), 2), params, sequence)
    inside, _ = run_steps(lazy_rows(accumulate(optax.sgd(0.1), 2), FLAGS), params, sequence)
    moved = [(x["table"] != params["table"]).all(axis=1).tolist() for x in (outside, inside)]
    assert moved[0] == [True, True, False, False, False]
    assert moved[1] == [False, True, False, False, False]


def test_flags_may_end_above_the_leaves_or_be_made_by_a_function():
    params = {"emb": {"word": jnp.ones((4, 2, 3)), "bias": jnp.ones(4)}, "none": None}
    grads = jax.tree.map(jnp.zeros_like, params)
    grads["emb"]["word"] = grads["emb"]["word"].at[1, 1, 2].set(1.0)
    whole = {"emb": {"word": True, "bias": True}, "none": None}
    results = [
        run_steps(lazy_rows(optax.lion(0.1), flags), params, [params, grads])
        for flags in (
            whole,
            {"emb": True, "none": False},
            True,
            lambda p: jax.tree.map(lambda x: x.shape[0] == 4, p),
        )
    ]
    for other in results[1:]:
        chex.assert_trees_all_equal(results[0], other)
    first, second = results[0][0]["emb"]["word"][:2]
    assert (second < first).all()  # one entry is enough to touch a row of any rank


def test_under_masked_only_what_is_seen_is_marked():
    """A table that `masked` hides is no leaf for the wrapper; its raw gradient comes through."""
    tx = optax.masked(lazy_rows(optax.sgd(1.0), FLAGS), {"table": False, "kernel": True})
    grads = gradients(PATTERN)[0]
    updates, _ = tx.update(grads, tx.init(start()), start())
    np.testing.assert_array_equal(updates["table"], grads["table"])
    np.testing.assert_array_equal(updates["kernel"], -grads["kernel"])


def test_scan_vmap_and_eight_devices_agree():
    tx = lazy_rows(optax.adamw(0.1, weight_decay=0.1), True)
    rng = np.random.default_rng(0)
    seen = rng.random((4, 16, 1)) < 0.5
    params = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    grads = jnp.asarray(rng.normal(size=(4, 16, 4)) * seen, jnp.float32)

    def train(params, grads):
        def step(carry, g):
            updates, state = tx.update(g, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

    expected = run_steps(tx, params, list(grads))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    for spec in (P("data"), P()):
        placed = jax.device_put(params, NamedSharding(mesh, spec))
        result = jax.jit(train)(placed, grads)
        chex.assert_trees_all_close(jax.device_get(result), expected, rtol=1e-6)
        assert result[0].sharding.is_equivalent_to(placed.sharding, 2)
    both = jax.vmap(train)(jnp.stack([params, -params]), jnp.stack([grads, -grads]))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], both), expected, rtol=1e-6)
    np.testing.assert_allclose(both[0][1], -expected[0], rtol=1e-6)


def test_optax_finds_the_parameters_in_the_state():
    tx = lazy_rows(optax.adam(0.1), FLAGS)
    state = tx.init(start())
    doubled = optax.tree.map_params(tx, lambda x: x + 2, state)
    np.testing.assert_array_equal(optax.tree.get(doubled, "mu")["table"], np.full((V, D), 2.0))
    assert int(optax.tree.get(doubled, "count")) == 0


def test_extra_arguments_reach_the_inner_transformation():
    by_value = optax.GradientTransformationExtraArgs(
        lambda p: optax.EmptyState(),
        lambda u, s, p=None, *, value: (jax.tree.map(lambda x: x * value, u), s),
    )
    tx = lazy_rows(by_value, FLAGS)
    grads = gradients(PATTERN)[0]
    updates, _ = tx.update(grads, tx.init(start()), start(), value=3.0)
    np.testing.assert_allclose(updates["table"], 3 * grads["table"])


@pytest.mark.parametrize(
    ("flags", "error", "match"),
    [
        ({"table": True}, ValueError, "is_row_sparse is no prefix"),
        ({"table": 1, "kernel": False}, TypeError, "at table must be a bool"),
        (lambda p: {"table": True, "kernel": "no"}, TypeError, "at kernel must be a bool"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, error, match):
    with pytest.raises(error, match=match):
        lazy_rows(optax.sgd(0.1), flags).init(start())


def test_bad_trees_are_refused_by_name():
    tx = lazy_rows(optax.sgd(0.1), FLAGS)
    params = start()
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"gradient table has shape \(1, 3\)"):
        tx.update({**params, "table": jnp.ones((1, 3))}, state, params)
    with pytest.raises(ValueError, match="parameter table has no gradient"):
        tx.update({**params, "table": None}, state, params)
    with pytest.raises(TypeError, match="gradient kernel is int32"):
        tx.update({**params, "kernel": jnp.ones((V, D), jnp.int32)}, state)
    with pytest.raises(TypeError, match="parameter table is complex64"):
        tx.init({**params, "table": jnp.ones((V, D), jnp.complex64)})
    with pytest.raises(ValueError, match="scale is marked as row-sparse"):
        lazy_rows(optax.sgd(0.1), True).init({"scale": jnp.ones(())})
