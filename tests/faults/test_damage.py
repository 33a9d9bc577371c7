"""Every file of a checkpoint, damaged in every way: detected, or of no consequence."""

import gc
import pathlib
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blogjax.train import mesh as meshes
from blogjax.train.checkpoint import CheckpointError, Checkpoints, fingerprints

pytestmark = [
    pytest.mark.slow,  # hundreds of restores
    # Orbax leaves coroutines behind when it cannot read.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def flip(where: float):
    def flip_one_bit(path: pathlib.Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(where * (len(data) - 1))] ^= 1 << int(8 * where) % 8
        path.write_bytes(data)

    return flip_one_bit


def cut(length):
    return lambda path: path.write_bytes(path.read_bytes()[: length(path.stat().st_size)])


DAMAGE = {
    "one bit at the start": flip(0.0),
    "one bit in the first third": flip(0.3),
    "one bit in the middle": flip(0.5),
    "one bit in the last third": flip(0.8),
    "one bit at the end": flip(1.0),
    "emptied": cut(lambda n: 0),
    "cut to half": cut(lambda n: n // 2),
    "cut by a byte": cut(lambda n: n - 1),
    "deleted": pathlib.Path.unlink,
}


def make_state(step: int, mesh) -> dict:
    rng = np.random.default_rng(step)
    split = jax.NamedSharding(mesh, jax.P("fsdp"))
    return {
        "params": jax.device_put(rng.normal(size=(64, 300)).astype(np.float32), split),
        "moments": jax.device_put(jnp.asarray(rng.normal(size=(64, 300)), jnp.bfloat16), split),
        "step": jax.device_put(jnp.int32(step), meshes.replicated(mesh)),
    }


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh(fsdp=4, devices=jax.devices()[:4])


@pytest.fixture(scope="module")
def sound(tmp_path_factory, mesh):
    """Two checkpoints; what holds the second one's fingerprints."""
    folder = tmp_path_factory.mktemp("sound")
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, make_state(step, mesh))
    checkpoints.close()
    return folder


def test_every_file_damaged_in_every_way(tmp_path, sound, mesh, record_property):
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(1, mesh)
    )
    expected = {step: fingerprints(make_state(step, mesh)) for step in (1, 2)}
    newest = sound / "checkpoints" / "2"
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    assert len(files) >= 10
    outcomes = {"detected": 0, "of no consequence": 0}
    for file in files:
        for name, damage in DAMAGE.items():
            folder = tmp_path / "damaged"
            shutil.copytree(sound, folder)
            path = folder / "checkpoints" / "2" / file
            if path.stat().st_size == 0 and damage is not pathlib.Path.unlink:
                shutil.rmtree(folder)
                continue
            damage(path)
            told: list[str] = []
            checkpoints = Checkpoints(folder / "checkpoints", warn=told.append)
            step, state = checkpoints.restore(abstract)
            assert fingerprints(state) == expected[step], (file, name)
            # What is bad is told of, set aside and not deleted.
            assert (step == 1) == bool(told) == (folder / "damaged_checkpoints" / "2").is_dir()
            outcomes["detected" if step == 1 else "of no consequence"] += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                checkpoints.close()
                gc.collect()
            shutil.rmtree(folder)
    assert outcomes["detected"] > len(files)
    record_property("files of a checkpoint", len(files))
    record_property("damages", sum(outcomes.values()))
    record_property("detected, the checkpoint before taken", outcomes["detected"])
    record_property("of no consequence, restored bit by bit", outcomes["of no consequence"])


def test_where_all_checkpoints_are_damaged_nothing_is_changed(tmp_path, sound, mesh):
    folder = tmp_path / "all"
    shutil.copytree(sound, folder)
    for path in (folder / "checkpoints").rglob("*"):
        if path.is_file() and path.stat().st_size:
            flip(0.5)(path)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(1, mesh)
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    with pytest.raises(CheckpointError, match="nothing was changed"):
        checkpoints.restore(abstract)
    checkpoints.close()
    gc.collect()
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
