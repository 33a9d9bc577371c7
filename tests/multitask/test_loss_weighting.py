from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from blogjax.multitask.loss_weighting import (
    classification_initial,
    classification_prior,
    dynamic_weight_average,
    generalized_mean,
    inverse_loss,
    reference_weighted,
    regression_initial,
    regression_prior,
    uncertainty_weighted,
)

POST = (0.1, 1.0, 7.0)
GAMMAS = (-1000, -30, -2, -1, -1e-3, 0, 1e-3, 0.5, 1, 2, 30, 1000)


def exact_mean(losses, gamma):
    """`(1/K sum L^gamma)^(1/gamma)` in decimals with fifty digits, no logarithm of a sum."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 50, 10**6, -(10**6)
        values = [Decimal(float(x)) for x in losses]
        k = Decimal(len(values))
        if gamma == 0:
            product = Decimal(1)
            for x in values:
                product *= x
            return product ** (1 / k)
        g = Decimal(gamma)
        return (sum(x**g for x in values) / k) ** (1 / g)


def exact_weights(losses, gamma):
    """Central differences of the same in steps of 1e-12, which cancel nothing in fifty digits."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 50, 10**6, -(10**6)
        found = []
        for i, x in enumerate(losses):
            h = Decimal(float(x)) * Decimal("1e-12")
            ends = [[*losses[:i], Decimal(float(x)) + sign * h, *losses[i + 1 :]]
                    for sign in (1, -1)]  # fmt: skip
            high, low = (mean_of(values, gamma) for values in ends)
            found.append(float((high - low) / (2 * h)))
    return found


def mean_of(values, gamma):
    k = Decimal(len(values))
    values = [x if isinstance(x, Decimal) else Decimal(float(x)) for x in values]
    if gamma == 0:
        return (sum(x.ln() for x in values) / k).exp()
    g = Decimal(gamma)
    return (sum(x**g for x in values) / k) ** (1 / g)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_generalized_mean(gamma):
    losses = np.asarray(POST, np.float32)
    found = generalized_mean(losses, gamma)
    np.testing.assert_allclose(found.loss, float(exact_mean(losses, gamma)), rtol=1e-6)
    np.testing.assert_allclose(
        found.weights, exact_weights(list(losses), gamma), rtol=5e-6, atol=1e-7
    )


@pytest.mark.parametrize("gamma", [-1e300, -1e30, -1e6, 1e6, 1e30, 1e300])
def test_a_gamma_far_out_is_nearly_infinite(gamma):
    """All weight on the largest loss, or the least, as in the limit, to about 1 / gamma."""
    losses = np.array([0.1, 1e-30, 7.0, 1e30], np.float32)
    found = generalized_mean(losses, gamma)
    extreme = np.argmax(losses) if gamma > 0 else np.argmin(losses)
    np.testing.assert_allclose(found.weights, np.arange(4) == extreme, atol=2e-5)
    np.testing.assert_allclose(found.loss, losses[extreme], rtol=2e-5)


def test_the_numbers_at_the_ends():
    """The means of (.1, 1, 7) at -1000 and 1000: .10011 and 6.99231, near the least and largest."""
    low, high = (generalized_mean(jnp.array(POST), gamma).loss for gamma in (-1000, 1000))
    assert round(float(low), 5) == 0.10011
    assert round(float(high), 5) == 6.99231
    assert float(generalized_mean(jnp.array(POST), -np.inf).loss) == np.float32(0.1)
    assert float(generalized_mean(jnp.array(POST), np.inf).loss) == 7.0


@pytest.mark.parametrize("gamma", [-np.inf, -1000, -1, 0, 1e-20, 1e-40, 0.5, 1, 3, 1000, np.inf])
def test_the_weights_are_what_jax_differentiates(gamma):
    losses = jnp.array([0.3, 2.0, 5.0, 0.3])
    gradient = jax.jit(jax.grad(lambda x: generalized_mean(x, gamma).loss))(losses)
    weights = generalized_mean(losses, gamma).weights
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(gradient, weights, rtol=1e-4, atol=1e-7)
    # Homogeneous of degree 1: the mean is sum_i w_i L_i.
    np.testing.assert_allclose(weights @ losses, generalized_mean(losses, gamma).loss, rtol=1e-4)


