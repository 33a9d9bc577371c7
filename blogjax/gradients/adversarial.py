"""Adversarial inputs: a small change of the input that raises the loss as much as it can.

What: `fast_gradient` (FGM, FGSM) and `projected_gradient` (PGD); `virtual_adversarial` has VAT.
Post: https://kexue.fm/archives/7234, https://kexue.fm/archives/7466
Papers: Goodfellow et al. (arXiv 1412.6572), Madry et al. (1706.06083); Miyato et al. (1605.07725)
  for embeddings, Ross and Doshi-Velez (1711.09404) for the penalty
Equations: min_theta mean_i max_{|r_i| <= eps} L(x_i + r_i, y_i; theta), where
  FGM: r = eps g / |g|_2 or eps sign(g), g = grad_x L;
  PGD: r <- P(r + step u(grad_x L(x + r))), u = g / |g|_2 or sign(g), P into the ball.
  To first order in eps, training on x + eps g adds eps/2 |grad_x L|^2 to the loss, and training on
  x + eps g/|g| adds eps |grad_x L|; what is left of theta's gradient is O(eps^2).
Differences from the post: g/|g| is 0 where g is 0, and exact for tiny g; the post's code adds 1e-8
  to |g|. The post's code perturbs the embedding matrix as a whole: that is `per_example=False`; the
  default is one norm per example, as its formulas have it.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from blogjax.core.norms import at_least_float32
from blogjax.core.random import Key
from blogjax.gradients.perturbation import (
    Norm,
    arrays,
    check_count,
    check_norm,
    check_size,
    constant,
    euclidean_norm,
    examples,
    finished,
    random_in_ball,
    scale,
    steepest_ascent,
)


def _input_gradient(loss: Callable[..., jax.Array], rows: tuple[int, ...]) -> Callable[..., Any]:
    """The gradient by x of the sum of `loss(params, x, *args)` over its examples."""

    def total(x: Any, params: Any, args: tuple[Any, ...]) -> jax.Array:
        values = loss(params, x, *args)
        if values.shape != rows:
            kind = "one number per example" if rows else "one number, as per_example=False asks for"
            raise ValueError(f"the loss must return {kind}, shape {rows}, got {values.shape}")
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise TypeError(f"the loss is {values.dtype}, but must be real and floating")
        return jnp.sum(at_least_float32(values))

    return lambda params, x, args: at_least_float32(jax.grad(total)(x, params, args))


def _box(clip_range: tuple[Any, Any], x: Any) -> tuple[Any, Any]:
    """The two bounds, each as a tree like x."""

    def like_x(bound: Any) -> Any:
        try:
            return jax.tree.map(lambda a: jnp.broadcast_to(jnp.asarray(bound, a.dtype), a.shape), x)
        except ValueError as error:
            raise ValueError(
                f"clip_range has a bound of shape {jnp.shape(bound)}, which does not broadcast to "
                f"x of shape {jax.tree.map(jnp.shape, x)}"
            ) from error

    low, high = (like_x(bound) for bound in clip_range)
    known = not any(isinstance(bound, Tracer) for bound in clip_range)
    if known and not np.all(np.asarray(clip_range[0]) <= np.asarray(clip_range[1])):
        raise ValueError(f"clip_range has low={clip_range[0]} above high={clip_range[1]}")
    return low, high


def fast_gradient(
    loss: Callable[..., jax.Array],
    params: Any,
    x: Any,
    *args: Any,
    epsilon: ArrayLike,
    norm: Norm | Literal["none"] = "l2",
    per_example: bool = True,
) -> Any:
    """FGM's perturbation of the input: one step up the loss, of length epsilon.

    `r = eps g / |g|_2` ("l2"), `eps sign(g)` ("linf", FGSM) or `eps g` ("none"), g = grad_x loss.
    Train on `x + r` in place of `x`; a step then costs two gradients.

    Numerics: see `steepest_ascent`. r has the dtype of x; an x in bfloat16 swallows an r below its
    resolution. An example whose gradient is 0 is not perturbed.

    Args:
      loss: `loss(params, x, *args) -> [B]`, one number per example; `[]` without `per_example`.
        Differentiated as a sum: if the model couples examples (batch statistics), so do gradients.
      params: anything that the loss takes.
      x: array `[B, ...]` of real floats, or a pytree of them.
      args: what else the loss takes, such as labels.
      epsilon: length of r in the norm, at least 0; a number or a traced scalar.
      norm: "l2", "linf" or "none".
      per_example: False takes x, then of any shape, as a whole. That is the post's recipe for
        text: x is the embedding matrix, and all its rows share one norm (eps .5 in the post).

    Returns:
      r like x, a constant to differentiation.

    Raises:
      ValueError: for an unknown norm, epsilon below 0, or shapes that do not fit.
      TypeError: if x or the loss is not real floating.

    >>> import jax, jax.numpy as jnp
    >>> def loss(params, x, y):
    ...     return jnp.log1p(jnp.exp(-y * (x @ params["w"])))
    >>> params, x, y = {"w": jnp.array([3.0, 4.0])}, jnp.ones((2, 2)), jnp.array([1.0, -1.0])
    >>> print(fast_gradient(loss, params, x, y, epsilon=0.5).round(3))
    [[-0.3 -0.4]
     [ 0.3  0.4]]

    A part of the parameters, here the embedding matrix. The gradient that trains is that of all
    parameters at the moved point:

    >>> params = {"table": jnp.ones((3, 2)), "w": jnp.array([3.0, 4.0])}
    >>> def mean_loss(params, tokens):
    ...     return jnp.mean(params["table"][tokens] @ params["w"])
    >>> def loss_of_table(params, table, tokens):
    ...     return mean_loss({**params, "table": table}, tokens)
    >>> tokens = jnp.array([1, 1])
    >>> r = fast_gradient(loss_of_table, params, params["table"], tokens, epsilon=0.5,
    ...                   per_example=False)
    >>> print(r.round(3))
    [[0.  0. ]
     [0.3 0.4]
     [0.  0. ]]
    >>> grads = jax.grad(mean_loss)({**params, "table": params["table"] + r}, tokens)

    `sharpness.sam_gradient` with a `mask` does this in one call, on several devices too.
    """
    check_size("epsilon", epsilon)
    x = arrays(x)
    rows = examples(x, per_example)
    params, given, args = constant((params, x, args))
    step = _input_gradient(loss, rows)(params, given, args)
    if norm != "none":
        step = steepest_ascent(step, norm=norm, per_example=per_example)
    return finished(step, x, epsilon)


def projected_gradient(
    loss: Callable[..., jax.Array],
    params: Any,
    x: Any,
    *args: Any,
    epsilon: ArrayLike,
    steps: int,
    step_size: ArrayLike,
    norm: Norm = "l2",
    per_example: bool = True,
    keys: Key | None = None,
    clip_range: tuple[ArrayLike, ArrayLike] | None = None,
) -> Any:
    """PGD's perturbation of the input: several steps up the loss, kept within a ball and a box.

    From r = 0, or from a random point of the ball, `steps` times:
    `r <- P(r + step_size u)`, u = `steepest_ascent(grad_x loss(x + r))`, where P scales r back to
    length epsilon ("l2") or clips its entries ("linf"), then clips x + r to `clip_range`. One step
    of size epsilon from 0 is `fast_gradient`.

    Numerics: r is carried in float32 or better and gets the dtype of x in the end. Ball and box
    hold up to rounding; the ball only for an x that lies in the box. A zero gradient is no step.
    Unless the loss is concave in x, the last r need not be the best on the way.

    Args:
      loss, params, x, args, epsilon, per_example: as in `fast_gradient`.
      steps: number of gradients, at least 1; each costs one forward and one backward pass.
      step_size: length of one step in the norm, at least 0.
      norm: "l2" or "linf".
      keys: for a random start, uniform in the ball: typed keys `[B]`, or one; a single one for
        `per_example=False`.
      clip_range: `(low, high)`, the least and the greatest value of an input, (0, 1) for images.
        Numbers, or arrays that broadcast to x, such as one number per channel.

    Returns:
      r like x, a constant to differentiation.

    Raises:
      ValueError: as `fast_gradient`, and if steps is below 1, low is above high, or one of them
        does not broadcast to x.
      TypeError: as `fast_gradient`, and if steps is not an integer known when the function is
        traced.

    >>> import jax.numpy as jnp
    >>> def loss(params, x):
    ...     return x @ params
    >>> r = projected_gradient(loss, jnp.array([1.0, -2.0]), jnp.full((1, 2), 0.5), epsilon=0.25,
    ...                        steps=3, step_size=0.125, norm="linf", clip_range=(0.375, 1.0))
    >>> r.tolist()
    [[0.25, -0.125]]
    """
    check_size("epsilon", epsilon)
    check_size("step_size", step_size)
    check_norm(norm)
    check_count("steps", steps, 1)
    x = arrays(x)
    rows = examples(x, per_example)
    params, given, args = constant((params, x, args))
    start = at_least_float32(given)
    box = None if clip_range is None else _box(clip_range, start)
    gradient = _input_gradient(loss, rows)

    def project(r: Any) -> Any:
        if norm == "linf":
            size = jnp.asarray(epsilon)
            r = jax.tree.map(lambda a: jnp.clip(a, -size.astype(a.dtype), size.astype(a.dtype)), r)
        else:
            length = euclidean_norm(r, per_example)
            outside = length > epsilon
            r = scale(r, jnp.where(outside, epsilon / jnp.where(outside, length, 1), 1))
        if box is None:
            return r
        return jax.tree.map(lambda a, r, low, high: jnp.clip(a + r, low, high) - a, start, r, *box)

    def one_step(_: Any, r: Any) -> Any:
        here = jax.tree.map(lambda a, r, like: (a + r).astype(like.dtype), start, r, given)
        step = steepest_ascent(gradient(params, here, args), norm=norm, per_example=per_example)
        return project(jax.tree.map(lambda r, u: r + jnp.asarray(step_size, r.dtype) * u, r, step))

    if keys is None:
        r = jax.tree.map(jnp.zeros_like, start)
    else:
        noise = random_in_ball(keys, start, norm, per_example)
        r = project(jax.tree.map(lambda u: jnp.asarray(epsilon, u.dtype) * u, noise))
    return finished(jax.lax.fori_loop(0, steps, one_step, r), x)
