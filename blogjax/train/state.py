"""The making of a state: shapes first, then where it lies, then one compiled `init`."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from blogjax.core.per_device import map_kinds, spread
from blogjax.train.mesh import put_key, replicated, state_shardings
from blogjax.train.task import Task, leaf_paths


def abstract_state(task: Task, mesh: Mesh) -> Any:
    """The state's shapes, dtypes and shardings; nothing is computed.

    Returns:
      The state with `jax.ShapeDtypeStruct`s for arrays; `PerDevice` leaves have a row per device.

    Raises:
      ValueError: if the state has no `step` of shape `[]` and dtype int32, or if a part of it is
        `PerDevice` and the task has no axis to map over.
    """
    # A key on the mesh, as `init_state` gets one: then `init` is traced once for both.
    key = put_key(jax.random.key(0), mesh)
    abstract = jax.eval_shape(_spread_init(task, mesh), key)
    step = getattr(abstract, "step", None)
    if step is None or step.shape != () or step.dtype != "int32":
        raise ValueError(
            f"a state needs a field `step`, int32 of shape (), got {step} "
            f"in a {type(abstract).__name__}"
        )
    own = jax.tree.leaves(map_kinds(lambda _: True, lambda _: False, abstract))
    if any(own) and task.axis_name is None:
        path = leaf_paths(abstract)[own.index(True)]
        raise ValueError(
            f"{path} differs between devices: build the task with axis_name, for the view pmap or "
            "shard_map; it has none"
        )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        state_shardings(abstract, mesh),
    )


def _spread_init(task: Task, mesh: Mesh) -> Callable[[jax.Array], Any]:
    return lambda key: spread(task.init(key), mesh.size)


def init_state(task: Task, abstract: Any, mesh: Mesh, key: jax.Array) -> Any:
    """Computes the first state in place: every device makes only what it will hold.

    Args:
      task: its `init` is compiled once, on CPU without optimisation since it runs but once.
      abstract: from `abstract_state`.
      mesh: the devices.
      key: scalar typed key.
    """
    options = {}
    if next(iter(mesh.devices.flat)).platform == "cpu":
        options["xla_backend_optimization_level"] = 0
    init = jax.jit(
        _spread_init(task, mesh),
        in_shardings=replicated(mesh),
        out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
        compiler_options=options,
    )
    return init(key)


@dataclasses.dataclass(frozen=True)
class Size:
    """How large one field of a state is: entries, bytes in all, bytes on each device."""

    entries: int
    bytes: int
    bytes_per_device: int


def sizes(abstract: Any) -> dict[str, Size]:
    """Measures each field of a state, fields without arrays left out.

    A state that is no dataclass counts as one field.

    Args:
      abstract: a state of `ShapeDtypeStruct`s with shardings, or of arrays.

    Returns:
      `{field name: Size}` in the order of the fields.
    """
    fields = {"state": abstract}
    if dataclasses.is_dataclass(abstract):
        fields = {f.name: getattr(abstract, f.name) for f in dataclasses.fields(abstract)}
    result = {}
    for name, tree in fields.items():
        leaves = jax.tree.leaves(tree)
        if not leaves:
            continue
        result[name] = Size(
            entries=sum(math.prod(x.shape) for x in leaves),
            bytes=sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves),
            bytes_per_device=sum(
                math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves
            ),
        )
    return result
