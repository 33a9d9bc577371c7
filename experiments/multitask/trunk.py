"""One trunk, three heads: the class of a digit, whether it is odd, and how much ink it took."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.data import digits
from blogjax.multitask.loss_weighting import classification_prior, regression_prior
from blogjax.tasks.multitask import MultitaskOutput
from blogjax.train.task import Batch

NAMES = ("class", "parity", "ink")
HEADS = {"class": 10, "parity": 2, "ink": 1}
_cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def load(*names: str) -> dict[str, dict[str, np.ndarray]]:
    """Digits with the labels of all three tasks.

    Args:
      *names: the splits.

    Returns:
      For each split `pixels` float32 `[n, 64]` in [-1, 1], `class` and `parity` int32 `[n]`, and
      `ink` float32 `[n]`: the mean pixel, in standard deviations from its mean, both of the
      training split.

    >>> {k: v.shape for k, v in load("test")["test"].items()}
    {'pixels': (360, 64), 'class': (360,), 'parity': (360,), 'ink': (360,)}
    """
    mean = digits.load("train")["image"].mean(axis=(1, 2, 3), dtype=np.float64)
    centre, deviation = mean.mean(), mean.std()
    splits = {}
    for name in names:
        image, label = (digits.load(name)[key] for key in ("image", "label"))
        ink = (image.mean(axis=(1, 2, 3), dtype=np.float64) - centre) / deviation
        splits[name] = {
            "pixels": image.reshape(len(label), -1),
            "class": label,
            "parity": label % 2,
            "ink": ink.astype(np.float32),
        }
    return splits


def reference(data: dict[str, np.ndarray], scale: float) -> list[float]:
    """What each loss is for a guess from the labels' frequencies or their mean, one per task.

    The ink's loss is multiplied by `scale`, and so is its reference.
    """
    of_classes = [classification_prior(np.bincount(data[name])) for name in ("class", "parity")]
    return [*of_classes, scale * regression_prior(data["ink"])]


def init(key: jax.Array, hidden: Sequence[int]) -> dict[str, Any]:
    """Dense layers for ReLU: weights by He et al., biases 0."""
    widths = (64, *hidden)
    shapes = [*itertools.pairwise(widths), *((widths[-1], n) for n in HEADS.values())]
    he, keys = jax.nn.initializers.he_normal(), jax.random.split(key, len(shapes))
    layers = [
        {"kernel": he(k, shape), "bias": jnp.zeros(shape[1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]
    heads = dict(zip(HEADS, layers[len(hidden) :], strict=True))
    return {"params": {"trunk": layers[: len(hidden)], "heads": heads}}


def outputs(params: Any, pixels: jax.Array) -> dict[str, jax.Array]:
    """Of the three heads: `class [n, 10]`, `parity [n, 2]`, `ink [n]`."""

    def dense(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ layer["kernel"] + layer["bias"][None]

    x = pixels
    for layer in params["trunk"]:
        x = jax.nn.relu(dense(layer, x))
    found = {name: dense(layer, x) for name, layer in params["heads"].items()}
    return {**found, "ink": found["ink"][:, 0]}


def losses(params: Any, batch: Batch, scale: float) -> MultitaskOutput:
    """Two cross-entropies in nats, and the squared error of the ink times `scale`."""
    found = outputs(params, batch["pixels"])
    of_each = [
        _cross_entropy(found["class"], batch["class"]),
        _cross_entropy(found["parity"], batch["parity"]),
        scale * jnp.square(found["ink"] - batch["ink"]),
    ]
    return MultitaskOutput(jnp.stack(of_each, axis=1))


def measure(params: Any, data: dict[str, np.ndarray]) -> dict[str, float]:
    """Accuracies in [0, 1], and the squared error of the ink as a share of the ink's variance."""
    found = jax.device_get(jax.jit(outputs)(params, data["pixels"]))
    wrong = np.square(found["ink"].astype(np.float64) - data["ink"]).mean()
    return {
        "class": float((found["class"].argmax(1) == data["class"]).mean()),
        "parity": float((found["parity"].argmax(1) == data["parity"]).mean()),
        "ink": float(wrong / data["ink"].astype(np.float64).var()),
    }
