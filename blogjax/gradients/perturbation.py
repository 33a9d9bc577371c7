"""What perturbations are made of: norms, directions and noise, per example or of a whole tree.

What: `steepest_ascent`, the direction in which a function rises most within the ball of a norm, and
  the small parts that `adversarial`, `virtual_adversarial` and `sharpness` share.
Post: https://kexue.fm/archives/7234
Equations: argmax_{|r|_2 <= 1} <g, r> = g / |g|_2; argmax_{|r|_inf <= 1} <g, r> = sign(g).
Differences from the post: g / |g| is 0 where g is 0, and exact for tiny g; the post's code adds
  1e-8 to |g|.

A tree here is an array or a pytree of arrays. "Per example" it has one axis of examples, `[B, ...]`
in every leaf, and what belongs to an example is taken from all leaves together.
"""

import operator
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from blogjax.core.norms import at_least_float32
from blogjax.core.random import Key, normal, split_keys, uniform

Norm = Literal["l2", "linf"]


def arrays(tree: Any) -> Any:
    """Makes jax arrays of numpy's, in the dtypes that jax has them in."""
    return jax.tree.map(jnp.asarray, tree)


def constant(tree: Any) -> Any:
    """Makes every array a constant to differentiation; what is no array stays as it is."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x, tree)


def check_size(name: str, value: Any, positive: bool = False) -> None:
    """Raises unless `value` is one number, and at least 0 if it is known, or above 0.

    Raises:
      ValueError: naming the value.

    >>> check_size("epsilon", -1.0)
    Traceback (most recent call last):
        ...
    ValueError: epsilon=-1.0 must be at least 0
    """
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} has shape {jnp.shape(value)}, but must be one number")
    if isinstance(value, Tracer):
        return
    if positive and not float(value) > 0:
        raise ValueError(f"{name}={value} must be above 0")
    if not float(value) >= 0:
        raise ValueError(f"{name}={value} must be at least 0")


def check_count(name: str, value: Any, least: int) -> None:
    """Raises unless `value` is an integer that is known when the function is traced.

    Raises:
      TypeError: at anything else, such as a traced number.
      ValueError: below `least`.

    >>> check_count("steps", 0, 1)
    Traceback (most recent call last):
        ...
    ValueError: steps=0 must be at least 1
    """
    try:
        count = operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"{name} is {value!r}, but must be an integer known when the function is traced: under "
            f"jit it belongs in static_argnames"
        ) from error
    if count < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def check_norm(norm: str) -> None:
    """Raises ValueError unless there is such a norm, listing those there are."""
    if norm not in get_args(Norm):
        raise ValueError(f"norm={norm!r} is unknown; valid: {', '.join(get_args(Norm))}")


def examples(tree: Any, per_example: bool, name: str = "x") -> tuple[int, ...]:
    """Checks what is to be perturbed and returns `(B,)`, or `()` where it is taken as a whole.

    Raises:
      ValueError: if there is no array, or the leaves have not the same number of examples.
      TypeError: at a leaf that is not real floating.

    >>> import jax.numpy as jnp
    >>> examples({"a": jnp.ones((4, 2)), "b": jnp.ones(4)}, True), examples(jnp.ones(3), False)
    ((4,), ())
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ValueError(f"{name} holds no array, so there is nothing to perturb")
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{name} is {leaf.dtype}, but must be real and floating: of tokens perturb the "
                "embeddings, or the embedding matrix with per_example=False"
            )
    if not per_example:
        return ()
    shapes = [leaf.shape for leaf in leaves]
    if any(len(shape) == 0 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            f"{name} has arrays of shapes {shapes}, but per_example=True needs the same axis of "
            "examples in front of all; per_example=False perturbs them as a whole"
        )
    return (shapes[0][0],)


def _over(reduce: Callable[..., jax.Array], tree: Any, per_example: bool) -> jax.Array:
    first = 1 if per_example else 0
    parts = [reduce(x, axis=tuple(range(first, x.ndim))) for x in jax.tree.leaves(tree)]
    return reduce(jnp.stack(parts), axis=0)


def largest_entry(tree: Any, per_example: bool) -> jax.Array:
    """`[B]` or `[]`: the largest absolute value; NaN where there is a NaN, 0 where nothing is."""
    return _over(lambda x, axis: jnp.max(jnp.abs(x), axis=axis, initial=0), tree, per_example)


