"""The plain task: one loss, one optimiser, an optional average of the parameters.

What: turns `init`, a per-example `loss` and an optax transformation into a `Task`.
Post: none; what S30, S31 and most other experiments train with.
Equations: L = sum_i w_i l_i / sum_i w_i over the global batch; g = grad L;
  theta' = theta + tx(g); ema' = ema + (1 - d_n)(theta' - ema), d_n = min(d, (1 + n)/(10 + n)).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.core import unfreeze

from blogjax.core.masked import masked_sum
from blogjax.core.norms import global_norm
from blogjax.optim.skip_nonfinite import skip_nonfinite
from blogjax.train.task import Batch, Metrics, NonfiniteLeaves, Sums, Task, leaf_paths

PARAMETERS = "the parameters after the update"
_METRICS = {
    "loss",
    "grad_norm",
    "update_norm",
    "param_norm",
    "skipped",
    "nonfinite",
    "step",
    "kind",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientState:
    """State of a `gradient_task`.

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


class LossOutput(NamedTuple):
    """What a loss returns.

    Attributes:
      loss: `[B]`, one number per example.
      metrics: `{name: [B]}`, averaged like the loss and reported.
      model_state: the new model state; None leaves it as it was.
    """

    loss: jax.Array
    metrics: Mapping[str, jax.Array] = {}
    model_state: Any = None


def ema_decay_with_warmup(decay: float, step: jax.Array) -> jax.Array:
    """Returns `min(decay, (1 + n) / (10 + n))`: short memory first, `decay` in the end.

    >>> import jax.numpy as jnp
    >>> ema_decay_with_warmup(0.99, jnp.array([0, 90, 10000])).tolist()
    [0.10000000149011612, 0.9100000262260437, 0.9900000095367432]
    """
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


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


