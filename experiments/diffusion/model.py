"""A config made into a denoiser: network, schedule, optimiser, task and sampler."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from blogjax.core.random import fold_in_rows
from blogjax.diffusion import schedules
from blogjax.diffusion.sampling import sample
from blogjax.diffusion.schedules import NoiseSchedule
from blogjax.models.unet import UNet
from blogjax.optim.accumulate import accumulate
from blogjax.optim.lion import lion
from blogjax.tasks.augmentation import random_horizontal_flip
from blogjax.tasks.denoising import Apply, denoising_task
from blogjax.train import mesh as meshes
from blogjax.train import per_device
from blogjax.train.state import abstract_state
from blogjax.train.task import Task
from experiments.launch.configs import check_loop, check_ranges

SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {
    "linear": schedules.linear_beta_schedule,
    "post": schedules.post_schedule,
    "cosine": schedules.cosine_schedule,
}
# The noise a sampler adds on its way: none, the posterior's, or the larger one of Ho et al.
SAMPLERS: dict[str, dict[str, Any]] = {
    "ddim": {"eta": 0.0},
    "ddpm": {"eta": 1.0},
    "ddpm_large": {"sigma": "hat"},
}
OPTIMIZERS = ("adam", "adamw", "lion", "sgd")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config put to use."""

    mesh: Mesh
    apply: Apply
    schedule: NoiseSchedule
    prediction: Any
    task: Task
    samples: Any
    num_classes: int
    optimizer: str


def build(config: Any, image_shape: tuple[int, ...], num_classes: int) -> Plan:
    """Makes everything that can be wrong with a config, before any work is done."""
    check_loop(config.train)
    mesh = meshes.make_mesh(fsdp=config.mesh.fsdp)
    meshes.check_batch_size(config.data.batch_size, mesh)
    model_fields = {k: config.model[k] for k in config.model.keys() if k != "conditional"}  # noqa: SIM118
    model = UNet(num_classes=num_classes if config.model.conditional else 0, **model_fields)
    if config.diffusion.schedule not in SCHEDULES:
        raise ValueError(
            f"diffusion.schedule must be one of {', '.join(SCHEDULES)}, "
            f"got {config.diffusion.schedule!r}"
        )
    schedule = SCHEDULES[config.diffusion.schedule](config.diffusion.num_steps)
    check_ranges(
        config.optim, learning_rate=(0, 10), warmup_fraction=(0, 1), b1=(0, 1), b2=(0, 1),
        weight_decay=(0, float("inf")), clip_norm=(1e-9, float("inf")),
    )  # fmt: skip
    _check_samples(config.sample, schedule, model.num_classes)
    task = denoising_task(
        make_init(model, image_shape),
        make_apply(model),
        schedule,
        make_optimizer(config.optim, config.train.steps),
        prediction=config.diffusion.prediction,
        weighting=config.diffusion.weighting,
        # Per step, so that it reaches back over as many updates however many steps these take.
        ema_decay=_root(config.optim.ema_decay, config.optim.accumulate_steps),
        augment=random_horizontal_flip if config.data.flip else None,
        axis_name=per_device.axis_name(config.mesh.view),
    )
    per_device.check_view(task, mesh, config.mesh.view)
    abstract_state(task, mesh)  # shapes are enough to find what the network refuses
    return Plan(
        mesh=mesh,
        apply=make_apply(model),
        schedule=schedule,
        prediction=config.diffusion.prediction,
        task=task,
        samples=config.sample,
        num_classes=num_classes,
        optimizer=config.optim.name,
    )


def _check_samples(samples: Any, schedule: NoiseSchedule, num_classes: int) -> None:
    too_long = [s for s in samples.steps if not 0 < s <= schedule.num_steps]
    if not samples.steps or too_long or sorted(samples.steps) != list(samples.steps):
        raise ValueError(
            f"sample.steps must ascend within 1..{schedule.num_steps}, got {samples.steps}"
        )
    if not samples.samplers or not set(samples.samplers) <= set(SAMPLERS):
        raise ValueError(
            f"sample.samplers must be some of {', '.join(SAMPLERS)}, got {samples.samplers}"
        )
    classes = max(num_classes, 1)
    if samples.num % classes or samples.num < 3 * classes:
        of_classes = f"a multiple of the {num_classes} classes and " if num_classes else ""
        raise ValueError(
            f"sample.num must be {of_classes}at least {3 * classes}, got {samples.num}"
        )
    if samples.batch_size < 1:
        raise ValueError(f"sample.batch_size must be at least 1, got {samples.batch_size}")


def make_optimizer(optim: Any, steps: int) -> optax.GradientTransformation:
    """Adam, AdamW, Lion or SGD on clipped gradients; the decay is of all parameters, biases too.

    The rate rises linearly, then stays or falls like a cosine. With `accumulate_steps` there is one
    update for so many steps, on the mean of their gradients, and the rate counts updates.

    Raises:
      ValueError: for an unknown `name` or `schedule`, where Adam or SGD, which have none, are given
        a decay, and if there are fewer steps than one update takes.
    """
    every = optim.accumulate_steps
    if not 1 <= every <= steps:
        raise ValueError(
            f"optim.accumulate_steps must be in 1..{steps}, the steps of the run, got {every}"
        )
    updates = steps // every
    warmup = int(optim.warmup_fraction * updates)
    if optim.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, optim.learning_rate, warmup, updates)
    elif optim.schedule == "constant":
        # Without steps to rise in, optax's schedule would stay at 0.
        rate = optax.warmup_constant_schedule(0.0, optim.learning_rate, max(warmup, 1))
    else:
        raise ValueError(f"optim.schedule must be cosine or constant, got {optim.schedule!r}")
    tx = optax.chain(optax.clip_by_global_norm(optim.clip_norm), _make_inner_optimizer(optim, rate))
    return tx if every == 1 else accumulate(tx, every)


