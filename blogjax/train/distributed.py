"""Several processes as one run: how they find each other, and what only the first one does.

Every process runs the same program. The devices of all form one mesh, each process feeds its own,
and whatever touches files or decides something is done by process 0 and told to the others.
"""

import glob
import importlib.util
import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

T = TypeVar("T")

# The names that jax documents for its own arguments; an index may also come from a Kubernetes Job.
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
JOB_INDEX = "JOB_COMPLETION_INDEX"


class Processes(NamedTuple):
    """How `jax.distributed` is to be started.

    Attributes:
      source: what said so: `"flags"`, `"environment"`, `"slurm"`, `"ompi"` or `"tpu"`.
      coordinator_address: `host:port` of process 0; None where jax finds it out by itself.
      num_processes, process_id: likewise.
    """

    source: str
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


class OtherProcessError(RuntimeError):
    """Process 0 failed, and its error could not be carried over as it was."""


def detect(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Processes | None:
    """Finds out whether this process is one of several.

    In this order: the arguments; `JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`, or `JOB_COMPLETION_INDEX` of a Kubernetes Job for the latter; a SLURM step or
    an Open MPI launch of more than one process; a Cloud TPU.

    Args:
      coordinator_address: `host:port`, free on the host of process 0 and reachable from all.
      num_processes: how many there are. 1 means that there is nothing to start, whatever the
        environment says.
      process_id: which one this is, from 0.
      environment: default `os.environ`.

    Returns:
      How to start `jax.distributed`; None for a process on its own.

    Raises:
      ValueError: if only some of the three are given, a number is none, or the index is out of
        range.

    >>> detect("10.0.0.1:8476", 2, 1, {})
    Processes(source='flags', coordinator_address='10.0.0.1:8476', num_processes=2, process_id=1)
    >>> detect(environment={"SLURM_NTASKS": "1"}) is None
    True
    """
    environment = os.environ if environment is None else environment
    if num_processes == 1 and coordinator_address is None and process_id in (None, 0):
        return None
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if any(value is not None for value in given.values()):
        return _complete("flags", given)
    if ADDRESS in environment:
        index = environment.get(INDEX, environment.get(JOB_INDEX))
        return _complete(
            "environment",
            {
                ADDRESS: environment[ADDRESS],
                COUNT: _number(COUNT, environment.get(COUNT)),
                f"{INDEX} or {JOB_INDEX}": _number(INDEX, index),
            },
        )
    # Of a step, not of the allocation: a shell inside of one is a process on its own, even where it
    # is a step of one task that has the allocation's variables.
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", 1)))
    if "SLURM_STEP_NODELIST" in environment and tasks > 1:
        return Processes("slurm")
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return Processes("ompi")
    if _on_cloud_tpu():
        return Processes("tpu")
    return None


def _complete(source: str, given: Mapping[str, Any]) -> Processes:
    missing = [name for name, value in given.items() if value is None]
    if missing:
        there = ", ".join(name for name in given if name not in missing)
        raise ValueError(f"{there} is given, but {' and '.join(missing)} is missing")
    address, count, index = given.values()
    host, colon, port = address.rpartition(":")
    if not host or not colon or not port.isdigit():
        raise ValueError(f"the coordinator's address must be host:port, got {address!r}")
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"process_id must be in 0..{count - 1} of {count} processes, got {index}")
    return Processes(source, address, count, index)


def _number(name: str, text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {text!r}") from None


def _on_cloud_tpu() -> bool:
    devices = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def start(processes: Processes | None, *, heartbeat_seconds: int = 100) -> None:
    """Starts `jax.distributed`; must come before anything that uses a device.

    Args:
      processes: from `detect`; None does nothing.
      heartbeat_seconds: after so long without a sign of life a process counts as dead, and jax
        ends the others.

    If the processes do not find each other within five minutes, jax ends this one with SIGABRT.

    Raises:
      RuntimeError: if a device has been used already, or it was started before.
      ValueError: if the cluster does not tell what was left to it.
    """
    if processes is None:
        return
    options: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat_seconds}
    if processes.coordinator_address is not None:
        # All is said: no cluster is to be asked.
        options["cluster_detection_method"] = "deactivate"
    elif processes.source in ("slurm", "ompi"):
        options["cluster_detection_method"] = processes.source
    jax.distributed.initialize(
        processes.coordinator_address,
        processes.num_processes,
        processes.process_id,
        **options,
    )


def is_first() -> bool:
    """Whether this process writes the files: the only one, or the first of several."""
    return jax.process_index() == 0


def on_first(function: Callable[[], T]) -> T:
    """What `function()` gives on process 0, on all processes.

    So that all take the same way whatever each of them would see in a folder that they share. All
    must call it at the same place.

    Args:
      function: called on process 0 only; its result must pickle.

    Raises:
      Exception: what `function` raises, on all processes; `OtherProcessError` where that does not
        pickle.

    >>> on_first(lambda: 3)
    3
    """
    if jax.process_count() == 1:
        return function()
    told, error, value = b"", None, None
    if is_first():
        try:
            value = function()
            told = pickle.dumps((True, value))
        except Exception as raised:
            error, told = raised, _pickled_error(raised)
    succeeded, result = pickle.loads(_broadcast(told))
    if error is not None:
        raise error
    if not succeeded:
        raise result
    return result


def _pickled_error(error: Exception) -> bytes:
    try:
        told = pickle.dumps((False, error))
        pickle.loads(told)  # an exception with arguments of its own may come back only half
        return told
    except Exception:
        return pickle.dumps((False, OtherProcessError(f"{type(error).__name__}: {error}")))


def _broadcast(told: bytes) -> bytes:
    from jax.experimental import multihost_utils

    length = multihost_utils.broadcast_one_to_all(np.array(len(told), np.int32))
    padded = np.zeros(int(length), np.uint8)
    if is_first():
        padded[:] = np.frombuffer(told, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8))


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Which flags are raised on any process; all must ask at the same place.

    >>> any_process(True, False)
    (True, False)
    """
    if jax.process_count() == 1:
        return flags
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(np.array(flags))
    return tuple(bool(flag) for flag in np.any(gathered, axis=0))


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"blogjax_{name}")


def fetch(tree: Any) -> Any:
    """The whole arrays of a tree on the host of every process, wherever their parts lie.

    Args:
      tree: arrays on the devices of any processes; all must call it together.

    Returns:
      The tree with numpy arrays.

    >>> fetch({"w": jax.numpy.ones(2)})["w"].tolist()
    [1.0, 1.0]
    """

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        mesh = x.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return jax.jit(lambda y: y, out_shardings=everywhere)(x)

    return jax.device_get(jax.tree.map(whole, tree))
