"""What is measured of a critic, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blogjax.models.gan import MLPCritic
from blogjax.train import mesh as meshes
from configs.gan import get_config
from experiments.adversarial import image_model, image_slopes


def rectified(params, x):
    """D and its gradient of an MLP with one hidden layer, in numpy."""
    first, last = params["dense_0"], params["out"]
    h = x.reshape(len(x), -1) @ first["kernel"] + first["bias"]
    weights = (h > 0) * last["kernel"][:, 0]
    return np.maximum(h, 0) @ last["kernel"][:, 0] + last["bias"], weights @ first["kernel"].T


def normalized(params, x):
    value, gradient = rectified(params, x)
    return value / (np.linalg.norm(gradient, axis=1) + abs(value))


@pytest.fixture(scope="module")
def rectifier():
    """A critic of 2 x 2 images with float64 parameters, and images away from its kinks."""
    rng = np.random.default_rng(3)
    network = MLPCritic((5,))
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape),
        network.init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))["params"],
    )
    return network, params, rng.normal(size=(7, 2, 2, 1)), rng.normal(size=(7, 2, 2, 1))


def test_slopes_against_finite_differences(rectifier, monkeypatch):
    monkeypatch.setattr(image_slopes, "AT_ONCE", 3)
    network, params, x, _ = rectifier
    score = image_slopes.score_at(network, "gn", jnp.float64)
    value, slope = image_slopes.slopes(score, params, x)
    assert value.dtype == slope.dtype == np.float64
    np.testing.assert_allclose(value, normalized(params, x), rtol=1e-12)
    steps = 1e-6 * np.eye(4).reshape(4, 1, 2, 2, 1)
    gradient = [(normalized(params, x + h) - normalized(params, x - h)) / 2e-6 for h in steps]
    np.testing.assert_allclose(slope, np.linalg.norm(gradient, axis=0), rtol=1e-6)
    plain, steep = image_slopes.slopes(
        image_slopes.score_at(network, "none", jnp.float64), params, x
    )
    d, by_x = rectified(params, x)
    np.testing.assert_allclose(plain, d, rtol=1e-12)
    np.testing.assert_allclose(steep, np.linalg.norm(by_x, axis=1), rtol=1e-12)


def test_lines_go_from_the_first_images_to_the_second(rectifier):
    network, params, begin, end = rectifier
    score = image_slopes.score_at(network, "gn", jnp.float32)
    lines = image_slopes.along_lines(score, jax.tree.map(np.float32, params), begin, end, 8)
    assert lines.shape == (7, 9)
    for i, t in enumerate(np.linspace(0, 1, 9)):
        expected = normalized(params, (1 - t) * begin + t * end)
        np.testing.assert_allclose(lines[:, i], expected, rtol=1e-4, atol=1e-5)


def test_the_figures_of_a_critic():
    t = np.linspace(0, 1, 101)
    still, distances = np.zeros(3), np.full(3, 2.0)

    def of(lines, value=still, slope=still + 1):
        return image_slopes.summary(value, slope, np.broadcast_to(lines, (3, 101)), distances)

    smooth = of(np.sin(t))  # steepest at the start
    assert smooth["finer"] == pytest.approx(np.sin(0.01) / np.sin(0.04), rel=1e-12)
    assert smooth["jump"] == pytest.approx(np.sin(0.01), rel=1e-12)
    assert smooth["chord"] == pytest.approx(np.sin(0.01) / 0.02, rel=1e-12)
    step = of(np.where(t > 0.5, 0.3, -0.3))
    assert step["finer"] == pytest.approx(1) and step["jump"] == pytest.approx(0.6)
    assert of(0 * t)["finer"] == 0
    found = of(2.5 * t, np.array([0.5, -0.5, 0.0]), np.array([0.25, 0.35, 1.2]))
    assert found["largest"] == 1.2 and found["steep"] == pytest.approx(1 / 3)
    assert found["off"] == pytest.approx(0.2)
    assert found["bound"] == 2.5 and found["outside"] == pytest.approx(60 / 101, abs=0.01)


@pytest.mark.slow
def test_slopes_are_those_of_the_parameters_that_the_losses_see(monkeypatch, tmp_path):
    """With spectral normalisation the losses see other parameters than the optimiser."""
    one = meshes.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(meshes, "make_mesh", lambda fsdp: one)
    config = get_config("smoke")
    config.game.constraint = "sn"
    plan = image_model.build(config, (8, 8, 1))
    state = jax.jit(plan.task.init)(jax.random.key(0))
    params = jax.device_get(state.params["critic"])
    constraint = jax.device_get(state.model_state["critic"])
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8, 1)).astype(np.float32)
    found = image_slopes.measure_critic(
        plan, state, config.measure, *images, tmp_path / "critic.png"
    )
    outputs = np.asarray(plan.critic(params, constraint, images.reshape(6, 8, 8, 1)))
    assert found["bound"] >= abs(outputs).max() * (1 - 1e-5)
    assert found["bound"] <= 2 * abs(outputs).max()
    assert (tmp_path / "critic.png").stat().st_size > 10_000
