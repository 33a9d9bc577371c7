"""What every task promises the loop, for all of `task_cases.CASES`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from task_cases import CASES

from blogjax.train import mesh as meshes
from blogjax.train.compiled import compile_task
from blogjax.train.loop import fit
from blogjax.train.state import abstract_state, init_state

pytestmark = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def start(task, mesh, seed=0):
    abstract = abstract_state(task, mesh)
    return init_state(task, abstract, mesh, jax.device_put(jax.random.key(seed)))


def mesh_of(devices, fsdp=1):
    return meshes.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])


@pytest.mark.parametrize(("devices", "fsdp"), [(8, 1), (8, 4)])
def test_losses_and_state_do_not_depend_on_the_devices(case, devices, fsdp, monkeypatch):
    monkeypatch.setitem(
        meshes.state_shardings.__kwdefaults__, "min_size", 16
    )  # so that the small leaves of a test are split
    # SGD: Adam would hide a wrong scale of the gradients.
    task = case.make(optax.sgd(0.05), None)
    states = [
        fit(task, case.batches(), 4, mesh=mesh_of(n, f)) for n, f in [(1, 1), (devices, fsdp)]
    ]
    chex.assert_trees_all_close(*jax.device_get(states), rtol=2e-6, atol=1e-6)


def test_per_device_step_equals_the_global_one(case):
    """`axis_name` under pmap: the same losses from the same rows, 8 devices of 2 rows each."""
    tx = optax.sgd(0.05)
    whole, mapped = case.make(tx, None), case.make(tx, "devices")
    state = start(whole, mesh_of(1))
    step = jax.jit(whole.step)
    pstep = jax.pmap(mapped.step, axis_name="devices", in_axes=(None, 0, None), out_axes=None)
    a = b = jax.device_get(state)
    for i in range(3):
        key = jax.random.fold_in(jax.random.key(1), i)
        batch = case.batches()(i)
        shards = {name: x.reshape(8, 2, *x.shape[1:]) for name, x in batch.items()}
        a, a_metrics = jax.device_get(step(a, batch, key))
        b, b_metrics = jax.device_get(pstep(b, shards, key))
        assert a_metrics["loss"] == pytest.approx(b_metrics["loss"], rel=1e-6, abs=1e-6)
    chex.assert_trees_all_close(a, b, rtol=5e-6, atol=2e-6)


def test_per_device_mean_is_right_when_devices_hold_unequal_numbers_of_examples(case):
    """Averaging per-device means would be wrong here: five rows, then three, then none."""
    weight = np.array([1] * 5 + [0] * 3, np.float32)
    batch = {**case.batches(8)(0), "weight": weight}
    tx = optax.sgd(0.05)
    whole, mapped = case.make(tx, None), case.make(tx, "devices")
    state = jax.device_get(start(whole, mesh_of(1)))
    a, a_metrics = jax.jit(whole.step)(state, batch, jax.random.key(1))
    shards = {name: x.reshape(4, 2, *x.shape[1:]) for name, x in batch.items()}
    pstep = jax.pmap(mapped.step, axis_name="devices", in_axes=(None, 0, None), out_axes=None,
                     devices=jax.devices()[:4])  # fmt: skip
    b, b_metrics = pstep(state, shards, jax.random.key(1))
    np.testing.assert_allclose(a_metrics["loss"], b_metrics["loss"], rtol=1e-6)
    chex.assert_trees_all_close(
        jax.device_get(a.params), jax.device_get(b.params), rtol=2e-6, atol=1e-6
    )
    if not case.rows_interact:
        short = {name: x[:5] for name, x in batch.items()}
        c, c_metrics = jax.jit(whole.step)(state, short, jax.random.key(1))
        np.testing.assert_allclose(a_metrics["loss"], c_metrics["loss"], rtol=1e-6)
        chex.assert_trees_all_close(a.params, c.params, rtol=1e-6, atol=1e-7)


def test_one_compilation(case):
    compiled = compile_task(case.make(optax.adam(0.01), None), mesh := mesh_of(8))
    state = start(case.make(optax.adam(0.01), None), mesh)
    key = jax.device_put(jax.random.key(0), meshes.replicated(mesh))
    for i in range(3):
        state, _ = compiled.step(state, meshes.put_batch(case.batches()(i), mesh), key)
    assert compiled.step._cache_size() == 1  # pyright: ignore
    assert int(state.step) == 3


def test_shapes_and_dtypes_of_the_state_are_kept(case):
    task = case.make(optax.adam(0.01), None)
    before = jax.eval_shape(task.init, jax.random.key(0))
    after, metrics = jax.eval_shape(task.step, before, case.batches()(0), jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert metrics["loss"].shape == ()


def test_the_state_is_updated_in_place(case):
    mesh = mesh_of(1)
    compiled = compile_task(case.make(optax.adam(0.01), None), mesh)
    state = start(case.make(optax.adam(0.01), None), mesh)
    new, _ = compiled.step(state, meshes.put_batch(case.batches()(0), mesh), jax.random.key(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    chex.assert_tree_all_finite(new.params)


def test_resume_gives_the_same_bits_and_files(case, tmp_path):
    task = case.make(optax.adam(0.01), None)
    options = {"evaluation": case.evaluation(), "evaluate_every": 2, "save_every": 2}
    whole = fit(task, case.batches(), 4, workdir=tmp_path / "whole", **options)
    fit(task, case.batches(), 2, workdir=tmp_path / "parts", **options)
    parts = fit(task, case.batches(), 4, workdir=tmp_path / "parts", **options)
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(parts))
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_padding_never_counts(case):
    """The last evaluation batch is padded: poisoned padding equals no padding at all."""
    task = case.make(optax.sgd(0.1), None)
    state = start(task, mesh_of(1))
    assert task.evaluate is not None
    batches = case.evaluation()
    counts = 0.0
    for i in range(len(batches)):
        batch = batches(i)
        kept = batch["weight"] > 0
        short = {name: rows[kept] for name, rows in batch.items()}
        batch[case.poison][~kept] = np.nan
        padded, alone = (
            jax.jit(task.evaluate)(state, b, jax.random.key(0))["loss"] for b in (batch, short)
        )
        assert float(padded[0]) == pytest.approx(float(alone[0]), rel=1e-5)
        counts += float(padded[1])
    assert not kept.all()
    assert counts == len(case.arrays[case.poison])


def test_a_nonfinite_step_changes_only_the_count(case):
    task = case.make(optax.adamw(0.01), None)
    state = start(task, mesh_of(1))
    step = jax.jit(task.step)
    state, _ = step(state, case.batches()(0), jax.random.key(0))
    bad = dict(case.batches()(1))
    bad[case.poison] = np.full_like(bad[case.poison], np.nan)
    after, metrics = step(state, bad, jax.random.key(1))
    assert metrics["nonfinite"].flags.any()
    assert int(after.step) == int(state.step) + 1
    for name in ("params", "model_state", "ema"):
        chex.assert_trees_all_equal(getattr(after, name), getattr(state, name))
    chex.assert_trees_all_equal(after.opt_state.inner, state.opt_state.inner)
    assert int(after.opt_state.skipped) == 1


def test_an_examples_numbers_follow_its_row(case):
    """The same examples in another order, with their rows: the same loss."""
    task = case.make(optax.sgd(0.1), None)
    state = start(task, mesh_of(1))
    batch = case.batches()(0)
    order = np.random.default_rng(1).permutation(16)
    shuffled = {name: x[order] for name, x in batch.items()}
    losses = [
        float(jax.jit(task.step)(state, b, jax.random.key(5))[1]["loss"]) for b in (batch, shuffled)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert jnp.isfinite(losses[0])
