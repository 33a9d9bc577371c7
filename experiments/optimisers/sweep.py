"""Many small networks at once: every learning rate with every weight decay, on the digits.

All networks of a run see the same batches, and lie in one state with a leading axis; candidate c's
replica r is network `c * replicas + r`. So a sweep is one run of the loop.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.data import digits
from blogjax.data.batches import Batches
from blogjax.optim.lion import scale_by_lion
from blogjax.tasks.gradient import LossOutput, gradient_task
from blogjax.train.task import Batch, Task
from experiments.launch.configs import check_ranges

CORES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": optax.scale_by_adam,
    "lion": scale_by_lion,
}
_cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def check(config: Any) -> None:
    """Refuses groups `model`, `optim` and `train` of which no sweep can be made.

    Raises:
      ValueError: naming the field.
    """
    optim = config.optim
    check_ranges(optim, warmup_fraction=(0, 1))
    check_ranges(config.train, epochs=(1e-9, float("inf")), replicas=(1, 2**16))
    if not config.model.hidden or min(config.model.hidden) < 1:
        raise ValueError(f"model.hidden needs widths of at least 1, got {config.model.hidden}")
    for name in ("rates", "decays"):
        values = list(optim[name])
        if len(values) < 2 or min(values) <= 0 or values != sorted(set(values)):
            raise ValueError(f"optim.{name} must be two positive numbers or more, rising: {values}")
    if not max(optim.rates) * max(optim.decays) < 2:
        # A step would turn a weight round and enlarge it, without end.
        raise ValueError(
            f"the largest of optim.rates, {max(optim.rates):g}, times the largest of "
            f"optim.decays, {max(optim.decays):g}, must be below 2"
        )


def load(split: str) -> dict[str, np.ndarray]:
    """Digits as rows of 64 pixels in [-1, 1]: `pixels` and `label`."""
    arrays = digits.load(split)
    return {"pixels": arrays["image"].reshape(len(arrays["label"]), -1), "label": arrays["label"]}


def steps_of(config: Any, batch_size: int, examples: int) -> int:
    """How many batches make the epochs of a run."""
    return max(1, round(config.train.epochs * examples / batch_size))


def candidates(optim: Any) -> np.ndarray:
    """Every rate with every decay, decays changing fastest: `[rates * decays, 2]`."""
    return np.stack(np.meshgrid(optim.rates, optim.decays, indexing="ij"), axis=-1).reshape(-1, 2)


def make_task(config: Any, optimiser: str, steps: int) -> Task:
    """The sweep of one optimiser, over `steps` steps.

    A network's loss is its mean cross-entropy in nats; the task's, the mean over the networks. The
    rate rises linearly from 0 and falls to it along a cosine.
    """
    pairs = np.repeat(candidates(config.optim), config.train.replicas, axis=0)
    rates, decays = jnp.asarray(pairs.T, jnp.float32)
    replicas, networks = config.train.replicas, len(pairs)
    warmup = round(config.optim.warmup_fraction * steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0 if warmup else 1.0, 1.0, warmup, steps)
    widths = (64, *config.model.hidden, 10)

    def init(key: jax.Array) -> dict[str, Any]:
        # Replica r begins with the same weights whatever its rates and its optimiser.
        drawn = jax.vmap(lambda k: _init_network(k, widths))(jax.random.split(key, replicas))
        times = networks // replicas
        return {"params": jax.tree.map(lambda x: jnp.concatenate([x] * times), drawn)}

    def loss(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> LossOutput:
        del model_state, key
        return LossOutput(_losses(params, batch["pixels"], batch["label"]).mean(axis=0))

    def decay_and_scale(update: jax.Array, param: jax.Array) -> jax.Array:
        rate, decay = (v.reshape(-1, *[1] * (param.ndim - 1)) for v in (rates, decays))
        return -rate * (update + decay * param)

    tx = optax.chain(
        optax.scale(networks),  # of the mean's gradient, to that of each network's own loss
        CORES[optimiser](),
        optax.stateless(lambda updates, params: jax.tree.map(decay_and_scale, updates, params)),
        optax.scale_by_schedule(schedule),
    )
    return gradient_task(init, loss, tx)


def _init_network(key: jax.Array, widths: Sequence[int]) -> list[dict[str, jax.Array]]:
    """Dense layers for ReLU: weights by He et al., biases 0."""
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(widths) - 1)
    shapes = itertools.pairwise(widths)
    return [
        {"kernel": he(k, shape), "bias": jnp.zeros(shape[1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def _logits(params: list[dict[str, jax.Array]], pixels: jax.Array) -> jax.Array:
    """Of all networks: `[networks, n, 10]`."""

    def one(layers: list[dict[str, jax.Array]]) -> jax.Array:
        x = pixels
        for i, layer in enumerate(layers):
            x = jax.nn.relu(x) if i else x
            x = x @ layer["kernel"] + layer["bias"][None]
        return x

    return jax.vmap(one)(params)


def _losses(params: list[dict[str, jax.Array]], pixels: jax.Array, label: jax.Array) -> jax.Array:
    logits = _logits(params, pixels)
    return _cross_entropy(logits, jnp.broadcast_to(label, logits.shape[:-1]))


def make_batches(data: dict[str, np.ndarray], batch_size: int, seed: int) -> Batches:
    """Endless shuffled digits."""
    return Batches(
        data, batch_size, seed=seed,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip


def measure(config: Any, state: Any, splits: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Mean over the replicas of loss (nats) and accuracy, for each split: `[rates][decays]`."""
    optim, params = config.optim, jax.device_get(state.params)

    @jax.jit
    def score(pixels: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
        logits = _logits(params, pixels)
        return {
            "loss": _losses(params, pixels, label).mean(axis=1),
            "accuracy": (logits.argmax(-1) == label[None]).mean(axis=1),
        }

    def table(values: jax.Array) -> list[list[float]]:
        shape = (len(optim.rates), len(optim.decays), config.train.replicas)
        return np.asarray(values, np.float64).reshape(shape).mean(axis=-1).round(6).tolist()

    return {
        name: {key: table(x) for key, x in score(data["pixels"], data["label"]).items()}
        for name, data in splits.items()
    }
