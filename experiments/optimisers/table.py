"""A table of rows that are asked for with Zipf frequencies: the smallest embedding there is."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.data.batches import Batch, share_of_rows, with_rows
from blogjax.optim.lion import lion
from blogjax.optim.sparse_rows import lazy_rows
from blogjax.tasks.gradient import LossOutput, gradient_task
from blogjax.train.task import Task
from experiments.launch.configs import check_ranges
from experiments.optimisers.arms import binned

INF = float("inf")


class ZipfRows:
    """Endless batches of row numbers, number i with probability proportional to (i + 1)^-exponent.

    The batch of a step is drawn from `numpy.random.default_rng([seed, step])`.

    >>> batches = ZipfRows(10, 1.0, 4, seed=0)
    >>> batches(3)["index"].shape
    (4,)
    """

    def __init__(self, size: int, exponent: float, batch_size: int, seed: int):
        weights = np.arange(1, size + 1, dtype=np.float64) ** -exponent
        self._edges = np.cumsum(weights)[:-1] / np.sum(weights)
        self._rows = share_of_rows(batch_size, jax.process_index(), jax.process_count())
        self.batch_size, self.seed = batch_size, seed

    def __call__(self, step: int) -> Batch:
        """This process's share of the batch of a step: `index`, int32."""
        uniform = np.random.default_rng([self.seed, step]).random(self.batch_size)[self._rows]
        index = np.searchsorted(self._edges, uniform, side="right")
        return with_rows({"index": index.astype(np.int32)}, self._rows)


def check(table: Any) -> None:
    """Refuses a `table` group that nothing can be measured on.

    Raises:
      ValueError: naming the field.
    """
    check_ranges(
        table, rows=(20, 2**24), width=(1, 2**16), exponent=(0, 10), target_std=(1e-9, INF),
        learning_rate=(1e-12, INF), weight_decay=(1e-12, INF), min_age=(1, table.steps),
    )  # fmt: skip
    if not table.learning_rate * table.weight_decay < 1:
        raise ValueError(
            "table.learning_rate times table.weight_decay must be below 1, got "
            f"{table.learning_rate} and {table.weight_decay}"
        )


def optimisers(table: Any) -> dict[str, optax.GradientTransformation]:
    """The arms: all at the same rates."""
    rates = {"learning_rate": table.learning_rate, "weight_decay": table.weight_decay}
    return {
        "adamw": optax.adamw(**rates),
        "lion": lion(**rates),
        "lazy": lazy_rows(lion(**rates), {"embedding": True}),
    }


def targets(table: Any, seed: int) -> np.ndarray:
    """What the rows are to become: float32 `[rows, width]`."""
    draw = np.random.default_rng([seed, 2**32]).normal(size=(table.rows, table.width))
    return (table.target_std * draw).astype(np.float32)


def make_task(table: Any, tx: optax.GradientTransformation, seed: int) -> Task:
    """Least squares, `|E_i - T_i|^2 / 2`, from zeros.

    The model state notes of each row what it was when it was last asked for (`before`, ahead of the
    update of that step) and how many steps have passed since then (`age`; of rows never asked for,
    all of them).
    """
    wanted = targets(table, seed)

    def init(key: jax.Array) -> dict[str, Any]:
        del key
        return {
            "params": {"embedding": jnp.zeros(wanted.shape)},
            "before": jnp.zeros(wanted.shape),
            "age": jnp.zeros(len(wanted), jnp.int32),
        }

    def loss(params: Any, notes: Any, batch: Any, key: jax.Array) -> LossOutput:
        del key
        index, embedding = batch["index"], params["embedding"]
        rows = embedding[index]
        kept = jax.lax.stop_gradient(rows)
        return LossOutput(
            jnp.square(rows - jnp.asarray(wanted)[index]).sum(-1) / 2,
            model_state={
                "before": notes["before"].at[index].set(kept),
                "age": (notes["age"] + 1).at[index].set(0),
            },
        )

    return gradient_task(init, loss, tx)


def closed_form(before: Any, sign: Any, updates: Any, rate: float, decay: float) -> Any:
    """Where a row ends after `updates` of Lion in which the sign stays the same.

    `q^n e - sign (1 - q^n) / decay`, `q = 1 - rate decay`: towards `-sign / decay`.

    >>> round(float(closed_form(0.0, -1.0, 1, 0.1, 0.5)), 6)
    0.1
    >>> float(closed_form(7.0, 1.0, 10_000, 0.1, 0.5))
    -2.0
    """
    left = np.exp(updates * np.log1p(-rate * decay))
    return left * before - sign * (1 - left) / decay


@dataclasses.dataclass(frozen=True)
class Edges:
    """Bins of the curves: ranks by frequency and steps since the last visit."""

    rank: list[int]
    age: list[int]


def edges(table: Any) -> Edges:
    """Bins that grow by a factor of about 1.5."""
    return Edges(_geometric(table.rows + 1), _geometric(table.steps + 1))


def _geometric(end: int) -> list[int]:
    inner = np.geomspace(1, end, max(3, int(np.log(end) / np.log(1.5)))).round().astype(int)
    return sorted({1, *inner.tolist(), end})


def measure(table: Any, state: Any, seed: int) -> dict[str, Any]:
    """What the claims rest on, for one arm."""
    embedding = np.asarray(state.params["embedding"], np.float64)
    before = np.asarray(state.model_state["before"], np.float64)
    age = np.asarray(state.model_state["age"])
    momentum = np.asarray(optax.tree.get(state.opt_state, "mu")["embedding"])
    wanted = targets(table, seed).astype(np.float64)
    error = np.abs(embedding - wanted).mean(axis=1)
    # The update of the visit itself may have had another sign: after many it does not matter.
    updates = np.broadcast_to(age[:, None] + 1, embedding.shape)
    predicted = closed_form(
        before, np.sign(momentum), updates, table.learning_rate, table.weight_decay
    )
    moving = (momentum != 0) & (age[:, None] >= table.min_age)
    apart = np.abs(embedding - predicted)[moving] / np.abs(predicted - before)[moving]
    visited = age < table.steps
    rank = np.arange(1, table.rows + 1)
    bins = edges(table)
    return {
        "max": float(np.abs(embedding).max()),
        "max_target": float(np.abs(wanted).max()),
        "head_error": float(error[: table.rows // 10].mean()),
        "tail_error": float(error[table.rows // 2 :].mean()),
        "closed_form": float(apart.max()) if apart.size else None,
        "error_by_rank": binned(rank, error, bins.rank),
        "moved_by_age": binned(
            age[visited], np.abs(embedding - before).mean(axis=1)[visited], bins.age
        ),
    }
