import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blogjax.core.random import uniform
from blogjax.gradients.penalties import r1_penalty
from blogjax.tasks.critics import (
    CONSTRAINTS,
    ConstrainedCritic,
    clipped,
    constrain,
    gradient_normalized,
    gradient_penalized,
    penalized,
    spectrally_normalized,
    unconstrained,
)

W = jnp.array([3.0, 4.0])  # slope 5
X = jnp.array([[1.0, 0.5], [0.0, 0.0], [-1.0, 2.0]])


def linear(params, x):
    return x @ params


def keys(n=3):
    return jax.random.split(jax.random.key(0), n)


def penalty_of(critic):
    return jax.jit(critic.penalty)


def test_nothing_is_added_to_a_plain_critic():
    critic = unconstrained(linear)
    assert (critic.penalty, critic.project) == (None, None)
    assert critic.init(jax.random.key(0), W) == {}
    assert critic.effective(W, {}) == (W, {})
    np.testing.assert_array_equal(critic(W, {}, X), [5.0, 0.0, 5.0])
    assert constrain(critic, "none") is critic


def test_clipping_against_numpy():
    params = {"a": jnp.array([[-3.0, 0.2], [0.0, jnp.nan]]), "b": jnp.array(7.0, jnp.bfloat16)}
    project = clipped(linear, bound=0.5).project
    assert project is not None
    out = project(params)
    np.testing.assert_array_equal(out["a"], np.clip(params["a"], -0.5, 0.5))
    assert out["b"].dtype == jnp.bfloat16 and float(out["b"]) == 0.5
    for bounds in ((0.5, 0.2), (0.2, 0.5)):
        tighter = clipped(clipped(linear, bounds[0]), bounds[1]).project
        assert tighter is not None
        assert tighter(jnp.array([0.4, -0.1])).tolist() == pytest.approx([0.2, -0.1])


def test_constraints_are_kept_by_those_that_follow():
    for order in (("sn", "gp", "clip", "gn"), ("gn", "clip", "gp", "sn")):
        critic = linear
        for kind in order:
            critic = constrain(critic, kind)
        assert isinstance(critic, ConstrainedCritic) and critic.score is not linear
        parts = critic.penalty, critic.project, critic.init_state, critic.reparametrize
        assert None not in parts


def test_penalties_draw_numbers_of_their_own():
    def drawn(score, params, keys, real, fake):
        return uniform(keys, real.shape[:1])

    one = penalty_of(penalized(linear, drawn))(W, keys(), X, X)
    two = penalty_of(penalized(penalized(linear, drawn), drawn))(W, keys(), X, X)
    assert np.abs(two - 2 * one).min() > 1e-3


def test_the_gradient_penalty_of_a_linear_critic_is_known_everywhere():
    for options, wanted in [
        ({}, 10 * 16.0),
        ({"weight": 0.5, "target": 2.0}, 0.5 * 9.0),
        ({"target": 6.0}, 10.0),
        ({"target": 6.0, "one_sided": True}, 0.0),
    ]:
        got = penalty_of(constrain(linear, "gp", **options))(W, keys(), X, X + 1)
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_the_points_of_the_penalty_lie_between_each_pair():
    """A quadratic critic's slope is its input: the penalty says where it was measured."""

    def quadratic(params, x):
        return params * jnp.sum(jnp.square(x), axis=-1) / 2

    penalty = penalty_of(gradient_penalized(quadratic, weight=1.0, target=0.0))
    real, fake = jnp.zeros((64, 1)), jnp.ones((64, 1))
    share = np.sqrt(penalty(jnp.float32(1.0), keys(64), real, fake))
    assert 0 <= share.min() < 0.1 and 0.9 < share.max() <= 1 and len(np.unique(share)) == 64


def test_penalties_add_up_and_see_the_critic_that_they_were_given():
    def half_r1(score, params, key, real, fake):
        return 0.5 * r1_penalty(score, params, real)

    both = penalized(gradient_penalized(linear), half_r1)
    np.testing.assert_allclose(penalty_of(both)(W, keys(), X, X + 1), 160 + 0.5 * 12.5, rtol=1e-6)
    inside = gradient_normalized(penalized(linear, half_r1))
    np.testing.assert_allclose(penalty_of(inside)(W, keys(), X, X), 6.25, rtol=1e-6)
    outside = penalized(gradient_normalized(linear), half_r1)
    d = np.abs(np.asarray(X) @ [3, 4])
    slope = 25 / (5 + d) ** 2
    np.testing.assert_allclose(penalty_of(outside)(W, keys(), X, X), slope**2 / 4, rtol=1e-5)