@given(st.lists(st.floats(1e-6, 1e6), min_size=4, max_size=4))
def test_the_mean_grows_with_gamma(losses):
    losses = np.asarray(losses, np.float32)
    gammas = (-np.inf, -1000, -1, 0, 0.5, 1, 2, 1000, np.inf)
    means = np.array([float(generalized_mean(losses, gamma).loss) for gamma in gammas])
    assert (np.diff(means) >= -2e-6 * means[1:]).all(), means


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_a_unit_of_the_losses_is_one_of_the_mean(scale):
    for gamma in (-1000, -1, 0, 2, 1000):
        here = generalized_mean(np.float32(POST), gamma)
        there = generalized_mean(np.float32(np.array(POST) * scale), gamma)
        np.testing.assert_allclose(there.loss, here.loss * scale, rtol=1e-5)
        np.testing.assert_allclose(there.weights, here.weights, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan])
@pytest.mark.parametrize("gamma", [-2, 0, 0.5, 2, np.inf])
def test_losses_that_have_no_logarithm(gamma, bad):
    losses = jnp.array([1.0, bad])
    with pytest.raises(ValueError, match=r"generalized_mean with gamma=.* needs positive losses"):
        generalized_mean(losses, gamma)
    assert np.isnan(jax.jit(lambda x: generalized_mean(x, gamma).loss)(losses))


def test_the_arithmetic_mean_takes_any_losses():
    found = generalized_mean(jnp.array([0.0, -1.0, 4.0]), 1)
    assert (float(found.loss), found.weights.tolist()) == (1.0, [np.float32(1 / 3)] * 3)


def test_gamma_is_a_number():
    with pytest.raises(ValueError, match="gamma is NaN"):
        generalized_mean(jnp.ones(2), np.nan)


def test_inverse_loss():
    losses = np.array([0.5, 4.0, 1e-20], np.float32)
    found = inverse_loss(losses)
    np.testing.assert_allclose(found.weights, [2, 0.25, 1e8], rtol=1e-6)
    np.testing.assert_allclose(found.loss, 2 + 1e-12, rtol=1e-6)
    gradient = jax.grad(lambda x: inverse_loss(x).loss)(jnp.asarray(losses))
    np.testing.assert_allclose(gradient, found.weights, rtol=1e-6)
    # The gradient of the sum of logarithms, by float64 differences.
    h = 1e-6
    slope = [(np.log(x + h) - np.log(x - h)) / (2 * h) for x in losses[:2].astype(float)]
    np.testing.assert_allclose(found.weights[:2], slope, rtol=1e-6)


def test_a_loss_that_reaches_zero_stays_finite():
    """Without the floor the value and every gradient would be NaN from then on."""
    function = lambda w: inverse_loss(jnp.stack([w[0] ** 2, w[1] ** 2])).loss  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(function))(jnp.array([0.0, 3.0]))
    assert float(value) == 1.0
    np.testing.assert_allclose(gradient, [0.0, 2 / 3], rtol=1e-6)
    own = inverse_loss(jnp.zeros(2), floor=jnp.array([1e-2, 1e-4]))
    np.testing.assert_allclose(own.weights, [1e2, 1e4], rtol=1e-6)
    assert np.isnan(inverse_loss(jnp.array([jnp.nan, 1.0])).loss)


def test_references():
    assert classification_initial(10) == pytest.approx(np.log(10), rel=1e-15)
    counts = [10, 0, 30, 60]
    assert classification_prior(counts) == pytest.approx(entropy(counts), rel=1e-14)
    assert classification_prior([1] * 7) == pytest.approx(classification_initial(7), rel=1e-14)
    y = np.random.default_rng(0).normal(size=(50, 3, 2)) + 5
    flat = y.reshape(50, 6)
    assert regression_initial(y) == pytest.approx(np.trace(flat.T @ flat) / 50, rel=1e-13)
    assert regression_prior(y) == pytest.approx(flat.var(0).sum(), rel=1e-13)
    losses, reference = np.array([1.0, 8.0], np.float32), [2.0, 4.0]
    found = reference_weighted(losses, reference)
    assert (float(found.loss), found.weights.tolist()) == (2.5, [0.5, 0.25])


