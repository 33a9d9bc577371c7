"""What every optimiser promises, for all of `optimiser_cases.CASES`; optax's own are the controls.

`python tests/conformance/optimiser_table.py` prints the outcome as optimiser x check.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optimiser_cases import CASES, Case, tree

from blogjax.optim.skip_nonfinite import skip_nonfinite
from blogjax.train.checkpoint import Checkpoints

# Left to `make slow`: the controls, which test optax, and variants of what stays.
SLOW = (
    "optax.lion", "optax.adamw", "optax.sgd, momentum", "lion, bf16 momentum", "lion, cautious",
    "sgdm, 2 microbatches", "adam, 2 microbatches", "sign power", "centralised, sgd",
)  # fmt: skip


@pytest.fixture(
    params=[
        pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, case in CASES.items()
    ]
)
def case(request):
    """Checks that a case is known to fail must fail, or the reason given is no longer true."""
    case: Case = request.param
    name = request.node.name.removeprefix("test_")
    check, _, parameters = name.partition("[")
    case_id = next(k for k, v in CASES.items() if v is case)
    rest = parameters.removesuffix("]").replace(case_id, "").strip("-")
    reason = case.fails.get(f"{check}[{rest}]" if rest else check)
    if reason:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    return case


def step_of(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def walk(tx, params, gradients, step=None):
    """Parameters and state after these gradients, one jitted call each."""
    state, step = tx.init(params), step or jax.jit(step_of(tx))
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


@functools.cache
def compiled(case):
    """The optimiser and its step, shared by all checks."""
    tx = case.make(case.lr)
    return tx, jax.jit(step_of(tx))


def alone(case, params, gradients):
    tx, step = compiled(case)
    return walk(tx, params, gradients, step)


def close(a, b, **tolerances):
    chex.assert_trees_all_close(a, b, **({"rtol": 1e-5, "atol": 1e-6} | tolerances))


def some_gradients(n=4):
    return [tree(100 + i) for i in range(n)]


def test_converges(case):
    """To the minimum of a parabola, with a rate that falls to 0."""
    steps = 1000 * case.period
    tx = case.make(optax.polynomial_schedule(case.lr, 0.0, 2, 1000))
    goal, start = tree(0), tree(1)

    def body(carry, _):
        params, state = carry
        grads = jax.tree.map(jnp.subtract, params, goal)
        return step_of(tx)(params, state, grads), None

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=steps)[0])
    params, _ = run((start, tx.init(start)))
    close(params, goal, atol=0.02, rtol=0)


@pytest.mark.parametrize("dtypes", [
    ("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"),
    ("float32", "bfloat16"),
], ids="-".join)  # fmt: skip
def test_dtypes(case, dtypes):
    """A step is a function from one type to the same type, so it compiles once and scans."""
    params, grads = (tree(i, dtype) for i, dtype in enumerate(dtypes))
    tx = case.make(case.lr)
    state = jax.eval_shape(tx.init, params)
    after = jax.eval_shape(step_of(tx), params, state, grads)
    chex.assert_trees_all_equal_structs(after, (params, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, (params, state))
    assert not any(x.weak_type for x in jax.tree.leaves(after))
    updates, _ = jax.eval_shape(tx.update, grads, state, params)
    chex.assert_trees_all_equal_shapes(updates, params)


def sharded(mesh, tree_, spec):
    return jax.device_put(tree_, NamedSharding(mesh, PartitionSpec(*spec)))


def test_one_device_is_eight(case):
    """Parameters and state split over the first axis: the same numbers, still split."""
    tx = case.make(case.lr)
    mesh = Mesh(np.array(jax.devices()), ("x",))
    expected, _ = alone(case, tree(0), some_gradients())
    params = sharded(mesh, tree(0), ["x"])
    state, step = jax.jit(tx.init)(params), jax.jit(step_of(tx), donate_argnums=(0, 1))
    for grads in some_gradients():
        params, state = step(params, state, sharded(mesh, grads, ["x"]))
    shapes = {x.shape for x in jax.tree.leaves(params)}
    big = [x for x in jax.tree.leaves((params, state)) if x.shape in shapes]
    assert len(big) >= 3
    assert all(x.sharding.spec == PartitionSpec("x") for x in big)
    close(jax.device_get(params), expected)


@pytest.mark.parametrize("view", ["shard_map", pytest.param("pmap", marks=pytest.mark.slow)])
def test_per_device(case, view):
    """On replicas that see equal gradients it needs no collective and stays equal."""
    tx = case.make(case.lr)
    expected, _ = alone(case, tree(0), some_gradients(2))
    many = lambda t: jax.tree.map(lambda x: jnp.stack([x] * 8), t)  # noqa: E731
    if view == "pmap":
        step = jax.pmap(step_of(tx), axis_name="x")
    else:
        mesh, spec = Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x")
        one = lambda t: jax.tree.map(lambda x: x[0], t)  # noqa: E731
        body = lambda *args: jax.tree.map(  # noqa: E731
            lambda x: x[None], step_of(tx)(*map(one, args))
        )
        step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))
    params, state = many(tree(0)), many(tx.init(tree(0)))
    for grads in some_gradients(2):
        params, state = step(params, state, many(grads))
    close(jax.tree.map(lambda x: x[5], params), expected)


@functools.cache
def injected(case):
    tx = optax.inject_hyperparams(case.make)(learning_rate=case.lr)
    return tx, jax.jit(step_of(tx))


def test_inject_hyperparams(case):
    tx, step = injected(case)
    changed, _ = walk(tx, tree(0), some_gradients(), step)
    close(changed, alone(case, tree(0), some_gradients())[0])


def test_schedule(case):
    """A schedule is asked once per update, with 0, 1, ...; changing a rate compiles nothing."""
    halves = optax.piecewise_constant_schedule(case.lr, {1: 0.5, 2: 0.5})
    whole, _ = walk(case.make(halves), tree(0), some_gradients(3 * case.period))
    (tx, step), params = injected(case), tree(0)
    state = tx.init(params)
    for i, grads in enumerate(some_gradients(3 * case.period)):
        state.hyperparams["learning_rate"] = jnp.float32(case.lr * 0.5 ** (i // case.period))
        params, state = step(params, state, grads)
    close(params, whole)
    assert step._cache_size() == 1


def test_chain(case):
    clip = lambda g: jax.tree.map(lambda x: jnp.clip(x, -0.5, 0.5), g)  # noqa: E731
    chained, _ = walk(optax.chain(optax.clip(0.5), case.make(case.lr)), tree(0), some_gradients())
    expected, _ = alone(case, tree(0), [clip(g) for g in some_gradients()])
    close(chained, expected)


def test_masked(case):
    """What is under the mask goes its own way; the rest gets its raw gradient (optax#159)."""
    tx = optax.masked(case.make(case.lr), {"dense": True, "embedding": False})
    params, _ = walk(tx, tree(0), some_gradients())
    close(params["dense"], alone(case, tree(0), some_gradients())[0]["dense"])
    raw = [tree(0), *some_gradients()]
    close(params["embedding"], sum(t["embedding"] for t in raw))


def test_partition(case):
    """Two parts with a state each, and a frozen one."""
    labels = {"dense": {"kernel": "a", "bias": "b"}, "embedding": "frozen"}
    parts = {"a": case.make(case.lr), "b": case.make(case.lr), "frozen": optax.set_to_zero()}
    params, _ = walk(optax.partition(parts, labels), tree(0), some_gradients())
    chex.assert_trees_all_equal(params["embedding"], tree(0)["embedding"])
    close(params["dense"], alone(case, tree(0), some_gradients())[0]["dense"])


def test_multisteps(case):
    multi = optax.MultiSteps(case.make(case.lr), 2).gradient_transformation()
    micro = some_gradients(8)
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *micro[i : i + 2]) for i in range(0, 8, 2)]
    close(walk(multi, tree(0), micro)[0], alone(case, tree(0), means)[0])


