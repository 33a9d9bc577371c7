"""What tasks with one optimiser share: everything but how the gradient comes about.

What: `descent_task` makes a `Task` of a function that finds a gradient; `gradient_task` and
  `multitask_task` are made with it.
Post: none; a part of the base on which every post's training stands.
Equations: theta' = theta + tx(g); ema' = ema + (1 - d_n)(theta' - ema),
  d_n = min(d, (1 + n)/(10 + n)).
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.core import unfreeze

from blogjax.core.broadcasting import per_example
from blogjax.core.masked import masked_sum
from blogjax.core.norms import global_norm
from blogjax.optim.skip_nonfinite import skip_nonfinite
from blogjax.train.task import Batch, Metrics, NonfiniteLeaves, Sums, Task, leaf_paths

PARAMETERS = "the parameters after the update"
# What every such task reports, and what the records of a run call their own fields.
RESERVED = frozenset(
    {
        "loss",
        "grad_norm",
        "update_norm",
        "param_norm",
        "skipped",
        "nonfinite",
        "step",
        "kind",
    }
)

Evaluate = Callable[[Any, Any, Batch, jax.Array], Mapping[str, Any]]
Render = Callable[[Any, Any, Batch, jax.Array], dict[str, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientState:
    """State of a task with one optimiser.

    Attributes:
      step: int32 `[]`, calls of `step`, skipped ones included.
      params: what the loss is differentiated by.
      model_state: other variables that the loss may change, such as batch statistics; a dict.
      opt_state: a `SkipNonfiniteState` around the optimiser's state.
      ema: average of the parameters, float32 or better; None without `ema_decay`.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any

    @property
    def averaged_params(self) -> Any:
        """The average where there is one, else the parameters: what to evaluate and to sample."""
        return self.params if self.ema is None else self.ema


class Gradient(NamedTuple):
    """What a step follows.

    Attributes:
      loss: `[]`, over the global batch.
      gradient: tree like the parameters.
      norm: `[]`, of the gradient.
      metrics: what else to report, scalars over the global batch.
      model_state: as this device's rows left it; None leaves it as it was.
      suspects: `{name: bool []}`, what to name besides the leaves if the gradient is not finite.
    """

    loss: jax.Array
    gradient: Any
    norm: jax.Array
    metrics: Metrics
    model_state: Any = None
    suspects: Mapping[str, jax.Array] = {}


def ema_decay_with_warmup(decay: float, step: jax.Array) -> jax.Array:
    """Returns `min(decay, (1 + n) / (10 + n))`: short memory first, `decay` in the end.

    >>> import jax.numpy as jnp
    >>> ema_decay_with_warmup(0.99, jnp.array([0, 90, 10000])).tolist()
    [0.10000000149011612, 0.9100000262260437, 0.9900000095367432]
    """
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def check_metrics(names: Collection[str], reserved: Collection[str]) -> None:
    """Raises ValueError if a metric of the loss has the name of one of the task's own."""
    taken = set(reserved) & set(names)
    if taken:
        raise ValueError(f"metrics of the loss may not be called {sorted(taken)}")