def test_uncertainty():
    """`sum L / (2 e^s) + s / 2`; its optimum has `e^s = L`, where the slope by s vanishes."""
    rng = np.random.default_rng(1)
    losses, s = rng.uniform(0.1, 5, size=4), rng.normal(size=4)
    found = uncertainty_weighted(np.float32(losses), np.float32(s))
    np.testing.assert_allclose(found.loss, (losses / (2 * np.exp(s)) + s / 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.weights, 1 / (2 * np.exp(s)), rtol=1e-5)
    by_s = jax.grad(lambda s: uncertainty_weighted(jnp.float32(losses), s).loss)
    np.testing.assert_allclose(by_s(jnp.log(jnp.float32(losses))), np.zeros(4), atol=1e-6)


def test_dynamic_weight_average():
    losses, last, before = np.float32([1, 2]), [1.0, 1.0], [2.0, 1.0]
    powers = np.exp(np.array([0.5, 1.0]) / 2)
    expected = 2 * powers / powers.sum()
    found = dynamic_weight_average(losses, last, before)
    np.testing.assert_allclose(found.weights, expected, rtol=1e-6)
    np.testing.assert_allclose(found.loss, expected @ losses, rtol=1e-6)
    hot = dynamic_weight_average(losses, last, before, temperature=1e6)
    np.testing.assert_allclose(hot.weights, [1, 1], rtol=1e-5)
    assert dynamic_weight_average(losses, last, last).weights.tolist() == [1, 1]
    assert dynamic_weight_average(losses, [0.0, 1.0], [0.0, 1.0]).weights.tolist() == [1, 1]
    history = jax.grad(lambda x: dynamic_weight_average(jnp.ones(2), x, jnp.ones(2)).loss)
    assert history(jnp.array([1.0, 2.0])).tolist() == [0, 0]


USES = {
    "inverse_loss": inverse_loss,
    "generalized_mean": lambda x: generalized_mean(x, 2),
    "reference_weighted": lambda x: reference_weighted(x, jnp.ones(2)),
    "uncertainty_weighted": lambda x: uncertainty_weighted(x, jnp.zeros(2)),
    "dynamic_weight_average": lambda x: dynamic_weight_average(x, jnp.ones(2), jnp.ones(2)),
}


@pytest.mark.parametrize("use", USES)
def test_losses_are_one_number_for_each_task(use):
    for bad in (jnp.ones(()), jnp.ones((2, 1)), jnp.ones((0,))):
        with pytest.raises(ValueError, match=r"losses are \[K\].*got shape"):
            USES[use](bad)
    with pytest.raises(ValueError, match="must be real numbers, got int32"):
        USES[use](jnp.arange(1, 3))
    half = USES[use](jnp.ones(2, jnp.bfloat16))
    assert half.loss.dtype == half.weights.dtype == jnp.float32
    assert half.loss.shape == () and half.weights.shape == (2,)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: reference_weighted(jnp.ones(2), jnp.ones(3)), r"\(3,\) for losses of \(2,\)"),
        (lambda: reference_weighted(jnp.ones(2), [1.0, 0.0]), "needs positive losses"),
        (lambda: inverse_loss(jnp.ones(2), floor=0.0), "positive floor"),
        (lambda: inverse_loss(jnp.ones(2), floor=jnp.ones(3)), r"floor of shape \(3,\)"),
        (lambda: uncertainty_weighted(jnp.ones(2), jnp.ones(3)), r"\(3,\) for losses of \(2,\)"),
        (lambda: dynamic_weight_average(jnp.ones(2), jnp.ones(2), jnp.ones(3)), r"\(3,\)"),
        (lambda: dynamic_weight_average(*[jnp.ones(2)] * 3, temperature=0), "must be positive"),
        (lambda: classification_initial(1), "at least 2, got 1"),
        (lambda: classification_prior([5, 0]), "at least two of them positive"),
        (lambda: classification_prior([5, -1, 3]), "at least two of them positive"),
        (lambda: regression_initial([0.0, 0.0]), "all zero"),
        (lambda: regression_prior([3.0, 3.0]), "all the same"),
        (lambda: regression_initial(np.zeros((0, 2))), r"got shape \(0, 2\)"),
    ],
)
def test_bad_input(function, message):
    with pytest.raises(ValueError, match=message):
        function()
