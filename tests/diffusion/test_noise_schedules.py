import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_oracles import BETAS, table

from blogjax.diffusion.schedules import (
    continuous_cosine_schedule,
    continuous_post_schedule,
    cosine_schedule,
    from_betas,
    linear_beta_schedule,
    post_schedule,
    timesteps,
)

MAKE = {"post": post_schedule, "linear": linear_beta_schedule}
CONTINUOUS = {"post": continuous_post_schedule, "cosine": continuous_cosine_schedule}


@pytest.mark.parametrize("name", MAKE)
def test_tables_agree_with_float64_to_one_part_in_a_million(name):
    schedule, tab = MAKE[name](), table(BETAS[name])
    every = jnp.arange(1001)
    steps = every[1:]
    assert schedule.num_steps == schedule.final_time == 1000
    np.testing.assert_allclose(schedule.signal(every), tab.A, rtol=1e-6)
    np.testing.assert_allclose(schedule.noise(every), tab.B, rtol=1e-6)
    np.testing.assert_allclose(schedule.step_signal(steps), tab.a[1:], rtol=1e-6)
    np.testing.assert_allclose(schedule.step_noise(steps), tab.b[1:], rtol=1e-6)
    log_snr = 2 * np.log(tab.A[1:] / tab.B[1:])
    np.testing.assert_allclose(schedule.log_snr(steps), log_snr, rtol=1e-6, atol=1e-6)


def test_the_naive_float32_noise_is_wrong_where_ours_is_right():
    schedule = post_schedule()
    signal = schedule.signal(1)
    naive = float(jnp.sqrt(1 - signal**2))
    assert abs(naive / np.sqrt(2e-5) - 1) > 5e-4
    assert abs(float(schedule.noise(1)) / np.sqrt(2e-5) - 1) < 1e-6


@pytest.mark.parametrize(("name", "last"), [("post", 0.0064820), ("linear", 0.0063528)])
def test_last_signal(name, last):
    assert float(MAKE[name]().signal(1000)) == pytest.approx(last, abs=6e-8)


@pytest.mark.parametrize("name", MAKE)
def test_ends(name):
    schedule = MAKE[name]()
    assert (float(schedule.signal(0)), float(schedule.noise(0))) == (1.0, 0.0)
    assert bool(jnp.all(jnp.diff(schedule.signal(jnp.arange(1001))) < 0))


def test_cosine_follows_the_paper_until_the_last_step_is_capped():
    schedule = cosine_schedule(50)
    f = [np.cos((t / 50 + 0.008) / 1.008 * np.pi / 2) ** 2 for t in range(51)]
    np.testing.assert_allclose(
        schedule.signal(jnp.arange(50)) ** 2, np.array(f[:50]) / f[0], rtol=1e-5
    )
    assert float(schedule.step_noise(50)) ** 2 == pytest.approx(0.999, rel=1e-6)


def test_betas_are_the_betas():
    assert float(from_betas([0.1, 0.3]).step_noise(2)) ** 2 == pytest.approx(0.3, rel=1e-6)
    assert float(linear_beta_schedule(10, 0.1, 0.5).step_noise(10)) ** 2 == pytest.approx(0.5)
    assert float(post_schedule(10).step_noise(5)) ** 2 == pytest.approx(0.01)


@pytest.mark.parametrize("bad", [[0.0, 0.1], [0.1, 1.0], [np.nan], [[0.1]], [], 0.1, [-0.1]])
def test_bad_betas(bad):
    with pytest.raises(ValueError, match="betas must"):
        from_betas(bad)


@pytest.mark.parametrize("make", [linear_beta_schedule, post_schedule])
def test_no_steps(make):
    with pytest.raises(ValueError, match="num_steps"):
        make(0)


@pytest.mark.parametrize("method", ["signal", "noise", "log_snr", "log_signal_at", "step_noise"])
def test_times_outside_are_refused_or_nan_but_never_moved(method):
    ask = getattr(post_schedule(), method)
    for t in (-1, 1001, np.array([3, 1001])):
        with pytest.raises(ValueError, match="outside"):
            ask(t)
    values = jax.jit(ask)(jnp.array([-1, 5, 1001, -1001]))
    assert np.isnan(values).tolist() == [True, False, True, True]


