"""Norms of trees and of examples, in float32 or better whatever the arrays are."""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")

# Leaves below this many entries are never split over devices, so putting them together is free.
_SMALL = 2**12

# The bits of the exponent, and an integer as wide.
_EXPONENT = {
    jnp.dtype(jnp.float32): (jnp.uint32, 0x7F800000),
    jnp.dtype(jnp.float64): (jnp.uint64, 0x7FF0000000000000),
}


def _check_real(x: jax.Array) -> None:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"norms are of real numbers here, got an array of {x.dtype}")


def at_least_float32(tree: T) -> T:
    """Casts the leaves of a tree, or one array, to float32 or better: float64 stays.

    Plain numbers become arrays; complex numbers stay complex.

    >>> at_least_float32({"a": jnp.ones(2, jnp.bfloat16)})["a"].dtype
    dtype('float32')
    """

    def cast(x: jax.typing.ArrayLike) -> jax.Array:
        x = jnp.asarray(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    return jax.tree.map(cast, tree)


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm of all entries of all leaves together.

    Squares are summed in float32 or better, so bfloat16 leaves lose nothing in the sum; they must
    exist there, which entries of 1e-19 to 1e+18 do. The gradient at zero is NaN, as for any norm;
    this is a measurement, not a part of a loss.

    Args:
      tree: pytree of real arrays.

    Returns:
      Scalar; 0 for an empty tree.

    Raises:
      TypeError: at a complex leaf.

    >>> import jax.numpy as jnp
    >>> float(global_norm({"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}))
    5.0
    """
    leaves = jax.tree.leaves(at_least_float32(tree))
    for leaf in leaves:
        _check_real(leaf)
    # Biases and scales go through one reduction together: each kernel less compiles faster.
    small = [x.ravel() for x in leaves if x.size < _SMALL]
    leaves = [x for x in leaves if x.size >= _SMALL]
    if small:
        leaves.append(jnp.concatenate(small))
    if not leaves:
        return jnp.zeros((), jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.stack([jnp.sum(x * x) for x in leaves])))


def power_of_two(x: jax.Array) -> jax.Array:
    """Returns the largest power of two not above each entry, and 1 where there is none.

    There is none below the smallest normal number (1.2e-38 in float32) and at infinity and NaN. To
    divide by the result is exact, so a formula that is indifferent to scale can be computed near 1,
    where its squares neither underflow nor overflow. No gradient passes.

    Args:
      x: float32 or float64, any shape.

    Returns:
      Array like `x`.

    Raises:
      TypeError: at another dtype.

    >>> power_of_two(jnp.array([0.3, 1.0, 7.5, 0.0, jnp.inf])).tolist()
    [0.25, 1.0, 4.0, 1.0, 1.0]
    """
    if x.dtype not in _EXPONENT:
        raise TypeError(f"power_of_two needs float32 or float64, got {x.dtype}")
    integer, mask = _EXPONENT[x.dtype]
    bits = jax.lax.bitcast_convert_type(x, integer) & jnp.asarray(mask, integer)
    power = jax.lax.bitcast_convert_type(bits, x.dtype)
    return jnp.where((power > 0) & jnp.isfinite(power), power, 1)


def per_example_norm(x: jax.Array, batch_ndim: int = 1) -> jax.Array:
    """Euclidean norm over every axis but the first `batch_ndim`; 0 and flat at zero.

    Where the norm is 0, its first and second derivatives are defined as 0. Elsewhere they are the
    true ones, `x / |x|` and `(I - u u') / |x|` with `u = x / |x|`.

    Numerics: float32 or better. Entries are divided by a power of two before they are squared, so
    norms from 1e-37 to 1e+38 are right where their squares do not exist in float32; elsewhere the
    bits are those of the plain formula. What has no entry above 1.2e-38 may count as zero. NaN and
    infinity stay in their example.

    Args:
      x: real array `[B, ...]`.
      batch_ndim: how many leading axes are kept.

    Returns:
      `x.shape[:batch_ndim]`, float32 or better.

    Raises:
      ValueError: if `x` has fewer than `batch_ndim` axes, or that is negative.
      TypeError: if `x` is complex.

    >>> per_example_norm(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [5.0, 0.0]
    >>> jax.grad(lambda x: per_example_norm(x).sum())(jnp.zeros((1, 2))).tolist()
    [[0.0, 0.0]]
    """
    if not 0 <= batch_ndim <= x.ndim:
        raise ValueError(f"x of shape {x.shape} has no batch_ndim={batch_ndim} axes in front")
    _check_real(x)
    kept, size = x.shape[:batch_ndim], math.prod(x.shape[batch_ndim:])
    wide = at_least_float32(x).reshape(*kept, size)
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(wide)), axis=-1, keepdims=True, initial=0)
    power = power_of_two(largest)
    squares = jnp.sum(jnp.square(wide / power), axis=-1)
    # Both branches of a `where` are differentiated: the inner one keeps the root away from 0, whose
    # infinite slope would come through as 0 * inf. Not `squares > 0`: NaN must pass.
    something = squares != 0
    root = jnp.where(something, jnp.sqrt(jnp.where(something, squares, 1)), 0)
    return root * power[..., 0]
