"""State of which every device has its own: marked in the tree, with one row per device.

Under `jax.pmap` and `jax.shard_map` a step sees one device's rows of the batch and a whole copy of
the state. Methods that keep something local, as the workers of distributed Lion keep their
momentum, put it under a `PerDevice`: inside the mapped step its arrays are `[1, ...]`, this
device's row; outside they are `[devices, ...]`, split over the devices like a batch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


class PerDevice(NamedTuple):
    """A part of a state that differs between devices.

    Attributes:
      rows: pytree of arrays with a leading axis, one row per device; one row inside a mapped
        function and from an `init` outside of one.
    """

    rows: Any


def _is_per_device(x: Any) -> bool:
    return isinstance(x, PerDevice)


def map_kinds(own: Any, shared: Any, tree: Any) -> Any:
    """Applies `own` to the leaves under a `PerDevice` and `shared` to all others.

    >>> tree = {"m": PerDevice([1.0, 2.0]), "w": 3.0}
    >>> jax.tree.leaves(map_kinds(lambda x: "own", lambda x: "shared", tree))
    ['own', 'own', 'shared']
    """
    return jax.tree.map(
        lambda x: jax.tree.map(own, x) if _is_per_device(x) else shared(x),
        tree,
        is_leaf=_is_per_device,
    )


def holds_per_device(tree: Any) -> bool:
    """Whether any leaf stands under a `PerDevice`.

    >>> holds_per_device({"m": PerDevice([1.0])}), holds_per_device({"w": 3.0})
    (True, False)
    """
    return any(jax.tree.leaves(map_kinds(lambda _: True, lambda _: False, tree)))


def partition_specs(tree: Any, axis_name: str | tuple[str, ...]) -> Any:
    """How a state is handed to `jax.shard_map`: its `PerDevice` leaves split, the rest whole.

    Args:
      tree: state, or its shapes.
      axis_name: mesh axes over which the rows are dealt out.

    Returns:
      A tree of `PartitionSpec`, for `in_specs` and `out_specs`.

    >>> specs = partition_specs({"m": PerDevice(jnp.zeros((4, 2))), "w": jnp.zeros(2)}, "devices")
    >>> specs["m"].rows == PartitionSpec("devices"), specs["w"] == PartitionSpec()
    (True, True)
    """
    return map_kinds(lambda _: PartitionSpec(axis_name), lambda _: PartitionSpec(), tree)


def spread(tree: Any, devices: int) -> Any:
    """Gives every device the one row that an `init` made.

    Args:
      tree: state whose `PerDevice` leaves are `[1, ...]`.
      devices: how many.

    Returns:
      The same with `[devices, ...]`, all rows equal.

    Raises:
      ValueError: if a leaf has not exactly one row.

    >>> spread(PerDevice(jnp.zeros((1, 3))), 8).rows.shape
    (8, 3)
    """

    def repeat(x: jax.Array) -> jax.Array:
        if jnp.ndim(x) == 0 or jnp.shape(x)[0] != 1:
            raise ValueError(f"a per-device leaf must start as one row, got shape {jnp.shape(x)}")
        return jnp.broadcast_to(x, (devices, *x.shape[1:]))

    return map_kinds(repeat, lambda x: x, tree)


def device_varying(tree: Any, axis_name: str | Sequence[str] | None) -> Any:
    """The same values, but seen as this device's own.

    Under `shard_map(check_vma=True)` jax sums gradients by replicated parameters by itself, and a
    mean over them would be too large by the number of devices. By varying ones it does not.

    Args:
      tree: pytree of arrays.
      axis_name: mapped axes; None returns the tree as it is.

    >>> device_varying({"w": jnp.ones(2)}, None)["w"].tolist()
    [1.0, 1.0]
    """
    if axis_name is None:
        return tree
    names = axis_name if isinstance(axis_name, str) else tuple(axis_name)
    here = jax.lax.axis_index(names) >= 0
    return jax.tree.map(lambda x: jnp.where(here, x, x), tree)
