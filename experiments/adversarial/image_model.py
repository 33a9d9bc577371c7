"""A config made into a GAN of images: networks, game, optimisers, task and sampler."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from blogjax.core.random import fold_in_rows, normal
from blogjax.losses.adversarial import critic_loss, game
from blogjax.models.gan import DCGANCritic, DCGANGenerator, ResNetCritic, ResNetGenerator
from blogjax.tasks.adversarial import (
    AdversarialState,
    Generate,
    Generated,
    adversarial_task,
    real_images,
)
from blogjax.tasks.augmentation import random_horizontal_flip
from blogjax.tasks.critics import ConstrainedCritic, ConstraintName, constrain
from blogjax.train import mesh as meshes
from blogjax.train import per_device
from blogjax.train.state import abstract_state
from blogjax.train.task import Batch, Task
from experiments.adversarial.image_slopes import as_score, check_measure
from experiments.launch.configs import check_loop, check_ranges

ARCHITECTURES = ("dcgan", "resnet")
RENDERED = 64  # samples in a rendered grid


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config put to use."""

    mesh: Mesh
    network: nn.Module
    critic: ConstrainedCritic
    constraint: ConstraintName
    generate: Generate
    task: Task
    samples: Any


def build(config: Any, image_shape: tuple[int, ...]) -> Plan:
    """Makes everything that can be wrong with a config, before any work is done.

    Raises:
      ValueError: naming the field, or what network, game or mesh refuse.
    """
    check_loop(config.train)
    mesh, view = meshes.make_mesh(fsdp=config.mesh.fsdp), config.mesh.view
    axis_name = per_device.axis_name(view)
    _check_batch(config, mesh, axis_name)
    check_ranges(config.optim, generator_rate=(0, 10), critic_rate=(0, 10), b1=(0, 1), b2=(0, 1))
    samples = config.sample
    for name in ("num", "batch_size"):
        if samples[name] < 1:
            raise ValueError(f"sample.{name} must be at least 1, got {samples[name]}")
    check_measure(config.measure)
    latent, rules = config.model.latent, config.game
    if latent < 1:
        raise ValueError(f"model.latent must be at least 1, got {latent}")
    generator, network = networks(config.model, image_shape, axis_name)
    critic = constrain(as_score(network), rules.constraint)
    generate = make_generate(generator, latent)
    task = adversarial_task(
        make_init(networks(config.model, image_shape)[0], network, latent, image_shape),
        generate,
        critic,
        make_optimizer(config.optim, "generator", config.train.steps),
        make_optimizer(config.optim, "critic", config.train.steps, rules.critic_steps),
        loss=rules.loss,
        critic_steps=rules.critic_steps,
        generator_draws=rules.generator_draws,
        ema_decay=config.optim.ema_decay,
        real=_flipped if config.data.flip else real_images,
        evaluate=make_evaluate(generate, critic, rules.loss),
        render=make_render(generate),
        axis_name=axis_name,
    )
    per_device.check_view(task, mesh, view)
    abstract_state(task, mesh)  # shapes are enough to find what the networks refuse
    return Plan(mesh, network, critic, rules.constraint, generate, task, samples)


def _check_batch(config: Any, mesh: Mesh, axis_name: str | None) -> None:
    size, critic_steps = config.data.batch_size, config.game.critic_steps
    meshes.check_batch_size(size, mesh)
    rows = size if axis_name is None else size // mesh.size
    if critic_steps < 1 or rows % critic_steps:
        of_device = "" if axis_name is None else f", {rows} on each of {mesh.size} devices,"
        raise ValueError(
            f"data.batch_size of {size}{of_device} does not divide among "
            f"game.critic_steps={critic_steps}"
        )


def networks(
    model: Any, image_shape: tuple[int, ...], axis_name: str | None = None
) -> tuple[nn.Module, nn.Module]:
    """Generator and critic of a config's `model` group, for images `(H, W, C)`.

    Raises:
      ValueError: if the architecture is unknown, or widths or halvings do not fit the images.
    """
    *size, channels = image_shape
    widths, judged = tuple(model.generator_widths), tuple(model.critic_widths)
    for name, chosen in (("generator_widths", widths), ("critic_widths", judged)):
        if len(chosen) < 1 or min(chosen) < 1:
            raise ValueError(f"model.{name} needs numbers of at least 1, got {chosen}")
    doublings, halvings = len(widths) - 1, model.halvings
    for name, count in (("generator_widths", doublings), ("halvings", halvings)):
        if count < 0 or any(s % 2**count for s in size):
            raise ValueError(
                f"model.{name} asks for {count} doublings or halvings, but images have "
                f"{size[0]} x {size[1]} pixels"
            )
    dtypes = {"dtype": model.dtype, "param_dtype": model.param_dtype}
    options = {
        "channels": channels, "widths": widths, "norm": model.norm, "axis_name": axis_name,
        "base": (size[0] >> doublings, size[1] >> doublings),
    }  # fmt: skip
    if model.architecture == "resnet":
        critic = ResNetCritic(judged, halvings=halvings, **dtypes)
        return ResNetGenerator(**options, **dtypes), critic
    if model.architecture != "dcgan":
        raise ValueError(
            f"model.architecture must be one of {', '.join(ARCHITECTURES)}, "
            f"got {model.architecture!r}"
        )
    if halvings != len(judged) - 1:
        raise ValueError(
            f"model.halvings is {halvings}, but a DCGAN critic of {len(judged)} widths halves "
            f"{len(judged) - 1} times"
        )
    return DCGANGenerator(**options, **dtypes), DCGANCritic(judged, **dtypes)


