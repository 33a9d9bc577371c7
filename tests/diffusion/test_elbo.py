import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_oracles import BETAS, point_denoiser, standard_normal_denoiser, table
from jax.test_util import check_grads
from scipy import integrate, stats

from blogjax.core.random import fold_in_rows
from blogjax.diffusion.elbo import bits_per_dim, elbo_terms, log_gaussian_bin
from blogjax.diffusion.schedules import (
    continuous_post_schedule,
    from_betas,
    linear_beta_schedule,
    post_schedule,
)

MAKE = {"post": post_schedule, "linear": linear_beta_schedule}
# Two-node Gauss-Hermite quadrature: exact for the mean of a quadratic over (x_0, e).
NODES = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], np.float32)
X0, EPS = jnp.asarray(NODES[:, :1]), jnp.asarray(NODES[:, 1:])
ENTROPY = 1.4189385332  # of N(0, 1), in nats

log_bin = jax.jit(log_gaussian_bin, static_argnames="levels")


def jit_terms(key, x0, denoise, schedule, eps=None, **kwargs):
    run = jax.jit(lambda key, x0, eps: elbo_terms(key, x0, denoise, schedule, eps=eps, **kwargs))
    return run(key, x0, eps)


def standard_normal_terms(name, **kwargs):
    schedule = MAKE[name]()
    denoise = standard_normal_denoiser(schedule)
    return jit_terms(None, X0, denoise, schedule, eps=EPS, **kwargs)


@pytest.mark.parametrize("name", MAKE)
def test_the_bound_of_standard_normal_data_is_its_entropy(name):
    terms = standard_normal_terms(name)
    assert terms.transitions.shape == (999, 4)
    total = float(jnp.mean(terms.total()))
    assert total == pytest.approx(ENTROPY, abs=2e-6)
    assert float(bits_per_dim(total, 1)) == pytest.approx(2.047095, abs=1e-5)
    # The chain is then the forward one read backwards, so each term is log(B_t / B_{t-1}).
    B = table(BETAS[name]).B
    expected = np.log(B[2:] / B[1:-1])
    np.testing.assert_allclose(jnp.mean(terms.transitions, 1), expected, atol=2e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "loss", "first"),
    [
        ("post", 0.918, [0.4507, 0.1534, 0.0779]),
        ("linear", 0.465, [0.2055, 0.0718, 0.0383]),
    ],
)
def test_the_posteriors_variance_costs_standard_normal_data(name, loss, first):
    beta = standard_normal_terms(name)
    posterior = standard_normal_terms(name, sigma="posterior", decoder_std=0.1)
    gap = jnp.mean(posterior.transitions - beta.transitions, axis=1)
    np.testing.assert_allclose(gap[:3], first, atol=6e-5)
    assert float(jnp.sum(gap)) == pytest.approx(loss, abs=6e-4)


def gaussian_chain(start_mean, start_variance, steps):
    """Mean and covariance of a chain y_0 ~ N, y_{i+1} = slope y_i + shift + std z."""
    mean, noise = [start_mean], [np.array([math.sqrt(start_variance)])]
    for i, (slope, shift, std) in enumerate(steps):
        mean.append(slope * mean[-1] + shift)
        noise.append(np.append(slope * np.pad(noise[-1], (0, i + 1 - len(noise[-1]))), std))
    rows = np.array([np.pad(row, (0, len(steps) + 1 - len(row))) for row in noise])
    return np.array(mean), rows @ rows.T