def poisoned(grads, value):
    return grads | {"embedding": grads["embedding"].at[3, 2].set(value)}


def test_skip_nonfinite(case):
    """A bad step is, bit for bit, as if it had never been."""
    tx = skip_nonfinite(case.make(case.lr))
    step = jax.jit(step_of(tx))
    good, bad = some_gradients(), [poisoned(tree(7), value) for value in (np.nan, np.inf)]
    a, state = walk(tx, tree(0), [good[0], bad[0], good[1], bad[1], *good[2:]], step)
    b, other = walk(tx, tree(0), good, step)
    assert state.skipped == 2
    chex.assert_trees_all_equal((a, state.inner), (b, other.inner))


def test_apply_if_finite(case):
    tx = optax.apply_if_finite(case.make(case.lr), 5)
    step, good = jax.jit(step_of(tx)), some_gradients()
    a, state = walk(tx, tree(0), [good[0], poisoned(tree(7), np.nan), *good[1:]], step)
    b, other = walk(tx, tree(0), good, step)
    chex.assert_trees_all_equal((a, state.inner_state), (b, other.inner_state))


def test_nan(case):
    """Without a guard a NaN goes as far as the case says, and no farther."""
    grads = [poisoned(g, np.nan) for g in some_gradients(case.period)]
    params, _ = alone(case, tree(0), grads)
    seen = jax.tree.map(np.isnan, params)
    embedding = np.zeros((64, 16), bool)
    if case.nan == "entry":
        embedding[3, 2] = True
    if case.nan == "leaf":
        assert seen["embedding"][3, 2]
    else:
        np.testing.assert_array_equal(seen["embedding"], embedding)
    assert not seen["dense"]["kernel"].any()
    assert not seen["dense"]["bias"].any()


