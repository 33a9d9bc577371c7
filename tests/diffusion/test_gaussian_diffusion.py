import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diffusion_oracles import BETAS, gaussian_denoiser, gaussian_eps_matrix, table
from jax.test_util import check_grads

from blogjax.core.random import fold_in_rows
from blogjax.diffusion import gaussian
from blogjax.diffusion.schedules import (
    continuous_cosine_schedule,
    linear_beta_schedule,
    post_schedule,
)

SCHEDULE = post_schedule()
TABLE = table(BETAS["post"])
KINDS = ("eps", "x0", "v", "score")


@pytest.mark.slow  # seconds of compiling
def test_q_sample_has_the_moments_of_the_forward_process(key):
    t = jnp.array([1, 300, 1000])
    x0 = jnp.full((3, 40000), 2.0)
    x_t, eps = gaussian.q_sample(key, x0, t, SCHEDULE)
    A, B = TABLE.A[t], TABLE.B[t]
    np.testing.assert_allclose(jnp.mean(x_t, 1), 2 * A, atol=0.02)
    np.testing.assert_allclose(jnp.std(x_t, 1), B, rtol=0.02)
    np.testing.assert_allclose(x_t, 2 * A[:, None] + B[:, None] * np.asarray(eps), atol=1e-5)


def test_an_examples_noise_depends_on_its_key_alone(key):
    x0 = jnp.ones((4, 3))
    keys = fold_in_rows(key, jnp.arange(4))
    turned = fold_in_rows(jax.random.clone(key), jnp.array([2, 0, 3, 1]))
    x_t, _ = gaussian.q_sample(keys, x0, 500, SCHEDULE)
    y_t, _ = gaussian.q_sample(turned, x0, 500, SCHEDULE)
    np.testing.assert_array_equal(y_t, x_t[jnp.array([2, 0, 3, 1])])


def test_shapes_that_do_not_go_together(key):
    with pytest.raises(ValueError, match=r"\(2,\).*\(3, 4\)"):
        gaussian.q_sample(key, jnp.ones((3, 4)), jnp.array([1, 2]), SCHEDULE)
    with pytest.raises(ValueError, match=r"\(3, 1\).*\(3, 4\)"):
        gaussian.q_sample(jax.random.key(1), jnp.ones((3, 4)), jnp.ones((3, 1), int), SCHEDULE)