def euclidean_norm(tree: Any, per_example: bool) -> jax.Array:
    """`[B]` or `[]`, without care for squares that under- or overflow, nor for gradients."""
    return jnp.sqrt(_over(jnp.sum, jax.tree.map(jnp.square, tree), per_example))


def scale(tree: Any, factor: jax.Array) -> Any:
    """Multiplies every leaf by the one factor `[]`, or row i of every leaf by factor i of `[B]`."""
    return jax.tree.map(
        lambda x: x * factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim)).astype(x.dtype),
        tree,
    )


def scale_to_one(tree: Any, per_example: bool) -> Any:
    """Divides by the largest absolute value; what is all 0 stays 0, and NaN goes through."""
    top = largest_entry(tree, per_example)
    # In two steps, because the inverse of a number near the smallest one would be infinite.
    half = jax.lax.rsqrt(jnp.where(top == 0, 1, top))
    return scale(scale(tree, half), half)


def _unit(tree: Any, per_example: bool) -> Any:
    # The largest entry is 1 then: no square overflows, and none that matters underflows.
    tree = scale_to_one(tree, per_example)
    norm = euclidean_norm(tree, per_example)
    return scale(tree, 1 / jnp.where(norm == 0, 1, norm))


def steepest_ascent(gradient: Any, *, norm: Norm = "l2", per_example: bool = True) -> Any:
    """The direction r in the unit ball of a norm along which a function rises most, by `<g, r>`.

    "l2": `g / |g|_2`; "linf": `sign(g)`. Zero where the gradient is zero.

    Numerics: in float32 or better. The result does not depend on the gradient's size: entries are
    scaled before they are squared, so 1e-30 is as good as 1. NaN goes through. Not meant to be
    differentiated.

    Args:
      gradient: array `[B, ...]` or a pytree of them; without `per_example` of any shapes.
      norm: "l2" or "linf".
      per_example: one norm for each index of the first axis, all leaves together; False takes one
        norm of everything.

    Returns:
      As `gradient`, in float32 or better.

    Raises:
      ValueError: if the norm is unknown, or leaves have not the same number of examples.
      TypeError: at a leaf that is not real floating.

    >>> import jax.numpy as jnp
    >>> g = jnp.array([[0.0, -4.0], [0.0, 0.0]])
    >>> steepest_ascent(g).tolist(), steepest_ascent(4 * g + 4, norm="linf").tolist()
    ([[0.0, -1.0], [0.0, 0.0]], [[1.0, -1.0], [1.0, 1.0]])
    """
    check_norm(norm)
    examples(gradient, per_example, "gradient")
    gradient = at_least_float32(gradient)
    return jax.tree.map(jnp.sign, gradient) if norm == "linf" else _unit(gradient, per_example)


def finished(direction: Any, x: Any, epsilon: ArrayLike = 1.0) -> Any:
    """`epsilon direction`, in the dtypes of x and a constant to differentiation."""
    return jax.tree.map(
        lambda d, a: jax.lax.stop_gradient((d * jnp.asarray(epsilon, d.dtype)).astype(a.dtype)),
        direction,
        x,
    )


def _drawn_like(draw: Callable[..., jax.Array], keys: Key, tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    each = split_keys(keys, len(leaves)) if len(leaves) > 1 else (keys,)
    # Plus zeros: under shard_map one key for all devices gives noise that is said not to vary over
    # them, and a loop that adds it to what does vary would not be accepted.
    noise = [
        draw(k, x.shape, x.dtype) + jnp.zeros_like(x) for k, x in zip(each, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noise)


def random_direction(keys: Key, tree: Any, per_example: bool) -> Any:
    """Noise like `tree`, uniform on the Euclidean unit sphere.

    Args:
      keys: typed keys `[B]`, or one.
      tree: float32 or better; its values do not matter.
      per_example: whether every example has a sphere of its own.
    """
    return _unit(_drawn_like(normal, keys, tree), per_example)


def random_in_ball(keys: Key, tree: Any, norm: Norm, per_example: bool) -> Any:
    """Noise like `tree`, uniform in the unit ball; arguments as in `random_direction`."""
    if norm == "linf":
        noise = _drawn_like(uniform, keys, tree)
        return jax.tree.map(lambda u: 2 * u - 1, noise)
    for_direction, for_length = split_keys(keys)
    rows = examples(tree, per_example)
    entries = sum(x.size for x in jax.tree.leaves(tree)) / max(1, *rows, 1)
    length = uniform(for_length, rows) ** (1 / max(1, entries))
    return scale(random_direction(for_direction, tree, per_example), length)
