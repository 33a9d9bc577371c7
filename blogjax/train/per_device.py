"""The per-device view: a task under `jax.pmap` or `jax.shard_map` instead of plain `jax.jit`.

Under `jit` a step sees the global batch and the compiler places the collectives. Here it runs once
per device, sees that device's rows, and averages over the axis that its task was built with. The
numbers are the same; what differs is who wrote the collectives, so this is the view for methods
that communicate themselves and for codebases built on `pmap`.

Either way the functions made here take and give the global arrays of the other view: the loop,
checkpoints and a resumed run need not know which one is in use. What of a state stands under a
`core.per_device.PerDevice` exists in these views only: one row per device, split over all of them.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from blogjax.core.per_device import map_kinds, partition_specs
from blogjax.train.fingerprints import leaf_fingerprints
from blogjax.train.task import Task

View = Literal["jit", "pmap", "shard_map"]
AXIS = "devices"


def axis_name(view: str) -> str | None:
    """The `axis_name` to build a task with: None for the view `jit`, `AXIS` for the others.

    Raises:
      ValueError: if there is no such view, listing those there are.

    >>> axis_name("jit"), axis_name("pmap")
    (None, 'devices')
    """
    if view not in get_args(View):
        raise ValueError(f"the view must be one of {', '.join(get_args(View))}, got {view!r}")
    return None if view == "jit" else AXIS


def check_view(task: Task, mesh: Mesh, view: str) -> None:
    """Refuses a task or a mesh that does not go with the view.

    Raises:
      ValueError: if a per-device view is asked of a task without `axis_name` or of a mesh that
        splits parameters, `jit` of a task with one, or if there is no such view.
    """
    if axis_name(view) is None:
        if task.axis_name is not None:
            raise ValueError(
                f"the task was built with axis_name={task.axis_name!r} and needs the view pmap or "
                "shard_map, got 'jit'; for jit build it without"
            )
        return
    if task.axis_name is None:
        raise ValueError(
            f"the view {view!r} needs a task built with axis_name, such as axis_name={AXIS!r}, "
            "but this one has none: its devices would train apart from each other"
        )
    if mesh.shape["fsdp"] > 1:
        raise ValueError(
            f"under the view {view!r} every device holds the whole state, but the mesh splits "
            f"parameters over fsdp={mesh.shape['fsdp']}; take fsdp=1 or the view 'jit'"
        )
    if view == "pmap" and jax.process_count() > 1:
        raise ValueError(
            f"the view 'pmap' is for one process, but there are {jax.process_count()}; "
            "'shard_map' is the same step on all of them"
        )


def on_each_device(
    function: Callable[..., Any],
    axis: str,
    mesh: Mesh,
    view: str,
    *,
    state: Any = None,
    returns_state: bool = False,
) -> Any:
    """Maps `function(state, batch, key) -> replicated` over the devices of a mesh.

    Args:
      function: what a device does with the state, its own rows and the key. Its results must be
        the same on all devices, as means and sums over `axis` are, `PerDevice` leaves excepted.
      axis: the name it communicates over.
      mesh: where; the rows are dealt out in the order of `mesh.devices`.
      view: `"pmap"` or `"shard_map"`.
      state: the state's shapes, which tell what of it is `PerDevice`; None where nothing is.
      returns_state: whether the result is `(state, replicated)`.

    Returns:
      A function of the state, the global batch and the key, to be called under `jit`.
    """
    devices = mesh.devices.flatten()
    whole, split = PartitionSpec(), PartitionSpec(axis)
    if view == "pmap":
        axes = map_kinds(lambda _: 0, lambda _: None, state)
        mapped = jax.pmap(
            function,
            axis,
            in_axes=(axes, 0, None),
            out_axes=(axes, None) if returns_state else None,
            devices=list(devices),
        )

        def on_global_batch(own: Any, batch: Any, key: jax.Array) -> Any:
            n = len(devices)
            rows = jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch)
            # pmap takes the leading axis off; shard_map leaves it, of length 1.
            out = mapped(map_kinds(lambda x: x[:, None], lambda x: x, own), rows, key)
            if not returns_state:
                return out
            return map_kinds(lambda x: x[:, 0], lambda x: x, out[0]), out[1]

        return on_global_batch
    specs = partition_specs(state, axis)
    # With check_vma=True jax would sum the gradients itself, and the task's own mean over them
    # would leave them too large by the number of devices, in silence.
    return jax.shard_map(
        function,
        mesh=Mesh(devices, (axis,)),
        in_specs=(specs if state is not None else whole, split, whole),
        out_specs=(specs, whole) if returns_state else whole,
        check_vma=False,
    )


def differing_leaves(axis: str, mesh: Mesh, view: str, state: Any = None) -> Callable[..., Any]:
    """Returns `f(state, devices) -> bool [leaves]`: which leaves are not everywhere the same.

    A step that forgets to average leaves every device with a state of its own in what counts as
    one replicated array, and nothing else would show it. `PerDevice` leaves may differ.

    Args:
      axis: as in `on_each_device`.
      mesh: likewise.
      view: likewise.
      state: likewise.

    Returns:
      A jitted function; `devices` is any array with one row per device.
    """

    def differ(own: Any, rows: jax.Array, key: jax.Array) -> jax.Array:
        del rows, key
        shared = jnp.array(jax.tree.leaves(map_kinds(lambda _: False, lambda _: True, own)))
        prints = jnp.stack(leaf_fingerprints(jax.tree.leaves(own)))
        return shared & (jax.lax.pmax(prints, axis) != jax.lax.pmin(prints, axis))

    mapped = on_each_device(differ, axis, mesh, view, state=state)
    return jax.jit(lambda own, devices: mapped(own, devices, jnp.zeros(())))
