"""The gradients of K losses by the same parameters, and what a combiner makes of them.

What: `task_gradients`, all of them at once; `combined_gradient`, from losses to one gradient, at
  once or one task at a time; `shared_feature_gradient`, by way of a trunk's output.
Post: https://kexue.fm/archives/8896
Paper: Sener & Koltun 2018, arXiv:1810.04650 (shared features).
Equations: J_i = g_i = grad_theta L_i, K = J J', w = combiner(K), u = J' w.
  scan: column j of K is J g_j, a directional derivative along g_j = J' e_j; then u is one backward
  pass with cotangent w. No two gradients are ever held together.
  shared features: H = encode(theta), w = combiner of <dL_i / dH, dL_j / dH>,
  u = (dH / dtheta)' sum_i w_i dL_i / dH.
Differences from the post: it proposes one task at a time for normalised gradients only, which need
  norms alone; by directional derivatives it is exact for every combiner.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from blogjax.core.per_device import device_varying
from blogjax.core.random import Key
from blogjax.multitask.combiner import Combiner
from blogjax.multitask.gram import check_weights, combine, gram, which_shared

AxisName = str | Sequence[str] | None
# losses(params) -> [K], or ([K], aux)
Losses = Callable[[Any], Any]
MODES = ("jacrev", "scan")


class TaskGradients(NamedTuple):
    """Losses `[K]`, gradients with a leading axis of tasks, and what else `losses` returned."""

    losses: jax.Array
    gradients: Any
    aux: Any


class CombinedGradient(NamedTuple):
    """Losses `[K]`, their Gram matrix `[K, K]`, weights `[K]`, one gradient like the parameters."""

    losses: jax.Array
    gram: jax.Array
    weights: jax.Array
    gradient: Any
    aux: Any


def _check_losses(losses: Any) -> None:
    if not isinstance(losses, jax.Array):
        raise ValueError(
            f"losses must return an array [K], got {type(losses).__name__}; jnp.stack scalars, and "
            "say has_aux=True where more is returned"
        )
    if jnp.ndim(losses) != 1 or losses.shape[0] < 1:
        raise ValueError(
            f"losses must return one number for each task, [K] with K of at least 1, got "
            f"shape {jnp.shape(losses)}; jnp.stack scalars"
        )
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(f"losses must be real numbers, got {losses.dtype}")


def _mean(x: Any, axis_name: AxisName) -> Any:
    return x if axis_name is None else jax.lax.pmean(x, axis_name)


def _one_hots(values: jax.Array, axis_name: AxisName) -> jax.Array:
    return device_varying(jnp.eye(values.shape[0], dtype=values.dtype), axis_name)


def task_gradients(
    losses: Losses, params: Any, *, axis_name: AxisName = None, has_aux: bool = False
) -> TaskGradients:
    """The gradient of every task, by one forward pass and K backward passes run as one.

    Args:
      losses: `losses(params) -> [K]`, or `([K], aux)`.
      params: pytree of real arrays.
      axis_name: axes of data parallelism, over which losses and gradients are averaged.
      has_aux: whether `losses` returns something else.

    Returns:
      The losses, and a tree like `params` whose leaves are `[K, ...]`: K times the memory of one
      gradient. `aux` is None without `has_aux`.

    Raises:
      ValueError: if the losses are not `[K]` real numbers.

    >>> both = lambda w: jnp.stack([jnp.sum(w**2), jnp.sum(w)])
    >>> task_gradients(both, jnp.array([1.0, 2.0])).gradients.tolist()
    [[2.0, 4.0], [1.0, 1.0]]
    """
    params = device_varying(params, axis_name)
    if has_aux:
        values, pull, aux = jax.vjp(losses, params, has_aux=True)
    else:
        (values, pull), aux = jax.vjp(losses, params), None
    _check_losses(values)
    (gradients,) = jax.vmap(pull)(_one_hots(values, axis_name))
    values, gradients = _mean((values, gradients), axis_name)
    return TaskGradients(values, gradients, aux)


def combined_gradient(
    losses: Losses,
    params: Any,
    combiner: Combiner,
    *,
    mode: Literal["jacrev", "scan"] = "jacrev",
    shared: Any = True,
    axis_name: AxisName = None,
    key: Key | None = None,
    has_aux: bool = False,
) -> CombinedGradient:
    """From K losses to one gradient.

    Args:
      losses: `losses(params) -> [K]`, means over the examples that this device sees, or
        `([K], aux)`.
      params: pytree of real arrays.
      combiner: see `multitask.combiner`; options are bound with `functools.partial`.
      mode: `"jacrev"` holds all gradients, K times the parameters. `"scan"` holds one besides the
        result, whatever K is, at the price of a directional derivative for each task and one
        backward pass more.
      shared: leaves that the Gram matrix is made of and the weights apply to; see `multitask.gram`.
        The others get the plain sum of the gradients.
      axis_name: axes of data parallelism. Gradients and losses are averaged over them before
        anything is multiplied: the weights are those of the global batch, the same on all devices.
      key: for combiners that draw.
      has_aux: whether `losses` returns something else.

    Returns:
      Losses and Gram matrix, averaged, the weights, and the combined gradient, a tree like
      `params`; `aux` as it is, not averaged.

    Numerics: with `"jacrev"` products are summed in float32 or better. With `"scan"` they are
      formed by the directional derivative, in the arithmetic of `losses`: with bfloat16 parameters,
      or where float32 matrices are multiplied in less, the Gram matrix has that accuracy only.

    Raises:
      ValueError: if the losses are not `[K]` real numbers, the combiner's weights not `[K]`,
        `shared` no prefix of bools, or the mode is unknown.

    >>> from blogjax.multitask.min_norm import min_norm_weights
    >>> both = lambda w: jnp.stack([w[0] ** 2, 100 * w[1] ** 2])
    >>> out = combined_gradient(both, jnp.ones(2), min_norm_weights, mode="scan")
    >>> [round(float(g), 3) for g in out.gradient]
    [2.0, 0.02]
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, but must be one of {', '.join(MODES)}")
    if mode == "scan":
        return _scanned(losses, params, combiner, shared, axis_name, key, has_aux)
    values, gradients, aux = task_gradients(losses, params, axis_name=axis_name, has_aux=has_aux)
    matrix = gram(gradients, shared=shared)
    weights = combiner(matrix, key=key, losses=values)
    return CombinedGradient(
        values, matrix, weights, combine(gradients, weights, shared=shared), aux
    )


