"""Flat minima: gradients taken next to the parameters, penalised gradients, and flooding.

What: `sam_gradient`, `gradient_norm_penalty`, `implicit_gradient_regularization`: in place of
  `jax.value_and_grad(loss)`, for any optax optimiser; and `flooding`, in place of the loss.
Post: https://kexue.fm/archives/7643 (flooding), https://kexue.fm/archives/7787 (learning rates)
Papers: Foret et al. (arXiv 2010.01412), Zhao et al. (2202.03599), Barrett and Dherin (2009.11162),
  Ishida et al. (2002.08709), Wang et al. (doi 10.21437/Interspeech.2017-1323)
Equations: g = grad L(theta), H its derivative;
  SAM: grad L(theta + rho g/|g|), the gradient of max_{|e| <= rho} L(theta + e) to first order;
  gradient norm: (1 - a) g + a grad L(theta + rho g/|g|), to first order that of L + a rho |g|;
  flooding: |L - b| + b. One step down and one up, of eps, is a step eps^2/2 down |g|^2; one down of
  e1 and one up of e2 is a step e1 - e2 down L + e1 e2/(2 (e1 - e2)) |g|^2 ("backstitch");
  gradient descent of rate gamma follows the flow of L + gamma/4 |g|^2 up to O(gamma^2).
Differences from the post: it has no SAM, which is its idea with a step of fixed length, up instead
  of down and then up. Differences from `optax.contrib.sam`: finite where g is 0, where that is NaN
  for ever after; no state, two gradients of one batch in one call; over devices the perturbation is
  that of the mean gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from blogjax.core.norms import at_least_float32
from blogjax.core.per_device import device_varying
from blogjax.gradients.perturbation import arrays, check_size, steepest_ascent

Axis = str | tuple[str, ...] | None


def _mean(tree: Any, axis_name: Axis) -> Any:
    """Mean of the floats over the devices; what is not floating is the same on all."""
    if axis_name is None:
        return tree
    return jax.tree.map(
        lambda x: jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree
    )


def _bound(loss: Callable[..., Any], batch: tuple[Any, ...], has_aux: bool) -> Callable[..., Any]:
    """`loss` as a function of the parameters to `(value, aux)`, whose value is one number."""

    def function(params: Any) -> tuple[jax.Array, Any]:
        out = loss(params, *batch)
        if isinstance(out, tuple) is not has_aux:
            expected = "a pair (value, aux)" if has_aux else "one array"
            raise TypeError(
                f"has_aux={has_aux}, so the loss must return {expected}, not {type(out)}"
            )
        value, aux = out if has_aux else (out, None)
        value = jnp.asarray(value)
        if value.shape != ():
            raise ValueError(
                f"the loss must return one number for the batch, shape (), got {value.shape}"
            )
        return value, aux

    return function


def _result(value: jax.Array, aux: Any, has_aux: bool, grads: Any) -> Any:
    return ((value, aux) if has_aux else value), grads


def _selected(mask: Any, params: Any) -> Any:
    """A bool for every leaf, from a mask as `optax.masked` takes them."""
    if callable(mask):
        mask = mask(params)
    for entry in jax.tree.leaves(mask):
        if not jnp.issubdtype(getattr(entry, "dtype", type(entry)), jnp.bool_):
            raise TypeError(f"a mask is of True and False, but this one has {entry!r}")
    return jax.tree.map(lambda m, part: jax.tree.map(lambda _: m, part), mask, params)


def _beside(
    function: Callable[..., Any],
    params: Any,
    rho: ArrayLike,
    axis_name: Axis,
    sync: bool,
    mask: Any,
) -> tuple[jax.Array, Any, Any, Any]:
    """Value, aux and gradient at the parameters, and the gradient at a distance of rho."""
    check_size("rho", rho)
    params = arrays(params)
    gradient = jax.value_and_grad(function, has_aux=True)
    (value, aux), first = gradient(device_varying(params, axis_name))
    value, aux, mean = _mean((value, aux, first), axis_name)
    leaves, structure = jax.tree.flatten(params)
    chosen = jax.tree.leaves(_selected(mask, params))
    if not any(chosen):
        raise ValueError("the mask selects no leaf of the parameters, so nothing is perturbed")
    slopes = jax.tree.leaves(mean if sync else first)
    to_move = [g for g, m in zip(slopes, chosen, strict=True) if m]
    steps = iter(steepest_ascent(to_move, per_example=False))

    def moved(p: jax.Array) -> jax.Array:
        step = next(steps)
        return (p.astype(step.dtype) + jnp.asarray(rho, step.dtype) * step).astype(p.dtype)

    there = [moved(p) if m else p for p, m in zip(leaves, chosen, strict=True)]
    _, second = gradient(device_varying(jax.tree.unflatten(structure, there), axis_name))
    return value, aux, mean, _mean(second, axis_name)


def sam_gradient(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    rho: ArrayLike,
    has_aux: bool = False,
    axis_name: Axis = None,
    sync: bool = True,
    mask: Any = True,
) -> Any:
    """Sharpness-aware minimisation: the loss, and its gradient a distance of rho uphill.

    `grad L(theta + rho g / |g|)`, g = grad L(theta), |g| the norm of all leaves together. Stands
    where `jax.value_and_grad(loss)(params, *batch)` stood, and costs two of it.

    Numerics: g / |g| in float32 or better, of any size of g; where g = 0 the result is g. theta is
    moved in its own dtype: of bfloat16 parameters most may not move, for an entry's share of rho
    is small. NaN in one gradient is NaN in the other.

    Args:
      loss: `loss(params, *batch) -> []`, the mean over the batch.
      params: pytree of real floats.
      batch: what else the loss takes.
      rho: distance, at least 0; .05 in the authors' example. A number or a traced scalar.
      has_aux: the loss returns `(value, aux)`, as for `jax.value_and_grad`. What is returned is the
        aux at theta: batch statistics should not be those of the moved parameters.
      axis_name: mapped axes under `pmap` or `shard_map` (with `check_vma` or without) over which
        the batch is split: value, floating aux and gradient are then means over them.
      sync: True moves all devices by the mean gradient: the numbers are those of one device. False
        moves each by its own rows' gradient (m-SAM, the authors' default), at one mean less.
      mask: which leaves are moved, as in `optax.masked`: a pytree of bools that is a prefix of
        params, or a function of params to one. With the embedding matrix alone this is FGM of post
        7234. The gradient is that of all parameters.

    Returns:
      `(value, gradient)`, with `has_aux` `((value, aux), gradient)`; the value is L(theta).

    Raises:
      ValueError: if the loss is no scalar, rho is below 0, or the mask selects nothing.
      TypeError: at a parameter that is not real floating, if the mask is not of bools, or the loss
        returns a pair without `has_aux` or none with it.

    >>> import jax.numpy as jnp, optax
    >>> def loss(params, scale):
    ...     return scale * jnp.sum(params["w"] ** 2) / 2
    >>> params = {"w": jnp.array([0.0, 2.0])}
    >>> value, grads = sam_gradient(loss, params, 1.0, rho=0.5)
    >>> float(value), grads["w"].tolist()
    (2.0, [0.0, 2.5])
    >>> tx = optax.sgd(0.1)
    >>> updates, state = tx.update(grads, tx.init(params), params)
    """
    function = _bound(loss, batch, has_aux)
    value, aux, _, there = _beside(function, params, rho, axis_name, sync, mask)
    return _result(value, aux, has_aux, there)


def gradient_norm_penalty(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    rho: ArrayLike,
    alpha: ArrayLike,
    has_aux: bool = False,
    axis_name: Axis = None,
    sync: bool = True,
    mask: Any = True,
) -> Any:
    """The loss, and nearly the gradient of `L + alpha rho |grad L|`, without second derivatives.

    `(1 - alpha) g + alpha grad L(theta + rho g / |g|)`, g = grad L(theta), which is exact on
    quadratics and up to O(rho^2) else. alpha = 0 is the plain gradient, 1 is `sam_gradient`.

    Numerics, args, returns and errors as in `sam_gradient`, and ValueError if alpha is no scalar,
    but for

    Args:
      rho: distance of the second gradient; the smaller, the nearer to the derivative and the more
        rounding.
      alpha: the penalty's weight divided by rho; any number, usually in [0, 1]; may be traced.

    >>> import jax.numpy as jnp
    >>> value, grads = gradient_norm_penalty(lambda w: 2 * w @ w, jnp.array([0.0, 2.0]),
    ...                                      rho=0.5, alpha=0.25)
    >>> grads.tolist()
    [0.0, 8.5]
    """
    if jnp.ndim(alpha) != 0:
        raise ValueError(f"alpha has shape {jnp.shape(alpha)}, but must be one number")
    function = _bound(loss, batch, has_aux)
    value, aux, here, there = _beside(function, params, rho, axis_name, sync, mask)

    def mix(a: jax.Array, b: jax.Array) -> jax.Array:
        dtype = a.dtype
        a, b = at_least_float32((a, b))
        share = jnp.asarray(alpha, a.dtype)
        return ((1 - share) * a + share * b).astype(dtype)

    return _result(value, aux, has_aux, jax.tree.map(mix, here, there))


def implicit_gradient_regularization(
    loss: Callable[..., Any],
    params: Any,
    *batch: Any,
    learning_rate: ArrayLike,
    has_aux: bool = False,
    axis_name: Axis = None,
) -> Any:
    """The loss that gradient descent of a finite rate really follows, and its gradient.

    `L + gamma/4 |g|^2` and `g + gamma/2 H g`, g = grad L, H its derivative: the flow down this loss
    meets the iterates of gradient descent of rate gamma up to O(gamma^2), that down L only up to
    O(gamma). With a small rate and a gamma chosen freely it is the explicit penalty.

    Numerics: H g is exact, one `jvp` of the gradient: 2.6 times the operations of a plain gradient
    (an MLP). |g|^2 is summed in float32 or better. The loss must have a forward derivative of its
    gradient.

    Args:
      loss, params, batch, has_aux: as in `sam_gradient`.
      learning_rate: gamma, at least 0; a number or a traced scalar.
      axis_name: mapped axes over which the batch is split; the penalty is that of the mean
        gradient, so the numbers are those of one device.

    Returns:
      `(value, gradient)`, with `has_aux` `((value, aux), gradient)`; the value has the penalty in.

    Raises:
      ValueError: if the loss is no scalar, or the rate is below 0.
      TypeError: as `sam_gradient`.

    >>> import jax.numpy as jnp
    >>> value, grads = implicit_gradient_regularization(lambda w: w @ w, jnp.array([1.0, 2.0]),
    ...                                                 learning_rate=0.5)
    >>> float(value), grads.tolist()
    (7.5, [3.0, 6.0])
    """
    check_size("learning_rate", learning_rate)
    function = _bound(loss, batch, has_aux)
    gradient = jax.value_and_grad(function, has_aux=True)
    params = device_varying(params, axis_name)

    def slope(params: Any) -> tuple[Any, Any]:
        out, grads = gradient(params)
        return grads, out

    own, along, (value, aux) = jax.linearize(slope, params, has_aux=True)
    value, aux, mean = _mean((value, aux, own), axis_name)
    curved = _mean(along(device_varying(mean, axis_name)), axis_name)
    wide, curved = at_least_float32((mean, curved))
    square = sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(wide))
    rate = jnp.asarray(learning_rate, jnp.result_type(square, jnp.float32))
    grads = jax.tree.map(
        lambda like, g, c: (g + rate.astype(g.dtype) / 2 * c).astype(like.dtype),
        mean,
        wide,
        curved,
    )
    value = at_least_float32(value) + rate / 4 * square
    return _result(value, aux, has_aux, grads)


def flooding(loss_value: jax.Array, level: ArrayLike) -> jax.Array:
    """`|L - b| + b`: below the level b the gradient is turned round, and the loss rises again.

    That is `L` from b on, to the bit, and `2 b - L` below.

    For the mean over a batch, not for single examples: their losses lie on both sides of any
    level, and the sum would be another loss. Where a step sees only a part of the batch, average
    first: `flooding(jax.lax.pmean(loss, axis_name), level)`.

    Numerics: in float32 or better; the result has the dtype of L. At L = b the gradient is L's own.

    Args:
      loss_value: `[]`.
      level: b, a number or a traced scalar.

    Returns:
      `[]`, at least b.

    Raises:
      ValueError: if the loss or the level is not one number.
      TypeError: if the loss is not real floating.

    >>> import jax, jax.numpy as jnp
    >>> float(flooding(jnp.array(0.25), 0.5)), float(flooding(jnp.array(2.0), 0.5))
    (0.75, 2.0)
    >>> jax.grad(lambda w: flooding(w**2, 0.5))(jnp.array(0.5)).item()
    -1.0
    """
    if jnp.shape(loss_value) != () or jnp.shape(level) != ():
        raise ValueError(
            f"flooding is for one number, the mean over a batch: the loss has shape "
            f"{jnp.shape(loss_value)}, the level {jnp.shape(level)}, but both must be ()"
        )
    loss_value = jnp.asarray(loss_value)
    if not jnp.issubdtype(loss_value.dtype, jnp.floating):
        raise TypeError(f"the loss is {loss_value.dtype}, but must be real and floating")
    value = at_least_float32(loss_value)
    floor = jnp.asarray(level, value.dtype)
    flooded = jnp.where(value >= floor, value, 2 * floor - value)
    return flooded.astype(loss_value.dtype)
