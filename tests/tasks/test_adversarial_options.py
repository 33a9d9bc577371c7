import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_gans import (
    batch_of,
    linear,
    linear_init,
    linear_task,
    random_shift,
    reals,
    shifted,
    start,
    take,
)

from blogjax.losses.adversarial import AdversarialLoss
from blogjax.tasks.adversarial import Generated, adversarial_task
from blogjax.tasks.critics import (
    CONSTRAINTS,
    constrain,
    penalized,
)


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_every_constraint_at_work_on_a_linear_critic(kind):
    """What the losses see on the data, and what the generator then follows, in closed form."""
    w = np.array([3.0, 4.0])
    critic = constrain(lambda p, x: x @ p["w"][:, 0], kind)

    def init(key):
        made = linear_init(key)
        return {**made, "critic": {"params": {"w": jnp.asarray(w[:, None], jnp.float32)}}}

    task = adversarial_task(
        init, shifted, critic, optax.sgd(0.1), optax.sgd(0.01), real=reals, loss="wasserstein"
    )
    z = np.random.default_rng(5).normal(size=(12, 2)).astype(np.float32)
    batch = batch_of(z=z)
    state, metrics = take(task, start(task), batch)
    x = np.asarray(batch["x"], np.float64)
    d, fake = x @ w, np.array([0.5, 0.0]) + z
    seen = {
        "sn": d / 5, "gn": d / (5 + np.abs(d)), "gran": 5 * d / 25.1,
    }.get(kind, d)  # fmt: skip
    assert float(metrics["critic_real"]) == pytest.approx(seen.mean(), rel=1e-4)
    assert ("penalty" in metrics) == (kind == "gp")
    # The generator climbs the critic as it is after its update.
    w = np.asarray(state.params["critic"]["w"], np.float64)[:, 0]
    assert (np.abs(w).max() <= 0.01) == (kind == "clip")
    n, d = np.linalg.norm(w), fake @ w
    slope = {
        "sn": w / n,
        "gn": w * np.mean(n / (n + np.abs(d)) ** 2),
        "gran": w * n / (n**2 + 0.1),
    }.get(kind, w)
    np.testing.assert_allclose(
        state.params["generator"], np.array([0.5, 0.0]) + 0.1 * slope, rtol=1e-4
    )


def test_the_penalty_sees_the_reparametrised_critic_and_joins_the_loss():
    """A linear critic of spectral norm 1 has slope 1 everywhere: target 3 costs 4."""
    critic = constrain(lambda p, x: x @ p["w"][:, 0] + p["b"], "sn")
    critic = constrain(critic, "gp", weight=0.5, target=3.0)

    def init(key):
        made = linear_init(key)
        return {**made, "critic": {"params": {"w": jnp.array([[3.0], [4.0]]), "b": jnp.zeros(())}}}

    task = adversarial_task(
        init, random_shift, critic, optax.sgd(0.1), optax.sgd(0.1), real=reals, loss="wasserstein"
    )
    _, metrics = take(task, start(task), batch_of())
    assert float(metrics["penalty"]) == pytest.approx(2, rel=1e-5)
    gap = metrics["critic_fake"] - metrics["critic_real"]
    assert float(metrics["loss"]) == pytest.approx(gap + 2, rel=1e-5)


@pytest.mark.slow  # seconds of compiling
def test_conditions_reach_the_critic():
    """The critic of label 1 is blind, so only rows of label 0 teach the generator."""

    def critic(params, x, label):
        return jnp.where(label == 0, x @ params["w"] + params["b"], 0)

    label = jnp.array([0, 1, 1, 1] * 3)
    task = linear_task(
        critic_tx=optax.set_to_zero(), critic=constrain(critic, "gp"), generator_draws=2,
        condition=lambda batch: (batch["label"],),
    )  # fmt: skip
    state, metrics = take(task, start(task), batch_of(label=label))
    np.testing.assert_allclose(state.params["generator"][0], 0.5 + 0.1 * 0.3 / 4, rtol=1e-6)
    penalty = 10 * (0.25 * (1 - 0.3) ** 2 + 0.75)
    assert float(metrics["penalty"]) == pytest.approx(penalty, rel=1e-5)