@pytest.mark.parametrize("sigma", ["beta", "posterior"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_the_bound_is_the_divergence_of_the_two_joint_gaussians(sigma, prediction):
    """Total = KL(q(x_0..x_T) || p(x_0..x_T)) + entropy of x_0, for any linear denoiser."""
    betas = np.array([0.1, 0.3, 0.2, 0.5, 0.6])
    tab, schedule = table(betas), from_betas(betas)
    m, sd, slopes, shifts = 0.3, 0.7, np.linspace(0.1, 0.8, 6), np.linspace(-0.2, 0.3, 6)
    decoder_std = 0.4
    q_mean, q_cov = gaussian_chain(m, sd**2, [(tab.a[t], 0.0, tab.b[t]) for t in range(1, 6)])
    steps = []
    for t in range(5, 0, -1):
        A, B, before = tab.A[t], tab.B[t], tab.B[t - 1]
        k = tab.a[t] * before**2 / B**2
        l = tab.A[t - 1] * tab.b[t] ** 2 / B**2
        std = tab.b[t] if sigma == "beta" else before * tab.b[t] / B
        std = decoder_std if t == 1 else std
        # x0hat = (x - B (slope x + shift)) / A
        steps.append((k + l * (1 - B * slopes[t]) / A, -l * B * shifts[t] / A, std))
    p_mean, p_cov = gaussian_chain(0.0, 1.0, steps)
    p_mean, p_cov = p_mean[::-1], p_cov[::-1, ::-1]
    inverse, gap = np.linalg.inv(p_cov), p_mean - q_mean
    kl = 0.5 * (
        np.trace(inverse @ q_cov)
        + gap @ inverse @ gap
        - 6
        + np.linalg.slogdet(p_cov)[1]
        - np.linalg.slogdet(q_cov)[1]
    )
    expected = kl + 0.5 * math.log(2 * math.pi * math.e * sd**2)

    def denoise(x, t):
        t = t[:, None]
        eps = jnp.asarray(slopes, jnp.float32)[t] * x + jnp.asarray(shifts, jnp.float32)[t]
        A, B = schedule.signal(t), schedule.noise(t)
        x0 = (x - B * eps) / A
        return {"eps": eps, "x0": x0, "v": A * eps - B * x0, "score": -eps / B}[prediction]

    terms = jit_terms(
        None,
        m + sd * X0,
        denoise,
        schedule,
        prediction=prediction,
        sigma=sigma,
        decoder_std=decoder_std,
        eps=EPS,
    )
    assert float(jnp.mean(terms.total())) == pytest.approx(expected, rel=1e-5)


def test_the_first_step_of_the_discretised_decoder():
    betas = np.array([0.01, 0.02, 0.5])
    tab, schedule = table(betas), from_betas(betas)
    point = jnp.array([[-1.0, 1 / 3, 1.0]])
    kwargs = {"decoder": "discretised", "levels": 4, "eps": jnp.ones((1, 3))}
    std = {"beta": tab.b[1], "posterior": tab.B[1] * tab.b[2] / tab.B[2]}
    for sigma in ("beta", "posterior"):
        denoise = point_denoiser(schedule, point)
        terms = jit_terms(None, point, denoise, schedule, sigma=sigma, **kwargs)
        half = stats.norm.cdf(1 / 3 / std[sigma])
        expected = -2 * np.log(half) - np.log(2 * half - 1)
        np.testing.assert_allclose(terms.reconstruction, [expected], rtol=2e-3)
    # Data of one point and the posterior's variance: nothing is lost on the way.
    np.testing.assert_allclose(terms.transitions, 0.0, atol=1e-8)


@pytest.mark.parametrize("mean", [-1.7, -0.2, 0.3, 0.55])
@pytest.mark.parametrize("std", [0.02, 0.3])
def test_log_bin_probability_against_integration(mean, std):
    levels = 9
    centres = np.linspace(-1, 1, levels)
    expected = []
    for centre in centres:
        low = -np.inf if centre == -1 else (centre - 0.125 - mean) / std
        high = np.inf if centre == 1 else (centre + 0.125 - mean) / std
        peak = min(max(low, 0.0), high)  # the density's largest value within the bin
        low, high = max(low, peak - 12), min(high, peak + 12)
        area, _ = integrate.quad(
            lambda u, peak=peak: math.exp(0.5 * (peak**2 - u**2)),
            low,
            high,
            points=[peak],
            limit=200,
        )
        expected.append(math.log(area) - 0.5 * peak**2 - 0.5 * math.log(2 * math.pi))
    got = log_bin(jnp.asarray(centres, jnp.float32), jnp.full(levels, mean), std, levels)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("std", [1e-3, 0.1, 3.0])
def test_all_bins_together_have_probability_one(std):
    x = jnp.linspace(-1, 1, 256)
    log_p = log_bin(x, jnp.full(256, 0.123), std, 256)
    assert float(jnp.sum(jnp.exp(log_p))) == pytest.approx(1.0, abs=1e-4)


def test_far_bins_are_finite_with_finite_gradients():
    x = jnp.array([-1.0, -127 / 255, 127 / 255, 1.0])
    both = jax.jit(
        jax.value_and_grad(
            lambda m: jnp.sum(log_gaussian_bin(x, jnp.broadcast_to(m, 4), 0.01, 256))
        )
    )
    for mean in (-3.0, 3.0):
        value, grad = both(mean)
        assert bool(jnp.isfinite(value)) and bool(jnp.isfinite(grad))
        assert float(grad) * mean < 0


def test_gradients(x64):
    x = jnp.linspace(-1, 1, 5)
    check_grads(
        jax.jit(lambda m, s: log_gaussian_bin(x, m, s, 5)),
        (jnp.linspace(-0.9, 1.3, 5), jnp.float64(0.4)),
        order=1,
        modes=["fwd", "rev"],
    )


def test_random_noise_belongs_to_the_example(key):
    schedule = post_schedule(10)
    denoise = standard_normal_denoiser(schedule)
    x0 = jnp.ones((3, 2))
    rows = fold_in_rows(key, jnp.arange(3))
    one = jit_terms(rows, x0, denoise, schedule).total()
    rows = fold_in_rows(jax.random.clone(key), jnp.array([2, 0]))
    two = jit_terms(rows, x0[:2], denoise, schedule).total()
    np.testing.assert_allclose(two, one[jnp.array([2, 0])], rtol=1e-6)


def test_every_term_has_its_own_standard_normal_noise(key):
    schedule = post_schedule(10)
    x0 = jnp.zeros((1, 2000))

    def terms(key, eps):  # with e = 0 predicted, a term is a multiple of |e|^2
        kwargs = {"sigma": "posterior", "decoder_std": 1.0, "eps": eps}
        return jit_terms(key, x0, lambda x, t: jnp.zeros_like(x), schedule, **kwargs).transitions

    squares = np.asarray(terms(key, None) / terms(None, jnp.ones_like(x0)))[:, 0]
    np.testing.assert_allclose(squares, 1.0, atol=0.15)
    assert np.min(np.diff(np.sort(squares))) > 1e-4


def test_bits_per_dimension():
    assert float(bits_per_dim(12 * math.log(2), 3)) == pytest.approx(4.0)
    # A density of 1/2 on [-1, 1] is uniform: 256 integers, 8 bits each.
    density = 3 * math.log(2.0)
    assert float(bits_per_dim(density, 3, bin_width=2 / 256)) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="num_dims"):
        bits_per_dim(1.0, 0)
    with pytest.raises(ValueError, match="bin_width"):
        bits_per_dim(1.0, 1, bin_width=0.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sigma": "posterior"}, "infinite density"),
        ({"sigma": "hat"}, "'beta', 'posterior'"),
        ({"decoder": "logistic"}, "'discretised'"),
        ({"decoder": "discretised"}, "levels=None"),
        ({"levels": 256}, "levels=256"),
        ({"eps": None}, "either a key or"),
        ({"eps": jnp.ones((4, 2))}, r"\(4, 2\)"),
        ({"schedule": continuous_post_schedule()}, "T >= 2"),
        ({"schedule": post_schedule(1)}, "T >= 2"),
        ({"denoise": lambda x, t: x[:, 0]}, "denoise has shape"),
    ],
)
def test_bad_arguments(kwargs, message):
    call = {"schedule": post_schedule(3), "denoise": lambda x, t: x, "eps": EPS} | kwargs
    with pytest.raises(ValueError, match=message):
        elbo_terms(None, X0, **call)


