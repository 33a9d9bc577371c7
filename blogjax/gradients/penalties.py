"""Penalties on gradients, by the input and by the parameters.

What: per-example input penalties for critics (WGAN-GP, R1, R2, at the points of WGAN-GP and DRAGAN)
  and for losses; the squared norm of a batch loss's parameter gradient, exact or by a difference.
Post: https://kexue.fm/archives/8757, https://kexue.fm/archives/8796 (which penalty bounds which)
Papers: Gulrajani et al. 2017 (arXiv 1704.00028) for WGAN-GP; Mescheder et al. 2018 (arXiv
  1801.04406) for R1 and R2; Kodali et al. 2017 (arXiv 1705.07215) for DRAGAN; Dherin et al. 2021
  (arXiv 2111.15090) for the parameter penalty beside the input penalty
Equations: WGAN-GP (|grad_x D| - 1)^2, one-sided max(|grad_x D| - 1, 0)^2; R1, R2 |grad_x D|^2 / 2;
  for a loss |grad_x l|^2; parameters |grad_theta L|^2, with gradient
  2 H g ~ 2 |g| (grad L(theta + r g / |g|) - grad L(theta)) / r.
Differences from the post: a critic is differentiated example by example, not through the sum over
  the batch, so that layers which couple examples cannot mix their gradients. A norm is flat at
  zero, where the formula's slope is infinite.

Nothing is multiplied by the weight of the penalty, and nothing is averaged: results are `[B]`, so
that padding can be left out with `core.masked.masked_mean`. All can be differentiated again by the
parameters; that is what they are for.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.extend
import jax.numpy as jnp
from jax.typing import ArrayLike

from blogjax.core import random
from blogjax.core.broadcasting import per_example, sum_except
from blogjax.core.labels import leaf_name
from blogjax.core.norms import at_least_float32, global_norm, per_example_norm
from blogjax.gradients.input_gradient import (
    Critic,
    check_rows,
    value_and_input_gradient,
)
from blogjax.gradients.perturbation import check_size

Noise = Literal["uniform", "normal"]
Reduction = Literal["none", "mean", "sum"]
Method = Literal["exact", "difference"]


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        valid = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}={value!r} is unknown; valid: {valid}")


def gradient_penalty(
    critic: Critic,
    params: Any,
    x: jax.Array,
    *args: Any,
    target: ArrayLike = 1.0,
    one_sided: bool = False,
) -> jax.Array:
    """WGAN-GP's penalty `(|grad_x D(x)| - target)^2` per example.

    One-sided, `max(|grad_x D(x)| - target, 0)^2`: slopes below the target are free. The paper's
    weight is 10, its points those of `interpolate`; with those of `dragan_points` this is DRAGAN's
    penalty.

    Numerics: norms over all non-batch axes in float32 or better. Where the gradient is zero (a dead
    critic) the two-sided value is `target^2` and its derivatives are 0: the penalty cannot revive
    such a critic.

    Args:
      critic: `critic(params, x, *args) -> [B]`.
      params: its parameters.
      x: `[B, ...]`, where to measure the slope.
      args: arrays with leading axis B.
      target: the wanted slope, a scalar.
      one_sided: whether only slopes above the target cost.

    Returns:
      `[B]`, float32 or better, without a weight.

    Raises:
      ValueError: as `value_and_input_gradient`, and if target is not a scalar.

    >>> critic = lambda params, x: x @ params
    >>> gradient_penalty(critic, jnp.array([3.0, 4.0]), jnp.ones((2, 2))).tolist()
    [16.0, 16.0]
    """
    if jnp.shape(target) != ():
        raise ValueError(f"target has shape {jnp.shape(target)}, but must be a scalar: ()")
    _, gradient = value_and_input_gradient(critic, params, x, *args)
    excess = per_example_norm(gradient) - target
    return jnp.square(jax.nn.relu(excess) if one_sided else excess)


def r1_penalty(critic: Critic, params: Any, real: jax.Array, *args: Any) -> jax.Array:
    """R1, `|grad_x D(x)|^2 / 2` per example, at real data.

    The paper's regulariser is `gamma / 2 E |grad D|^2`: the half is here, gamma is the caller's
    (10 in the paper's experiments). D is the logit, not the probability. Smooth at zero.

    Args and errors: as `gradient_penalty`.

    Returns:
      `[B]`, float32 or better.

    >>> r1_penalty(lambda params, x: x @ params, jnp.array([3.0, 4.0]), jnp.ones((2, 2))).tolist()
    [12.5, 12.5]
    """
    _, gradient = value_and_input_gradient(critic, params, real, *args)
    return sum_except(jnp.square(at_least_float32(gradient))) / 2


def r2_penalty(critic: Critic, params: Any, fake: jax.Array, *args: Any) -> jax.Array:
    """R2, `|grad_x D(x)|^2 / 2` per example, at samples of the generator; the rest as `r1_penalty`.

    The samples pass no gradient: like R1 it is a term of the critic's loss alone.

    >>> r2_penalty(lambda params, x: x @ params, jnp.array([3.0, 4.0]), jnp.ones((2, 2))).tolist()
    [12.5, 12.5]
    """
    return r1_penalty(critic, params, jax.lax.stop_gradient(fake), *args)


def interpolate(keys: random.Key, real: jax.Array, fake: jax.Array) -> jax.Array:
    """WGAN-GP's points `u real + (1 - u) fake`, with one `u ~ U[0, 1)` per example.

    Args:
      keys: typed keys `[B]`, from `core.random.fold_in_rows`, or a scalar one.
      real: `[B, ...]` floating.
      fake: like `real`; which real stands beside which fake is the batch's order.

    Returns:
      Like `real`, of the wider dtype of both; mixed in float32 or better.

    Raises:
      ValueError: if the shapes differ.
      TypeError: if one of them is not real and floating, or the keys are not typed.

    >>> points = interpolate(jax.random.key(0), jnp.zeros((2, 3)), jnp.ones((2, 3)))
    >>> bool(jnp.all(points == points[:, :1]))  # one u for all entries of an example
    True
    """
    if real.shape != fake.shape:
        raise ValueError(f"real has shape {real.shape}, but fake has shape {fake.shape}")
    check_rows(real)
    check_rows(fake)
    dtype = jnp.promote_types(real.dtype, fake.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    u = per_example(random.uniform(keys, real.shape[:1], wide), real)
    return (u * real.astype(wide) + (1 - u) * fake.astype(wide)).astype(dtype)


def dragan_points(
    keys: random.Key,
    real: jax.Array,
    *,
    noise: Noise = "uniform",
    scale: ArrayLike = 0.5,
    std: ArrayLike | None = None,
) -> jax.Array:
    """DRAGAN's points: real data, perturbed.

    - "uniform", the authors' code: `x + a scale std u`, with `u ~ U[0, 1)` per entry and
      `a ~ U[0, 1)` per example. Entries only ever grow.
    - "normal", the paper's text: `x + scale std n`, `n ~ N(0, I)`. Its `N(0, c I)` is
      `scale=sqrt(c), std=1`.

    Args:
      keys: typed keys `[B]`, from `core.random.fold_in_rows`, or a scalar one.
      real: `[B, ...]` floating.
      noise: which.
      scale: a scalar.
      std: the data's standard deviation over all entries, a scalar. None takes the batch's, as the
        authors do; then examples depend on each other, and under pmap on the device's share: there
        give the data set's.

    Returns:
      Like `real`; computed in float32 or better.

    Raises:
      ValueError: if `noise` is unknown, or scale or std is no scalar.
      TypeError: if `real` is not real and floating, or the keys are not typed.

    >>> real = jnp.zeros((2, 3))
    >>> points = dragan_points(jax.random.key(0), real, std=1.0)
    >>> bool(jnp.all((points >= 0) & (points < 0.5)))
    True
    """
    _check_choice("noise", noise, get_args(Noise))
    for name, value in (("scale", scale), ("std", 0.0 if std is None else std)):
        if jnp.shape(value) != ():
            raise ValueError(f"{name} has shape {jnp.shape(value)}, but must be a scalar: ()")
    check_rows(real)
    wide = at_least_float32(real)
    spread = scale * (jnp.std(wide) if std is None else jnp.asarray(std, wide.dtype))
    if noise == "normal":
        return (wide + spread * random.normal(keys, wide.shape, wide.dtype)).astype(real.dtype)
    for_shift, for_share = random.split_keys(keys)
    shift = random.uniform(for_shift, wide.shape, wide.dtype)
    share = per_example(random.uniform(for_share, wide.shape[:1], wide.dtype), wide)
    return (wide + share * spread * shift).astype(real.dtype)


def input_gradient_penalty(
    loss: Critic,
    params: Any,
    x: jax.Array,
    *args: Any,
    ord: float = 2,
    power: int = 2,
    reduction: Reduction = "none",
) -> jax.Array:
    """Norm of a loss's gradient by the input, `|grad_x l|_ord^power`, per example.

    To first order, what an attack of length eps adds to the loss is `eps |grad_x l|_ord`, where
    `ord=2` belongs to the Euclidean ball, `ord=1` to the cube `max |d_i| <= eps` and `ord=inf` to
    `sum |d_i| <= eps`. With `ord=2, power=2` it is the square that post 8796 bounds by the
    parameter penalty, and smooth everywhere.

    Numerics: float32 or better; with `ord=2` derivatives at zero are 0, with `ord=1` the sign of 0
    is 0.

    Args:
      loss: `loss(params, x, *args) -> [B]`, one per example.
      params: its parameters.
      x: `[B, ...]` floating.
      args: arrays with leading axis B, as labels are.
      ord: 1, 2 or inf, over all non-batch axes.
      power: 1 or 2.
      reduction: "none" gives `[B]`, "mean" and "sum" a scalar over all rows, padding included.

    Returns:
      `[B]` or a scalar, float32 or better.

    Raises:
      ValueError: if ord, power or reduction is unknown; else as `value_and_input_gradient`.
      TypeError: as there.

    >>> squared = lambda params, x, y: (x @ params - y) ** 2
    >>> x, y = jnp.array([[1.0, 1.0]]), jnp.array([2.0])
    >>> input_gradient_penalty(squared, jnp.array([1.0, 2.0]), x, y).tolist()  # |2 (3 - 2) w|^2
    [20.0]
    """
    _check_choice("ord", ord, (1, 2, float("inf")))
    _check_choice("power", power, (1, 2))
    _check_choice("reduction", reduction, get_args(Reduction))
    _, gradient = value_and_input_gradient(loss, params, x, *args)
    gradient = at_least_float32(gradient)
    # Not jnp.abs, whose slope at 0 is 1.
    size = gradient * jnp.sign(gradient)
    if ord == 2 and power == 2:
        norm = sum_except(jnp.square(gradient))  # without a root: exactly smooth at zero
    elif ord == 2:
        norm = per_example_norm(gradient)
    elif ord == 1:
        norm = sum_except(size) ** power
    else:
        norm = jnp.max(size, axis=tuple(range(1, x.ndim)), initial=0) ** power
    if reduction == "none":
        return norm
    return jnp.mean(norm) if reduction == "mean" else jnp.sum(norm)


@jax.custom_jvp
def _not_differentiable(x: jax.Array) -> jax.Array:
    return x


@_not_differentiable.defjvp
def _refuse(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    raise ValueError(
        "method='difference' has a derivative by the parameters only, but was differentiated by "
        "another array that the loss depends on, an argument of the batch or one that it closes "
        f"over, of shape {jnp.shape(primals[0])}: take method='exact'"
    )


def _without_closure(
    loss: Callable[[Any], jax.Array], params: Any
) -> tuple[Callable[[Any, list[Any]], jax.Array], list[Any]]:
    """`loss` as a function of the parameters and of the arrays it closes over, and these arrays.

    A custom derivative may be taken long after the trace around it has ended, as in the gradient of
    a function under `jit` or `scan`. What belongs to that trace must come in as an argument.
    """
    closed = jax.make_jaxpr(loss)(params)

    def opened(params: Any, constants: list[Any]) -> jax.Array:
        jaxpr = jax.extend.core.ClosedJaxpr(closed.jaxpr, constants)
        return jax.extend.core.jaxpr_as_fun(jaxpr)(*jax.tree.leaves(params))[0]

    return opened, [_not_differentiable(constant) for constant in closed.consts]


def parameter_gradient_penalty(
    loss: Callable[..., jax.Array],
    params: Any,
    *batch: Any,
    method: Method = "exact",
    step: ArrayLike = 1e-2,
) -> jax.Array:
    """Squared norm of a batch loss's gradient by all parameters together, `|grad_theta L|^2`.

    Gradient descent at rate `gamma` follows the flow of `L + gamma / 4` times this (posts 7787,
    8796). The value is exact. How its gradient `2 H g` is made is the method:

    - "exact" differentiates through the gradient: 2.6 times the operations of a plain gradient (an
      MLP), and the activations of both passes are kept. Any derivative of any order is right.
    - "difference" uses `H g ~ |g| (grad L(theta + r g / |g|) - grad L(theta)) / r`: two plain
      gradients, one after the other, of which a compiler shares the one at `theta` with the loss
      itself; nothing is differentiated twice, so every loss with a gradient will do. Its error is
      of order `r`, plus rounding of order `1e-7 |theta| / r` in float32. By the parameters and in
      reverse mode only.

    Numerics: norms in float32 or better; under "difference" parameters narrower than that are cast
    to float32 for all of it, else the step would be rounded away. At a zero gradient the value and
    its gradient are 0. A loss that computes in bfloat16 inside drowns the difference: take "exact".

    Over devices: under `pmap`, and `shard_map(check_vma=False)`, it is the penalty of each device's
    own batch; with `check_vma=True`, where jax sums gradients by replicated parameters, that of the
    sum. `sharpness.implicit_gradient_regularization` has the one of the mean.

    Args:
      loss: `loss(params, *batch) -> []`, the mean over the batch.
      params: pytree of real floating arrays.
      batch: further arguments, of any kind.
      method: how it is differentiated.
      step: `r`, the length of the step under "difference", over all parameters together; a number
        above 0, or a traced scalar.

    Returns:
      Scalar, float32 or better.

    Raises:
      ValueError: if the loss is no scalar, the method is unknown, the step is not one number above
        0, or "difference" is differentiated by what is no parameter.
      TypeError: at a parameter that is not real floating; from JAX, if "difference" is
        differentiated in forward mode.

    >>> loss = lambda params, x: params["a"] * x + 0.5 * params["b"] ** 2
    >>> params = {"a": jnp.array(1.0), "b": jnp.array(3.0)}
    >>> float(parameter_gradient_penalty(loss, params, 4.0))
    25.0
    >>> for method in ("exact", "difference"):
    ...     gradient = jax.grad(parameter_gradient_penalty, 1)
    ...     print(f"{gradient(loss, params, 4.0, method=method)['b']:.2f}")
    6.00
    6.00
    """
    _check_choice("method", method, get_args(Method))

    def checked(params: Any) -> jax.Array:
        value = loss(params, *batch)
        if jnp.shape(value) != ():
            raise ValueError(f"loss has shape {jnp.shape(value)}, but must be a scalar: ()")
        return value

    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"the parameter {leaf_name(path)} is {jnp.result_type(leaf)}, but must be real and "
                "floating to be differentiated by"
            )
    if method == "exact":
        leaves = jax.tree.leaves(at_least_float32(jax.grad(checked)(params)))
        return sum((jnp.sum(jnp.square(g)) for g in leaves), jnp.zeros((), jnp.float32))

    check_size("step", step, positive=True)
    params = at_least_float32(jax.tree.map(jnp.asarray, params))
    opened, constants = _without_closure(checked, params)

    @jax.custom_vjp
    def penalty(params: Any, constants: list[Any], step: ArrayLike) -> jax.Array:
        return jnp.square(global_norm(jax.grad(opened)(params, constants)))

    def forward(params: Any, constants: list[Any], step: ArrayLike) -> tuple[jax.Array, Any]:
        gradient = jax.grad(opened)(params, constants)
        norm = global_norm(gradient)
        length = jnp.where(norm == 0, 0, step / jnp.where(norm == 0, 1, norm))
        moved = jax.tree.map(lambda p, g: p + length.astype(p.dtype) * g, params, gradient)
        factor = 2 * norm / step
        slope = jax.tree.map(
            lambda there, here: factor.astype(here.dtype) * (there - here),
            jax.grad(opened)(moved, constants),
            gradient,
        )
        return jnp.square(norm), slope

    def backward(slope: Any, cotangent: jax.Array) -> tuple[Any, None, None]:
        return jax.tree.map(lambda s: cotangent.astype(s.dtype) * s, slope), None, None

    penalty.defvjp(forward, backward)
    return penalty(params, constants, jnp.asarray(step, jnp.float32))
