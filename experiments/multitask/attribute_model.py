"""A config made into a network that tells many attributes of an image: a trunk and heads."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from blogjax.core.random import fold_in_rows
from blogjax.multitask.registry import COMBINERS
from blogjax.nn.residual_encoder import ResidualEncoder
from blogjax.tasks.augmentation import random_horizontal_flip
from blogjax.tasks.multitask import MultitaskOutput, multitask_task
from blogjax.train import mesh as meshes
from blogjax.train import per_device
from blogjax.train.state import abstract_state
from blogjax.train.task import Batch, Task
from experiments.launch.configs import check_ranges
from experiments.multitask.attributes import Attributes
from experiments.optimisers.arms import check_train

MEAN = "mean"  # of the losses: what the literature calls uniform scaling


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config put to use."""

    mesh: Mesh
    encoder: ResidualEncoder
    head: nn.Dense
    task: Task


def build(config: Any, data: Attributes) -> Plan:
    """Makes everything that can be wrong with a config, before any work is done.

    Raises:
      ValueError: naming the field, or what network, task or mesh refuse.
    """
    check_train(config.train, {"train.steps": config.train.steps})
    if config.train.evaluate_every < 1:
        raise ValueError(
            f"train.evaluate_every must be at least 1, got {config.train.evaluate_every}"
        )
    mesh, view = meshes.make_mesh(fsdp=config.mesh.fsdp), config.mesh.view
    meshes.check_batch_size(config.data.batch_size, mesh)
    check_ranges(config.optim, learning_rate=(0, 10), warmup_fraction=(0, 1), weight_decay=(0, 10))
    methods = (MEAN, *COMBINERS)
    if config.multitask.method not in methods:
        raise ValueError(
            f"multitask.method must be one of {', '.join(methods)}, got {config.multitask.method!r}"
        )
    model = config.model
    dtypes = {"dtype": model.dtype, "param_dtype": model.param_dtype}
    encoder = ResidualEncoder(
        model.channels, tuple(model.multipliers), model.num_blocks, model.resample, **dtypes
    )
    head = nn.Dense(len(data.names), param_dtype=model.param_dtype)
    task = make_task(config, data, encoder, head, per_device.axis_name(view))
    per_device.check_view(task, mesh, view)
    abstract_state(task, mesh)  # shapes are enough to find what the network refuses
    return Plan(mesh, encoder, head, task)


def _make_optimizer(optim: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    if optim.name == "adamw":
        return optax.adamw(rate, weight_decay=optim.weight_decay)
    if optim.name == "sgd":
        return optax.chain(optax.add_decayed_weights(optim.weight_decay), optax.sgd(rate))
    raise ValueError(f"optim.name must be adamw or sgd, got {optim.name!r}")


def make_task(
    config: Any, data: Attributes, encoder: ResidualEncoder, head: nn.Dense, axis_name: str | None
) -> Task:
    """Every attribute a task: its binary cross-entropy, weighted by the method.

    The encoder is what the tasks share. A column of the head belongs to one task alone, and gets
    that task's gradient as it is.
    """
    optim, chosen = config.optim, config.multitask

    def init(key: jax.Array) -> dict[str, Any]:
        first, second = jax.random.split(key)
        x = jnp.zeros((1, *data.shape))
        features = jnp.zeros((1, encoder.channels * encoder.multipliers[-1]))
        return {
            "params": {
                "encoder": encoder.init(first, x)["params"],
                "head": head.init(second, features)["params"],
            }
        }

    def losses(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> MultitaskOutput:
        del model_state
        image = pixels(batch)
        if config.data.flip:
            image = random_horizontal_flip(fold_in_rows(key, batch["row"]), image)
        found = logits(encoder, head, params, image)
        return MultitaskOutput(
            _cross_entropy(found, batch), metrics={"error": wrong(found, batch).mean(axis=1)}
        )

    def evaluate(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> Any:
        del model_state, key
        found = logits(encoder, head, params, pixels(batch))
        of_each = _cross_entropy(found, batch)
        return {"loss": of_each.mean(axis=1), "error": wrong(found, batch).mean(axis=1)}

    warmup = int(optim.warmup_fraction * config.train.steps)
    rate = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else optim.learning_rate, optim.learning_rate, warmup, config.train.steps
    )
    return multitask_task(
        init,
        losses,
        _make_optimizer(optim, rate),
        names=data.names,
        combiner=None if chosen.method == MEAN else chosen.method,
        mode=chosen.mode,
        shared={"encoder": True, "head": False},
        evaluate=evaluate,
        axis_name=axis_name,
    )


def pixels(batch: Batch) -> jax.Array:
    """The images of a batch, float32 in [-1, 1]."""
    return batch["image"].astype(jnp.float32) / 127.5 - 1


def logits(encoder: ResidualEncoder, head: nn.Dense, params: Any, image: jax.Array) -> jax.Array:
    """`[B, A]`, positive where an attribute is more likely there than not."""
    features = encoder.apply({"params": params["encoder"]}, image)
    return head.apply({"params": params["head"]}, features)  # type: ignore


def _cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(logits, batch["attributes"].astype(logits.dtype))


def wrong(logits: jax.Array, batch: Batch) -> jax.Array:
    """1 where the more likely answer is not the true one, else 0: float32 `[B, A]`."""
    return ((logits > 0) != batch["attributes"]).astype(jnp.float32)


def measure(plan: Plan, params: Any, data: Attributes, split: str, batch_size: int) -> Any:
    """Errors of every attribute on a split.

    Returns:
      `error` `[A]`, shares of the images that are told wrongly; `guess` `[A]`, the same where every
      image gets the attribute's commoner value; `images`, how many there are.
    """

    def sums(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        weight = batch["weight"][:, None]
        found = wrong(logits(plan.encoder, plan.head, params, pixels(batch)), batch)
        there = batch["attributes"].astype(jnp.float32)
        return (found * weight).sum(axis=0), (there * weight).sum(axis=0), weight.sum()

    counted = jax.jit(sums, out_shardings=meshes.replicated(plan.mesh))
    batches = data.evaluation(split, batch_size)
    put = meshes.BatchPutter(plan.mesh, batches.batch_size)
    parts = [jax.device_get(counted(params, put(batches(i)))) for i in range(len(batches))]
    errors, there, images = (
        np.asarray(part, np.float64).sum(axis=0) for part in zip(*parts, strict=True)
    )
    share = there / images
    return {
        "error": (errors / images).tolist(),
        "guess": np.minimum(share, 1 - share).tolist(),
        "images": int(images),
    }
