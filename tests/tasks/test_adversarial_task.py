import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_gans import (
    KEY,
    batch_of,
    counting_task,
    linear,
    linear_init,
    linear_task,
    normed_task,
    shifted,
    start,
    take,
)

from blogjax.core.random import normal
from blogjax.losses.adversarial import AdversarialLoss
from blogjax.tasks.adversarial import Generated
from blogjax.tasks.critics import (
    clipped,
)
from blogjax.tasks.gradient import PARAMETERS
from blogjax.train import mesh as meshes
from blogjax.train import per_device


@pytest.mark.parametrize("unroll", [True, False])
def test_three_steps_by_hand(unroll):
    """Wasserstein, clipping, three updates of the critic, an average, padding full of NaN."""
    z = np.random.default_rng(1).normal(size=(12, 2)).astype(np.float32)
    weight = np.array([1, 1, 1, 0, 2, 1, 1, 1, 0, 1, 1, 0], np.float32)
    task = linear_task(
        optax.sgd(0.3), optax.sgd(0.2, momentum=0.5), generate=shifted,
        critic=clipped(linear, 0.25), critic_steps=3, ema_decay=0.15, unroll=unroll,
    )  # fmt: skip
    state = start(task)
    program = jax.make_jaxpr(task.step)(state, batch_of(z=z), jax.random.key(0))
    assert ("scan[" in str(program)) is not unroll
    w, b, g = np.array([0.3, 0.0]), 0.0, np.array([0.5, 0.0])
    trace, ema = np.zeros(3), g.copy()
    for t in range(3):
        batch = batch_of(seed=t, z=z, weight=weight)
        x = np.asarray(batch["x"], np.float64)
        batch["x"] = batch["x"].at[weight == 0].set(jnp.nan)
        losses, of_real, norms = [], [], []
        for k in range(3):
            rows = np.arange(k, 12, 3)
            share = weight[rows] / weight[rows].sum()
            real, fake = x[rows], g + z[rows]
            gap = share @ (fake - real)
            losses.append(w @ gap)
            of_real.append(share @ (real @ w + b))
            norms.append(np.linalg.norm(gap))
            trace = 0.5 * trace + np.append(gap, 0)
            w, b = np.clip(w - 0.2 * trace[:2], -0.25, 0.25), b - 0.2 * trace[2]
        share = weight[::3] / weight[::3].sum()
        generator_loss = -(share @ ((g + z[::3]) @ w + b))
        g = g + 0.3 * w
        ema = ema + (1 - min(0.15, (1 + t) / (10 + t))) * (g - ema)
        state, metrics = take(task, state, batch)
        np.testing.assert_allclose(state.params["critic"]["w"], w, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.params["generator"], g, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.averaged_params, ema, rtol=1e-5, atol=1e-6)
        wanted = {
            "loss": np.mean(losses), "critic_real": np.mean(of_real),
            "critic_fake": np.mean(of_real) + np.mean(losses), "critic_grad_norm": np.mean(norms),
            "generator_loss": generator_loss, "generator_grad_norm": np.linalg.norm(w),
            "critic_param_norm": np.linalg.norm(w), "generator_param_norm": np.linalg.norm(g),
            "skipped": 0,
        }  # fmt: skip
        assert wanted.keys() | {"nonfinite"} == metrics.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        assert int(state.step) == t + 1 and not metrics["nonfinite"].flags.any()


@pytest.mark.slow  # seconds of compiling
def test_each_turn_leaves_the_other_player_as_it_was_to_the_bit():
    batch = batch_of()
    frozen = {
        "generator": linear_task(optax.set_to_zero(), critic_steps=2, loss="non_saturating"),
        "critic": linear_task(critic_tx=optax.set_to_zero(), loss="non_saturating"),
    }
    for name, other in (("generator", "critic"), ("critic", "generator")):
        before = jax.device_get(start(frozen[name]))
        after = take(frozen[name], before, batch)[0]
        chex.assert_trees_all_equal(after.params[name], before.params[name])
        old, new = (jax.tree.leaves(s.params[other]) for s in (before, after))
        assert any((x != y).any() for x, y in zip(old, new, strict=True))


