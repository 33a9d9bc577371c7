"""Gradients by the input, of each example by itself.

What: values of a function of a batch and their gradients by the input, such that no example sees
  another; the checks that go with it.
Post: https://kexue.fm/archives/8757
Equations: (D(x_i), grad_{x_i} D(x_i)), each from a batch of one.
Differences from the post: usual code differentiates the sum of D over the batch. That is the same
  only as long as D(x_i) does not depend on x_j; where it does (BatchNorm) the sum's gradient mixes
  examples and nothing says so. Here each example is alone, and `check_per_example` tells whether
  the function minds.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blogjax.core.labels import leaf_name
from blogjax.core.norms import at_least_float32

Critic = Callable[..., jax.Array]  # critic(params, x, *args) -> [B]; a per-example loss is one too


def check_rows(x: jax.Array, args: tuple[Any, ...] = ()) -> None:
    """Raises unless `x` is `[B, ...]`, real and floating, and all in `args` have B rows too.

    Args:
      x: what is differentiated by.
      args: pytrees of arrays.

    Raises:
      ValueError: where the leading axes differ, naming both shapes.
      TypeError: if `x` is not one array, or not real and floating.

    >>> check_rows(jnp.ones((2, 3)), (jnp.arange(4),))
    Traceback (most recent call last):
        ...
    ValueError: args[0] has shape (4,), but x of shape (2, 3) needs 2 rows, one per example; ...
    """
    if not hasattr(x, "ndim"):
        raise TypeError(f"x must be one array, [B, ...], got {type(x)}")
    if x.ndim == 0:
        raise ValueError("x has shape (), but needs a leading axis of examples: [B, ...]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x is {x.dtype}, but must be real and floating to be differentiated by")
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if jnp.shape(leaf)[:1] != x.shape[:1]:
            raise ValueError(
                f"args[{leaf_name(path)}] has shape {jnp.shape(leaf)}, but x of shape {x.shape} "
                f"needs {x.shape[0]} rows, one per example; close over what all examples share"
            )


def _check_array(out: Any) -> None:
    if not hasattr(out, "shape"):
        raise TypeError(f"the output must be one array, [B, ...], got {type(out)}")


def alone(function: Callable[..., jax.Array], params: Any) -> Callable[..., jax.Array]:
    """Returns `function` of one example: without the batch axis, to be mapped with `jax.vmap`.

    Args:
      function: `function(params, x, *args) -> [B, ...]`.
      params: its parameters.

    Returns:
      `one(x_i, *args_i) -> [...]`, which runs `function` on a batch of one. It raises ValueError if
      the output does not lead with the batch axis, and TypeError if it is not one array, real and
      floating.

    >>> one = alone(lambda params, x: params * x.sum(-1), 2.0)
    >>> jax.vmap(one)(jnp.ones((4, 3))).tolist()
    [6.0, 6.0, 6.0, 6.0]
    """

    def one(*example: Any) -> jax.Array:
        out = function(params, *jax.tree.map(lambda leaf: leaf[None], example))
        _check_array(out)
        if out.shape[:1] != (1,):
            raise ValueError(
                f"the output for a batch of one has shape {out.shape}, but must lead with the "
                "batch axis: (1, ...), in general [B, ...]"
            )
        if not jnp.issubdtype(out.dtype, jnp.floating):
            raise TypeError(f"the output is {out.dtype}, but must be real and floating")
        return out[0]

    return one


def scalar_alone(critic: Critic, params: Any) -> Callable[..., jax.Array]:
    """`alone` of a critic or a per-example loss: raises ValueError unless the output is a scalar.

    >>> scalar_alone(lambda params, x: x.sum(-1), None)(jnp.ones(3)).tolist()
    3.0
    """

    def one(*example: Any) -> jax.Array:
        out = alone(critic, params)(*example)
        if out.shape != ():
            raise ValueError(
                f"the critic's output for a batch of one has shape {(1, *out.shape)}, but must be "
                "one scalar per example: (1,), in general [B]"
            )
        return at_least_float32(out)

    return one


def value_and_input_gradient(
    critic: Critic, params: Any, x: jax.Array, *args: Any
) -> tuple[jax.Array, jax.Array]:
    """Values of a critic, or of a per-example loss, and their gradients by the input.

    Each example is differentiated in a batch of its own, `jax.vmap` over `jax.value_and_grad`, so
    a layer that couples examples (BatchNorm, minibatch discrimination) sees one example only; see
    `check_per_example`. The cost is that of a gradient of the whole batch.

    Args:
      critic: `critic(params, x, *args) -> [B]`, one real number per example.
      params: its parameters.
      x: `[B, ...]` floating.
      args: pytrees of arrays with leading axis B, as labels are; not differentiated by.

    Returns:
      Values `[B]`, float32 or better, and gradients like `x`.

    Raises:
      ValueError: if the critic's output is not one scalar per example (as `[B, 1]` or `[]`), or an
        array in `args` has not B rows.
      TypeError: if `x` or the output is not one array, real and floating.

    >>> critic = lambda params, x: jnp.sin(x @ params)
    >>> value, gradient = value_and_input_gradient(critic, jnp.array([1.0, 2.0]), jnp.zeros((1, 2)))
    >>> value.tolist(), gradient.tolist()
    ([0.0], [[1.0, 2.0]])
    """
    check_rows(x, args)
    return jax.vmap(jax.value_and_grad(scalar_alone(critic, params)))(x, *args)


def check_per_example(
    critic: Critic, params: Any, x: jax.Array, *args: Any, tolerance: float | None = None
) -> None:
    """Raises if a critic's output for an example depends on the others in its batch.

    A function does not show whether BatchNorm is inside; its values do. They are computed for the
    batch at once and for each example alone, and compared. A critic that draws random numbers
    (dropout) differs too, unless the numbers come with the example. For tests, and once before a
    training: it waits for the device and cannot be called under `jit`.

    Args:
      critic: `critic(params, x, *args) -> [B]`.
      params: its parameters, not all zero: a critic that is zero everywhere passes.
      x: `[B, ...]` floating, B at least 2, examples that differ.
      args: arrays with leading axis B.
      tolerance: largest allowed difference relative to the largest value. None is 0.01, more for
        narrow dtypes; it covers that a device multiplies one row differently from many.

    Raises:
      ValueError: if some output depends on other rows, or is not finite, naming the row and both
        values; if there are fewer than two rows; if the output is not of shape `[B]`.
      TypeError: if `x` or the output is not one array, real and floating.

    >>> check_per_example(lambda params, x: jnp.tanh(x @ params), jnp.ones(3), jnp.eye(3))
    >>> centred = lambda params, x: (x - x.mean(0)) @ params
    >>> check_per_example(centred, jnp.array([1.0, 2.0, 6.0]), jnp.eye(3))
    Traceback (most recent call last):
        ...
    ValueError: the critic couples examples: row 0 is -2 in its batch of 3 but 0 alone. ...
    """
    check_rows(x, args)
    if x.shape[0] < 2:
        raise ValueError(f"x of shape {x.shape} has one row or none, but coupling needs at least 2")
    out = jax.eval_shape(critic, params, x, *args)
    _check_array(out)
    if out.shape != x.shape[:1]:
        raise ValueError(
            f"the critic's output has shape {out.shape}, but x of shape {x.shape} needs one scalar "
            f"per example: {x.shape[:1]}"
        )

    @jax.jit
    def both(params: Any, x: jax.Array, *args: Any) -> tuple[jax.Array, jax.Array]:
        return critic(params, x, *args), jax.vmap(scalar_alone(critic, params))(x, *args)

    together, separate = both(params, x, *args)
    if tolerance is None:
        tolerance = max(0.01, 16 * float(jnp.finfo(out.dtype).eps))
    a, b = (
        np.asarray(jax.device_get(at_least_float32(v)), np.float64) for v in (together, separate)
    )
    finite = np.isfinite(np.stack([a, b]))
    if not finite.any(axis=0).all():
        row = int(np.argmin(finite.any(axis=0)))
        raise ValueError(
            f"the critic's outputs cannot be compared: row {row} is {a[row]:.6g} in its batch of "
            f"{len(a)} and {b[row]:.6g} alone"
        )
    largest = np.max(np.abs(np.stack([a, b])), initial=0, where=finite)
    # Written so that NaN counts as different.
    different = ~(np.abs(a - b) <= tolerance * largest)
    if different.any():
        row = int(np.argmax(different))
        raise ValueError(
            f"the critic couples examples: row {row} is {a[row]:.6g} in its batch of {len(a)} but "
            f"{b[row]:.6g} alone. Per-example gradients need a critic without BatchNorm or other "
            "statistics of the batch (GroupNorm and LayerNorm are fine)"
        )