def _scanned(
    losses: Losses,
    params: Any,
    combiner: Combiner,
    shared: Any,
    axis_name: AxisName,
    key: Key | None,
    has_aux: bool,
) -> CombinedGradient:
    params = device_varying(params, axis_name)
    if has_aux:
        values, push, aux = jax.linearize(losses, params, has_aux=True)
    else:
        (values, push), aux = jax.linearize(losses, params), None
    _check_losses(values)
    transposed = jax.linear_transpose(push, params)
    counted = which_shared(shared, params)

    def pull(cotangent: jax.Array) -> Any:
        cotangent = device_varying(cotangent.astype(values.dtype), axis_name)
        return _mean(transposed(cotangent)[0], axis_name)

    def column(_: None, one_hot: jax.Array) -> tuple[None, jax.Array]:
        gradient = jax.tree.map(
            lambda g, counts: g if counts else jnp.zeros_like(g), pull(one_hot), counted
        )
        products = push(device_varying(gradient, axis_name))
        return None, products.astype(jnp.promote_types(values.dtype, jnp.float32))

    tasks = values.shape[0]
    _, matrix = jax.lax.scan(column, None, jnp.eye(tasks, dtype=values.dtype))
    values, matrix = _mean((values, matrix), axis_name)
    matrix = (matrix + matrix.T) / 2
    weights = combiner(matrix, key=key, losses=values)
    check_weights(weights, tasks)
    gradient = pull(weights)
    if not all(jax.tree.leaves(counted)):
        plain = pull(jnp.ones(tasks))
        gradient = jax.tree.map(lambda g, p, counts: g if counts else p, gradient, plain, counted)
    return CombinedGradient(values, matrix, weights, gradient, aux)


def shared_feature_gradient(
    encode: Callable[[Any], Any],
    losses: Callable[[Any, Any], jax.Array],
    trunk: Any,
    heads: Any,
    combiner: Combiner,
    *,
    axis_name: AxisName = None,
    key: Key | None = None,
) -> CombinedGradient:
    """Weights from the gradients by a trunk's output instead of by its parameters.

    One backward pass through the trunk serves all tasks. The Gram matrix is that of `dL_i / dH`,
    which bounds the true one from above only up to the trunk's Jacobian: the result need not be a
    direction of common descent, and where each example has the label of one task only, the
    gradients by features are orthogonal and say nothing about conflicts.

    Args:
      encode: `encode(trunk) -> features`, a pytree of real arrays, one row per example of the
        batch.
      losses: `losses(features, heads) -> [K]`, means over the examples.
      trunk: the shared parameters.
      heads: parameters behind the features; they get the plain sum of their gradients.
        There may be none.
      combiner: as in `combined_gradient`.
      axis_name: axes of data parallelism, each device with examples of its own and equally many:
        the Gram matrix of the global batch's features is the sum of the devices', divided by their
        number twice.
      key: for combiners that draw.

    Returns:
      As `combined_gradient`; `gradient` is the pair `(trunk, heads)`, `aux` None.

    Raises:
      ValueError: if the losses are not `[K]` real numbers.

    >>> from blogjax.multitask.gradient_normalized import gradient_normalized_weights
    >>> out = shared_feature_gradient(
    ...     lambda trunk: jnp.ones((4, 2)) * trunk,
    ...     lambda h, heads: jnp.stack([jnp.mean(h @ heads), jnp.mean(h[:, 0])]),
    ...     jnp.ones(2), jnp.array([3.0, 4.0]), gradient_normalized_weights,
    ... )  # fmt: skip
    >>> [round(float(g), 3) for g in out.gradient[0]]
    [3.2, 1.6]
    """
    features, back = jax.vjp(encode, device_varying(trunk, axis_name))
    values, pull = jax.vjp(losses, features, device_varying(heads, axis_name))
    _check_losses(values)
    by_features, by_heads = jax.vmap(pull)(_one_hots(values, axis_name))
    matrix = gram(by_features)
    if axis_name is not None:
        matrix = jax.lax.pmean(matrix, axis_name) / jax.lax.psum(1, axis_name)
    values = _mean(values, axis_name)
    weights = combiner(matrix, key=key, losses=values)
    (gradient,) = back(combine(by_features, weights))
    # Without heads there is nothing to be summed.
    summed = combine(by_heads, weights, shared=False) if jax.tree.leaves(by_heads) else by_heads
    return CombinedGradient(values, matrix, weights, _mean((gradient, summed), axis_name), None)
