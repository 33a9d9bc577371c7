"""What can be checked before a program runs, and when it can.

A value is looked at only if it is known on the host: a Python number, a numpy array, or a jax array
outside of tracing. Under `jit` the same checks are left out and NaN speaks for them.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.core
import numpy as np


def concrete(value: Any) -> np.ndarray | None:
    """Returns `value` as a numpy array, or None where only the device will know it.

    >>> concrete([1, 2])
    array([1, 2])
    >>> print(jax.jit(lambda x: print(concrete(x)))(1.0))
    None
    None
    """
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    # device_get is what an outer transfer guard lets pass.
    return np.asarray(jax.device_get(value))


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises ValueError, listing the valid names, unless `value` is one of `choices`.

    >>> check_choice("fruit", "stone", ("apple", "pear"))
    Traceback (most recent call last):
    ...
    ValueError: fruit='stone' is unknown; valid: 'apple', 'pear'
    """
    if value not in choices:
        valid = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}={value!r} is unknown; valid: {valid}")


def check_same_shape(
    name: str, shape: tuple[int, ...], other: str, wanted: tuple[int, ...]
) -> None:
    """Raises ValueError, naming both, unless the two shapes are equal."""
    if tuple(shape) != tuple(wanted):
        raise ValueError(f"{name} has shape {tuple(shape)}, but {other} has shape {tuple(wanted)}")


def check_floating(name: str, value: jax.Array) -> None:
    """Raises ValueError, naming the dtype, unless `value` is floating.

    Noise added to integers would be cut off; images must be scaled to [-1, 1] before.
    """
    if not jax.numpy.issubdtype(value.dtype, jax.numpy.floating):
        raise ValueError(f"{name} must be floating, roughly in [-1, 1], got dtype {value.dtype}")
