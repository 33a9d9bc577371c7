"""Powers of the momentum against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optimiser_steps import normal, path_of_steps

from blogjax.optim.hidden_accumulation import emit_every, hidden_momentum
from blogjax.optim.sign_power import gamma_from_rate, scale_by_sign_power, sign_power


def reference(gradients, gammas, b):
    """The post's formula, one entry after the other; 0 is nobody's power."""
    m, seen = np.zeros(np.shape(gradients[0])), []
    for g, gamma in zip(gradients, gammas, strict=True):
        m = b * m + (1 - b) * g
        seen.append([x and np.copysign(np.exp((1 - gamma) * np.log(abs(x))), x) for x in m])
    return np.array(seen), m


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, lambda t: 1 / (t + 1)])
def test_many_steps_in_float64(gamma, x64):
    grads = normal(0, 8, 30)
    grads[:, 3] = 0
    tx = optax.chain(scale_by_sign_power(gamma, 0.9), optax.scale(-1.0))
    path, state = path_of_steps(tx, jnp.zeros(30), jnp.asarray(grads))
    gammas = [gamma(t) if callable(gamma) else gamma for t in range(8)]
    expected, m = reference(grads, gammas, 0.9)
    np.testing.assert_allclose(np.stack(path), -np.cumsum(expected, axis=0), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(state[0][0].mu, m, rtol=1e-12)


POWER = jax.jit(lambda gamma, x: sign_power(gamma).update(x, optax.EmptyState())[0])


@given(st.floats(0, 1, width=32), st.integers(-12, 12), st.integers(0, 9))
def test_gradients_times_s_give_steps_times_s_to_the_one_minus_gamma(gamma, power, seed):
    x = jnp.asarray(normal(seed, 16), jnp.float32)
    one, scaled = (np.asarray(POWER(jnp.float32(gamma), s * x)) for s in (1, 2.0**power))
    np.testing.assert_allclose(scaled, one * 2.0 ** (power * (1 - gamma)), rtol=1e-5)
    np.testing.assert_array_equal(POWER(jnp.float32(gamma), -x), -one)
    np.testing.assert_array_equal(np.sign(one), np.sign(x))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_zero_infinity_and_nan(gamma, traced):
    x = jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan])
    power = POWER(jnp.float32(gamma), x) if traced else sign_power(gamma).update(x, ())[0]
    top = 1 if gamma == 1 else np.inf
    np.testing.assert_array_equal(power, [0, 0, top, -top, np.nan])


def test_the_ends_are_exact():
    """Also where `pow` rounds: no bit of the momentum changes at 0, only signs are left at 1."""
    x = jnp.asarray(normal(0, 10_000) * np.exp(10 * normal(1, 10_000)), jnp.float32)
    np.testing.assert_array_equal(POWER(jnp.float32(0), x), x)
    np.testing.assert_array_equal(POWER(jnp.float32(1), x), np.sign(x))
    np.testing.assert_array_equal(POWER(jnp.float32(2), x), np.sign(x))
    np.testing.assert_array_equal(POWER(jnp.float32(-1), x), x)


def test_the_power_is_taken_in_float32_of_the_stored_momentum():
    """An exponent of .7 has an error of 1/500 in bfloat16, a power of 1e30 then one of 10%."""
    for dtype, value in ((jnp.bfloat16, 1e30), (jnp.float16, 6e-5)):
        tx = scale_by_sign_power(0.3, 0.0)
        g = jnp.full(3, value, dtype)
        u, state = tx.update(g, tx.init(g))
        assert u.dtype == state[0].mu.dtype == dtype
        expected = np.float64(g[0]) ** 0.7
        np.testing.assert_allclose(np.float64(u), expected, rtol=2**-8)


def test_gamma_counts_updates_not_microbatches(x64):
    gammas, b = [1.0, 0.6, 0.2], 0.8
    gamma = lambda t: jnp.asarray(gammas)[t]  # noqa: E731
    tx = optax.chain(hidden_momentum(b, 2), emit_every(2, sign_power(gamma)))
    micro = normal(0, 6, 5)
    path, _ = path_of_steps(tx, jnp.zeros(5), jnp.asarray(micro))
    expected, _ = reference(micro.reshape(3, 2, 5).mean(axis=1), gammas, b)
    np.testing.assert_allclose(np.stack(path[1::2]), np.cumsum(expected, axis=0), rtol=1e-6)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_gamma_follows_the_rate_once_the_warm_up_is_over(power):
    rate = optax.join_schedules(
        [optax.linear_schedule(0.0, 0.2, 10), optax.linear_schedule(0.2, 0.0, 100)], [10]
    )
    gamma = gamma_from_rate(rate, peak=10, power=power)
    expected = [min(1, max(0, (110 - t) / 100)) ** power for t in range(0, 130, 5)]
    # The rate is a float32: near its end a rounding of 1e-9 under a root is one of 3e-5.
    np.testing.assert_allclose([gamma(t) for t in range(0, 130, 5)], expected, atol=1e-3)
    np.testing.assert_allclose(jax.jit(gamma)(60), 0.5**power, rtol=1e-6)


def test_a_rate_that_rises_again_keeps_gamma_at_one():
    gamma = gamma_from_rate(lambda t: jnp.asarray([1.0, 0.5, 3.0])[t])
    assert [float(gamma(t)) for t in range(3)] == [1.0, 0.5, 1.0]


@pytest.mark.parametrize(("call", "match"), [
    (lambda: scale_by_sign_power(1.5), r"gamma is 1.5, but must lie in \[0, 1\]"),
    (lambda: sign_power(-0.1), "gamma is -0.1"),
    (lambda: scale_by_sign_power(0.5, 1.0), "b is 1.0"),
    (lambda: gamma_from_rate(optax.linear_schedule(0.0, 1.0, 9)), "is 0.0 at count 0, but must be"),
    (lambda: gamma_from_rate(optax.constant_schedule(1.0), power=0), "power is 0, but must be pos"),
    (lambda: gamma_from_rate(optax.constant_schedule(1.0), peak=-1), "peak is -1"),
])  # fmt: skip
def test_arguments_out_of_range(call, match):
    with pytest.raises(ValueError, match=match):
        call()
