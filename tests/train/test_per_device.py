"""The per-device views: what they refuse, and state of which every device has its own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blogjax.data.batches import Batches
from blogjax.optim.lion import lion
from blogjax.optim.majority_vote import distributed_lion
from blogjax.tasks.gradient import LossOutput, gradient_task
from blogjax.train import mesh as meshes
from blogjax.train import per_device
from blogjax.train.checkpoint import CheckpointMismatchError
from blogjax.train.loop import fit
from blogjax.train.state import abstract_state, sizes
from blogjax.train.task import Task

TASK = Task(lambda key: None, lambda state, batch, key: (state, {}), axis_name="rows")


def test_pmap_is_for_one_process(monkeypatch):
    mesh = meshes.make_mesh()
    per_device.check_view(TASK, mesh, "pmap")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="for one process, but there are 2; 'shard_map'"):
        per_device.check_view(TASK, mesh, "pmap")
    per_device.check_view(TASK, mesh, "shard_map")


def test_unknown_views_are_named():
    with pytest.raises(ValueError, match="one of jit, pmap, shard_map, got 'vmap'"):
        per_device.check_view(TASK, meshes.make_mesh(), "vmap")


# --- a momentum on every device ---

VIEWS = ["pmap", "shard_map"]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 5)).astype(np.float32)
Y = X @ np.array([1, -2, 0.5, 0, 3], np.float32) + RNG.normal(size=64).astype(np.float32)


def regression(tx, **options):
    def loss(params, model_state, batch, key):
        del model_state, key
        return LossOutput(jnp.square(batch["x"] @ params["w"] - batch["y"]))

    return gradient_task(lambda key: {"params": {"w": jnp.zeros(5)}}, loss, tx, **options)


def voting(**options):
    tx = distributed_lion(0.05, per_device.AXIS, weight_decay=0.01)
    return regression(tx, axis_name=per_device.AXIS, average_gradients=False, **options)


def data(**changes):
    return Batches({"x": X, "y": Y} | changes, batch_size=32, seed=0)


def mesh_of(n):
    return meshes.make_mesh(devices=jax.devices()[:n])


@pytest.mark.parametrize("view", VIEWS)
def test_distributed_lion_trains_in_the_loop(view, tmp_path):
    """Against the equations in float64 numpy, on the rows that each of four devices sees."""
    state = fit(voting(), data(), 6, view=view, mesh=mesh_of(4), workdir=tmp_path, save_every=3)
    w, m = np.zeros(5), np.zeros((4, 5))
    for t in range(6):
        batch = data()(t)
        x, y = (batch[k].astype(np.float64).reshape(4, 8, -1) for k in "xy")
        g = 2 * np.einsum("dbi,dbo->di", x, x @ w[:, None] - y) / 8
        votes = np.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        direction = np.where(votes.sum(0), np.sign(votes.sum(0)), votes[t % 4])
        w = w - 0.05 * (direction + 0.01 * w)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5, atol=1e-7)
    own = state.opt_state.inner[0].rows.mu["w"]
    np.testing.assert_allclose(own, m, rtol=1e-4, atol=1e-6)
    assert {s.data.shape for s in own.addressable_shards} == {(1, 5)}
    # Each device goes on with its own momentum, in this view or the other.
    other = VIEWS[1 - VIEWS.index(view)]
    whole = fit(voting(), data(), 9, view=view, mesh=mesh_of(4))
    resumed = fit(voting(), data(), 9, view=other, mesh=mesh_of(4), workdir=tmp_path)
    chex.assert_trees_all_equal(*jax.device_get((whole, resumed)))


def test_momenta_are_for_as_many_devices_as_made_them(tmp_path):
    fit(voting(), data(), 2, view="shard_map", mesh=mesh_of(4), workdir=tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"float32\[4, 5\].*float32\[2, 5\]"):
        fit(voting(), data(), 4, view="shard_map", mesh=mesh_of(2), workdir=tmp_path)
    with pytest.raises(ValueError, match=r"rows/.* differs between devices: build the task with"):
        fit(regression(distributed_lion(0.1, "devices")), data(), 1)
    with pytest.raises(ValueError, match="average_gradients=False needs an axis_name"):
        regression(optax.sgd(0.1), average_gradients=False)


def test_sizes_count_a_row_on_each_device():
    size = sizes(abstract_state(voting(), mesh_of(8)))["opt_state"]
    # 8 momenta and counts; skipped, one flag and the count of votes are everywhere the same.
    assert size.bytes == 8 * (5 + 1) * 4 + 4 + 1 + 4
    assert size.bytes_per_device == (5 + 1) * 4 + 4 + 1 + 4


@pytest.mark.parametrize("view", VIEWS)
def test_all_devices_leave_out_a_step_that_one_cannot_take(view):
    """The others would take in its NaN; the state is as if the step had not been."""
    bad = Batches({"x": X, "y": Y}, batch_size=32, seed=0)

    def batches(step):
        batch = dict(bad(step))
        if step == 2:
            batch["x"] = np.where(np.arange(32)[:, None] == 9, np.nan, batch["x"])
        return batch

    batches.batch_size = 32
    options = {"view": view, "mesh": mesh_of(4), "on_nonfinite": "skip"}
    before, after = (fit(voting(), batches, n, **options) for n in (2, 3))
    assert int(after.opt_state.skipped) == 1
    chex.assert_trees_all_equal(
        *jax.device_get([(s.params, s.opt_state.inner) for s in (before, after)])
    )


def test_gradients_left_to_the_optimiser_have_the_global_mean():
    """Their average over devices is the gradient, also where devices hold unequal weights."""
    weight = np.array([1] * 13 + [0] * 19, np.float32)
    batch = {**data()(0), "weight": weight}
    seen = {}
    for average in (True, False):
        tx = optax.stateless(lambda u, p: jax.lax.pmean(u, "rows"))
        task = regression(tx, axis_name="rows", average_gradients=average)
        step = per_device.on_each_device(task.step, "rows", mesh_of(4), "shard_map")
        state, metrics = jax.jit(step)(task.init(jax.random.key(0)), batch, jax.random.key(0))
        seen[average] = state.params["w"]
        norms = []
        for rows in np.split(np.arange(32), 4):
            x, y, w = batch["x"][rows], batch["y"][rows], weight[rows]
            norms.append(np.linalg.norm(2 * x.T @ (w * -y) * 4 / weight.sum()))
        if not average:
            np.testing.assert_allclose(
                metrics["grad_norm"], np.sqrt(np.mean(np.square(norms))), rtol=1e-5
            )
    x, y = batch["x"][:13].astype(np.float64), batch["y"][:13]
    for update in seen.values():
        np.testing.assert_allclose(update, -2 * x.T @ y / 13, rtol=1e-5)


def test_averaged_gradients_make_every_vote_unanimous():
    tx = distributed_lion(0.05, per_device.AXIS, weight_decay=0.01)
    task = regression(tx, axis_name=per_device.AXIS)
    one = fit(task, data(), 5, view="shard_map", mesh=mesh_of(8))
    other = fit(regression(lion(0.05, weight_decay=0.01)), data(), 5, mesh=mesh_of(1))
    np.testing.assert_allclose(one.params["w"], other.params["w"], rtol=1e-6)


def test_only_what_is_marked_may_differ(tmp_path):
    """A momentum per device that nobody voted on makes the parameters differ, and that is seen."""
    task = regression(optax.sgd(0.05), axis_name=per_device.AXIS, average_gradients=False)
    with pytest.raises(ValueError, match="hold different values of params/w:"):
        fit(task, data(), 2, view="shard_map", mesh=mesh_of(4), workdir=tmp_path, save_every=1)
