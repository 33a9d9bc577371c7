import jax
import numpy as np
import pytest

from blogjax.train import distributed
from blogjax.train.distributed import Processes, detect

JAX = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "2"}


def without(names, *left_out):
    return {k: v for k, v in names.items() if k not in left_out}


@pytest.fixture(autouse=True)
def no_tpu(monkeypatch):
    monkeypatch.setattr(distributed, "_on_cloud_tpu", lambda: False)


@pytest.mark.parametrize(
    ("arguments", "environment", "found"),
    [
        ((), {}, None),
        (("a:80", 2, 1), {}, Processes("flags", "a:80", 2, 1)),
        (("[::1]:80", 1, 0), {}, Processes("flags", "[::1]:80", 1, 0)),
        (("a:80", 2, 0), JAX | SLURM, Processes("flags", "a:80", 2, 0)),
        ((), JAX, Processes("environment", "h:1", 4, 3)),
        ((), JAX | SLURM | OMPI, Processes("environment", "h:1", 4, 3)),
        # An indexed Job; the explicit name wins.
        (
            (),
            without(JAX, "JAX_PROCESS_ID") | {"JOB_COMPLETION_INDEX": "2"},
            Processes("environment", "h:1", 4, 2),
        ),
        ((), JAX | {"JOB_COMPLETION_INDEX": "2"}, Processes("environment", "h:1", 4, 3)),
        # An index alone is any indexed Job's.
        ((), {"JOB_COMPLETION_INDEX": "2"}, None),
        ((), SLURM, Processes("slurm")),
        ((), SLURM | OMPI, Processes("slurm")),
        ((), SLURM | {"SLURM_NTASKS": "1"}, None),
        # The shell that salloc gives is a step of one task.
        ((), SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ((), SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, Processes("slurm")),
        # Inside an allocation, but not of a step.
        ((), {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]"}, None),
        ((), OMPI, Processes("ompi")),
        ((), {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        # One process on its own, wherever it is.
        ((None, 1, None), JAX, None),
        ((None, 1, 0), SLURM, None),
    ],
)
def test_who_says_that_there_are_several(arguments, environment, found):
    assert detect(*arguments, environment=environment) == found


def test_a_cloud_tpu_is_asked_last(monkeypatch):
    monkeypatch.setattr(distributed, "_on_cloud_tpu", lambda: True)
    assert detect(environment={}) == Processes("tpu")
    assert detect(environment=SLURM) == Processes("slurm")
    assert detect(num_processes=1, environment={}) is None


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (
            ("a:80", None, None),
            {},
            "coordinator_address is given, but num_processes and process_id",
        ),
        ((None, 2, None), {}, "num_processes is given, but coordinator_address and process_id"),
        ((None, None, 0), {}, "process_id is given, but coordinator_address and num_processes"),
        ((None, 1, 3), {}, "num_processes, process_id is given, but coordinator_address"),
        (("a:80", 2, 2), {}, "process_id must be in 0..1 of 2 processes, got 2"),
        (("a:80", 2, -1), {}, "process_id must be in 0..1 of 2 processes, got -1"),
        (("a", 2, 0), {}, "must be host:port, got 'a'"),
        ((":80", 2, 0), {}, "must be host:port, got ':80'"),
        (("a:http", 2, 0), {}, "must be host:port, got 'a:http'"),
        ((), without(JAX, "JAX_NUM_PROCESSES"), "but JAX_NUM_PROCESSES is missing"),
        ((), without(JAX, "JAX_PROCESS_ID"), "JAX_PROCESS_ID or JOB_COMPLETION_INDEX is missing"),
        ((), JAX | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES must be a number, got 'two'"),
        ((), JAX | {"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID must be a number, got ''"),
        ((), JAX | {"JAX_PROCESS_ID": "4"}, "process_id must be in 0..3 of 4 processes, got 4"),
    ],
)
def test_what_is_at_odds_is_refused(arguments, environment, message):
    with pytest.raises(ValueError, match=message):
        detect(*arguments, environment=environment)


@pytest.mark.parametrize(
    ("found", "positional", "method"),
    [
        (Processes("flags", "a:80", 2, 1), ("a:80", 2, 1), "deactivate"),
        (Processes("environment", "h:1", 4, 3), ("h:1", 4, 3), "deactivate"),
        (Processes("slurm"), (None, None, None), "slurm"),
        (Processes("ompi"), (None, None, None), "ompi"),
        (Processes("tpu"), (None, None, None), None),
    ],
)
def test_what_jax_is_told(monkeypatch, found, positional, method):
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: told.append((a, k)))
    distributed.start(None)
    assert not told
    distributed.start(found, heartbeat_seconds=7)
    [(arguments, options)] = told
    assert arguments == positional
    assert options.pop("heartbeat_timeout_seconds") == 7
    assert options.pop("cluster_detection_method", None) == method
    assert not options


def test_one_process_decides_by_itself():
    assert distributed.is_first()
    assert distributed.on_first(lambda: [1, "a"]) == [1, "a"]
    with pytest.raises(KeyError, match="lost"):
        distributed.on_first(lambda: {}["lost"])
    assert distributed.any_process() == ()
    assert distributed.any_process(False, True) == (False, True)
    distributed.barrier("alone")


def test_fetch_gives_whole_arrays_whatever_their_sharding():
    mesh = jax.make_mesh((8,), ("data",))
    x = np.arange(16.0, dtype=np.float32)
    parts = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    tree = distributed.fetch({"parts": parts, "number": 3, "host": x})
    assert isinstance(tree["parts"], np.ndarray) and tree["number"] == 3
    np.testing.assert_array_equal(tree["parts"], x)
    np.testing.assert_array_equal(tree["host"], x)