def make_init(
    generator: nn.Module, critic: nn.Module, latent: int, image_shape: tuple[int, ...]
) -> Callable[[jax.Array], Mapping[str, Any]]:
    """The first variables of both; `generator` without an axis that only a step has."""

    def init(key: jax.Array) -> dict[str, Any]:
        first, second = jax.random.split(key)
        return {
            "generator": generator.init(first, jnp.zeros((2, latent)), train=True),
            "critic": critic.init(second, jnp.zeros((2, *image_shape))),
        }

    return init


def make_generate(generator: nn.Module, latent: int) -> Generate:
    """The generator as `adversarial_task` calls it, on normal latent vectors."""

    def generate(params: Any, model_state: Any, keys: Any, batch: Batch, train: bool) -> Generated:
        del batch
        z, variables = normal(keys, (len(keys), latent)), {"params": params, **model_state}
        if not (train and model_state):
            return Generated(generator.apply(variables, z, train=train))  # type: ignore
        images, moved = generator.apply(variables, z, train=True, mutable=list(model_state))
        return Generated(images, moved)

    return generate


def make_optimizer(
    optim: Any, player: str, steps: int, updates: int = 1
) -> optax.GradientTransformation:
    """Adam or SGD; the rate stays, or falls on a line that reaches 0 after the last of the steps.

    Args:
      optim: the config's group.
      player: whose rate to take, "generator" or "critic".
      steps: of the task.
      updates: of this player in each of them, all at one rate.

    Raises:
      ValueError: for an unknown name or schedule.
    """
    if optim.name not in ("adam", "sgd"):
        raise ValueError(f"optim.name must be adam or sgd, got {optim.name!r}")
    rate = optim[f"{player}_rate"]
    if optim.schedule not in ("linear", "constant"):
        raise ValueError(f"optim.schedule must be linear or constant, got {optim.schedule!r}")

    def falling(count: Any) -> Any:
        return rate * (1 - count // updates / steps)

    schedule = falling if optim.schedule == "linear" else rate
    if optim.name == "sgd":
        return optax.sgd(schedule)
    return optax.adam(schedule, b1=optim.b1, b2=optim.b2)


def _flipped(batch: Batch, keys: jax.Array) -> jax.Array:
    return random_horizontal_flip(keys, real_images(batch, keys))


def make_evaluate(generate: Generate, critic: ConstrainedCritic, loss: Any) -> Any:
    """The critic's loss and outputs on held-out images and the averaged generator's."""
    played = game(loss)

    def evaluate(state: AdversarialState, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        keys = fold_in_rows(key, batch["row"])
        fake = generate(state.averaged_params, state.averaged_model_state, keys, batch, False)

        def judged(x: jax.Array) -> jax.Array:
            return critic(state.params["critic"], state.model_state["critic"], x)

        of_real, of_fake = judged(real_images(batch, keys)), judged(fake.examples)
        return {
            "loss": critic_loss(of_real, of_fake, played),
            "critic_real": of_real,
            "critic_fake": of_fake,
        }

    return evaluate


def make_render(generate: Generate) -> Any:
    """A grid of the averaged generator's samples, of the same latent vectors every time."""

    def render(state: AdversarialState, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        keys = fold_in_rows(key, batch["row"])[:RENDERED]
        out = generate(state.averaged_params, state.averaged_model_state, keys, batch, False)
        return {"samples": out.examples / 2 + 0.5}

    return render


def sampler(plan: Plan, state: AdversarialState, seed: int) -> Callable[[int], np.ndarray]:
    """Returns `draw(first) -> [n, H, W, C]` in [-1, 1], of the averaged generator.

    These are the samples `first .. first + n` of `sample.num`; n is `sample.batch_size`, less at
    the end. A sample depends on seed and row only, not on the number of devices.
    """
    num, devices = plan.samples.num, plan.mesh.size
    wanted = min(plan.samples.batch_size, num)
    size = -(-wanted // devices) * devices  # what is too many is drawn and dropped
    split, whole = meshes.batch_sharding(plan.mesh), meshes.replicated(plan.mesh)
    key = meshes.put_key(jax.random.key(seed), plan.mesh)

    @functools.partial(jax.jit, out_shardings=whole)
    def batch(params: Any, model_state: Any, key: jax.Array, rows: jax.Array) -> jax.Array:
        keys = fold_in_rows(key, jax.lax.with_sharding_constraint(rows, split))
        return plan.generate(params, model_state, keys, {}, False).examples

    def draw(first: int) -> np.ndarray:
        rows = jax.device_put(np.arange(first, first + size, dtype=np.int32), split)
        images = batch(state.averaged_params, state.averaged_model_state, key, rows)
        return jax.device_get(images)[: min(wanted, num - first)]

    return draw


def batch_starts(plan: Plan) -> range:
    """The `first` of every batch of samples."""
    return range(0, plan.samples.num, plan.samples.batch_size)
