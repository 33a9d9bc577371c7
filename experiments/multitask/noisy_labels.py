"""Digits with wrong labels, and a few with right ones: two tasks for one network.

The primary task has most of the training images, with labels of which a share were replaced by
random ones; the auxiliary task has the rest, a few of every class, with the labels they have.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.multitask.coefficient_free_weight_decay import coefficient_free_weight_decay
from blogjax.multitask.combiner import Combiner
from blogjax.multitask.primary_auxiliary import agreeing_examples
from blogjax.tasks.multitask import MultitaskOutput, multitask_task
from blogjax.train.task import Batch, HostBatch, Task
from experiments.multitask import first_order
from experiments.regularisers.replicas import init_replicas, make_batches, make_loss

NAMES = ("noisy", "clean")
_cross_entropy = make_loss(jax.nn.relu)


def fixed(*weights: float) -> Combiner:
    """The combiner whose weights are always those.

    >>> fixed(1.0, 0.5)(jnp.eye(2)).tolist()
    [1.0, 0.5]
    """

    def combine(
        gram: jax.Array, /, *, key: jax.Array | None = None, losses: jax.Array | None = None
    ) -> jax.Array:
        del key, losses
        return jnp.array(weights, gram.dtype)

    return combine


class Method(NamedTuple):
    """How two gradients become one.

    Attributes:
      label: for pictures.
      combiner: of the noisy gradient and the clean one, in this order.
      masked: whether noisy examples that go against the clean gradient are left out.
      held: whether what would make the parameters grow is taken out.
    """

    label: str
    combiner: Combiner | str
    masked: bool = False
    held: bool = False


METHODS = {
    "noisy": Method("noisy only", fixed(1.0, 0.0)),
    "clean": Method("clean only", fixed(0.0, 1.0)),
    "sum": Method("sum", fixed(1.0, 1.0)),
    "primary_auxiliary": Method("noisy first, clean auxiliary", "primary_auxiliary"),
    "min_norm": Method("least norm", "min_norm"),
    "masked": Method("noisy, those that agree", fixed(1.0, 0.0), masked=True),
    "held": Method("noisy only, norm held", fixed(1.0, 0.0), held=True),
}


def divide(
    data: Mapping[str, np.ndarray], clean: int, noise: float, replicas: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Noisy and clean images of each replica.

    Args:
      data: `pixels [n, 64]` and `label [n]`.
      clean: images with right labels, `clean / 10` of each class.
      noise: the share of the others' labels to be replaced by random ones, of which a tenth are
        right all the same.
      replicas: how many divisions; that of replica r depends on the seed and r, and fewer clean
        images are a part of more.
      seed: of the run.

    Returns:
      `pixels [m, replicas, 64]` and `label [m, replicas]` of `m = n - clean` noisy images, and of
      `m = clean` clean ones.

    >>> data = {"pixels": np.zeros((40, 64)), "label": np.arange(40) % 10}
    >>> noisy, clean = divide(data, 10, 0.6, replicas=3, seed=0)
    >>> noisy["pixels"].shape, clean["label"].shape
    ((30, 3, 64), (10, 3))
    """
    size, parts = len(data["label"]), []
    for replica in range(replicas):
        rng = np.random.default_rng([seed, replica])
        of_class = [rng.permutation(np.flatnonzero(data["label"] == c)) for c in range(10)]
        right = np.concatenate([rows[: clean // 10] for rows in of_class])
        rest = np.setdiff1d(np.arange(size), right)
        label = data["label"][rest].copy()
        wrong = rng.permutation(len(rest))[: round(noise * len(rest))]
        label[wrong] = rng.integers(0, 10, len(wrong))
        parts.append((data["pixels"][rest], label, data["pixels"][right], data["label"][right]))
    stacked = [np.stack(arrays, axis=1) for arrays in zip(*parts, strict=True)]
    names = ("pixels", "label")
    return dict(zip(names, stacked[:2], strict=True)), dict(zip(names, stacked[2:], strict=True))


class NoisyAndClean:
    """Batches of as many noisy as clean images, for replicas of several divisions side by side.

    Args:
      divisions: what `divide` returned, one for each number of clean images.
      batch_size: rows of either kind.
      seed: of the order.
    """

    def __init__(self, divisions: Any, batch_size: int, seed: int):
        self.batch_size = batch_size
        self._parts = {
            name: [make_batches(division[i], batch_size, seed) for division in divisions]
            for i, name in enumerate(NAMES)
        }

    def __call__(self, step: int) -> HostBatch:
        """`noisy_pixels [B, R, 64]`, `noisy_label [B, R]`, clean ones too, `row` and `weight`.

        R counts the replicas of the first division, then those of the second, and so on.
        """
        batch: dict[str, np.ndarray] = {}
        for name, parts in self._parts.items():
            found = [part(step) for part in parts]
            for key in ("pixels", "label"):
                batch[f"{name}_{key}"] = np.concatenate([part[key] for part in found], axis=1)
            batch |= {key: found[0][key] for key in ("row", "weight")}
        return batch


def losses(params: Any, batch: Any) -> jax.Array:
    """Cross-entropies of one network, `[B, 2]`: of noisy images and of clean ones."""
    return jnp.stack(
        [_cross_entropy(params, batch[f"{n}_pixels"], batch[f"{n}_label"]) for n in NAMES], axis=1
    )


def means(params: Any, batch: Any) -> jax.Array:
    """`[2]`, for `first_order`."""
    return jnp.mean(losses(params, batch), axis=0)


def agreement(params: Any, batch: Batch) -> jax.Array:
    """`[B]`, 1 for the noisy examples whose gradient goes with that of the clean batch."""
    clean = jax.grad(lambda p: means(p, batch)[1])(params)
    products = jax.jvp(lambda p: losses(p, batch)[:, 0], (params,), (clean,))[1]
    return agreeing_examples(products)


def make_task(method: Method, widths: Any, rate: jax.Array | float) -> Task:
    """One network's: plain gradient descent, after what the method makes of the two gradients.

    Args:
      method: see `METHODS`.
      widths: of all layers, inputs and outputs included.
      rate: the learning rate.
    """

    def init(key: jax.Array) -> dict[str, Any]:
        return {"params": jax.tree.map(lambda leaf: leaf[0], init_replicas(key, widths, 1))}

    def loss(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> MultitaskOutput:
        del model_state, key
        of_each = losses(params, batch)
        if not method.masked:
            return MultitaskOutput(of_each)
        agreeing = agreement(jax.lax.stop_gradient(params), batch)
        return MultitaskOutput(of_each, jnp.stack([agreeing, jnp.ones_like(agreeing)], axis=1))

    tx = optax.chain(
        coefficient_free_weight_decay() if method.held else optax.identity(),
        first_order.noted(),
        optax.sgd(rate),
    )
    return multitask_task(init, loss, tx, names=NAMES, combiner=method.combiner)


def networks_task(
    method: Method, widths: Any, rates: Any, divisions: int, replicas: int, steps: int
) -> Task:
    """All networks of a method: `(division * rates + rate) * replicas + replica` is the number."""
    tried = jnp.array(rates, jnp.float32)

    def make(number: jax.Array) -> Task:
        return make_task(method, widths, tried[number // replicas % len(tried)])

    def own(batch: Batch, number: jax.Array) -> Batch:
        column = number // (replicas * len(tried)) * replicas + number % replicas
        return {
            name: x if name in ("row", "weight") else jnp.take(x, column, axis=1)
            for name, x in batch.items()
        }

    return first_order.watched(
        make, own, means, networks=divisions * len(tried) * replicas, replicas=replicas, steps=steps
    )