def test_times_are_uniform_on_one_to_T(key):
    t = gaussian.uniform_timesteps(key, (40000,), post_schedule(4))
    np.testing.assert_allclose(np.bincount(t, minlength=6) / 10000, [0, 1, 1, 1, 1, 0], atol=0.05)
    u = gaussian.uniform_timesteps(jax.random.key(1), (40000,), continuous_cosine_schedule())
    assert u.dtype == jnp.float32 and float(u.min()) > 0 and float(u.max()) <= 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("t", [1, 10, 500, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_every_prediction_gives_back_data_and_noise(kind, t):
    rng = np.random.default_rng(t)
    x0, eps = rng.normal(size=(2, 3, 4))
    A, B = TABLE.A[t], TABLE.B[t]
    value = {"eps": eps, "x0": x0, "v": A * eps - B * x0, "score": -eps / B}[kind]
    x_t = A * x0 + B * eps
    args = [jnp.asarray(v, jnp.float32) for v in (value, x_t)]
    got_x0, got_eps = gaussian.to_x0_eps(kind, *args, t, SCHEDULE)
    # What is divided by A or by B loses its digits; v divides by neither.
    exact = 2e-6
    np.testing.assert_allclose(got_x0, x0, atol=exact if kind in ("x0", "v") else 3e-6 / A)
    np.testing.assert_allclose(got_eps, eps, atol=3e-6 / B if kind == "x0" else exact)
    x0, eps = (jnp.asarray(v, jnp.float32) for v in (x0, eps))
    target = gaussian.prediction_target(kind, x0, eps, t, SCHEDULE)
    np.testing.assert_allclose(target, value, rtol=2e-6, atol=2e-6)


@pytest.mark.slow  # seconds of compiling
def test_small_conversions_invert_each_other(key):
    x_t, eps = jax.random.normal(key, (2, 5, 3))
    t = jnp.array([1, 10, 100, 500, 900])
    x0 = gaussian.eps_to_x0(eps, x_t, t, SCHEDULE)
    np.testing.assert_allclose(gaussian.x0_to_eps(x0, x_t, t, SCHEDULE), eps, atol=1e-4)
    v = gaussian.eps_to_v(eps, x_t, t, SCHEDULE)
    A, B = TABLE.A[t][:, None], TABLE.B[t][:, None]
    np.testing.assert_allclose(v, A * np.asarray(eps) - B * np.asarray(x0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gaussian.v_to_eps(v, x_t, t, SCHEDULE), eps, atol=1e-5)
    np.testing.assert_allclose(gaussian.v_to_x0(v, x_t, t, SCHEDULE), x0, rtol=1e-4, atol=1e-4)
    score = gaussian.eps_to_score(eps, t, SCHEDULE)
    np.testing.assert_allclose(score, -np.asarray(eps) / B, rtol=1e-5)
    np.testing.assert_allclose(gaussian.score_to_eps(score, t, SCHEDULE), eps, rtol=1e-6)


def test_unknown_names_are_answered_with_the_known_ones():
    x = jnp.ones((1, 2))
    with pytest.raises(ValueError, match=r"'epsilon'.*'eps', 'x0', 'v', 'score'"):
        gaussian.to_x0_eps("epsilon", x, x, 1, SCHEDULE)
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 2\)"):
        gaussian.to_x0_eps("eps", jnp.ones((1, 3)), x, 1, SCHEDULE)
    for name in ("prediction", "weighting", "reduction"):
        with pytest.raises(ValueError, match=f"{name}='none'"):
            gaussian.denoising_loss(lambda x, t: x, None, x, 1, SCHEDULE, eps=x, **{name: "none"})
    with pytest.raises(ValueError, match="key"):
        gaussian.denoising_loss(lambda x, t: x, None, x, 1, SCHEDULE)
    with pytest.raises(ValueError, match=r"\(1,\).*\(1, 2\)"):
        gaussian.denoising_loss(lambda x, t: x[:, 0], None, x, 1, SCHEDULE, eps=x)
    schedule = continuous_cosine_schedule()
    with pytest.raises(ValueError, match="continuous"):
        gaussian.denoising_loss(lambda x, t: x, None, x, 0.5, schedule, weighting="elbo", eps=x)


@pytest.mark.parametrize(("prediction", "weighting"), list(itertools.product(KINDS, repeat=2)))
def test_losses_measure_what_they_say(prediction, weighting):
    rng = np.random.default_rng(0)
    x0, eps, wrong = rng.normal(size=(3, 3, 4)).astype(np.float32).astype(np.float64)
    t = np.array([2, 100, 700])
    A, B = TABLE.A[t][:, None], TABLE.B[t][:, None]

    def quantity(kind, noise):  # with x_t fixed, so the data move when the noise does
        data = (A * x0 + B * (eps - noise)) / A
        return {"eps": noise, "x0": data, "v": A * noise - B * data, "score": -noise / B}[kind]

    value = jnp.asarray(quantity(prediction, wrong), jnp.float32)
    got = gaussian.denoising_loss(
        lambda x, t: value,
        None,
        jnp.asarray(x0, jnp.float32),
        jnp.asarray(t),
        SCHEDULE,
        prediction=prediction,
        weighting=weighting,
        eps=jnp.asarray(eps, jnp.float32),
    )
    squares = (quantity(weighting, wrong) - quantity(weighting, eps)) ** 2
    np.testing.assert_allclose(got, squares.sum(1), rtol=1e-3)


def test_simple_loss_elbo_weight_and_reduction():
    x0, eps = jnp.ones((2, 4)), jnp.full((2, 4), 3.0)
    t = jnp.array([5, 800])

    def loss(**kwargs):
        return gaussian.denoising_loss(
            lambda x, t: jnp.ones_like(x), None, x0, t, SCHEDULE, eps=eps, **kwargs
        )

    assert loss().tolist() == [16.0, 16.0]
    assert loss(reduction="mean").tolist() == [4.0, 4.0]
    assert loss(prediction="x0").tolist() == [0.0, 0.0]
    weight = TABLE.b[t] ** 2 / (2 * TABLE.a[t] ** 2 * TABLE.B[t] ** 2)
    np.testing.assert_allclose(loss(weighting="elbo"), 16 * weight, rtol=1e-5)


def test_a_time_for_all_is_passed_to_the_denoiser_as_one_per_example(key):
    seen = []

    def denoise(x, t):
        seen.append((t.shape, t.dtype))
        return x

    gaussian.denoising_loss(denoise, key, jnp.ones((3, 2)), 7, SCHEDULE)
    assert seen == [((3,), jnp.int32)]


def test_bfloat16_is_mixed_and_summed_in_float32(key):
    x0 = jnp.zeros((2, 4099), jnp.bfloat16)  # bfloat16 has 4096 and 4112, nothing between
    seen = []

    def denoise(x, t):
        seen.append(x.dtype)
        return x + 1 - x

    eps = jnp.zeros((2, 4099), jnp.bfloat16)
    loss = gaussian.denoising_loss(denoise, None, x0, 10, SCHEDULE, eps=eps)
    assert loss.dtype == jnp.float32 and loss.tolist() == [4099.0, 4099.0]
    assert seen == [jnp.bfloat16]
    x_t, noise = gaussian.q_sample(key, x0, 10, SCHEDULE)
    assert (x_t.dtype, noise.dtype) == (jnp.bfloat16, jnp.float32)


def test_nan_stays_with_its_example():
    x0 = jnp.ones((3, 2)).at[1, 0].set(jnp.nan)
    loss = gaussian.denoising_loss(lambda x, t: x, None, x0, 5, SCHEDULE, eps=jnp.ones((3, 2)))
    assert np.isnan(loss).tolist() == [False, True, False]


def test_one_program_for_all_times_and_vmap():
    traces = []

    @jax.jit
    def loss(key, x0, t):
        traces.append(t)
        return gaussian.denoising_loss(lambda x, t: x, key, x0, t, SCHEDULE)

    x0 = jnp.ones((3, 2))
    for t in (1, 500, 1001):
        value = loss(jax.random.key(t), x0, jnp.full(3, t))
        assert bool(jnp.all(jnp.isnan(value))) == (t == 1001)
    assert len(traces) == 1
    keys = jax.random.split(jax.random.key(0), 2)
    again = jax.random.clone(keys)[1]
    batched = jax.vmap(loss)(keys, jnp.stack([x0, x0]), jnp.full((2, 3), 9))
    np.testing.assert_allclose(batched[1], loss(again, x0, jnp.full(3, 9)))


@pytest.mark.parametrize("weighting", ["simple", "x0", "elbo"])
def test_gradients(x64, weighting):
    eps = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))

    @jax.jit
    def loss(weight, x0):
        return gaussian.denoising_loss(
            lambda x, t: jnp.tanh(weight * x),
            None,
            x0,
            jnp.array([3, 400]),
            SCHEDULE,
            weighting=weighting,
            eps=eps,
        )

    check_grads(loss, (jnp.float64(0.7), eps[::-1] * 0.5), order=1, modes=["fwd", "rev"], rtol=1e-3)


