"""Devices: one mesh with the axes `data` and `fsdp`, and where arrays lie on it.

The same program runs on one CPU, eight GPUs or many hosts. Batches are split over both axes;
parameters may be split over `fsdp` by their shape; everything else is replicated.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from blogjax.core.per_device import map_kinds
from blogjax.train.task import HostBatch

AXES = ("data", "fsdp")


def make_mesh(
    data: int | None = None, fsdp: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """Lays the devices out as `data x fsdp`.

    Axis types are Auto: the compiler places the collectives, and nothing in a step names an axis.

    Args:
      data: groups that hold the same parameters; None takes all the devices that `fsdp` leaves.
      fsdp: over how many devices each parameter is split.
      devices: default all of `jax.devices()`.

    Raises:
      ValueError: if `data * fsdp` is not the number of devices.

    >>> dict(make_mesh(1, devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    if data is None:
        data = max(len(devices) // max(fsdp, 1), 1)
    if data < 1 or fsdp < 1 or data * fsdp != len(devices):
        raise ValueError(
            f"a mesh of data={data} x fsdp={fsdp} needs {data * fsdp} devices, "
            f"but there are {len(devices)}"
        )
    return jax.make_mesh((data, fsdp), AXES, (AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Everywhere the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(abstract: Any, mesh: Mesh, *, min_size: int = 2**12) -> Any:
    """Chooses for each leaf whether and where it is split over `fsdp`.

    The largest axis that `fsdp` divides is split, the first one among equals; leaves of fewer than
    `min_size` entries and leaves without such an axis are replicated. The choice depends on the
    shape alone, so parameters, their moments and their average lie alike. The rows of `PerDevice`
    leaves are split over all devices.

    Args:
      abstract: tree of arrays or `ShapeDtypeStruct`s.
      mesh: from `make_mesh`.
      min_size: smallest number of entries worth splitting.

    Returns:
      Tree of `NamedSharding`.
    """
    fsdp = mesh.shape["fsdp"]

    def choose(leaf: Any) -> NamedSharding:
        axes = [i for i, n in enumerate(leaf.shape) if n % fsdp == 0]
        if fsdp == 1 or not axes or math.prod(leaf.shape) < min_size:
            return replicated(mesh)
        largest = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(
            mesh, PartitionSpec(*("fsdp" if i == largest else None for i in range(largest + 1)))
        )

    return map_kinds(lambda _: batch_sharding(mesh), choose, abstract)


def sharding_of(leaf: Any) -> jax.sharding.Sharding:
    """Where an array lies, or is to lie: on the first device where a leaf does not say it.

    >>> sharding_of(jax.ShapeDtypeStruct((2,), "float32")) == sharding_of(np.ones(2))
    True
    """
    given = getattr(leaf, "sharding", None)
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if given is None else given


def check_batch_size(batch_size: int, mesh: Mesh, process_count: int | None = None) -> None:
    """Refuses a global batch that the devices or the processes cannot share evenly.

    Raises:
      ValueError: with the numbers.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    processes = jax.process_count() if process_count is None else process_count
    if batch_size % (data * fsdp):
        raise ValueError(
            f"a batch of {batch_size} does not divide over data={data} x fsdp={fsdp} "
            f"= {data * fsdp} devices; the nearest sizes are {_nearest(batch_size, data * fsdp)}"
        )
    if batch_size % processes:
        raise ValueError(
            f"a batch of {batch_size} does not divide over {processes} processes; "
            f"the nearest sizes are {_nearest(batch_size, processes)}"
        )


def _nearest(size: int, divisor: int) -> str:
    below, above = size // divisor * divisor, -(-size // divisor) * divisor
    return f"{below} and {above}" if below else str(above)


def put_key(key: jax.Array, mesh: Mesh) -> jax.Array:
    """Puts a typed key on every device, those of other processes included.

    >>> mesh = make_mesh(1, devices=jax.devices()[:1])
    >>> put_key(jax.random.key(0), mesh).sharding.is_fully_replicated
    True
    """
    # jax moves plain arrays to devices of other processes, but not keys.
    data = jax.device_put(jax.random.key_data(key), replicated(mesh))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def put_batch(batch: HostBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows on its devices, as its part of the global batch."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
        for name, rows in batch.items()
    }


class BatchPutter:
    """`put_batch` for the batches of one source, each checked against what was announced.

    Args:
      mesh: the devices.
      batch_size: rows of the global batch.

    Raises:
      ValueError: when called with a batch that has not this process's share of the rows, or other
        names, shapes or dtypes than the first one.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        self._mesh, self._batch_size = mesh, batch_size
        self._first: dict[str, Any] | None = None

    def __call__(self, batch: HostBatch) -> dict[str, jax.Array]:
        """Checks and puts one batch."""
        rows = self._batch_size // jax.process_count()
        layout = {name: (np.shape(x), str(np.asarray(x).dtype)) for name, x in batch.items()}
        for name, (shape, _) in layout.items():
            if not shape or shape[0] != rows:
                raise ValueError(
                    f"batch_size {self._batch_size} over {jax.process_count()} process(es) means "
                    f"{rows} rows here, but {name} has shape {shape}"
                )
        if self._first is None:
            self._first = layout
        for name in sorted(layout.keys() | self._first.keys()):
            if layout.get(name) != self._first.get(name):
                raise ValueError(
                    f"{name} is {layout.get(name, 'absent')} in this batch, "
                    f"{self._first.get(name, 'absent')} in the first one"
                )
        return put_batch(batch, self._mesh)
