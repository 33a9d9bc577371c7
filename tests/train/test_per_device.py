import jax
import pytest

from blogjax.train import mesh as meshes
from blogjax.train import per_device
from blogjax.train.task import Task

TASK = Task(lambda key: None, lambda state, batch, key: (state, {}), axis_name="rows")


def test_pmap_is_for_one_process(monkeypatch):
    mesh = meshes.make_mesh()
    per_device.check_view(TASK, mesh, "pmap")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="for one process, but there are 2; 'shard_map'"):
        per_device.check_view(TASK, mesh, "pmap")
    per_device.check_view(TASK, mesh, "shard_map")


def test_unknown_views_are_named():
    with pytest.raises(ValueError, match="one of jit, pmap, shard_map, got 'vmap'"):
        per_device.check_view(TASK, meshes.make_mesh(), "vmap")