@pytest.mark.slow  # seconds of compiling
def test_a_trained_linear_denoiser_reaches_the_closed_form_minimum(key):
    schedule, t = linear_beta_schedule(), 300
    tab = table(BETAS["linear"])
    A, B = tab.A[t], tab.B[t]
    mean, root = np.array([0.5, -1.0]), np.array([[1.0, 0.0], [0.9, 0.4]])
    covariance = root @ root.T
    matrix = gaussian_eps_matrix(A, B, covariance)
    # E |e - E[e | x]|^2 = trace of I - cov(e, x) cov(x)^-1 cov(x, e).
    minimum = np.trace(np.eye(2) - B * matrix)

    def draw(key, count):
        z = jax.random.normal(key, (count, 2))
        return z @ jnp.asarray(root.T, jnp.float32) + jnp.asarray(mean, jnp.float32)[None]

    def loss(params, key, count):
        data_key, noise_key = jax.random.split(key)
        x0 = draw(data_key, count)

        def denoise(x, _):
            return x @ params["w"] + params["c"][None]

        return jnp.mean(gaussian.denoising_loss(denoise, noise_key, x0, t, schedule))

    optimiser = optax.adam(optax.cosine_decay_schedule(0.05, 300))

    @jax.jit
    def train(key):
        def step(carry, key):
            params, state = carry
            grads = jax.grad(loss)(params, key, 512)
            updates, state = optimiser.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        params = {"w": jnp.zeros((2, 2)), "c": jnp.zeros(2)}
        train_key, test_key = jax.random.split(key)
        keys = jax.random.split(train_key, 300)
        (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), keys)
        return params, loss(params, test_key, 50000)

    params, reached = train(key)
    np.testing.assert_allclose(params["w"], matrix, atol=0.05)
    np.testing.assert_allclose(params["c"], -A * matrix @ mean, atol=0.06)
    assert float(reached) == pytest.approx(minimum, rel=0.02)
    x = jnp.ones((1, 2))
    np.testing.assert_allclose(
        gaussian_denoiser(schedule, mean, covariance)(x, jnp.array([t])),
        ((np.ones(2) - A * mean) @ matrix)[None],
        rtol=1e-4,
    )
