"""What every task promises the loop, for all of `task_cases.CASES`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from task_cases import CASES

from blogjax.train import mesh as meshes
from blogjax.train import per_device
from blogjax.train.compiled import compile_task
from blogjax.train.loop import fit
from blogjax.train.reporting import read_metrics
from blogjax.train.state import abstract_state, init_state

pytestmark = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] * case.slow)
        for name, case in CASES.items()
    ],
)


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


VIEWS = ("pmap", "shard_map")


@pytest.mark.parametrize("view", VIEWS)
def test_the_views_train_and_evaluate_alike(case, view, tmp_path):
    """jit = pmap = shard_map: 8 devices of 2 rows each, the whole loop."""
    options = {"evaluation": case.evaluation(), "evaluate_every": 2, "mesh": mesh_of(8)}
    states, columns = [], []
    for kind in ("jit", view):
        task = case.make(optax.sgd(0.05), per_device.axis_name(kind))
        folder = tmp_path / kind
        states.append(fit(task, case.batches(), 4, view=kind, workdir=folder, **options))
        for records in ("train", "evaluate"):
            columns.append(read_metrics(folder / "metrics.jsonl", records))
    chex.assert_trees_all_close(*jax.device_get(states), rtol=5e-6, atol=2e-6)
    for one, other in ((columns[0], columns[2]), (columns[1], columns[3])):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6, atol=1e-6)
    assert len(columns[0]["loss"]) == 4


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.slow
def test_a_run_may_go_on_in_another_view(case, view, tmp_path):
    tx, options = optax.sgd(0.05), {"mesh": mesh_of(8), "save_every": 1, "workdir": tmp_path / "w"}
    whole = fit(case.make(tx, None), case.batches(), 4, mesh=mesh_of(8))
    fit(case.make(tx, per_device.AXIS), case.batches(), 2, view=view, **options)
    resumed = fit(case.make(tx, None), case.batches(), 4, **options)
    chex.assert_trees_all_close(*jax.device_get((whole, resumed)), rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize("view", VIEWS)
def test_the_mean_is_right_when_devices_hold_unequal_numbers_of_examples(case, view):
    """Averaging per-device means would be wrong here: five rows, then three, then none."""
    weight = np.array([1] * 5 + [0] * 3, np.float32)
    batch = {**case.batches(8)(0), "weight": weight}
    tx = optax.sgd(0.05)
    whole, mapped = case.make(tx, None), case.make(tx, "rows")
    state = jax.device_get(start(whole, mesh_of(1)))
    a, a_metrics = jax.jit(whole.step)(state, batch, jax.random.key(1))
    step = jax.jit(per_device.on_each_device(mapped.step, "rows", mesh_of(4), view))
    b, b_metrics = step(state, batch, jax.random.key(1))
    np.testing.assert_allclose(a_metrics["loss"], b_metrics["loss"], rtol=1e-6)
    chex.assert_trees_all_close(
        jax.device_get(a.params), jax.device_get(b.params), rtol=2e-6, atol=1e-6
    )
    if not case.rows_interact:
        short = {name: x[: 5 + -5 % case.hands] for name, x in batch.items()}
        c, c_metrics = jax.jit(whole.step)(state, short, jax.random.key(1))
        np.testing.assert_allclose(a_metrics["loss"], c_metrics["loss"], rtol=1e-6)
        chex.assert_trees_all_close(a.params, c.params, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.slow
def test_each_view_compiles_once_and_updates_in_place(case, view):
    compiled = compile_task(case.make(optax.adam(0.01), "rows"), mesh := mesh_of(8), view)
    state = start(case.make(optax.adam(0.01), None), mesh)
    key = jax.device_put(jax.random.key(0), meshes.replicated(mesh))
    first = state
    with jax.transfer_guard("disallow"):
        for i in range(3):
            state, _ = compiled.step(state, meshes.put_batch(case.batches()(i), mesh), key)
    assert compiled.step._cache_size() == 1  # pyright: ignore
    assert all(x.is_deleted() for x in jax.tree.leaves(first.params))


@pytest.mark.parametrize("view", VIEWS)
def test_what_is_not_averaged_is_seen(case, view, tmp_path):
    """The same step without its collectives: the devices train apart."""
    task = case.make(optax.sgd(0.05), None)._replace(axis_name="rows", evaluate=None)
    with pytest.raises(ValueError, match=r"after step 2 the devices hold different .*params/"):
        fit(task, case.batches(), 4, view=view, mesh=mesh_of(8), save_every=2, workdir=tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_without_an_axis_name_the_per_device_views_are_refused(case):
    with pytest.raises(ValueError, match="'pmap' needs a task built with axis_name"):
        fit(case.make(optax.sgd(0.1), None), case.batches(), 1, view="pmap")
    with pytest.raises(ValueError, match=r"axis_name='rows' .* got 'jit'"):
        fit(case.make(optax.sgd(0.1), "rows"), case.batches(), 1)
    with pytest.raises(ValueError, match=r"fsdp=2; take fsdp=1"):
        compile_task(case.make(optax.sgd(0.1), "rows"), mesh_of(8, 2), "shard_map")


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
    inner = [getattr(s.opt_state, "inner", s.opt_state) for s in (after, state)]
    chex.assert_trees_all_equal(*inner)
    assert int(metrics["skipped"]) == 1


def test_an_examples_numbers_follow_its_row(case):
    """The same examples in another order, with their rows: the same loss."""
    task = case.make(optax.sgd(0.1), None)
    state = start(task, mesh_of(1))
    batch = case.batches()(0)
    order = np.random.default_rng(1).permutation(16 // case.hands)
    order = (order[:, None] * case.hands + np.arange(case.hands)).ravel()
    shuffled = {name: x[order] for name, x in batch.items()}
    losses = [
        float(jax.jit(task.step)(state, b, jax.random.key(5))[1]["loss"]) for b in (batch, shuffled)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert jnp.isfinite(losses[0])