def test_padding_may_hold_anything():
    """A critic and a generator that read more of a batch; examples that are no number at zero."""

    def critic(params, x, c):
        return x @ params["w"] + c * params["b"]

    def generate(params, model_state, keys, batch, train):
        assert batch["label"].shape == keys.shape
        return Generated(params[batch["label"]][:, None] * batch["c"][:, None] + batch["z"])

    task = linear_task(
        critic=critic, generate=generate, critic_steps=2, condition=lambda batch: (batch["c"],),
        loss="non_saturating",
        real=lambda batch, keys: batch["x"] / jnp.linalg.norm(batch["x"], axis=1, keepdims=True),
    )  # fmt: skip
    weight = np.array([1, 2, 1, 1, 0, 0], np.float32)
    z = np.random.default_rng(3).normal(size=(6, 2)).astype(np.float32)
    batch = batch_of(6, weight=weight, c=z[:, 0], z=z, label=np.zeros(6, np.int32))
    bad = {name: x.at[weight == 0].set(np.nan) for name, x in batch.items() if x.ndim > 1}
    bad |= {"c": batch["c"].at[weight == 0].set(np.inf), "label": batch["label"].at[4:].set(99)}
    state = start(task)
    (clean, _), (after, metrics) = (take(task, state, b) for b in (batch, {**batch, **bad}))
    assert int(metrics["skipped"]) == 0
    chex.assert_trees_all_equal(after.params, clean.params)
    assert after.params["generator"][0] != 0.5


def test_a_state_made_without_jit_can_be_given_away():
    """No buffer is in it twice, as the average's and the parameters' own would be."""
    task = linear_task(ema_decay=0.9)
    step = jax.jit(task.step, donate_argnums=0)
    state, _ = step(task.init(jax.random.key(0)), batch_of(), jax.random.key(1))
    assert int(state.step) == 1


def test_images_are_scaled_and_evaluation_sees_the_average():
    image = np.random.default_rng(0).integers(0, 256, size=(4, 1, 2, 1), dtype=np.uint8)
    batch = {**batch_of(4), "image": jnp.asarray(image)}

    def generate(params, model_state, keys, batch, train):
        return Generated(jnp.broadcast_to(params[None, None, :, None], (len(keys), 1, 2, 1)))

    def flat(params, x):
        return linear(params, x.reshape(len(x), 2))

    task = adversarial_task(
        linear_init, generate, flat, optax.sgd(0.5), optax.sgd(0.5), ema_decay=0.9,
        evaluate=lambda state, batch, key: {"g": jnp.full(4, state.averaged_params[0])},
        render=lambda state, batch, key: {"g": jnp.full((1, 1, 1, 1), state.averaged_params[0])},
    )  # fmt: skip
    state, metrics = take(task, start(task), batch)
    x = image[:, 0, :, 0] / 127.5 - 1
    assert float(metrics["critic_real"]) == pytest.approx(0.3 * x[:, 0].mean(), abs=1e-6)
    weighted = {**batch, "weight": jnp.array([1.0, 2.0, 0.0, 0.5])}
    assert task.evaluate is not None and task.render is not None
    total, weight = task.evaluate(state, weighted, jax.random.key(0))["g"]
    assert float(weight) == 3.5
    assert float(total / weight) == pytest.approx(float(state.ema["params"][0]), rel=1e-6)
    assert state.ema["params"][0] != state.params["generator"][0]
    assert (
        float(task.render(state, batch, jax.random.key(0))["g"][0, 0, 0, 0])
        == state.ema["params"][0]
    )


def test_narrow_parameters_keep_their_dtypes():
    def init(key):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), linear_init(key))

    task = adversarial_task(
        init, random_shift, linear, optax.adam(1e-3), optax.adam(1e-3), ema_decay=0.9, real=reals,
        critic_steps=2,
    )  # fmt: skip
    state = jax.eval_shape(task.init, jax.random.key(0))
    new, metrics = jax.eval_shape(task.step, state, batch_of(), jax.random.key(1))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    assert new.params["generator"].dtype == jnp.bfloat16
    assert new.ema["params"].dtype == metrics["loss"].dtype == jnp.float32


