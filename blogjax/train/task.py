"""The contract between a method and the training loop.

A `Task` is to training what an `optax.GradientTransformation` is to optimisation: a NamedTuple of
pure functions over a state that is plain data. The loop knows nothing else of a method.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Batch = Mapping[str, jax.Array]
HostBatch = Mapping[str, np.ndarray]
Metrics = dict[str, Any]
Sums = dict[str, tuple[jax.Array, jax.Array]]


class State(Protocol):
    """What the loop reads of a state: `step`, int32 `[]`, how often `Task.step` was called."""

    @property
    def step(self) -> jax.Array:
        """Calls of `Task.step` so far."""
        ...


class Task(NamedTuple):
    """Four pure functions, the last two of which may be None, and the axis they average over.

    A batch is a dict of arrays with leading axis `[B]`, plus `row` (int32, index in the global
    batch) and `weight` (float32, 0 = padding). Keys are typed. Everything random about an example
    is drawn from `fold_in(key, row)`, so that it does not depend on the number of devices.

    Attributes:
      init: `init(key) -> state`, a frozen pytree dataclass of arrays with a field `step`. Shapes
        must be known without data.
      step: `step(state, batch, key) -> (state, metrics)`; metrics are scalars, and may hold one
        `NonfiniteLeaves`. The state may be donated.
      evaluate: `evaluate(state, batch, key) -> {name: (sum, count)}`. Sums and counts of all
        batches are added up before one division; they may be arrays.
      render: `render(state, batch, key) -> {name: float [n, h, w, c] in [0, 1]}`. It sees the
        global batch in every view, so it must not communicate.
      axis_name: the mapped axis over which `step` and `evaluate` average; None where they see the
        global batch. See `train.per_device`.
    """

    init: Callable[[jax.Array], Any]
    step: Callable[[Any, Batch, jax.Array], tuple[Any, Metrics]]
    evaluate: Callable[[Any, Batch, jax.Array], Sums] | None = None
    render: Callable[[Any, Batch, jax.Array], dict[str, jax.Array]] | None = None
    axis_name: str | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NonfiniteLeaves:
    """What of a step was not finite; the loop stops or goes on as it was told.

    Attributes:
      flags: bool `[n]`.
      recoverable: bool `[]`, whether the state is still good; if not, the loop stops in any case
        and does not save it.
      paths: the names of the `n` leaves; static.
    """

    flags: jax.Array
    recoverable: jax.Array
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})


class Batches(Protocol):
    """Training data: a pure function from the step to this process's rows of its batch."""

    batch_size: int

    def __call__(self, step: int, /) -> HostBatch:
        """Returns the rows; `batch_size` counts those of all processes."""
        ...


class EvaluationBatches(Batches, Protocol):
    """Evaluation data: `len(batches)` batches, the last one padded with rows of weight 0."""

    def __len__(self) -> int:
        """Returns the number of batches."""
        ...


def leaf_paths(tree: Any) -> tuple[str, ...]:
    """Names the leaves of `tree`, in the order of `jax.tree.leaves`.

    >>> leaf_paths({"dense": {"kernel": 1, "bias": 2}})
    ('dense/bias', 'dense/kernel')
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
