import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blogjax.tasks.gradient import LossOutput, ema_decay_with_warmup, gradient_task

BATCH = {"x": jnp.array([1.0, 2.0, 4.0]), "row": jnp.arange(3), "weight": jnp.array([1.0, 1, 0])}


def quadratic(params, model_state, batch, key):
    return LossOutput(jnp.square(batch["x"] - params["w"]))


def zero_init(key):
    return {"params": {"w": jnp.zeros(())}}


def run(task, steps, batch=BATCH):
    state = task.init(jax.random.key(0))
    states = []
    for i in range(steps):
        state, metrics = jax.jit(task.step)(state, batch, jax.random.key(i))
        states.append((state, jax.device_get(metrics)))
    return states


def test_weighted_gradient_descent_by_hand():
    """Mean over the two rows of weight 1: gradient 2 (w - 1.5)."""
    (one, metrics), (two, _) = run(gradient_task(zero_init, quadratic, optax.sgd(0.25)), 2)
    assert float(one.params["w"]) == 0.75
    assert float(two.params["w"]) == 1.125
    assert metrics["loss"] == 2.5
    assert metrics["grad_norm"] == 3.0
    assert metrics["update_norm"] == metrics["param_norm"] == 0.75
    assert one.ema is None


@given(st.floats(0, 0.999), st.integers(1, 30))
def test_average_of_the_parameters(decay, steps):
    states = run(gradient_task(zero_init, quadratic, optax.sgd(0.25), ema_decay=decay), steps)
    ema, w = 0.0, 0.0
    for n in range(steps):
        w -= 0.25 * 2 * (w - 1.5)
        d = min(decay, (1 + n) / (10 + n))
        ema = d * ema + (1 - d) * w
    np.testing.assert_allclose(states[-1][0].ema["w"], ema, rtol=1e-5)
    np.testing.assert_allclose(states[-1][0].averaged_params["w"], ema, rtol=1e-5)


def test_decay_never_exceeds_what_was_asked_for():
    decays = ema_decay_with_warmup(0.9, jnp.arange(200))
    assert bool(jnp.all(jnp.diff(decays) >= 0)) and float(decays[-1]) == np.float32(0.9)


def test_averages_of_bfloat16_parameters_are_float32():
    init = lambda key: {"params": {"w": jnp.zeros((), jnp.bfloat16)}}  # noqa: E731
    state, _ = run(gradient_task(init, quadratic, optax.sgd(0.1), ema_decay=0.9), 2)[-1]
    assert state.params["w"].dtype == jnp.bfloat16
    assert state.ema["w"].dtype == jnp.float32


def test_evaluation_and_rendering_use_the_average():
    task = gradient_task(
        zero_init, quadratic, optax.sgd(0.25), ema_decay=0.9,
        evaluate=lambda params, ms, batch, key: {"w": jnp.full(3, params["w"])},
        render=lambda params, ms, batch, key: {"w": jnp.full((1, 1, 1, 1), params["w"])},
    )  # fmt: skip
    state, _ = run(task, 3)[-1]
    total, count = task.evaluate(state, BATCH, jax.random.key(0))["w"]
    assert float(total / count) == float(state.ema["w"]) != float(state.params["w"])
    assert float(task.render(state, BATCH, jax.random.key(0))["w"][0, 0, 0, 0]) == state.ema["w"]


def counting(params, model_state, batch, key):
    new = {"stats": {"mean": jnp.mean(batch["x"]), "count": model_state["stats"]["count"] + 1}}
    return LossOutput(jnp.square(batch["x"] - params["w"]), model_state=new)


def with_stats(key):
    stats = {"mean": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}
    return flax.core.freeze(
        {"params": {"w": jnp.zeros(())}, "stats": stats, "other": {"k": 1.0 + jnp.zeros(())}}
    )


def test_model_state_is_merged_averaged_over_devices_and_keeps_its_dtypes():
    task = gradient_task(with_stats, counting, optax.sgd(0.1), axis_name="d")
    state = task.init(jax.random.key(0))
    batch = {"x": jnp.arange(8.0).reshape(4, 2), "row": jnp.arange(8).reshape(4, 2),
             "weight": jnp.ones((4, 2))}  # fmt: skip
    step = jax.pmap(
        task.step, "d", in_axes=(None, 0, None), out_axes=None, devices=jax.devices()[:4]
    )
    new, _ = step(state, batch, jax.random.key(0))
    assert float(new.model_state["stats"]["mean"]) == 3.5
    assert int(new.model_state["stats"]["count"]) == 1
    assert float(new.model_state["other"]["k"]) == 1.0
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.device_get(new))


def test_model_state_of_another_layout_is_refused_by_name():
    def loss(params, model_state, batch, key):
        return LossOutput(batch["x"], model_state={"stats": {"mean": jnp.zeros(2)}})

    task = gradient_task(with_stats, loss, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"model state stats/count: .* absent after it"):
        task.step(task.init(jax.random.key(0)), BATCH, jax.random.key(0))


def test_optimisers_that_ask_for_the_loss_get_it():
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    flat = lambda params, ms, batch, key: LossOutput(jnp.ones(3) + 0 * params["w"])  # noqa: E731
    state, _ = run(gradient_task(zero_init, flat, tx), 4)[-1]
    assert float(state.opt_state.inner[1].scale) < 1


def test_a_metric_may_not_hide_one_of_the_tasks_own():
    loss = lambda p, ms, batch, key: LossOutput(batch["x"] * p["w"], {"loss": batch["x"]})  # noqa: E731
    task = gradient_task(zero_init, loss, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"may not be called \['loss'\]"):
        task.step(task.init(jax.random.key(0)), BATCH, jax.random.key(0))


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_what_a_row_of_weight_0_holds_never_reaches_the_gradient(garbage):
    task = gradient_task(zero_init, quadratic, optax.sgd(0.1))
    dirty = {**BATCH, "x": BATCH["x"].at[2].set(garbage)}
    (clean, _), (state, metrics) = run(task, 1)[0], run(task, 1, dirty)[0]
    chex.assert_trees_all_equal(clean, state)
    assert metrics["skipped"] == 0


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        gradient_task(zero_init, quadratic, optax.sgd(0.1), ema_decay=decay)


def test_a_loss_that_is_not_one_number_per_example_is_refused():
    loss = lambda p, ms, batch, key: LossOutput(jnp.mean(batch["x"] * p["w"]))  # noqa: E731
    task = gradient_task(zero_init, loss, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(\)"):
        task.step(task.init(jax.random.key(0)), BATCH, jax.random.key(0))
