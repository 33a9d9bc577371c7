import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from blogjax.losses.adversarial import (
    LOSSES,
    AdversarialLoss,
    critic_loss,
    game,
    generator_loss,
)

# (real, fake, generator), in float64 from other formulas than the library's.
ORACLES = {
    "wasserstein": (lambda d: -d, lambda d: d, lambda d: -d),
    "hinge": (
        lambda d: np.where(d < 1, 1 - d, 0),
        lambda d: np.where(d > -1, 1 + d, 0),
        lambda d: -d,
    ),
    "non_saturating": (
        lambda d: -scipy.special.log_expit(d),
        lambda d: -scipy.special.log_expit(-d),
        lambda d: -scipy.special.log_expit(d),
    ),
    "least_squares": (
        lambda d: 0.5 * d * d - d + 0.5,
        lambda d: 0.5 * d * d,
        lambda d: 0.5 * d * d - d + 0.5,
    ),
}
NAMES = pytest.mark.parametrize("name", LOSSES)
outputs = st.lists(st.floats(-60, 60, width=32), min_size=6, max_size=6)


def test_every_game_has_an_oracle():
    assert set(LOSSES) == set(ORACLES)


@NAMES
@given(real=outputs, seed=st.integers(0, 9))
def test_values(name, real, seed):
    real = np.array(real, np.float32)
    fake = np.random.default_rng(seed).normal(size=real.shape).astype(np.float32) * 3
    of_real, of_fake, of_generator = ORACLES[name]
    wanted = of_real(real.astype(np.float64)) + of_fake(fake.astype(np.float64))
    got = critic_loss(jnp.asarray(real), jnp.asarray(fake), name)
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=1e-6)
    got = generator_loss(jnp.asarray(fake), name)
    np.testing.assert_allclose(got, of_generator(fake.astype(np.float64)), rtol=2e-6, atol=1e-6)


@NAMES
def test_one_players_gain_is_the_others_loss(name):
    """The critic wants real up and generated down, the generator wants generated up."""
    real, fake = jnp.array([0.3]), jnp.array([-0.4])
    up_real = jax.grad(lambda d: critic_loss(d, fake, name).sum())(real)
    up_fake = jax.grad(lambda d: critic_loss(real, d, name).sum())(
        fake if name != "least_squares" else -fake
    )
    assert float(up_real[0]) < 0 < float(up_fake[0])
    assert float(jax.grad(lambda d: generator_loss(d, name).sum())(fake)[0]) < 0


@pytest.mark.parametrize(
    ("name", "optimum"),
    [("non_saturating", lambda p, q: np.log(p / q)), ("least_squares", lambda p, q: p / (p + q))],
)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_the_optimal_critic_where_both_densities_are_known(name, optimum, p):
    q = 1 - p
    # Mixed as the expectation is: p of the real part, q of the generated one.
    found = scipy.optimize.minimize_scalar(
        lambda d: float(p * game(name).real(jnp.float32(d)) + q * game(name).fake(jnp.float32(d))),
        bounds=(-4, 4),
        method="bounded",
    ).x
    assert found == pytest.approx(optimum(p, q), abs=3e-3)


def test_a_confident_critic_still_moves_the_generator():
    """What the non-saturating game is for: the slope far below 0 is -1, not 0."""
    slope = jax.grad(lambda d: generator_loss(d, "non_saturating").sum())(jnp.array([-50.0]))
    assert float(slope[0]) == -1.0


def test_outputs_of_any_size_give_finite_losses_and_gradients():
    for d in (-1e4, 1e4):
        x = jnp.full(1, d)
        for name in ("non_saturating", "hinge", "wasserstein"):
            value, slope = jax.value_and_grad(lambda x, n=name: critic_loss(x, x, n).sum())(x)
            assert np.isfinite(value) and np.isfinite(slope).all()
    assert float(critic_loss(jnp.array([1e4]), jnp.array([-1e4]), "non_saturating")[0]) == 0


@NAMES
def test_narrow_outputs_are_computed_wide_and_nan_is_seen(name):
    d = jnp.array([0.1, 3.0], jnp.bfloat16)
    exact = np.asarray(d, np.float64)
    got = critic_loss(d, -d, name)
    assert got.dtype == generator_loss(d, name).dtype == jnp.float32
    np.testing.assert_allclose(got, ORACLES[name][0](exact) + ORACLES[name][1](-exact), rtol=1e-5)
    np.testing.assert_allclose(generator_loss(d, name), ORACLES[name][2](exact), rtol=1e-5)
    nan = jnp.array([jnp.nan, 0.0])
    assert np.isnan(critic_loss(nan, jnp.zeros(2), name)).tolist() == [True, False]
    assert np.isnan(critic_loss(jnp.zeros(2), nan, name)).tolist() == [True, False]
    assert np.isnan(generator_loss(nan, name)).tolist() == [True, False]


def test_a_game_of_ones_own():
    mine = AdversarialLoss(lambda d: 3 * d, lambda d: 5 * d, lambda d: 7 * d)
    assert float(critic_loss(jnp.ones(1), jnp.ones(1), mine)[0]) == 8
    assert float(generator_loss(jnp.ones(1), mine)[0]) == 7


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        critic_loss(jnp.ones(3), jnp.ones(2))
    mean = AdversarialLoss(jnp.mean, jnp.mean, jnp.mean)
    for call in (lambda: critic_loss(jnp.ones(3), jnp.ones(3), mean),
                 lambda: generator_loss(jnp.ones(3), mean)):  # fmt: skip
        with pytest.raises(ValueError, match=r"shape \(3,\), got \(\)"):
            call()
    with pytest.raises(ValueError, match=r"'hnge' is unknown; valid: 'wasserstein', 'hinge'"):
        generator_loss(jnp.ones(3), "hnge")  # pyright: ignore
