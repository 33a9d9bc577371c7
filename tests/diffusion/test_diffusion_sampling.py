import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_oracles import (
    BETAS,
    ddim_scale,
    gaussian_denoiser,
    gaussian_eps_matrix,
    point_denoiser,
    standard_normal_denoiser,
    table,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from scipy import stats

from blogjax.core.random import fold_in_rows
from blogjax.diffusion.reverse import reverse_coefficients
from blogjax.diffusion.sampling import ddim_invert, sample, spherical_interpolation
from blogjax.diffusion.schedules import (
    continuous_cosine_schedule,
    continuous_post_schedule,
    linear_beta_schedule,
    post_schedule,
    timesteps,
)

SCHEDULE = post_schedule()
TABLE = table(BETAS["post"])
NORMAL = standard_normal_denoiser(SCHEDULE)
POINT = jnp.array([[0.3, -0.8]])


def run(denoise, schedule, x_T, key=None, **options):
    """`sample` as one compiled program: eager dispatch would compile every small operation."""
    return jax.jit(lambda key, x_T: sample(key, denoise, schedule, x_T.shape, x_T=x_T, **options))(
        key, x_T
    )


@pytest.mark.parametrize(
    ("spacing", "published"),
    [
        ("leading", {10: 0.83166, 20: 0.91253, 50: 0.96411, 100: 0.98189}),
        ("trailing", {10: 0.83084, 20: 0.91211, 50: 0.96394, 100: 0.98181}),
    ],
)
def test_ddim_shrinks_standard_normal_data_by_the_product_of_cosines(spacing, published):
    for steps, scale in published.items():
        x = run(NORMAL, SCHEDULE, jnp.ones((1, 1)), steps=steps, spacing=spacing)
        assert float(x[0, 0]) == pytest.approx(scale, abs=6e-6)
        times = timesteps(SCHEDULE, steps, spacing)
        assert float(x[0, 0]) == pytest.approx(ddim_scale(TABLE, times), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "name", "variance"),
    [(post_schedule, "post", 0.9911620), (linear_beta_schedule, "linear", 0.9910674)],
)
def test_the_posteriors_variance_loses_some_of_standard_normal_data(make, name, variance):
    schedule, tab = make(), table(BETAS[name])
    t = np.arange(1, 1001)
    c = reverse_coefficients(schedule, t, t - 1, sigma="posterior")
    slope = np.asarray(c.k_eps, np.float64) + np.asarray(c.l_eps, np.float64) * tab.B[1:]
    sigma = np.asarray(c.sigma, np.float64)
    v = w = 1.0
    for i in range(999, -1, -1):
        v = slope[i] ** 2 * v + sigma[i] ** 2
        w = slope[i] ** 2 * w + tab.b[i + 1] ** 2  # the forward noise keeps all of it
    assert v == pytest.approx(variance, abs=2e-5)
    assert w == pytest.approx(1.0, abs=2e-5)


@pytest.mark.parametrize("options", [{"eta": 1.0}, {"eta": 0.4}, {"sigma": "hat"}])
def test_every_step_has_the_mean_and_the_noise_of_float64(key, options):
    """Takes the noise out of a trajectory by numpy's formulas: it must be standard normal."""
    mean, root = np.array([0.4, -1.0]), np.array([[1.0, 0.0], [0.7, 0.5]])
    covariance, steps = root @ root.T, 10
    times = timesteps(SCHEDULE, steps)
    denoise = gaussian_denoiser(SCHEDULE, mean, covariance)
    run = jax.jit(
        lambda key: sample(
            key, denoise, SCHEDULE, (4096, 2), steps=steps, trajectory=True, **options
        )
    )
    path = np.asarray(run(key), np.float64)
    assert path.shape == (steps + 1, 4096, 2)
    noises = []
    for i in range(steps):
        t, s, x = times[i], times[i + 1], path[i]
        A, B = TABLE.A[t], TABLE.B[t]
        eps = (x - A * mean) @ gaussian_eps_matrix(A, B, covariance)
        x0 = (x - B * eps) / A
        b = np.sqrt(1 - (A / TABLE.A[s]) ** 2)
        posterior = b * TABLE.B[s] / B
        inside = posterior if "sigma" in options else options["eta"] * posterior
        outside = b if "sigma" in options else inside
        expected = TABLE.A[s] * x0 + np.sqrt(TABLE.B[s] ** 2 - inside**2) * eps
        if s == 0:
            np.testing.assert_allclose(path[-1], expected, atol=1e-5)
        else:
            noises.append((path[i + 1] - expected) / outside)
    noises = np.stack([path[0], *noises]).reshape(steps, -1)
    assert stats.kstest(noises.ravel(), "norm").pvalue > 1e-3
    assert np.std(noises) == pytest.approx(1.0, abs=0.012)
    assert np.abs(np.corrcoef(noises) - np.eye(steps)).max() < 0.06