@pytest.mark.slow  # seconds of compiling
def test_model_states_move_in_their_own_players_turn_only():
    task = counting_task(critic_steps=3, ema_decay=0.5)
    state, _ = take(task, start(task), batch_of())
    assert int(state.model_state["critic"]) == 3
    stats = state.model_state["generator"]["stats"]
    assert int(stats["calls"]) == 1 and stats["mean"] != 0
    assert state.model_state["generator"]["other"] == {"k": 1.0}
    # The first step's decay is 0.1. A count is no average.
    averaged = state.averaged_model_state["stats"]
    assert averaged["mean"] == pytest.approx(0.9 * stats["mean"], rel=1e-6)
    assert int(averaged["calls"]) == 1 and averaged["calls"].dtype == np.int32


@pytest.mark.slow  # seconds of compiling
def test_the_numbers_of_a_row_follow_its_row_and_the_update():
    seen = []

    def generate(params, model_state, keys, batch, train):
        data = jax.random.key_data(jax.random.clone(keys))
        jax.debug.callback(lambda row, data: seen.append((row, data)), batch["row"], data)
        return Generated(params[None] + normal(keys, (len(keys), 2)))

    task = linear_task(generate=generate, critic_steps=2, generator_draws=3)
    rows = np.array([3, 9, 4, 1, 0, 7], np.int32)
    take(task, start(task), batch_of(6, row=rows))
    jax.effects_barrier()
    drawn = {(len(row), *row[:2].tolist()): data for row, data in seen}
    assert sorted(drawn) == [(3, 3, 4), (3, 9, 1), (9, 3, 3)]
    numbers = np.concatenate([data for data in drawn.values()])
    assert len(np.unique(numbers, axis=0)) == 3 + 3 + 9
    for k, name in enumerate([(3, 3, 4), (3, 9, 1)]):
        update = jax.random.fold_in(jax.random.key(KEY), k)
        latent = jax.random.split(jax.random.fold_in(update, name[1]), 3)[0]
        np.testing.assert_array_equal(drawn[name][0], jax.random.key_data(latent))
    # Each row of the first hand three times, with the keys that the docstring promises.
    row, data = next((row, data) for row, data in seen if len(row) == 9)
    assert row.tolist() == np.repeat([3, 4, 0], 3).tolist()
    for i in range(9):
        update = jax.random.fold_in(jax.random.key(KEY), 2 + i % 3)
        wanted = jax.random.key_data(jax.random.fold_in(update, row[i]))
        np.testing.assert_array_equal(data[i], wanted)


def test_the_generators_loss_is_the_mean_over_its_draws():
    task = linear_task(critic_tx=optax.set_to_zero(), generator_draws=64)
    state, metrics = take(task, start(task), batch_of(64))
    # E w.(g + z) = .15; 4096 draws of deviation .3.
    assert float(metrics["generator_loss"]) == pytest.approx(-0.15, abs=0.025)
    np.testing.assert_allclose(state.params["generator"], [0.5 + 0.03, 0.0], rtol=1e-6)