def without_padding(batch: Batch) -> Batch:
    """The batch with zeros in the floating arrays' rows of weight 0.

    Losses there are left out, but NaN in their inputs would reach the gradient as 0 times NaN.

    >>> batch = {"x": jnp.array([1.0, jnp.nan]), "weight": jnp.array([1.0, 0.0])}
    >>> without_padding(batch)["x"].tolist()
    [1.0, 0.0]
    """
    absent = batch["weight"] == 0

    def one(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return jnp.where(per_example(absent, x), 0, x)

    return {name: one(x) for name, x in batch.items()}


def sum_and_count(values: Any, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum over the rows and the weight that it is to be divided by.

    Args:
      values: `[B]` or `[B, ...]`, or a pair of that and weights `[B]` of its own, not negative, for
        what not every row has.
      weight: `[B]`, the rows'. Where it is 0, the own weights may be anything.

    >>> import jax.numpy as jnp
    >>> values, own = jnp.array([1.0, 3.0, 5.0]), jnp.array([1.0, 1.0, 0.0])
    >>> [float(x) for x in sum_and_count((values, own), jnp.ones(3))]
    [4.0, 2.0]
    """
    if isinstance(values, tuple):
        values, own = values
        if own.shape != weight.shape:
            raise ValueError(f"weights of shape {own.shape} for rows of shape {weight.shape}")
        weight = jnp.where(weight == 0, 0, weight * own)
    return masked_sum(values, weight), jnp.sum(weight)


def _check_alike(old: Any, new: Any) -> None:
    """Raises ValueError, naming the leaf, if a model state came back with another layout."""
    before, after = (
        {
            path: (x.shape, str(x.dtype))
            for path, x in zip(leaf_paths(t), jax.tree.leaves(t), strict=True)
        }
        for t in (old, new)
    )
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            raise ValueError(
                f"model state {path}: {before.get(path, 'absent')} before the loss, "
                f"{after.get(path, 'absent')} after it"
            )


def _flags(suspects: Mapping[str, jax.Array], leaves: jax.Array, lost: jax.Array) -> jax.Array:
    flags = jnp.append(leaves, lost)
    return jnp.concatenate([jnp.stack(list(suspects.values())), flags]) if suspects else flags


def descent_task(
    init: Callable[[jax.Array], Mapping[str, Any]],
    gradient: Callable[[GradientState, Batch, jax.Array], Gradient],
    tx: optax.GradientTransformation,
    *,
    ema_decay: float | None,
    evaluate: Evaluate | None,
    render: Render | None,
    axis_name: str | None,
    communicates: bool = False,
) -> Task:
    """Makes a task of a function that finds the gradient of a step.

    Args:
      init: `init(key) -> {"params": tree, **model_state}`.
      gradient: `gradient(state, batch, key) -> Gradient`, averaged over `axis_name`, the model
        state excepted.
      tx: the optimiser; it is wrapped in `skip_nonfinite`.
      ema_decay, evaluate, render, axis_name: see `gradient_task`. What `evaluate` returns may be
        pairs; see `sum_and_count`.
      communicates: whether the gradients are each device's own and `tx` averages over `axis_name`
        by itself.

    Returns:
      A `Task` whose state is a `GradientState`. It reports what `gradient` reports, and `loss`,
      `grad_norm`, `update_norm`, `param_norm`, `skipped` and a `NonfiniteLeaves`, in which suspects
      come first; none is named in a step that was taken.

    Raises:
      ValueError: if `ema_decay` is out of range, `init` gives no `params`, or a model state comes
        back in another layout.

    >>> import jax, jax.numpy as jnp
    >>> def downhill(state, batch, key):
    ...     return Gradient(state.params, jnp.ones(()), jnp.ones(()), {})
    >>> task = descent_task(lambda key: {"params": jnp.zeros(())}, downhill, optax.sgd(0.5),
    ...                     ema_decay=None, evaluate=None, render=None, axis_name=None)
    >>> state, metrics = task.step(task.init(jax.random.key(0)), {}, jax.random.key(1))
    >>> float(state.params)
    -0.5
    """
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
    tx = skip_nonfinite(tx, axis_name=axis_name if communicates else None)

    def over_devices(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    def over_devices_mean(x: jax.Array) -> jax.Array:
        # Counters are the same everywhere, and a mean would make them floats.
        return jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    def init_state(key: jax.Array) -> GradientState:
        variables = unfreeze(dict(init(key)))
        if "params" not in variables:
            raise ValueError(f"init must return a dict with 'params', got {sorted(variables)}")
        params = variables.pop("params")
        ema = None
        if ema_decay is not None:
            ema = jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params)
        return GradientState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=variables,
            opt_state=tx.init(params),
            ema=ema,
        )

    def step(state: GradientState, batch: Batch, key: jax.Array) -> tuple[GradientState, Metrics]:
        found = gradient(state, batch, key)
        grads = found.gradient
        opt_state: Any
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, value=found.loss, grad=grads
        )
        params = optax.apply_updates(state.params, updates)
        # From the count, not from the flags: else XLA computes `any` anew in every leaf's update.
        skip = opt_state.skipped != state.opt_state.skipped

        model_state = state.model_state
        if found.model_state is not None:
            new = {**model_state, **unfreeze(found.model_state)}
            _check_alike(model_state, new)
            if axis_name is not None:
                new = jax.tree.map(over_devices_mean, new)
            model_state = jax.tree.map(lambda a, b: jnp.where(skip, a, b), model_state, new)
        ema = state.ema
        if ema_decay is not None:
            rate = 1 - ema_decay_with_warmup(ema_decay, state.step)
            # -0.0 leaves every number as it was; see `skip_nonfinite`.
            ema = jax.tree.map(
                lambda e, p: e + jnp.where(skip, -0.0, rate.astype(e.dtype) * (p - e)), ema, params
            )
        param_norm = global_norm(params)
        # An optimiser can overflow on finite gradients; then the state is lost, and must be seen.
        lost = jnp.logical_not(jnp.isfinite(param_norm))
        suspects = {name: skip & flag for name, flag in found.suspects.items()}
        metrics: Metrics = {
            **found.metrics,
            "loss": found.loss,
            "grad_norm": found.norm,
            "update_norm": global_norm(updates),
            "param_norm": param_norm,
            "skipped": opt_state.skipped,
            "nonfinite": NonfiniteLeaves(
                flags=_flags(suspects, opt_state.nonfinite_leaves, lost),
                recoverable=jnp.logical_not(lost),
                paths=(*suspects, *leaf_paths(grads), PARAMETERS),
            ),
        }
        new_state = GradientState(state.step + 1, params, model_state, opt_state, ema)
        return new_state, metrics

    def evaluate_sums(state: GradientState, batch: Batch, key: jax.Array) -> Sums:
        assert evaluate is not None
        values = evaluate(state.averaged_params, state.model_state, batch, key)
        return over_devices({n: sum_and_count(v, batch["weight"]) for n, v in values.items()})

    def render_images(state: GradientState, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        assert render is not None
        return render(state.averaged_params, state.model_state, batch, key)

    return Task(
        init=init_state,
        step=step,
        evaluate=None if evaluate is None else evaluate_sums,
        render=None if render is None else render_images,
        axis_name=axis_name,
    )
