"""The tasks that the conformance suite runs; a new task factory is one entry of `CASES`."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from blogjax.core.random import fold_in_rows, normal, uniform
from blogjax.data.batches import Batches, EvaluationBatches
from blogjax.diffusion.schedules import linear_beta_schedule
from blogjax.losses.adversarial import critic_loss
from blogjax.models.gan import MLPCritic, MLPGenerator
from blogjax.models.unet import UNet
from blogjax.multitask.loss_weighting import inverse_loss
from blogjax.tasks.adversarial import Generated, adversarial_task
from blogjax.tasks.critics import constrain
from blogjax.tasks.denoising import denoising_task
from blogjax.tasks.gradient import LossOutput, gradient_task
from blogjax.tasks.multitask import MultitaskOutput, multitask_task
from blogjax.train.task import Task
from experiments.diffusion.model import make_apply, make_init


@dataclasses.dataclass(frozen=True)
class Case:
    """How to make a task, given the optimiser and the mapped axis, and what to feed it.

    `poison` names an array whose NaN reaches the loss; `rows_interact`: one example's loss depends
    on the others, as with batch statistics; `hands`: rows are dealt to so many updates of one step
    by their place modulo it; `slow`: left to `make slow`.
    """

    make: Callable[[optax.GradientTransformation, str | None], Task]
    arrays: dict[str, np.ndarray]
    poison: str = "x"
    rows_interact: bool = False
    hands: int = 1
    slow: bool = False

    def batches(self, size: int = 16) -> Batches:
        return Batches(self.arrays, size, seed=3)

    def evaluation(self, size: int = 16) -> EvaluationBatches:
        return EvaluationBatches(self.arrays, size)


def _regression_data(n: int = 44) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 6)).astype(np.float32)
    return {"x": x, "y": (x @ rng.normal(size=(6, 2))).astype(np.float32)}


class _Net(nn.Module):
    norm: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(16)(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
        return nn.Dense(2)(jnp.tanh(x))


def noisy_regression(tx: optax.GradientTransformation, axis_name: str | None = None) -> Task:
    """Noise on the input of every example, an average of the parameters, pictures."""
    net = _Net()

    def errors(params, batch, noise):
        predicted = net.apply({"params": params}, batch["x"] + 0.1 * noise, train=True)
        return jnp.sum(jnp.square(predicted - batch["y"]), axis=-1)

    def loss(params, model_state, batch, key):
        keys = fold_in_rows(key, batch["row"])
        value = errors(params, batch, normal(keys, batch["x"].shape))
        return LossOutput(value, {"root": jnp.sqrt(value)})

    return gradient_task(
        lambda key: net.init(key, jnp.zeros((1, 6)), train=False),
        loss,
        tx,
        ema_decay=0.9,
        evaluate=lambda params, model_state, batch, key: {
            "loss": errors(params, batch, 0.0),
            "moments": batch["x"][:, :, None] * batch["x"][:, None, :],
        },
        render=lambda params, model_state, batch, key: {
            "kernel": jax.nn.sigmoid(params["Dense_0"]["kernel"])[None, :, :, None]
        },
        axis_name=axis_name,
    )


def batch_norm_regression(tx: optax.GradientTransformation, axis_name: str | None = None) -> Task:
    """A model state: batch statistics of the global batch."""
    net = _Net(norm=True, axis_name=axis_name)

    def loss(params, model_state, batch, key):
        predicted, new = net.apply(
            {"params": params, **model_state}, batch["x"], train=True, mutable=["batch_stats"]
        )
        return LossOutput(jnp.sum(jnp.square(predicted - batch["y"]), -1), model_state=dict(new))

    def evaluate(params, model_state, batch, key):
        predicted = net.apply({"params": params, **model_state}, batch["x"], train=False)
        return {"loss": jnp.sum(jnp.square(predicted - batch["y"]), -1)}

    return gradient_task(
        lambda key: net.init(key, jnp.zeros((2, 6)), train=True), loss, tx, evaluate=evaluate,
        axis_name=axis_name,
    )  # fmt: skip


class _Denoiser(nn.Module):
    """What `denoising_task` asks of a network, and no more."""

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, label: jax.Array, train: bool) -> jax.Array:
        known = jnp.concatenate([jax.nn.one_hot(label, 3), t[:, None] / 20], axis=1)
        hidden = nn.Dense(16)(x.reshape(len(x), -1)) + nn.Dense(16)(known)
        hidden = nn.Dropout(0.3, deterministic=not train)(jnp.tanh(hidden))
        return nn.Dense(16)(hidden).reshape(x.shape)


def denoising(tx: optax.GradientTransformation, axis_name: str | None = None) -> Task:
    """A network of two layers, with dropout by each example's own key."""
    model = _Denoiser()

    def init(key):
        x, label = jnp.zeros((1, 4, 4, 1)), jnp.zeros(1, jnp.int32)
        return model.init(key, x, jnp.ones(1, jnp.int32), label, train=False)

    def apply(params, x, t, label, keys):
        def one(x, t, label, key):
            inputs = (x[None], t[None], label[None])
            rngs = {"dropout": key}
            return model.apply({"params": params}, *inputs, train=True, rngs=rngs)[0]

        if keys is None:
            return model.apply({"params": params}, x, t, label, train=False)
        return jax.vmap(one)(x, t, label, keys)

    return denoising_task(
        init, apply, linear_beta_schedule(20), tx, ema_decay=0.9, render_steps=2,
        axis_name=axis_name,
    )  # fmt: skip


