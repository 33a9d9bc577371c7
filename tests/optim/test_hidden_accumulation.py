"""Accumulation hidden in the momentum, against numpy in float64 and optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optimiser_steps import normal, path_of_steps

from blogjax.optim.hidden_accumulation import (
    accumulating_adam,
    accumulating_sgdm,
    emit_every,
    hidden_momentum,
)


@jax.jit
def momenta(b, k, grads):
    """The momentum after every microbatch; b and k are traced."""
    tx = hidden_momentum(b, k)

    def step(state, g):
        m, state = tx.update(g, state)
        return state, m

    return jax.lax.scan(step, tx.init(grads[0]), grads)[1]


@given(st.floats(0, 0.999), st.integers(1, 6), st.integers(0, 9))
def test_at_every_kth_microbatch_the_momentum_is_that_of_the_means(b, k, seed):
    grads = normal(seed, 12, 3)
    with jax.enable_x64(True):
        seen = momenta(jnp.asarray(b), jnp.asarray(k), jnp.asarray(grads))
    m = np.zeros(3)
    for end in range(k, 13, k):
        m = b * m + (1 - b) * grads[end - k : end].mean(axis=0)
        np.testing.assert_allclose(seen[end - 1], m, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("k", [1, 4])
def test_sgdm_is_exactly_the_momentum_of_mean_gradients(k, x64):
    params, micro = jnp.asarray(normal(0, 20)), [jnp.asarray(normal(t, 20)) for t in range(1, 13)]
    lr = optax.linear_schedule(0.3, 0.0, 10)
    theirs = optax.MultiSteps(
        optax.sgd(lambda t: lr(t) * 0.2, momentum=0.8), k
    ).gradient_transformation()
    a, _ = path_of_steps(theirs, params, micro)
    b, _ = path_of_steps(accumulating_sgdm(lr, 0.8, accumulate_steps=k), params, micro)
    chex.assert_trees_all_close(a, b, rtol=1e-7, atol=1e-8)  # the schedule is float32


def adam_reference(theta, gradients, lr, b1, b2, eps, k):
    """The post's formulas, its t = 1, 2, ...; eps outside of the root."""
    m = v = np.zeros(np.shape(theta))
    path = []
    for t, g in enumerate(gradients, start=1):
        chi = float((t - 1) % k == 0)
        m = ((b1 - 1) * chi + 1) * m + (1 - b1) * g / k
        v = ((b2 - 1) * chi + 1) * v + (1 - b2) * g**2 / k
        if t % k == 0:
            m_hat, v_hat = m / (1 - b1 ** (t / k)), v / (1 - b2 ** (t / k))
            theta = theta - lr(t // k - 1) * m_hat / (np.sqrt(v_hat) + eps)
        path.append(theta)
    return path


def test_adam_against_numpy(x64):
    grads = normal(0, 12, 20)
    lr = lambda t: 0.1 / (t + 1)  # noqa: E731
    tx = accumulating_adam(lr, 0.8, 0.95, 1e-3, accumulate_steps=3)
    path, state = path_of_steps(tx, jnp.ones(20), jnp.asarray(grads))
    expected = adam_reference(np.ones(20), grads, lr, 0.8, 0.95, 1e-3, 3)
    np.testing.assert_allclose(np.stack(path), np.stack(expected), rtol=1e-10)
    assert (int(state[0].emitted), int(state[0].position)) == (4, 0)


def test_where_the_microbatches_agree_it_is_adam(x64):
    grads = jnp.asarray(normal(0, 5, 20))
    exact, _ = path_of_steps(optax.adam(0.1), jnp.ones(20), grads)
    near, _ = path_of_steps(
        accumulating_adam(0.1, accumulate_steps=4), jnp.ones(20), jnp.repeat(grads, 4, axis=0)
    )
    np.testing.assert_allclose(np.stack(near[3::4]), np.stack(exact), rtol=1e-12)


def test_where_noise_dominates_adams_steps_are_shorter_by_the_root_of_k():
    micro = jnp.asarray(normal(0, 1600, 50), jnp.float32)

    def steps(tx):
        def step(state, g):
            u, state = tx.update(g, state)
            return state, u

        return jax.jit(lambda: jax.lax.scan(step, tx.init(micro[0]), micro)[1])()[400:][3::4]

    exact = steps(optax.MultiSteps(optax.adam(0.01), 4).gradient_transformation())
    near = steps(accumulating_adam(0.01, accumulate_steps=4))
    assert np.std(near) / np.std(exact) == pytest.approx(0.5, rel=0.05)


def test_adams_second_moment_is_not_lost_in_half_precision():
    """A gradient of constant size: the step is the learning rate, from the first to the last."""
    params = jnp.zeros(3, jnp.bfloat16)
    g = jnp.array([1e-3, 1.0, 1e4], jnp.bfloat16)
    tx = accumulating_adam(1.0, 0.5, accumulate_steps=2)
    _, state = path_of_steps(tx, params, [g] * 40)
    _, state = tx.update(g, state)
    updates, state = tx.update(g, state)
    assert (state[0].mu.dtype, state[0].nu.dtype) == (jnp.bfloat16, jnp.float32)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_allclose(updates.astype(jnp.float32), -1, rtol=0.01)


def test_a_small_share_is_lost_in_bfloat16_and_not_in_float32():
    micro = [jnp.array([256.0], jnp.bfloat16)] + [jnp.array([1.0], jnp.bfloat16)] * 7
    sums = {}
    for dtype in (None, jnp.float32):
        _, state = path_of_steps(hidden_momentum(0.5, 8, dtype), jnp.zeros(1, jnp.bfloat16), micro)
        sums[dtype] = float(state.mu[0])
    assert sums == {None: 16.0, jnp.float32: 0.5 * 263 / 8}


def test_schedules_count_updates_and_state_waits():
    tx = emit_every(3, optax.chain(optax.trace(0.5), optax.scale_by_schedule(lambda t: t + 1.0)))
    state, seen = tx.init(jnp.zeros(1)), []
    for _ in range(7):
        u, state = tx.update(jnp.ones(1), state)
        seen.append(float(u[0]))
    assert seen == [0, 0, 1, 0, 0, 3, 0]
    assert np.signbit(seen).tolist() == [True, True, False, True, True, False, True]
    assert state.inner[1].count == 2


def test_extra_arguments_reach_the_wrapped_transformation():
    inner = optax.GradientTransformationExtraArgs(
        lambda p: optax.EmptyState(), lambda u, s, p=None, *, value: (u * value, s)
    )
    u, _ = emit_every(1, inner).update(jnp.ones(1), emit_every(1, inner).init(0), value=3.0)
    assert u.tolist() == [3.0]


def test_a_key_in_the_inner_state_waits_too():
    """As itself, and where keys are checked for being used twice."""
    noise = optax.add_noise(1.0, 0.5, key=jax.random.key(0))
    alone, state = noise.update(jnp.zeros(3), noise.init(jnp.zeros(3)))
    again, _ = noise.update(jnp.zeros(3), state)
    noise = optax.add_noise(1.0, 0.5, key=jax.random.key(0))
    tx = emit_every(2, noise)
    state, seen = tx.init(jnp.zeros(3)), []
    update = jax.jit(tx.update)
    for _ in range(4):
        u, state = update(jnp.zeros(3), state)
        seen.append(u)
    np.testing.assert_allclose(seen[1], alone, rtol=1e-6)
    np.testing.assert_allclose(seen[3], again, rtol=1e-6)


def test_a_momentum_that_is_kept_is_kept_to_the_last_bit():
    """Also where the hardware flushes small results to zero."""
    tx = hidden_momentum(0.9, keep_on_nonfinite=True)
    mu = jnp.asarray(np.array([1e-40, -1e-45, -0.0, 1.0], np.float32))
    state = tx.init(mu)._replace(mu=mu)
    _, after = jax.jit(tx.update)(jnp.array([jnp.nan, 1, 1, 1]), state)
    assert np.asarray(after.mu).tobytes() == np.asarray(mu).tobytes()


@pytest.mark.parametrize(("call", "match"), [
    (lambda: hidden_momentum(0.9, 1.5), "accumulate_steps is 1.5, but must be a whole number"),
    (lambda: emit_every(2.5, optax.identity()), "accumulate_steps is 2.5"),
    (lambda: accumulating_adam(0.1, accumulate_steps=float("nan")), "accumulate_steps is nan"),
    (lambda: emit_every(0, optax.identity()), "accumulate_steps is 0, but must be at least 1"),
    (lambda: hidden_momentum(0.9, 0), "accumulate_steps is 0"),
    (lambda: hidden_momentum(1.0), r"b is 1.0, but must lie in \[0, 1\)"),
    (lambda: accumulating_sgdm(0.1, -0.1, accumulate_steps=2), "b is -0.1"),
    (lambda: accumulating_adam(0.1, 1.0, accumulate_steps=2), "b1 is 1.0"),
    (lambda: accumulating_adam(0.1, b2=2, accumulate_steps=2), "b2 is 2"),
    (lambda: accumulating_adam(0.1, accumulate_steps=0), "accumulate_steps is 0"),
])  # fmt: skip
def test_arguments_out_of_range(call, match):
    with pytest.raises(ValueError, match=match):
        call()
