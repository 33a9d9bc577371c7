"""Replicas: small networks side by side, each with labelled digits and first weights of its own.

Replica r has leading index r in every parameter. A run draws, for each replica, as many labelled
images of every class from the training split. All are trained in one run of the loop.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.data.batches import Batches

Params = list[dict[str, jax.Array]]
Activation = Callable[[jax.Array], jax.Array]


def check_labelled(labelled: int, label: np.ndarray) -> None:
    """Refuses a number of labelled images that is not the same for every class.

    Raises:
      ValueError: naming the field.
    """
    least = int(np.bincount(label, minlength=10).min())
    if labelled < 10 or labelled % 10 or labelled > 10 * least:
        raise ValueError(
            f"data.labelled must be a multiple of 10 in [10, {10 * least}], got {labelled}"
        )


def labelled_subsets(
    data: dict[str, np.ndarray], labelled: int, replicas: int, seed: int
) -> dict[str, np.ndarray]:
    """Draws the labelled images of each replica, `labelled / 10` of every class.

    Args:
      data: `pixels [n, 64]` and `label [n]`.
      labelled: images of one replica.
      replicas: how many subsets; that of replica r depends on the seed and r alone.
      seed: of the run.

    Returns:
      `pixels [labelled, replicas, 64]` and `label [labelled, replicas]`.

    >>> data = {"pixels": np.zeros((40, 64)), "label": np.arange(40) % 10}
    >>> {k: v.shape for k, v in labelled_subsets(data, 20, 3, seed=0).items()}
    {'pixels': (20, 3, 64), 'label': (20, 3)}
    """
    chosen = []
    for replica in range(replicas):
        rng = np.random.default_rng([seed, replica])
        of_class = [rng.permutation(np.flatnonzero(data["label"] == c)) for c in range(10)]
        chosen.append(np.concatenate([rows[: labelled // 10] for rows in of_class]))
    rows = np.stack(chosen, axis=1)
    return {name: data[name][rows] for name in ("pixels", "label")}


def make_batches(arrays: dict[str, np.ndarray], batch_size: int, seed: int) -> Batches:
    """Endless shuffled batches, this process's share of them."""
    return Batches(
        arrays, batch_size, seed=seed,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip


def init_replicas(key: jax.Array, widths: Sequence[int], replicas: int) -> Params:
    """Dense layers, weights as He et al. have it and biases 0: leaves `[replicas, ...]`."""
    he, shapes = jax.nn.initializers.he_normal(), list(itertools.pairwise(widths))

    def one(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(shapes))
        return [
            {"kernel": he(k, shape), "bias": jnp.zeros(shape[1])}
            for k, shape in zip(keys, shapes, strict=True)
        ]

    return jax.vmap(one)(jax.random.split(key, replicas))


def logits(params: Params, pixels: jax.Array, activation: Activation = jax.nn.relu) -> jax.Array:
    """Of one network: `[n, 10]`."""
    x = pixels
    for i, layer in enumerate(params):
        x = activation(x) if i else x
        x = x @ layer["kernel"] + layer["bias"][None]
    return x


def make_loss(activation: Activation) -> Callable[..., jax.Array]:
    """`loss(params, pixels, label) -> [n]`, of one network: cross-entropies in nats."""

    def loss(params: Params, pixels: jax.Array, label: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, pixels, activation), label
        )

    return loss


def per_replica_adam(learning_rate: float, networks: int) -> optax.GradientTransformation:
    """Adam on each network's own loss, where the loss of the run is the mean over all of them."""
    return optax.chain(optax.scale(networks), optax.adam(learning_rate))


def points(values: Any) -> np.ndarray:
    """Shares, as JSON has them, as percentages: float64."""
    return 100 * np.array(values, np.float64)