@pytest.mark.parametrize(
    "prediction", ["eps", *(pytest.param(p, marks=pytest.mark.slow) for p in ("x0", "v", "score"))]
)
def test_ddim_and_ddpm_end_at_the_moments_of_the_float64_recursion(key, prediction):
    mean, root = np.array([0.4, -1.0]), np.array([[1.0, 0.0], [0.7, 0.5]])
    covariance = root @ root.T
    times = timesteps(SCHEDULE, 25)
    exact = gaussian_denoiser(SCHEDULE, mean, covariance)

    def denoise(x, t):
        A, B, eps = SCHEDULE.signal(t)[:, None], SCHEDULE.noise(t)[:, None], exact(x, t)
        x0 = (x - B * eps) / A
        return {"eps": eps, "x0": x0, "v": A * eps - B * x0, "score": -eps / B}[prediction]

    @jax.jit
    def run(key, eta):
        return sample(key, denoise, SCHEDULE, (20000, 2), steps=25, eta=eta, prediction=prediction)

    for eta in (0.0, 1.0):
        m, V = np.zeros(2), np.eye(2)
        for t, s in itertools.pairwise(times):
            A, B = TABLE.A[t], TABLE.B[t]
            M = gaussian_eps_matrix(A, B, covariance)
            sigma = eta * TABLE.B[s] / B * np.sqrt(1 - (A / TABLE.A[s]) ** 2)
            kept = np.sqrt(TABLE.B[s] ** 2 - sigma**2) - TABLE.A[s] * B / A
            step = TABLE.A[s] / A * np.eye(2) + kept * M
            m = step @ m - kept * M @ (A * mean)
            V = step @ V @ step.T + sigma**2 * np.eye(2)
        x = run(jax.random.fold_in(key, int(eta)), eta)
        np.testing.assert_allclose(jnp.mean(x, 0), m, atol=0.035)
        np.testing.assert_allclose(jnp.cov(x.T), V, atol=0.04)


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("schedule", [SCHEDULE, continuous_cosine_schedule()])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_data_of_one_point_are_returned_exactly(key, schedule, eta):
    denoise = point_denoiser(schedule, POINT)
    x = run(denoise, schedule, jnp.array([[0.0, 1.0], [-2.0, 3.0]]), key, steps=20, eta=eta)
    np.testing.assert_allclose(x, jnp.broadcast_to(POINT, x.shape), atol=1e-6)


@pytest.mark.slow  # seconds of compiling
def test_all_steps_leading_quadratic_and_own_times(key):
    denoise = point_denoiser(SCHEDULE, POINT)
    for options in (
        {"steps": None},
        {"steps": 30, "spacing": "quadratic"},
        {"steps": 30, "spacing": "leading"},
        {"steps": [1000, 10, 0]},
    ):
        x_T = jnp.array([[1.0, -2.0]])
        x = run(denoise, SCHEDULE, x_T, jax.random.clone(key), eta=1.0, **options)
        np.testing.assert_allclose(x, POINT, atol=1e-6)
    traced = jax.jit(lambda key, times: sample(key, NORMAL, SCHEDULE, (1, 1), steps=times))
    a = traced(jax.random.clone(key), jnp.array([1000, 500, 0]))
    b = sample(key, NORMAL, SCHEDULE, (1, 1), steps=np.array([1000, 500, 0]))
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_ddim_is_a_first_order_solver():
    schedule = continuous_post_schedule()
    variance = np.array([[0.25, 4.0]], np.float32)

    def denoise(x, t):
        a, b = schedule.signal(t)[:, None], schedule.noise(t)[:, None]
        return b * x / (variance * a**2 + b**2)

    A = np.exp(-5.0)
    # The exact flow keeps the quantile: x_0 / sd_0 = x_T / sd_T.
    exact = np.sqrt(variance / (variance * A**2 + 1 - A**2))
    errors = []
    for steps in (20, 40, 80, 160):
        x = run(denoise, schedule, jnp.ones((1, 2)), steps=steps)
        errors.append(np.abs(np.asarray(x) - exact)[0])
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, 1.0, atol=0.15)
    np.testing.assert_array_less(errors[-1], 0.02 * exact[0])


