import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from blogjax.train import mesh as meshes
from blogjax.train.state import sizes


def test_mesh_of_all_devices():
    assert dict(meshes.make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(meshes.make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4}


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (None, 3), (8, 2), (0, 1), (None, 16)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(data, fsdp):
    with pytest.raises(ValueError, match=r"needs \d+ devices, but there are 8"):
        meshes.make_mesh(data, fsdp)


def test_batches_divide_over_devices_and_processes():
    mesh = meshes.make_mesh(fsdp=2)
    meshes.check_batch_size(16, mesh)
    with pytest.raises(ValueError, match=r"batch of 20 .* data=4 x fsdp=2 = 8 .* 16 and 24"):
        meshes.check_batch_size(20, mesh)
    with pytest.raises(ValueError, match=r"batch of 8 .* over 3 processes; .* 6 and 9"):
        meshes.check_batch_size(8, mesh, process_count=3)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 128), P(None, "fsdp")),
        ((128, 64), P("fsdp")),
        ((128, 128), P("fsdp")),
        ((3, 3, 64, 62), P(None, None, "fsdp")),
        ((63, 129), P()),
        ((16,), P()),
        ((), P()),
    ],
)
def test_the_largest_axis_that_divides_is_split(shape, spec):
    mesh = meshes.make_mesh(fsdp=4)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert meshes.state_shardings(leaf, mesh).spec == spec
    assert meshes.state_shardings(leaf, meshes.make_mesh()).spec == P()


def test_rows_are_split_over_both_axes():
    mesh = meshes.make_mesh(fsdp=2)
    batch = meshes.put_batch({"x": np.arange(16.0)}, mesh)
    shards = [s.data.tolist() for s in batch["x"].addressable_shards]
    assert sorted(shards) == [[2.0 * i, 2.0 * i + 1] for i in range(8)]


def test_sizes_per_device():
    import dataclasses

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class S:
        step: jax.Array
        params: jax.Array
        ema: None

    mesh = meshes.make_mesh(fsdp=4)
    shapes = S(
        jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((64, 128), jnp.bfloat16), None
    )
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        meshes.state_shardings(shapes, mesh),
    )
    got = sizes(placed)
    assert list(got) == ["step", "params"]
    assert (got["params"].entries, got["params"].bytes, got["params"].bytes_per_device) == (
        8192, 16384, 4096,
    )  # fmt: skip