def test_nothing_comes_from_nothing(case):
    zero = {"embedding": jnp.zeros((64, 16)), "bias": jnp.zeros(3)}
    tx = case.make(case.lr)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(tx.init, zero))
    params, step = zero, jax.jit(step_of(tx))
    for _ in range(2 * case.period):
        params, state = step(params, state, zero)
    assert all(np.all(x == 0) for x in jax.tree.leaves(params))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """Every optimiser after three steps, written and read back; one checkpoint for all."""
    states = [alone(case, tree(0), some_gradients(3)) for case in CASES.values()]
    checkpoints = Checkpoints(tmp_path_factory.mktemp("optimisers"))
    checkpoints.save(3, states)
    checkpoints.wait()
    found = checkpoints.restore(jax.eval_shape(lambda: states))
    checkpoints.close()
    assert found is not None
    return dict(zip(CASES.values(), found[1], strict=True))


def test_checkpoint(case, restored):
    """Saved, read back and continued: the same bits as without a break."""
    grads = some_gradients(5)
    whole = alone(case, tree(0), grads)
    params, state = restored[case]
    for g in grads[3:]:
        params, state = compiled(case)[1](params, state, g)
    chex.assert_trees_all_equal((params, state), whole)


def test_scan(case):
    tx = case.make(case.lr)
    grads = some_gradients()
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    start = (tree(0), tx.init(tree(0)))
    body = lambda carry, g: (step_of(tx)(*carry, g), None)  # noqa: E731
    (params, _), _ = jax.jit(lambda: jax.lax.scan(body, start, stacked))()
    close(params, alone(case, tree(0), grads)[0])


def test_vmap(case):
    """Many seeds at once."""
    tx = case.make(case.lr)
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    params = stack(tree(0), tree(1))
    state, step = jax.vmap(tx.init)(params), jax.jit(jax.vmap(step_of(tx)))
    for i in range(2):
        params, state = step(params, state, stack(tree(10 + i), tree(20 + i)))
    for row in range(2):
        expected, _ = alone(case, tree(row), [tree(10 * (row + 1) + i) for i in range(2)])
        close(jax.tree.map(lambda x: x[row], params), expected)  # noqa: B023