def test_inversion_is_exact_with_iterations_and_first_order_without():
    schedule = continuous_post_schedule()
    denoise = gaussian_denoiser(schedule, np.array([0.4, -1.0]), np.array([[1.0, 0.3], [0.3, 0.5]]))
    x0 = jnp.array([[1.0, -0.5]])

    def invert(x0, steps, iterations=1):
        return jax.jit(
            lambda x0: ddim_invert(denoise, x0, schedule, steps=steps, iterations=iterations)
        )(x0)

    errors = []
    for steps in (50, 100, 200):
        x = run(denoise, schedule, invert(x0, steps), steps=steps)
        errors.append(float(jnp.max(jnp.abs(x - x0))))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, 1.0, atol=0.2)
    z = invert(x0, 50, iterations=40)
    x = run(denoise, schedule, z, steps=50)
    np.testing.assert_allclose(x, x0, atol=1e-4)
    np.testing.assert_allclose(invert(x, 50, iterations=40), z, atol=2e-3)


def test_inversion_never_asks_for_time_zero():
    asked = []

    def denoise(x, t):
        jax.debug.callback(lambda t: asked.append(int(t[0])), t)
        return NORMAL(x, t)

    ddim_invert(denoise, jnp.ones((1, 1)), SCHEDULE, steps=4)
    jax.effects_barrier()
    assert asked == [250, 500, 750, 1000]


def test_spherical_interpolation_keeps_the_variance(key):
    z1, z2 = jax.random.normal(key, (2, 3, 20000))
    weight = jnp.array([0.0, 0.3, 1.0])
    z = spherical_interpolation(z1, z2, weight)
    np.testing.assert_allclose(jnp.std(z, axis=1), 1.0, atol=0.02)
    np.testing.assert_allclose(z[0], z1[0], atol=1e-6)
    np.testing.assert_allclose(z[2], z2[2], atol=1e-6)
    third = np.cos(0.15 * np.pi) * np.asarray(z1[1]) + np.sin(0.15 * np.pi) * np.asarray(z2[1])
    np.testing.assert_allclose(z[1], third, atol=1e-6)
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        spherical_interpolation(jnp.ones(2), jnp.ones(3), 0.5)


def test_clipping_recomputes_the_noise():
    x_T = jnp.array([[3.0, 0.1]])
    x = run(NORMAL, SCHEDULE, x_T, steps=[300, 100], clip_x0=0.5)
    x0 = np.array([[0.5, TABLE.A[300] * 0.1]])  # unclipped (x - B B x) / A = A x
    eps = (np.asarray(x_T) - TABLE.A[300] * x0) / TABLE.B[300]
    np.testing.assert_allclose(x, TABLE.A[100] * x0 + TABLE.B[100] * eps, rtol=1e-5)
    last = run(NORMAL, SCHEDULE, x_T, steps=10, clip_x0=0.5)
    assert float(jnp.max(jnp.abs(last))) == 0.5


@pytest.mark.slow  # seconds of compiling
def test_an_examples_sample_depends_on_its_key_alone(key):
    keys = fold_in_rows(key, jnp.arange(6))
    order = jnp.array([5, 2, 0])
    some = fold_in_rows(jax.random.clone(key), order)
    run = jax.jit(
        lambda keys: sample(keys, NORMAL, SCHEDULE, (keys.shape[0], 4), steps=10, eta=1.0)
    )
    np.testing.assert_array_equal(run(some), run(keys)[order])


def test_one_and_eight_devices_agree(key):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = jnp.arange(16)
    run = jax.jit(
        lambda key, rows: sample(
            fold_in_rows(key, rows), NORMAL, SCHEDULE, (16, 4), steps=10, eta=1.0
        )
    )
    alone = run(key, rows)
    split = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data")))
    spread = run(jax.random.clone(key), split)
    assert len(spread.sharding.device_set) == 8 and not spread.sharding.is_fully_replicated
    np.testing.assert_array_equal(alone, spread)