def test_steps_have_no_time_zero():
    schedule = post_schedule()
    with pytest.raises(ValueError, match="time -1"):
        schedule.step_signal(0)
    assert bool(jnp.isnan(jax.jit(schedule.step_signal)(jnp.uint8(0))))


@pytest.mark.parametrize("t", [1.0, np.float32(2), True, jnp.array([0.5])])
def test_discrete_times_are_integers(t):
    with pytest.raises(ValueError, match="integer"):
        post_schedule().signal(t)


def test_a_schedule_is_a_pytree_and_may_be_an_argument():
    ask = jax.jit(lambda schedule, t: schedule.noise(t))
    np.testing.assert_allclose(ask(post_schedule(), 1), np.sqrt(2e-5), rtol=1e-6)
    np.testing.assert_allclose(ask(linear_beta_schedule(), 1), 0.01, rtol=1e-6)
    gradient = jax.grad(lambda s: jnp.sum(s.noise(jnp.arange(3))))(post_schedule(3))
    assert bool(jnp.all(jnp.isfinite(gradient.log_signal)))


def cosine_in_float64(t, offset=0.008, min_log_snr=-20.0):
    first = np.pi / 2 * offset / (1 + offset)
    last = np.arccos(np.cos(first) / np.sqrt(1 + np.exp(-min_log_snr)))
    return np.cos(first + (last - first) * np.asarray(t, np.float64)) / np.cos(first)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_schedules_against_float64(name):
    schedule = CONTINUOUS[name]()
    t = np.linspace(0, 1, 101, dtype=np.float32)
    t64 = t.astype(np.float64)
    A = np.exp(-5 * t64**2) if name == "post" else cosine_in_float64(t64)
    np.testing.assert_allclose(schedule.signal(t), A, rtol=5e-6)
    np.testing.assert_allclose(schedule.noise(t)[1:], np.sqrt(1 - A[1:] ** 2), rtol=5e-6)
    ratio = np.log(A[1:] / A[:-1])
    np.testing.assert_allclose(schedule.log_ratio(t[1:], t[:-1]), ratio, rtol=1e-5)
    np.testing.assert_allclose(schedule.log_ratio(1.0, 0.2), np.log(A[-1] / A[20]), rtol=1e-5)
    assert schedule.num_steps is None and schedule.final_time == 1.0
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="outside"):
            schedule.signal(wrong)
        assert bool(jnp.isnan(jax.jit(schedule.signal)(wrong)))


def test_the_continuous_post_schedule_is_the_limit_of_the_discrete_one():
    discrete, continuous = post_schedule(1000), continuous_post_schedule()
    t = np.arange(0, 1001, 100, dtype=np.int32)
    a, b = discrete.log_signal_at(t), continuous.log_signal_at((t / 1000).astype(np.float32))
    np.testing.assert_allclose(a, b, atol=0.04)


def test_continuous_cosine_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="offset"):
        continuous_cosine_schedule(1.0)
    with pytest.raises(ValueError, match="min_log_snr"):
        continuous_cosine_schedule(min_log_snr=-np.inf)


def test_timesteps():
    schedule = post_schedule(1000)
    assert timesteps(schedule, 4).tolist() == [1000, 750, 500, 250, 0]
    assert timesteps(schedule, 4, "leading").tolist() == [751, 501, 251, 1, 0]
    assert timesteps(schedule, 4, "quadratic").tolist() == [1000, 563, 250, 63, 0]
    assert timesteps(post_schedule(7), 3).tolist() == [7, 4, 2, 0]
    assert timesteps(schedule, 4).dtype == np.int32
    continuous = timesteps(continuous_post_schedule(), 4)
    assert continuous.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0] and continuous.dtype == np.float32
    for spacing in ("trailing", "leading"):
        assert timesteps(schedule, 1000, spacing).tolist() == list(range(1000, -1, -1))


@pytest.mark.parametrize(
    ("steps", "spacing", "message"),
    [
        (0, "trailing", r"steps = 0 .* 1\.\.1000"),
        (1001, "trailing", r"steps = 1001 .* 1\.\.1000"),
        (200, "quadratic", "coincide"),
        (10, "cubic", "trailing"),
    ],
)
def test_bad_timesteps(steps, spacing, message):
    with pytest.raises(ValueError, match=message):
        timesteps(post_schedule(), steps, spacing)


def test_leading_needs_integer_times():
    with pytest.raises(ValueError, match="integer times"):
        timesteps(continuous_post_schedule(), 4, "leading")
