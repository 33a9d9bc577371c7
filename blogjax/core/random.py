"""Random numbers that belong to an example, not to its place in a device's batch.

A key array of shape `[B]` gives every example its own stream. Drawn that way, the numbers are the
same under jit, pmap and any number of devices or processes.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Key = jax.Array  # a typed key array, from `jax.random.key`


def _check_typed(key: Key) -> None:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"a typed key is needed, from jax.random.key, got an array of dtype {key.dtype}; "
            "jax.random.wrap_key_data turns the result of PRNGKey into one"
        )


def fold_in_rows(key: Key, row: jax.Array) -> Key:
    """Returns one key per example, `fold_in(key, row_i)`.

    Args:
      key: a scalar typed key.
      row: `[B]` int32, the example's index in the global batch.

    Returns:
      Typed key array `[B]`.

    >>> import jax
    >>> fold_in_rows(jax.random.key(0), jax.numpy.arange(4)).shape
    (4,)
    """
    _check_typed(key)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row)


def split_keys(key: Key, num: int = 2) -> tuple[Key, ...]:
    """Splits a scalar key, or every key of an array, into `num` keys of the same shape."""
    _check_typed(key)
    if key.ndim == 0:
        return tuple(jax.random.split(key, num))
    split = jax.vmap(lambda k: jax.random.split(k, num), out_axes=0)(key.reshape(-1))
    return tuple(split[:, i].reshape(key.shape) for i in range(num))


def _draw(key: Key, shape: Sequence[int], draw: Callable[[Key, tuple[int, ...]], jax.Array]):
    _check_typed(key)
    shape = tuple(shape)
    if key.ndim == 0:
        return draw(key, shape)
    if key.shape != shape[: key.ndim]:
        raise ValueError(f"keys of shape {key.shape} do not lead the shape {shape} to draw")
    rest = shape[key.ndim :]
    flat = jax.vmap(lambda k: draw(k, rest))(key.reshape(-1))
    return flat.reshape(shape)


def normal(key: Key, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Standard normal numbers of `shape`, from one key or from one key per leading index.

    Args:
      key: a scalar key, or a key array whose shape leads `shape`.
      shape: what to draw.
      dtype: floating dtype.

    Raises:
      ValueError: if the keys' shape does not lead `shape`.

    >>> import jax
    >>> keys = fold_in_rows(jax.random.key(0), jax.numpy.arange(4))
    >>> normal(keys, (4, 8, 8, 1)).shape
    (4, 8, 8, 1)
    """
    return _draw(key, shape, lambda k, s: jax.random.normal(k, s, dtype))


def randint(key: Key, shape: Sequence[int], minval: int, maxval: int) -> jax.Array:
    """int32 integers uniform on `[minval, maxval)`; keys as in `normal`."""
    return _draw(key, shape, lambda k, s: jax.random.randint(k, s, minval, maxval, jnp.int32))


def uniform(key: Key, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Numbers uniform on `[0, 1)`; keys as in `normal`."""
    return _draw(key, shape, lambda k, s: jax.random.uniform(k, s, dtype))