def test_flatten(case):
    flat = optax.flatten(case.make(case.lr))
    close(walk(flat, tree(0), some_gradients())[0],
          alone(case, tree(0), some_gradients())[0])  # fmt: skip


def test_map_params(case):
    """optax finds the leaves of the state that belong to parameters."""
    tx = case.make(case.lr)
    state = tx.init(tree(0))
    same = optax.tree.map_params(tx, lambda x: x, state)
    chex.assert_trees_all_equal(same, state)


def test_empty_tree_and_none(case):
    """A `None` on both sides stays; a tree without leaves is no special case."""
    tx = case.make(case.lr)
    for empty in ({}, {"frozen": None, "w": jnp.ones(4)}):
        params, _ = jax.eval_shape(step_of(tx), empty, jax.eval_shape(tx.init, empty), empty)
        chex.assert_trees_all_equal_structs(params, empty)


BAD = {
    "integer": ({"w": jnp.arange(1, 4)}, {"w": jnp.ones(3)}, TypeError),
    "complex": ({"w": jnp.ones(3, complex)}, {"w": jnp.ones(3, complex)}, TypeError),
    "complex_gradient": ({"w": jnp.ones(3)}, {"w": jnp.ones(3, complex)}, TypeError),
    "broadcast": ({"w": jnp.ones((1, 3))}, {"w": jnp.ones((2, 3))}, ValueError),
    "rank": ({"w": jnp.ones(3)}, {"w": jnp.ones((1, 3))}, ValueError),
    "renamed": ({"w": jnp.ones(3)}, {"v": jnp.ones(3)}, ValueError),
    "missing": ({"w": jnp.ones(3), "v": jnp.ones(3)}, {"v": jnp.ones(3)}, ValueError),
    "none": ({"w": jnp.ones(3)}, {"w": None}, ValueError),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input(case, fault):
    """Refused at trace time, with the leaf's name."""
    params, grads, error = BAD[fault]
    tx = case.make(case.lr)

    def use():
        state = jax.eval_shape(tx.init, params)
        updates, state = jax.eval_shape(tx.update, grads, state, params)
        for _ in range(case.period - 1):
            updates, state = jax.eval_shape(tx.update, grads, state, params)
        return jax.eval_shape(optax.apply_updates, params, updates)

    with pytest.raises(error, match=r"\bw\b"):
        use()


def test_bfloat16(case):
    """All in bfloat16: it stays so, and the parabola goes down."""
    tx = case.make(case.lr)
    goal, params = tree(0, jnp.bfloat16), tree(1, jnp.bfloat16)
    state, step = tx.init(params), jax.jit(step_of(tx))
    start = params
    for _ in range(30 * case.period):
        params, state = step(params, state, jax.tree.map(jnp.subtract, params, goal))
    distance = lambda t: float(optax.tree.norm(jax.tree.map(jnp.subtract, t, goal)))  # noqa: E731
    assert distance(params) < 0.95 * distance(start)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))


def test_in_place(case):
    """With donation nothing is copied and nothing as large as a row of parameters is allocated."""
    tx = case.make(case.lr)
    params = {"kernel": jnp.ones((64, 256)), "more": {"kernel": jnp.ones((128, 128))}}
    lowered = jax.jit(step_of(tx), donate_argnums=(0, 1)).lower(params, tx.init(params), params)
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": "3"})
    copies = re.findall(r"= \w+\[(\d[\d,]*)\]\S* copy\(", compiled.as_text())
    memory = compiled.memory_analysis()
    assert copies == []
    assert memory.temp_size_in_bytes < 4096
    assert memory.alias_size_in_bytes >= 0.99 * memory.output_size_in_bytes