def _root(decay: float, every: int) -> float:
    """The decay of one step where `every` of them make up one of `decay`."""
    return decay ** (1 / every) if every > 1 and decay > 0 else decay


def _make_inner_optimizer(optim: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    decay = optim.weight_decay
    if optim.name in ("adam", "sgd"):
        if decay != 0:
            raise ValueError(
                f"optim.weight_decay is {decay}, but optim.name is {optim.name!r}, which has no "
                "decay: take 'adamw' or 'lion'"
            )
        if optim.name == "sgd":
            return optax.sgd(rate)
        return optax.adam(rate, b1=optim.b1, b2=optim.b2)
    if optim.name == "adamw":
        return optax.adamw(rate, b1=optim.b1, b2=optim.b2, weight_decay=decay)
    if optim.name == "lion":
        return lion(rate, b1=optim.b1, b2=optim.b2, weight_decay=decay)
    raise ValueError(f"optim.name must be one of {', '.join(OPTIMIZERS)}, got {optim.name!r}")


def make_init(model: UNet, image_shape: tuple[int, ...]) -> Callable[[jax.Array], Any]:
    """The network's first parameters."""

    def init(key: jax.Array) -> Any:
        x, label = jnp.zeros((1, *image_shape)), jnp.zeros(1, jnp.int32)
        inputs = (x, jnp.ones(1, jnp.int32), label if model.num_classes else None)
        return model.init(key, *inputs, train=False)

    return init


def make_apply(model: UNet) -> Apply:
    """The network as `denoising_task` calls it; labels reach it if it has classes."""

    def apply(params: Any, x: Any, t: Any, label: Any, keys: Any) -> Any:
        label = label if model.num_classes else None
        if keys is None or model.dropout == 0:
            return model.apply({"params": params}, x, t, label, train=False)

        def one(x: jax.Array, t: jax.Array, label: Any, key: jax.Array) -> Any:
            inputs = (x[None], t[None], None if label is None else label[None])
            rngs = {"dropout": key}
            return model.apply({"params": params}, *inputs, train=True, rngs=rngs)[0]  # type: ignore

        return jax.vmap(one)(x, t, label, keys)  # each example drops by its own key

    return apply


def sampler(plan: Plan, image_shape: tuple[int, ...]) -> Callable[..., Any]:
    """Returns `generate(params, seed, steps, kind, first, trajectory=False) -> [n, ...]`.

    It draws the samples `first .. first + n` of `sample.num`, whose classes come in turn, by the
    sampler `kind` of `SAMPLERS`; n is `sample.batch_size`, less at the end, on any number of
    devices. With `trajectory` the states from noise to images, `[steps + 1, n, ...]`. Of a seed
    and row the noise is the same for every sampler: what differs between them is not chance.
    """
    num, devices = plan.samples.num, plan.mesh.size
    wanted = min(plan.samples.batch_size, num)
    size = -(-wanted // devices) * devices  # what is too many is drawn and dropped
    split, whole = meshes.batch_sharding(plan.mesh), meshes.replicated(plan.mesh)

    @functools.partial(
        jax.jit, static_argnames=("steps", "sigma", "trajectory"), out_shardings=whole
    )
    def generate_batch(
        params: Any, key: jax.Array, rows: jax.Array, eta: Any,
        *, steps: int, sigma: Any, trajectory: bool,
    ) -> jax.Array:  # fmt: skip
        rows = jax.lax.with_sharding_constraint(rows, split)
        return sample(
            fold_in_rows(key, rows),
            lambda x_t, t: plan.apply(params, x_t, t, rows % plan.num_classes, None),
            plan.schedule,
            (size, *image_shape),
            steps=steps,
            eta=eta,
            sigma=sigma,
            prediction=plan.prediction,
            clip_x0=1.0 if plan.samples.clip else None,
            trajectory=trajectory,
        )

    def generate(
        params: Any, seed: int, steps: int, kind: str, first: int, trajectory: bool = False
    ) -> np.ndarray:
        key = meshes.put_key(jax.random.key(seed), plan.mesh)
        rows = jax.device_put(np.arange(first, first + size, dtype=np.int32), split)
        options = {"eta": 0.0, "sigma": "eta", **SAMPLERS[kind]}
        images = generate_batch(params, key, rows, steps=steps, trajectory=trajectory, **options)
        axis = 1 if trajectory else 0
        return jax.device_get(images).take(np.arange(min(wanted, num - first)), axis)

    return generate


def batch_starts(plan: Plan) -> range:
    """The `first` of every batch of samples."""
    return range(0, plan.samples.num, plan.samples.batch_size)