@pytest.mark.slow  # seconds of compiling
def test_one_program_serves_every_eta(key):
    traces = []

    @jax.jit
    def run(key, eta):
        traces.append(eta)
        return sample(key, NORMAL, SCHEDULE, (2, 3), steps=10, eta=eta)

    zero = run(key, 0.0)
    one = run(jax.random.clone(key), 1.0)
    assert len(traces) == 1
    assert float(jnp.max(jnp.abs(zero - one))) > 0.1
    static = sample(jax.random.clone(key), NORMAL, SCHEDULE, (2, 3), steps=10)
    np.testing.assert_allclose(zero, static, rtol=1e-5, atol=1e-6)
    many = jax.vmap(run, (0, None))(jax.random.split(jax.random.key(1), 2), 1.0)
    assert many.shape == (2, 2, 3)


@pytest.mark.slow  # seconds of compiling
def test_gradients_through_the_sampler(x64):
    @jax.jit
    def last(weight, x_T, eta):
        return sample(
            jax.random.key(3),
            lambda x, t: jnp.tanh(weight * x),
            SCHEDULE,
            (2, 2),
            steps=4,
            eta=eta,
            x_T=x_T,
        )

    x_T = jnp.array([[0.3, -1.0], [0.5, 2.0]])
    args = (jnp.float64(0.5), x_T, jnp.float64(0.6))
    check_grads(last, args, order=1, modes=["fwd", "rev"], rtol=1e-3, atol=1e-3)


def test_bfloat16_state_is_kept_in_float32(key):
    seen = set()

    def denoise(x, t):
        seen.add(x.dtype)
        return point_denoiser(SCHEDULE, POINT)(x.astype(jnp.float32), t).astype(x.dtype)

    z = jax.random.normal(key, (4, 2)).astype(jnp.bfloat16)
    x = run(NORMAL, SCHEDULE, z)
    y = run(NORMAL, SCHEDULE, z.astype(jnp.float32))
    assert x.dtype == jnp.bfloat16
    # A thousand steps rounded to 8 bits each would be lost altogether.
    np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=0.02, atol=0.02)
    path = run(denoise, SCHEDULE, z, steps=3, trajectory=True)
    assert path.dtype == jnp.bfloat16 and seen == {jnp.dtype(jnp.bfloat16)}
    back = jax.eval_shape(lambda z: ddim_invert(NORMAL, z, SCHEDULE, steps=3), z)
    assert back.dtype == jnp.bfloat16


def test_nan_stays_with_its_example(key):
    x_T = jnp.ones((3, 2)).at[1, 0].set(jnp.nan)
    x = run(NORMAL, SCHEDULE, x_T, key, steps=5, eta=1.0)
    assert np.isnan(x).any(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 1001}, r"steps = 1001"),
        ({"steps": 0}, r"steps = 0"),
        ({"steps": [0, 500, 1000]}, "descend"),
        ({"steps": [1000]}, r"\(1,\)"),
        ({"steps": [1001, 0]}, "1001 is outside"),
        ({"steps": [0.5, 0.0]}, "integer"),
        ({"spacing": "cubic", "steps": 10}, "'trailing', 'leading', 'quadratic'"),
        ({"prediction": "noise"}, "'eps', 'x0', 'v', 'score'"),
        ({"sigma": "large"}, "'hat'"),
        ({"sigma": "beta"}, "t = 3, 2, 1"),
        ({"eta": -1.0}, "negative"),
        ({"eta": 1.5}, "keeps the marginal"),
        ({"clip_x0": 0.0}, "clip_x0"),
        ({"shape": ()}, "batch axis"),
        ({"x_T": jnp.ones((3, 2))}, r"\(3, 2\).*\(2, 2\)"),
        ({"denoise": lambda x, t: x[:1]}, r"\(1, 2\).*\(2, 2\)"),
        ({"schedule": continuous_post_schedule()}, "give steps"),
        ({"key": None}, "without a key"),
        ({"key": None, "eta": 0.1, "x_T": jnp.ones((2, 2))}, "without a key"),
    ],
)
def test_bad_arguments(key, kwargs, message):
    call = {"key": key, "denoise": NORMAL, "schedule": SCHEDULE, "shape": (2, 2)} | kwargs
    with pytest.raises(ValueError, match=message):
        sample(**call)


def test_bad_arguments_of_the_inverse():
    with pytest.raises(ValueError, match="iterations"):
        ddim_invert(NORMAL, jnp.ones((1, 2)), SCHEDULE, iterations=0)
    with pytest.raises(ValueError, match="batch axis"):
        ddim_invert(NORMAL, jnp.float32(1), SCHEDULE)
    with pytest.raises(ValueError, match="'noise'"):
        ddim_invert(NORMAL, jnp.ones((1, 2)), SCHEDULE, prediction="noise")
