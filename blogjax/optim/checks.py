"""Checks of the arguments of a transformation; the message names the leaf at fault.

They look at types, shapes and structure only, so they cost nothing in a compiled step. optax lets
these cases through: a gradient of shape `(1, 3)` for a parameter of shape `(3,)` broadcasts, an
integer parameter gets a float momentum, `b1=1.5` is taken.
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blogjax.core.labels import leaf_name


def _is_number(value: Any) -> bool:
    return isinstance(value, (numbers.Real, np.ndarray)) and not isinstance(value, bool)


def check_rate(name: str, value: Any) -> None:
    """Raises unless `value` lies in `[0, 1)`, where the decay rate of an average must lie.

    JAX arrays pass unseen: they may be traced, and looking at one would wait for the device.

    Args:
      name: what to call it in the message.
      value: a number, or a JAX array.

    Raises:
      ValueError: if a number of the host is outside `[0, 1)`, or NaN.

    >>> check_rate("b1", 1.5)
    Traceback (most recent call last):
        ...
    ValueError: b1 is 1.5, but must lie in [0, 1)
    """
    if _is_number(value) and not 0 <= value < 1:
        raise ValueError(f"{name} is {value}, but must lie in [0, 1)")


def check_at_least(name: str, value: Any, least: float) -> None:
    """Raises if `value` is a number of the host below `least`, or NaN; else as `check_rate`.

    Raises:
      ValueError: as said.

    >>> check_at_least("weight_decay", -1, 0)
    Traceback (most recent call last):
        ...
    ValueError: weight_decay is -1, but must be at least 0
    """
    if _is_number(value) and not value >= least:
        raise ValueError(f"{name} is {value}, but must be at least {least}")


def check_steps(name: str, value: Any) -> None:
    """Raises unless `value` is a whole number of at least 1; JAX arrays pass, as in `check_rate`.

    Raises:
      ValueError: as said.

    >>> check_steps("accumulate_steps", 2.5)
    Traceback (most recent call last):
        ...
    ValueError: accumulate_steps is 2.5, but must be a whole number
    """
    if _is_number(value) and not value % 1 == 0:
        raise ValueError(f"{name} is {value}, but must be a whole number")
    check_at_least(name, value, 1)


def check_fraction(name: str, value: Any) -> None:
    """Raises unless `value` lies in `[0, 1]`; JAX arrays and None pass.

    Raises:
      ValueError: if a number of the host is outside `[0, 1]`, or NaN.

    >>> check_fraction("shrink", 2)
    Traceback (most recent call last):
        ...
    ValueError: shrink is 2, but must lie in [0, 1]
    """
    if _is_number(value) and not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, but must lie in [0, 1]")


def check_floating(tree: Any, what: str = "parameter") -> None:
    """Raises unless every leaf of `tree` is real and floating; `None` is no leaf.

    Args:
      tree: pytree of arrays.
      what: what a leaf is, for the message.

    Raises:
      TypeError: at an integer, boolean or complex leaf, naming it.

    >>> import jax.numpy as jnp
    >>> check_floating({"w": jnp.ones(2), "steps": jnp.arange(3)})
    Traceback (most recent call last):
        ...
    TypeError: parameter steps is int32, but must be real and floating: ...
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.floating):
            continue
        if jnp.issubdtype(dtype, jnp.complexfloating):
            cure = "wrap the transformation in optax.contrib.split_real_and_imaginary"
        else:
            cure = "leave it out with optax.masked or optax.partition"
        raise TypeError(
            f"{what} {leaf_name(path)} is {dtype}, but must be real and floating: {cure}"
        )


def check_mu_dtype(mu_dtype: Any) -> None:
    """Raises unless a momentum can have this dtype; None passes.

    Raises:
      TypeError: if it is an integer or complex dtype.

    >>> check_mu_dtype("int32")
    Traceback (most recent call last):
        ...
    TypeError: mu_dtype is int32, but must be real and floating
    """
    if mu_dtype is not None and not jnp.issubdtype(mu_dtype, jnp.floating):
        raise TypeError(f"mu_dtype is {jnp.dtype(mu_dtype)}, but must be real and floating")


def check_same(tree: Any, like: Any, what: str = "gradient", like_what: str = "parameter") -> None:
    """Raises unless both trees have the same structure and their leaves the same shapes.

    A `None` must stand opposite a `None`. Dtypes may differ.

    Args:
      tree: pytree of arrays.
      like: pytree of arrays.
      what: what a leaf of `tree` is, for the message.
      like_what: what a leaf of `like` is.

    Raises:
      ValueError: at the first leaf that has no counterpart or another shape, naming it.

    >>> import jax.numpy as jnp
    >>> check_same({"w": jnp.ones((1, 3))}, {"w": jnp.ones(3)})
    Traceback (most recent call last):
        ...
    ValueError: gradient w has shape (1, 3), but parameter w has shape (3,)
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    others, like_structure = jax.tree_util.tree_flatten_with_path(like)
    if structure != like_structure:
        names = [leaf_name(path) for path, _ in leaves]
        like_names = [leaf_name(path) for path, _ in others]
        for name in like_names:
            if name not in names:
                raise ValueError(f"{like_what} {name} has no {what}")
        for name in names:
            if name not in like_names:
                raise ValueError(f"{what} {name} has no {like_what}")
        raise ValueError(
            f"the {what}s are a tree {structure}, but the {like_what}s are {like_structure}"
        )
    for (path, leaf), (_, other) in zip(leaves, others, strict=True):
        if jnp.shape(leaf) != jnp.shape(other):
            name = leaf_name(path)
            raise ValueError(
                f"{what} {name} has shape {jnp.shape(leaf)}, "
                f"but {like_what} {name} has shape {jnp.shape(other)}"
            )


def check_updates(updates: Any, like: Any, like_what: str = "parameter") -> None:
    """`check_floating` of the gradients, then `check_same`: what an `update` starts with.

    Args:
      updates: the gradients.
      like: the parameters, or a part of the state that has their structure and shapes.
      like_what: what a leaf of `like` is, for the message.

    Raises:
      TypeError: at an integer or complex gradient.
      ValueError: where the trees or the shapes differ.

    >>> import jax.numpy as jnp
    >>> check_updates({"w": jnp.ones(3)}, {"w": jnp.zeros(3)})
    """
    check_same(updates, like, like_what=like_what)
    check_floating(updates, "gradient")


def require_params(params: Any, name: str) -> Any:
    """Returns `params`, and raises if they were left out of `update`.

    Args:
      params: what `update` was given.
      name: the transformation that needs them.

    Raises:
      ValueError: if `params` is None.

    >>> require_params(None, "scale_by_param_rms")
    Traceback (most recent call last):
        ...
    ValueError: scale_by_param_rms needs the parameters: call update(updates, state, params)
    """
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(updates, state, params)")
    return params
