import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_oracles import BETAS, table
from hypothesis import given
from hypothesis import strategies as st

from blogjax.diffusion.reverse import (
    posterior_mean_variance,
    reverse_coefficients,
    reverse_step,
)
from blogjax.diffusion.schedules import (
    continuous_cosine_schedule,
    continuous_post_schedule,
    linear_beta_schedule,
    post_schedule,
)

SCHEDULES = {"post": post_schedule(), "linear": linear_beta_schedule()}
TABLES = {name: table(betas) for name, betas in BETAS.items()}
names = st.sampled_from(["post", "linear"])


def coefficients(name, t, s, eta, sigma="eta"):
    # Compiled once: every value is traced.
    run = jax.jit(reverse_coefficients, static_argnames="sigma")
    return run(SCHEDULES[name], t, s, eta=eta, sigma=sigma)


def conditional(tab, t, s):
    """k, l and the deviation of x_s given x_t and x_0, by conditioning a joint Gaussian."""
    a = tab.A[t] / tab.A[s]
    mix = np.array(  # rows x_0, x_s, x_t; columns independent standard normals
        [
            [1, 0, 0],
            [tab.A[s], tab.B[s], 0],
            [tab.A[t], a * tab.B[s], np.sqrt(tab.B[t] ** 2 - a**2 * tab.B[s] ** 2)],
        ]
    )
    joint = mix @ mix.T
    given_ = [0, 2]
    weights = np.linalg.solve(joint[np.ix_(given_, given_)], joint[given_, 1])
    variance = joint[1, 1] - weights @ joint[given_, 1]
    return weights[1], weights[0], np.sqrt(variance)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("t", "s"), [(2, 1), (10, 9), (1000, 999), (1000, 500), (300, 7)])
def test_eta_one_is_the_posterior_of_bayes(name, t, s):
    k, l, sigma = conditional(TABLES[name], t, s)
    got = reverse_coefficients(SCHEDULES[name], t, s)
    np.testing.assert_allclose(got.k, k, rtol=1e-5)
    np.testing.assert_allclose(got.l, l, rtol=1e-5)
    np.testing.assert_allclose(got.sigma, sigma, rtol=1e-5)
    x = jax.random.normal(jax.random.key(t), (2, 3))
    y = jax.random.normal(jax.random.key(s), (2, 3))
    if s == t - 1:
        mean, variance = posterior_mean_variance(x, y, t, SCHEDULES[name])
        np.testing.assert_allclose(mean, k * np.asarray(x) + l * np.asarray(y), atol=1e-5)
        np.testing.assert_allclose(variance, sigma**2, rtol=1e-5)