def test_nan_propagates():
    terms = elbo_terms(
        None, X0, lambda x, t: jnp.where(x > 0, jnp.nan, x), post_schedule(3), eps=EPS
    )
    assert np.isnan(terms.total()).tolist() == [False, False, True, True]


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize(("levels", "std"), [(65536, 0.5), (256, 1e3), (256, 1e6), (17, 30.0)])
def test_bins_much_narrower_than_the_deviation_keep_their_digits(levels, std):
    x = np.linspace(-1, 1, levels)[[levels // 3, levels // 2]]
    half = 1 / (levels - 1)
    z = (x - 0.2) / std
    # The integral by the density and its second-order correction, all in float64.
    density = -0.5 * (z**2 + np.log(2 * np.pi)) + np.log(2 * half / std)
    expected = density + np.log1p((half / std) ** 2 * (z**2 - 1) / 6)
    got = log_gaussian_bin(jnp.float32(x), jnp.full(2, 0.2), std, levels)
    np.testing.assert_allclose(got, expected, rtol=2e-6)


def test_integers_and_deviations_of_zero_are_refused():
    schedule = post_schedule(10)
    with pytest.raises(ValueError, match=r"x0 must be floating.*int32"):
        elbo_terms(jax.random.key(0), jnp.ones((2, 3), jnp.int32), lambda x, t: x, schedule)
    with pytest.raises(ValueError, match="decoder_std must be a positive number"):
        elbo_terms(
            jax.random.key(0), jnp.ones((2, 3)), lambda x, t: x, schedule,
            sigma="posterior", decoder_std=0.0,
        )  # fmt: skip
