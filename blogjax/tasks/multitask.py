"""The multi-task task: K losses, one network, one optimiser.

What: `multitask_task` turns `init`, per-example losses of K tasks and a combiner of their
  gradients, or a weighting of their losses, into a `Task`.
Post: https://kexue.fm/archives/8870, https://kexue.fm/archives/8896, https://kexue.fm/archives/8907
Paper: Sener & Koltun 2018, arXiv:1810.04650.
Equations: L_k = sum_i v_i m_ik l_ik / sum_i v_i m_ik over the global batch, v the rows' weights,
  m the labels'; g = sum_k w_k grad L_k with w = combiner(<grad L_i, grad L_j>) or
  w = d weighting(L) / dL; theta' = theta + tx(g).
Differences from the post: tasks may lack labels; parameters may belong to one task alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.core.masked import masked_sum
from blogjax.core.norms import global_norm
from blogjax.multitask.combiner import Combiner
from blogjax.multitask.gram import which_shared
from blogjax.multitask.loss_weighting import WeightedLoss, generalized_mean
from blogjax.multitask.registry import named_combiner
from blogjax.multitask.task_gradients import MODES, combined_gradient
from blogjax.tasks.descent import (
    RESERVED,
    Evaluate,
    Gradient,
    GradientState,
    Render,
    check_metrics,
    descent_task,
    sum_and_count,
    without_padding,
)
from blogjax.train.task import Batch, Metrics, Task

_OWN = {"objective", "conflicts", "stationarity", "nonfinite_tasks"}
_OF_EACH = ("loss", "weight", "grad_norm")
# The combiner's stream beside those of the rows, which count up from 0.
_COMBINER = 2**32 - 1


class MultitaskOutput(NamedTuple):
    """What the losses of K tasks return.

    Attributes:
      losses: `[B, K]`, one number per example and task.
      weights: `[B, K]`, not negative, or bools: 0 where an example lacks a task's label, and its
        loss counts nothing, whatever it is. But put some number for a label that is NaN before the
        loss is computed: on the way back from there to the parameters, 0 times NaN is NaN. None
        where all examples have all labels.
      metrics: `{name: [B]}`, averaged over the rows, or `{name: ([B], weights [B])}`, averaged over
        those that have the label, say, and reported.
      model_state: the new model state; None leaves it as it was.
    """

    losses: jax.Array
    weights: jax.Array | None = None
    metrics: Mapping[str, Any] = {}
    model_state: Any = None


def multitask_task(
    init: Callable[[jax.Array], Mapping[str, Any]],
    losses: Callable[[Any, Any, Batch, jax.Array], MultitaskOutput],
    tx: optax.GradientTransformation,
    *,
    names: Sequence[str],
    combiner: Combiner | str | None = None,
    weighting: Callable[[jax.Array], WeightedLoss] | None = None,
    mode: Literal["jacrev", "scan"] = "jacrev",
    shared: Any = True,
    ema_decay: float | None = None,
    evaluate: Evaluate | None = None,
    render: Render | None = None,
    axis_name: str | None = None,
) -> Task:
    """Makes a task that minimises K losses together.

    The loss of a task is its mean over those examples of the global batch that have its label,
    weighted by the rows' and the labels' weights. Where no example has it, loss and gradient are 0.
    Mind what that means to the method: `min_norm` gives all weight to a gradient of zero unless
    `drop_zero=True`, and a geometric mean of losses is 0 then and has no derivatives.

    With a `combiner` the weights come from the inner products of the K gradients, with a
    `weighting` from the K losses, at the price of one backward pass. With neither the mean of the
    losses is minimised. All else is as in `gradient_task`: the average of the parameters, model
    states, and that a step whose gradient is not finite changes nothing but `step`. Where one
    task's gradient is not finite all weights fall back to equal ones, so the combined one is not
    finite either, and the step is left out; its `NonfiniteLeaves` begins with the tasks whose
    losses are not finite or, if all are, whose gradients are not. Rows of weight 0 count nothing,
    whatever they hold: `losses` is given zeros instead.

    Args:
      init: `init(key) -> {"params": tree, **model_state}`, as a linen module's `init` returns.
      losses: `losses(params, model_state, batch, key) -> MultitaskOutput`. Draw what is random
        about an example from `fold_in_rows(key, batch["row"])`.
      tx: the optimiser. It is given the mean of the K losses as `value`.
      names: one for each task, in the order of `losses`.
      combiner: `combiner(gram, key=, losses=) -> weights [K]`, see `multitask.combiner`, or its
        name in `multitask.registry`.
      weighting: `weighting(losses [K]) -> WeightedLoss`, a function of `multitask.loss_weighting`
        with its options bound. It sees the losses of the global batch. Weights with parameters of
        their own, as in `uncertainty_weighted`, are written into `losses` instead.
      mode: how a combiner gets at the gradients; `"scan"` holds one at a time. See
        `multitask.task_gradients`.
      shared: which parameters the weights apply to and the inner products are of: bools in a prefix
        of the tree. The others, which belong to one task's head each, get their task's gradient as
        it is.
      ema_decay: in [0, 1); the average's decay after warm-up.
      evaluate: `evaluate(averaged params, model_state, batch, key) -> {name: [B] or [B, ...]}`,
        averaged over the evaluation data; a pair of that and weights `[B]` where not every example
        has a label.
      render: `render(averaged params, model_state, batch, key) -> {name: [n, h, w, c]}`.
      axis_name: the mapped axis under `pmap` or `shard_map(..., check_vma=False)`; None under plain
        `jit`. Gradients are averaged over it before any product is formed, losses before they are
        weighted.

    Returns:
      A `Task` whose state is a `GradientState`. Metrics, besides those of `gradient_task` and of
      `MultitaskOutput`: `loss`, the mean of the K losses; `loss/<name>`; `weight/<name>`;
      `nonfinite_tasks`, how many losses, or else gradients, are not finite. A norm above 1e19,
      whose square float32 lacks, counts as such: weights are equal then, and the step is taken.
      With a weighting `objective`, its value. With a combiner, over the shared parameters,
      `grad_norm/<name>`; `conflicts`, the share of pairs of tasks whose gradients have a negative
      product; `stationarity`, `|sum_k w_k g_k| / sum_k |w_k| |g_k|`: 1 where the gradients point
      the same way, 0 where they cancel, which for weights that are not negative they do only at a
      Pareto stationary point (0 also if all that have a weight are zero).

    Raises:
      ValueError: if the names are none or not all different, there are both a combiner and a
        weighting, or a name or mode is unknown; in a step, if losses or weights are not `[B, K]`,
        the combiner's or weighting's are not `[K]`, or `shared` is no prefix of the parameters.

    A shared trunk, a head for each task; the second label is missing in the last row:

    >>> import jax, jax.numpy as jnp, optax
    >>> def init(key):
    ...     trunk, first, second = jax.random.split(key, 3)
    ...     return {"params": {"trunk": jax.random.normal(trunk, (3, 4)), "heads": {
    ...         "size": jax.random.normal(first, (4,)), "shape": jax.random.normal(second, (4,))}}}
    >>> def losses(params, model_state, batch, key):
    ...     hidden = jnp.tanh(batch["x"] @ params["trunk"])
    ...     outputs = jnp.stack([hidden @ params["heads"][name] for name in ("size", "shape")], 1)
    ...     known = jnp.isfinite(batch["y"])
    ...     return MultitaskOutput(jnp.square(outputs - jnp.where(known, batch["y"], 0)), known)
    >>> task = multitask_task(
    ...     init, losses, optax.sgd(0.1), names=("size", "shape"), combiner="min_norm",
    ...     shared={"trunk": True, "heads": False})
    >>> batch = {"x": jnp.eye(3), "y": jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, jnp.nan]]),
    ...          "row": jnp.arange(3), "weight": jnp.ones(3)}
    >>> state = task.init(jax.random.key(0))
    >>> state, metrics = jax.jit(task.step)(state, batch, jax.random.key(1))
    >>> round(float(metrics["weight/size"] + metrics["weight/shape"]), 5)
    1.0
    """
    names = _checked_names(names)
    if combiner is not None and weighting is not None:
        raise ValueError("either a combiner or a weighting, got both")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, but must be one of {', '.join(MODES)}")
    combine = named_combiner(combiner) if isinstance(combiner, str) else combiner
    weigh = weighting or (lambda losses: generalized_mean(losses, 1))
    reserved = RESERVED | _OWN | {f"{kind}/{name}" for kind in _OF_EACH for name in names}

    def gradient(state: GradientState, batch: Batch, key: jax.Array) -> Gradient:
        weight = batch["weight"]
        rows = without_padding(batch)

        def means(params: Any) -> tuple[jax.Array, MultitaskOutput]:
            out = losses(params, state.model_state, rows, key)
            if not isinstance(out, MultitaskOutput):
                raise ValueError(f"losses must return a MultitaskOutput, got {type(out).__name__}")
            return _global_means(out, weight, names, axis_name), out

        if combine is not None:
            found = combined_gradient(
                means,
                state.params,
                combine,
                mode=mode,
                shared=shared,
                axis_name=axis_name,
                key=jax.random.fold_in(key, _COMBINER),
                has_aux=True,
            )
            grads, out, of_each = found.gradient, found.aux, found.losses
            squares = jnp.diagonal(found.gram)
            of_tasks = {
                **_named("weight", names, found.weights),
                **_named("grad_norm", names, jnp.sqrt(squares)),
                "conflicts": _conflicts(found.gram),
                "stationarity": _stationarity(grads, found.weights, squares, shared),
            }
            # A zero times NaN is NaN: in gradients one task's passes to all, in losses it does not.
            bad = ~jnp.isfinite(of_each)
            bad = jnp.where(jnp.any(bad), bad, ~jnp.isfinite(squares))
        else:
            of_each, weighted, grads, out = _weighted(means, state.params, weigh, shared, axis_name)
            of_tasks = {**_named("weight", names, weighted.weights), "objective": weighted.loss}
            bad = ~jnp.isfinite(of_each)
        check_metrics(out.metrics, reserved)
        sums = {name: sum_and_count(v, weight) for name, v in out.metrics.items()}
        if axis_name is not None:
            sums = jax.lax.psum(sums, axis_name)
        metrics: Metrics = {
            **{
                name: total / jnp.where(count == 0, 1, count)
                for name, (total, count) in sums.items()
            },
            **_named("loss", names, of_each),
            **of_tasks,
            "nonfinite_tasks": jnp.sum(bad, dtype=jnp.int32),
        }
        suspects = {f"task {name}": bad[i] for i, name in enumerate(names)}
        mean, norm = jnp.mean(of_each), global_norm(grads)
        return Gradient(mean, grads, norm, metrics, out.model_state, suspects)

    return descent_task(
        init,
        gradient,
        tx,
        ema_decay=ema_decay,
        evaluate=evaluate,
        render=render,
        axis_name=axis_name,
    )


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"names must be a sequence of names, one for each task, got {names!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"names must be different, and at least one, got {list(names)}")
    return tuple(names)


def _named(kind: str, names: Sequence[str], values: jax.Array) -> dict[str, jax.Array]:
    return {f"{kind}/{name}": values[i] for i, name in enumerate(names)}


def _global_means(
    out: MultitaskOutput, weight: jax.Array, names: Sequence[str], axis_name: str | None
) -> jax.Array:
    """Numbers `[K]` whose mean over the devices is that over the examples of all of them."""
    wanted = (*weight.shape, len(names))
    if jnp.shape(out.losses) != wanted:
        raise ValueError(
            f"losses must be one number per example and task, {wanted} for the tasks "
            f"{', '.join(names)}, got shape {jnp.shape(out.losses)}"
        )
    if not jnp.issubdtype(out.losses.dtype, jnp.floating):
        raise ValueError(f"losses must be real numbers, got {out.losses.dtype}")
    labels = jnp.ones(wanted, weight.dtype) if out.weights is None else out.weights
    if jnp.shape(labels) != wanted:
        raise ValueError(f"weights of shape {jnp.shape(labels)} for losses of shape {wanted}")
    labels = jax.lax.stop_gradient(labels)
    # A row of weight 0 may hold anything, in its labels' weights too.
    share = jnp.where(weight[:, None] == 0, 0, weight[:, None] * labels)
    total, devices = jnp.sum(share, axis=0), 1
    if axis_name is not None:
        total, devices = jax.lax.psum(total, axis_name), jax.lax.axis_size(axis_name)
    sums = jax.vmap(masked_sum, in_axes=1)(out.losses, share)
    return devices * sums / jnp.where(total == 0, 1, total)


def _weighted(
    means: Callable[[Any], tuple[jax.Array, MultitaskOutput]],
    params: Any,
    weighting: Callable[[jax.Array], WeightedLoss],
    shared: Any,
    axis_name: str | None,
) -> tuple[jax.Array, WeightedLoss, Any, MultitaskOutput]:
    def over_devices(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    values, pull, out = jax.vjp(means, params, has_aux=True)
    of_each = over_devices(values)
    weighted = weighting(of_each)
    if not isinstance(weighted, WeightedLoss):
        raise ValueError(f"the weighting must return a WeightedLoss, got {type(weighted).__name__}")
    if weighted.weights.shape != values.shape or weighted.loss.shape:
        raise ValueError(
            f"the weighting must return a scalar and weights of shape {values.shape}, got shapes "
            f"{weighted.loss.shape} and {weighted.weights.shape}"
        )
    (grads,) = pull(weighted.weights.astype(values.dtype))
    counted = which_shared(shared, params)
    if not all(jax.tree.leaves(counted)):
        # Of this pass the compiler keeps the heads' part only.
        (plain,) = pull(jnp.ones_like(values))
        grads = jax.tree.map(lambda g, p, counts: g if counts else p, grads, plain, counted)
    return of_each, weighted, over_devices(grads), out


def _conflicts(gram: jax.Array) -> jax.Array:
    products = gram[np.triu_indices(gram.shape[0], 1)]
    known = jnp.sum(~jnp.isnan(products))
    return jnp.sum(products < 0) / jnp.maximum(known, 1)


def _stationarity(gradient: Any, weights: jax.Array, squares: jax.Array, shared: Any) -> jax.Array:
    # From the gradient itself: w' K w would cancel to rounding errors of the products.
    counted = jax.tree.leaves(which_shared(shared, gradient))
    leaves = zip(jax.tree.leaves(gradient), counted, strict=True)
    length = global_norm([leaf for leaf, counts in leaves if counts])
    longest = jnp.sum(jnp.abs(weights) * jnp.sqrt(squares))
    return jnp.where(longest == 0, 0, length / jnp.where(longest == 0, 1, longest))