def test_normalised_outputs_of_a_linear_critic():
    d = np.array([5.0, 0.0, 5.0])
    for kind, options, wanted in [
        ("gn", {}, d / (5 + np.abs(d))),
        ("gn", {"lipschitz": 3.0}, 3 * d / (5 + np.abs(d))),
        ("gran", {"eps": 2.0}, d * 5 / 27),
    ]:
        critic = constrain(linear, kind, **options)
        np.testing.assert_allclose(critic(W, {}, X), wanted, rtol=1e-6)
        assert critic.penalty is None and critic.project is None
    both = gradient_penalized(gradient_normalized(linear))
    np.testing.assert_allclose(both(W, {}, X), d / (5 + np.abs(d)), rtol=1e-6)


def test_spectral_normalisation_against_the_svd():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(6, 5)), "b": rng.normal(size=(5, 1)), "c": rng.normal(size=5)}
    params = jax.tree.map(jnp.float32, params)

    def net(params, x):
        return (jnp.tanh(x @ params["a"] + params["c"][None]) @ params["b"])[:, 0]

    critic = spectrally_normalized(net, iterations=2)
    state = critic.init(jax.random.key(0), params)
    x = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    a, b = (np.asarray(params[k]) / np.linalg.svd(params[k])[1][0] for k in "ab")
    wanted = np.tanh(x @ a + params["c"][None]) @ b
    judge = jax.jit(lambda p, s: (critic(p, s, x), critic.effective(p, s)[1]))
    new = state
    for _ in range(20):
        got, new = judge(params, new)
    np.testing.assert_allclose(got, wanted[:, 0], rtol=1e-4, atol=1e-5)
    assert np.abs(new["a"] - state["a"]).max() > 1e-3


def test_every_constraint_by_its_name():
    assert list(CONSTRAINTS) == ["none", "clip", "sn", "gp", "gn", "gran"]
    for kind in CONSTRAINTS:
        critic = constrain(lambda params, x: x @ params, kind)
        assert isinstance(critic, ConstrainedCritic)
        found = [critic.penalty, critic.project, critic.reparametrize]
        assert [f is not None for f in found] == [kind == "gp", kind == "clip", kind == "sn"]
        changed = kind in ("gn", "gran")
        state = critic.init(jax.random.key(0), W)
        assert (abs(float(critic(W, state, X)[0]) - 5) > 0.1) == changed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constrain(linear, "wgan"), r"'wgan' is unknown; valid: 'none', 'clip', 'sn'"),
        (lambda: constrain(linear, ["sn", "gp"]), r"\['sn', 'gp'\] is unknown; valid"),
        (lambda: constrain(linear, "clip", weight=1), "'clip' has no options weight; .*: bound"),
        (lambda: constrain(linear, "none", bound=1), "'none' has no options bound; .*: none"),
        (lambda: clipped(linear, 0.0), "positive, got 0"),
        (lambda: clipped(linear, float("nan")), "positive, got nan"),
        (lambda: gradient_penalized(linear, -1.0), "negative, got -1"),
        (lambda: spectrally_normalized(linear, 0), "at least 1, got 0"),
        (lambda: spectrally_normalized(spectrally_normalized(linear)), "reparametrised already"),
        (lambda: gradient_normalized(linear, "gx"), "'gx' is unknown"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", ["gn", "gran"])
def test_a_piecewise_linear_critic_may_be_said_to_be_one(kind):
    """On D = |x|^2 / 2 saying so is wrong, and gives the slope of the tangent plane."""
    critic = constrain(lambda p, x: jnp.sum(x * x, 1) / 2, kind, piecewise_linear=True)
    x = np.array([3.0, 4.0])
    d, n = 12.5, 5.0
    slope = n / (n + d) ** 2 if kind == "gn" else n / (n * n + 0.1)
    found = jax.grad(lambda x: critic(None, {}, x[None])[0])(jnp.array(x, jnp.float32))
    np.testing.assert_allclose(found, slope * x, rtol=1e-5)