def test_a_momentum_that_widens_is_kept_narrow():
    """As optax's does from a rate in float32; the state would change its type from step to step."""
    widening = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda g, s, p=None: (g, jax.tree.map(lambda x: x.astype(jnp.float32), g)),
    )

    def init(key):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), linear_init(key))

    task = adversarial_task(init, random_shift, linear, widening, widening, real=reals)
    state = jax.eval_shape(task.init, jax.random.key(0))
    new, _ = jax.eval_shape(task.step, state, batch_of(), jax.random.key(1))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)


@pytest.mark.slow  # seconds of compiling
def test_optimisers_get_the_loss_and_may_hold_keys():
    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    noisy = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(3)), optax.sgd(0.1))
    task = linear_task(plateau, noisy, critic_steps=2)
    state = start(task)
    batch = batch_of()
    for i in range(2):
        state, metrics = jax.jit(task.step)(state, batch, jax.random.key(i))
    assert int(metrics["skipped"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.0}, r"\[0, 1\), got 1"),
        ({"critic_steps": 0}, "critic_steps must be at least 1, got 0"),
        ({"generator_draws": 0}, "generator_draws must be at least 1, got 0"),
        ({"loss": "gan"}, "'gan' is unknown; valid: 'wasserstein'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        linear_task(**options)


def test_counts_are_integers():
    for name in ("critic_steps", "generator_draws"):
        with pytest.raises(TypeError, match="float"):
            linear_task(**{name: 2.0})


def missing(**changes):
    return lambda key: {**linear_init(key), **changes}


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (lambda key: {"generator": linear_init(key)["generator"]}, r"got \['generator'\]"),
        (missing(other={}), r"'critic', 'generator'.*'other'"),
        (
            missing(generator={"batch_stats": {}}),
            r"generator needs 'params', got \['batch_stats'\]",
        ),
        (missing(critic={"params": {}, "batch_stats": {}}), r"critic .* got \['batch_stats'\]"),
        (missing(critic=jnp.ones(2)), r"critic needs 'params', got .*Array"),
        (lambda key: [1, 2], r"networks \('critic', 'generator'\), got list"),
    ],
)
def test_bad_networks(init, message):
    task = adversarial_task(init, random_shift, linear, optax.sgd(0.1), optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        task.init(jax.random.key(0))


def test_what_the_functions_given_return_is_checked():
    def wide(params, model_state, keys, batch, train):
        return Generated(jnp.zeros((len(keys), 3)))

    def stateful(params, model_state, keys, batch, train):
        return Generated(batch["x"] + params[None], {"stats": jnp.zeros(2)})

    def bare(params, model_state, keys, batch, train):
        return batch["x"] + params[None]

    def column(params, x):
        return linear(params, x)[:, None]

    def rounded(params, x):
        return jnp.round(linear(params, x)).astype(jnp.int32)

    def scalar_penalty(score, params, keys, real, fake):
        return jnp.zeros(())

    def label(batch):
        return batch["row"]

    mean = AdversarialLoss(jnp.mean, jnp.mean, jnp.mean)
    for options, error, message in [
        ({"critic_steps": 5}, ValueError, "12 rows .* does not divide among critic_steps=5"),
        ({"generate": wide}, ValueError, r"examples have shape \(12, 3\), .* ones \(12, 2\)"),
        ({"generate": bare}, TypeError, "generate must return a Generated, got .*Tracer"),
        ({"generate": stateful}, ValueError, "model state"),
        ({"critic": column}, ValueError, r"shape \(12,\), got \(12, 1\)"),
        ({"critic": rounded}, TypeError, "the critic's output is int32, .* floating"),
        ({"critic": penalized(linear, scalar_penalty)}, ValueError, r"penalty .*\(12,\), got \(\)"),
        ({"condition": label}, TypeError, "condition must return a tuple of arrays, got .*Tracer"),
        ({"condition": lambda batch: (batch["row"][:3],)}, ValueError, r"\(3,\).* needs 12 rows"),
        ({"real": lambda batch, keys: batch["image"]}, TypeError, "real .* uint8, .* floating"),
        ({"loss": mean}, ValueError, r"one loss for each output, shape \(12,\), got \(\)"),
    ]:
        task = linear_task(**options)
        state = jax.eval_shape(task.init, jax.random.key(0))
        batch = batch_of(image=np.zeros((12, 2), np.uint8))
        with pytest.raises(error, match=message):
            jax.eval_shape(task.step, state, batch, jax.random.key(1))
