"""The plain task: one loss, one optimiser, an optional average of the parameters.

What: turns `init`, a per-example `loss` and an optax transformation into a `Task`.
Post: none; what S30, S31 and most other experiments train with.
Equations: L = sum_i w_i l_i / sum_i w_i over the global batch; g = grad L;
  theta' = theta + tx(g); ema' = ema + (1 - d_n)(theta' - ema), d_n = min(d, (1 + n)/(10 + n)).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blogjax.core.masked import masked_sum
from blogjax.core.norms import global_norm
from blogjax.tasks.descent import (
    PARAMETERS,
    RESERVED,
    Gradient,
    GradientState,
    check_metrics,
    descent_task,
    ema_decay_with_warmup,
    without_padding,
)
from blogjax.train.task import Batch, Task

__all__ = ["PARAMETERS", "GradientState", "LossOutput", "ema_decay_with_warmup", "gradient_task"]


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
    if not average_gradients and axis_name is None:
        raise ValueError(
            "average_gradients=False needs an axis_name over which tx communicates, got None"
        )

    def over_devices(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    def gradient(state: GradientState, batch: Batch, key: jax.Array) -> Gradient:
        batch, weight = without_padding(batch), batch["weight"]
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
        check_metrics(out.metrics, RESERVED)
        means = {name: masked_sum(values, weight) / total for name, values in out.metrics.items()}
        if average_gradients:
            mean_loss, means, grads = over_devices((mean_loss, means, grads))
            norm = global_norm(grads)
        else:
            mean_loss, means = over_devices((mean_loss, means))
            devices = jax.lax.axis_size(axis_name)
            grads = jax.tree.map(lambda g: g * devices, grads)
            norm = jnp.sqrt(jax.lax.pmean(jnp.square(global_norm(grads)), axis_name))
        return Gradient(mean_loss, grads, norm, means, out.model_state)

    return descent_task(
        init,
        gradient,
        tx,
        ema_decay=ema_decay,
        evaluate=evaluate,
        render=render,
        axis_name=axis_name,
        communicates=not average_gradients,
    )