@given(names, st.integers(1, 1000), st.integers(0, 999), st.floats(0, 1))
def test_every_sigma_keeps_the_marginal(name, t, s, fraction):
    t, s = max(t, s + 1), min(t - 1, s) if t <= s else s
    tab = TABLES[name]
    b = np.sqrt(tab.B[t] ** 2 - (tab.A[t] / tab.A[s]) ** 2 * tab.B[s] ** 2)
    c = coefficients(name, t, s, fraction * tab.B[t] / b)
    # The marginal of x_s given x_0 must be N(A_s x_0, B_s^2).
    np.testing.assert_allclose(c.sigma, fraction * tab.B[s], rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(c.k * tab.A[t] + c.l, tab.A[s], rtol=1e-5)
    np.testing.assert_allclose(c.k**2 * tab.B[t] ** 2 + c.sigma**2, tab.B[s] ** 2, rtol=1e-5)
    np.testing.assert_allclose(c.eps**2 + c.sigma**2, tab.B[s] ** 2, rtol=1e-5)
    # The third form, at x_t = A x_0 + B e: coefficients of x_0 and of e.
    np.testing.assert_allclose(c.k_eps * tab.A[t], c.x0, rtol=1e-5)
    np.testing.assert_allclose(c.k_eps * tab.B[t] + c.l_eps, c.eps, rtol=1e-4, atol=2e-6 * c.k_eps)


def test_small_coefficients_keep_their_digits():
    # l of DDIM is A_s - A_t B_s / B_t: two numbers that agree in four digits at the noisy end.
    for name, tab in TABLES.items():
        t = np.arange(2, 1001)
        c = reverse_coefficients(SCHEDULES[name], t, t - 1, eta=0.0)
        l = tab.A[t - 1] - tab.A[t] * tab.B[t - 1] / tab.B[t]
        np.testing.assert_allclose(c.l, l, rtol=1e-5)
        l_eps = tab.B[t - 1] - tab.B[t] / tab.a[t]
        np.testing.assert_allclose(c.l_eps, l_eps, rtol=1e-5)
        c = reverse_coefficients(SCHEDULES[name], t, t - 1, sigma="posterior")
        np.testing.assert_allclose(c.l_eps, -(tab.b[t] ** 2) / tab.B[t] / tab.a[t], rtol=1e-5)


@pytest.mark.parametrize(("name", "bad"), [("post", [1, 2, 3]), ("linear", [1, 2])])
def test_sigma_beta_is_refused_where_it_has_no_root(name, bad):
    schedule, tab = SCHEDULES[name], TABLES[name]
    refused = [t for t in range(1, 11) if tab.b[t] > tab.B[t - 1]]
    assert refused == bad
    for t in bad:
        with pytest.raises(ValueError, match=rf"{tab.b[t]:.6g} at t = {t}"):
            reverse_coefficients(schedule, t, t - 1, sigma="beta")
    t = jnp.arange(1, 1001)
    with pytest.raises(ValueError, match="t = " + ", ".join(map(str, bad))):
        reverse_coefficients(schedule, t, t - 1, sigma="beta")
    traced = coefficients(name, t, t - 1, 1.0, "beta")
    assert np.flatnonzero(np.isnan(traced.eps)).tolist() == [v - 1 for v in bad]
    good = np.arange(len(bad) + 1, 1001)
    c = reverse_coefficients(schedule, good, good - 1, sigma="beta")
    np.testing.assert_allclose(c.sigma, tab.b[good], rtol=1e-6)
    expected = np.sqrt(tab.B[good - 1] ** 2 - tab.b[good] ** 2)
    np.testing.assert_allclose(c.eps, expected, rtol=1e-5)
    np.testing.assert_allclose(
        c.l, tab.A[good - 1] - tab.A[good] * expected / tab.B[good], rtol=2e-5
    )


def test_hat_is_the_posterior_mean_with_the_forward_noise():
    tab = TABLES["post"]
    hat = reverse_coefficients(SCHEDULES["post"], 5, 4, sigma="hat")
    k, l, _ = conditional(tab, 5, 4)
    np.testing.assert_allclose([hat.k, hat.l, hat.sigma], [k, l, tab.b[5]], rtol=1e-5)
    # Too much variance for the marginal: no member of the family.
    assert hat.k**2 * tab.B[5] ** 2 + hat.sigma**2 > 1.1 * tab.B[4] ** 2


@pytest.mark.parametrize("schedule", [continuous_post_schedule(), continuous_cosine_schedule()])
def test_continuous_pairs(schedule):
    t = np.array([1.0, 0.7, 0.3, 0.01], np.float32)
    s = np.array([0.9, 0.1, 0.29, 0.0], np.float32)
    c = reverse_coefficients(schedule, t, s, eta=0.5)
    A_t, B_t = np.float64(schedule.signal(t)), np.float64(schedule.noise(t))
    A_s, B_s = np.float64(schedule.signal(s)), np.float64(schedule.noise(s))
    np.testing.assert_allclose(c.k * A_t + c.l, A_s, rtol=1e-5)
    np.testing.assert_allclose(c.k**2 * B_t**2 + c.sigma**2, B_s**2, rtol=1e-5, atol=1e-12)
    b = np.sqrt(1 - (A_t / A_s) ** 2)
    np.testing.assert_allclose(c.sigma, 0.5 * b * B_s / B_t, rtol=1e-4)


def test_bad_arguments():
    schedule = SCHEDULES["post"]
    with pytest.raises(ValueError, match="s < t, got t = 4 and s = 4"):
        reverse_coefficients(schedule, 4, 4)
    with pytest.raises(ValueError, match="negative"):
        reverse_coefficients(schedule, 4, 3, eta=-0.1)
    with pytest.raises(ValueError, match="keeps the marginal"):
        reverse_coefficients(schedule, 4, 3, eta=1.7)
    with pytest.raises(ValueError, match="'posterior'"):
        reverse_coefficients(schedule, 4, 3, sigma="betas")
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        reverse_coefficients(schedule, np.array([5, 6]), np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="continuous"):
        posterior_mean_variance(jnp.ones(2), jnp.ones(2), 1, continuous_post_schedule())
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        posterior_mean_variance(jnp.ones(2), jnp.ones(3), 1, schedule)
    with pytest.raises(ValueError, match="outside"):
        posterior_mean_variance(jnp.ones(2), jnp.ones(2), 0, schedule)
    assert bool(jnp.isnan(coefficients("post", 3, 4, 1.0).sigma))


def test_a_step_per_example_and_the_noise_it_adds(key):
    t = jnp.array([1000, 500, 2])
    c = reverse_coefficients(SCHEDULES["post"], t, t - 1, eta=0.8)
    zeros = jnp.zeros((3, 20000))
    noisy = reverse_step(key, zeros, zeros, c)
    np.testing.assert_allclose(jnp.std(noisy, axis=1), c.sigma, rtol=0.03)
    assert not np.any(reverse_step(None, zeros, zeros, c))
    moved = reverse_step(None, zeros + 2, zeros + 3, c)
    np.testing.assert_allclose(moved[:, 0], 2 * c.x0 + 3 * c.eps, rtol=1e-6)


def test_gradients_are_finite_at_the_last_step():
    def total(eta):
        c = reverse_coefficients(SCHEDULES["post"], jnp.array([1, 2]), jnp.array([0, 1]), eta=eta)
        return sum(jnp.sum(v) for v in c)

    gradient = jax.jit(jax.grad(total))
    for eta in (0.0, 0.5, 1.0):
        assert bool(jnp.isfinite(gradient(eta)))