def denoising_by_unet(tx: optax.GradientTransformation, axis_name: str | None = None) -> Task:
    """A tiny U-Net as experiments/ddpm.py trains it, with dropout."""
    model = UNet(channels=4, multipliers=(1,), num_blocks=1, num_classes=3, dropout=0.3)
    return denoising_task(
        make_init(model, (4, 4, 1)), make_apply(model), linear_beta_schedule(20), tx,
        ema_decay=0.9, render_steps=2, axis_name=axis_name,
    )  # fmt: skip


def _image_data(n: int = 44) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, size=(n, 4, 4, 1)).astype(np.float32)
    return {"image": image, "label": rng.integers(0, 3, size=n).astype(np.int32)}


def adversarial(tx: optax.GradientTransformation, axis_name: str | None = None) -> Task:
    """Two updates of a critic per step, with a state, a random penalty and a projection."""
    generator, net = MLPGenerator(6, (8,)), MLPCritic((8,), activation=jnp.tanh)
    critic = constrain(lambda params, x: net.apply({"params": params}, x), "sn")
    critic = constrain(constrain(critic, "gp", weight=0.1), "clip", bound=0.5)

    def init(key):
        shapes = {
            "generator": jax.eval_shape(generator.init, key, jnp.zeros((1, 3)), train=True),
            "critic": jax.eval_shape(net.init, key, jnp.zeros((1, 6))),
        }
        # One draw for all: it compiles faster, and this suite does so very often.
        flat, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, shapes))
        return unravel(0.5 * normal(key, flat.shape))

    def generate(params, model_state, keys, batch, train):
        z = uniform(keys, (len(keys), 3))
        return Generated(generator.apply({"params": params}, z, train=train))

    def evaluate(state, batch, key):
        keys = fold_in_rows(key, batch["row"])
        made = generate(state.averaged_params, {}, keys, batch, train=False).examples
        of_real, of_made = (
            critic(state.params["critic"], state.model_state["critic"], x)
            for x in (batch["x"], made)
        )
        return {"loss": critic_loss(of_real, of_made), "moments": made}

    return adversarial_task(
        init, generate, critic, tx, tx, critic_steps=2, generator_draws=2, ema_decay=0.9,
        loss="non_saturating", real=lambda batch, keys: batch["x"],
        evaluate=evaluate, axis_name=axis_name,
        render=lambda state, batch, key: {
            "kernel": jax.nn.sigmoid(state.averaged_params["dense_0"]["kernel"])[None, :, :, None]
        },
    )  # fmt: skip


def multitask(tx: optax.GradientTransformation, axis_name: str | None = None, **how) -> Task:
    """A trunk with noise on its input, three heads; some rows lack the label of some tasks."""
    names = ("first", "second", "sign")

    def init(key):
        flat = 0.5 * normal(key, (6 * 8 + 3 * 8,))
        heads = dict(zip(names, flat[48:].reshape(3, 8), strict=True))
        return {"params": {"trunk": flat[:48].reshape(6, 8), "heads": heads}}

    def outputs(params, batch, noise):
        hidden = jnp.tanh((batch["x"] + 0.1 * noise) @ params["trunk"])
        first, second, sign = (hidden @ params["heads"][name] for name in names)
        y = batch["y"]
        of_sign = optax.sigmoid_binary_cross_entropy(sign, (y[:, 0] > 0).astype(jnp.float32))
        errors = [jnp.square(first - y[:, 0]), jnp.square(second - y[:, 1]), of_sign]
        labels = jnp.stack([y[:, 1] > -1, y[:, 0] > -1, y[:, 1] < 2], axis=1)
        return MultitaskOutput(jnp.stack(errors, axis=1), labels)

    def losses(params, model_state, batch, key):
        keys = fold_in_rows(key, batch["row"])
        out = outputs(params, batch, normal(keys, batch["x"].shape))
        return out._replace(metrics={"root": (jnp.sqrt(out.losses[:, 0]), out.weights[:, 0])})

    def evaluate(params, model_state, batch, key):
        out = outputs(params, batch, 0.0)
        return {
            "loss": jnp.mean(out.losses, axis=1),
            **{name: (out.losses[:, i], out.weights[:, i]) for i, name in enumerate(names)},
        }

    return multitask_task(
        init, losses, tx, names=names, ema_decay=0.9, evaluate=evaluate, axis_name=axis_name,
        shared={"trunk": True, "heads": False}, **how,
    )  # fmt: skip


CASES = {
    "noisy_regression": Case(noisy_regression, _regression_data()),
    "batch_norm_regression": Case(
        batch_norm_regression, _regression_data(), rows_interact=True, slow=True
    ),
    "adversarial": Case(adversarial, _regression_data(), hands=2, slow=True),
    "multitask": Case(
        functools.partial(multitask, combiner="gradient_normalized"), _regression_data(), slow=True
    ),
    "multitask by scan": Case(
        functools.partial(multitask, combiner="min_norm", mode="scan"),
        _regression_data(),
        slow=True,
    ),
    "multitask by losses": Case(
        functools.partial(multitask, weighting=inverse_loss), _regression_data(), slow=True
    ),
    "denoising": Case(denoising, _image_data(), poison="image", slow=True),
    "denoising by a U-Net": Case(denoising_by_unet, _image_data(), poison="image", slow=True),
}