def test_one_bad_update_leaves_the_whole_step_out():
    """The updates after it meet NaN parameters; only the first one is told to be at fault."""
    task = counting_task(critic_steps=3, ema_decay=0.5, loss="non_saturating")
    state, metrics = take(task, start(task), batch_of())
    assert int(metrics["skipped"]) == 0 and float(metrics["critic_grad_norm"]) > 0
    bad = batch_of(seed=1)
    bad["x"] = bad["x"].at[4, 0].set(jnp.inf)  # row 4 is of update 1 of 0, 1, 2
    after, metrics = take(task, state, bad)
    flags = metrics["nonfinite"]
    named = [path for path, flag in zip(flags.paths, flags.flags, strict=True) if flag]
    assert named == ["critic/w"]
    assert bool(flags.recoverable) and int(after.step) == 2 and int(after.skipped) == 1
    assert int(metrics["skipped"]) == 1
    for part in ("params", "model_state", "opt_state", "ema"):
        chex.assert_trees_all_equal(getattr(after, part), getattr(state, part))
    # The next good step is that of a run that never saw the bad one.
    good = [take(task, s, batch_of(seed=2))[0] for s in (state, after)]
    chex.assert_trees_all_equal(*(s.params for s in good))


def test_the_generator_is_updated_in_place():
    """Though the step may be left out. The old critic has to be kept until it is done."""

    def init(key):
        params = {"w": jnp.ones((47, 53)), "b": jnp.ones(53)}
        return {**linear_init(key), "generator": {"params": params, "stats": {"m": jnp.ones(59)}}}

    def generate(params, model_state, keys, batch, train):
        made = jnp.tanh(normal(keys, (len(keys), 47)) @ params["w"] + params["b"][None])
        return Generated(made[:, :2], {"stats": {"m": model_state["stats"]["m"] * 0.9}})

    task = linear_task(
        optax.adam(0.1), optax.adam(0.1), generate=generate, init=init, ema_decay=0.9
    )
    state = jax.eval_shape(task.init, jax.random.key(0))
    step = jax.jit(task.step, donate_argnums=0).lower(state, batch_of(), jax.random.key(0))
    hlo = step.compile().as_text()
    assert all(shape in hlo for shape in ("f32[47,53]", "f32[53]", "f32[59]"))
    assert re.findall(r"f32\[(?:47,53|53|59)\]\S* copy\(", hlo) == []


def test_a_gradient_of_the_generator_alone_may_be_bad():
    def generate(params, model_state, keys, batch, train):
        # Finite, with an infinite slope at 0.
        return Generated(jnp.sqrt(jnp.abs(params))[None] * batch["x"])

    task = linear_task(generate=generate)
    state = jax.device_get(start(task))
    after, metrics = take(task, state, batch_of())
    flags = metrics["nonfinite"]
    assert [p for p, f in zip(flags.paths, flags.flags, strict=True) if f] == ["generator"]
    chex.assert_trees_all_equal(after.params, state.params)  # the critic's good update too
    assert np.signbit(after.params["critic"]["w"][1])


def test_parameters_that_overflow_are_told_as_lost():
    task = linear_task(optax.sgd(1e38), loss=AdversarialLoss(abs, abs, lambda d: -1e3 * d))
    after, metrics = take(task, start(task), batch_of())
    flags = metrics["nonfinite"]
    assert flags.paths[-1] == PARAMETERS and flags.flags.tolist() == [False] * 3 + [True]
    assert not flags.recoverable and int(after.skipped) == 0


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("view", [pytest.param("pmap", marks=pytest.mark.slow), "shard_map"])
def test_devices_share_means_and_statistics(view):
    """Four devices of four rows, some of weight 0, against the global batch."""
    weight = np.array([1, 1, 1, 1, 0, 2, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1], np.float32)
    batch = batch_of(16, weight=weight)
    whole, mapped = (
        normed_task(axis_name=name, critic_steps=2, ema_decay=0.9) for name in (None, "rows")
    )
    state = jax.device_get(start(whole))
    a, a_metrics = take(whole, state, batch)
    mesh = meshes.make_mesh(devices=jax.devices()[:4])
    step = jax.jit(per_device.on_each_device(mapped.step, "rows", mesh, view))
    b, b_metrics = jax.device_get(step(state, batch, jax.random.key(KEY)))
    chex.assert_trees_all_close(a, b, rtol=5e-6, atol=1e-6)
    chex.assert_trees_all_close(a_metrics, b_metrics, rtol=5e-6, atol=1e-6)