def gradient_task(
    init: Callable[[jax.Array], Mapping[str, Any]],
    loss: Callable[[Any, Any, Batch, jax.Array], LossOutput],
    tx: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
    evaluate: Callable[[Any, Any, Batch, jax.Array], Mapping[str, jax.Array]] | None = None,
    render: Callable[[Any, Any, Batch, jax.Array], dict[str, jax.Array]] | None = None,
    axis_name: str | None = None,
    average_gradients: bool = True,
) -> Task:
    """Makes a task that minimises the weighted mean of a per-example loss.

    The mean runs over the global batch: `sum_i weight_i loss_i / sum_i weight_i`. Rows of weight 0
    count nothing, whatever they hold. The optimiser is wrapped in `skip_nonfinite`: a step whose
    gradients are not finite changes neither parameters, optimiser, average nor model state, only
    `step`, and its metrics say which leaves were at fault. If the optimiser itself makes the
    parameters overflow, the metrics say that the state is lost.

    Args:
      init: `init(key) -> {"params": tree, **model_state}`, as a linen module's `init` returns.
      loss: `loss(params, model_state, batch, key) -> LossOutput`. Draw what is random about an
        example from `fold_in_rows(key, batch["row"])`.
      tx: the optimiser. It is given the loss as `value` and the gradients as `grad`, for those
        that ask; a line search that must evaluate the loss again is not supported.
      ema_decay: in [0, 1); the average's decay after warm-up (see `ema_decay_with_warmup`).
      evaluate: `evaluate(averaged params, model_state, batch, key) -> {name: [B] or [B, ...]}`,
        one row per example; averaged over the evaluation data.
      render: `render(averaged params, model_state, batch, key) -> {name: [n, h, w, c]}`.
      axis_name: the mapped axis under `pmap` or `shard_map(..., check_vma=False)`: gradients,
        metrics and batch statistics are then averaged over it (see `train.per_device`). None
        under plain `jit`, where the step sees the global batch.
      average_gradients: False gives `tx` each device's own gradients, of which the mean is the
        gradient of the loss, for a `tx` that communicates over `axis_name` by itself, such as
        `distributed_lion`. Its updates must be the same on all devices. `grad_norm` is then the
        root mean square of the devices' own norms.

    Returns:
      A `Task` whose state is a `GradientState`. Metrics: `loss`, those of `LossOutput`,
      `grad_norm`, `update_norm`, `param_norm`, `skipped` (so far) and a `NonfiniteLeaves`.

    Raises:
      ValueError: if `ema_decay` is out of range, `init` gives no `params`, the loss is not one
        number per example, or there is no axis over which not to average gradients.

    >>> import jax, jax.numpy as jnp, optax
    >>> def loss(params, model_state, batch, key):
    ...     return LossOutput(jnp.square(batch["x"] * params["w"] - 1.0))
    >>> task = gradient_task(lambda key: {"params": {"w": jnp.zeros(())}}, loss, optax.sgd(0.5))
    >>> batch = {"x": jnp.ones(4), "row": jnp.arange(4), "weight": jnp.ones(4)}
    >>> state, metrics = task.step(task.init(jax.random.key(0)), batch, jax.random.key(1))
    >>> float(metrics["loss"]), float(state.params["w"])
    (1.0, 1.0)
    """
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
    if not average_gradients and axis_name is None:
        raise ValueError(
            "average_gradients=False needs an axis_name over which tx communicates, got None"
        )
    tx = skip_nonfinite(tx, axis_name=None if average_gradients else axis_name)

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
        weight = batch["weight"]
        total = over_devices(jnp.sum(weight))
        total = jnp.where(total == 0, 1, total)

        def objective(params: Any) -> tuple[jax.Array, LossOutput]:
            out = loss(params, state.model_state, batch, key)
            if out.loss.shape != weight.shape:
                raise ValueError(
                    f"the loss must return one number per example, shape {weight.shape}, "
                    f"got {out.loss.shape}"
                )
            return masked_sum(out.loss, weight) / total, out

        (mean_loss, out), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        taken = _METRICS & set(out.metrics)
        if taken:
            raise ValueError(f"metrics of the loss may not be called {sorted(taken)}")
        means = {name: masked_sum(values, weight) / total for name, values in out.metrics.items()}
        if average_gradients:
            mean_loss, means, grads = over_devices((mean_loss, means, grads))
            grad_norm = global_norm(grads)
        else:
            mean_loss, means = over_devices((mean_loss, means))
            devices = jax.lax.axis_size(axis_name)
            grads = jax.tree.map(lambda g: g * devices, grads)
            grad_norm = jnp.sqrt(over_devices_mean(jnp.square(global_norm(grads))))
        opt_state: Any
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, value=mean_loss, grad=grads
        )
        params = optax.apply_updates(state.params, updates)
        # From the count, not from the flags: else XLA computes `any` anew in every leaf's update.
        skip = opt_state.skipped != state.opt_state.skipped

        model_state = state.model_state
        if out.model_state is not None:
            new = {**model_state, **unfreeze(out.model_state)}
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
        metrics: Metrics = {
            **means,
            "loss": mean_loss,
            "grad_norm": grad_norm,
            "update_norm": global_norm(updates),
            "param_norm": param_norm,
            "skipped": opt_state.skipped,
            "nonfinite": NonfiniteLeaves(
                flags=jnp.append(opt_state.nonfinite_leaves, lost),
                recoverable=jnp.logical_not(lost),
                paths=(*leaf_paths(grads), PARAMETERS),
            ),
        }
        new_state = GradientState(state.step + 1, params, model_state, opt_state, ema)
        return new_state, metrics

    def evaluate_sums(state: GradientState, batch: Batch, key: jax.Array) -> Sums:
        assert evaluate is not None
        values = evaluate(state.averaged_params, state.model_state, batch, key)
        weight = batch["weight"]
        return over_devices(
            {name: (masked_sum(v, weight), jnp.sum(weight)) for name, v in values.items()}
        )

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
