import gc
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blogjax.train import mesh as meshes
from blogjax.train.checkpoint import (
    Best,
    CheckpointError,
    CheckpointMismatchError,
    Checkpoints,
    fingerprints,
)

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "params": {"w": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=8), jnp.bfloat16),
        "step": jnp.int32(seed),
        "flag": jnp.array(True),
        "key": jax.random.key(seed),
        "empty": None,
    }


def abstract(state, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


@pytest.fixture
def saved(tmp_path):
    warnings = []
    checkpoints = Checkpoints(tmp_path / "c", warn=warnings.append)
    for step in (1, 2):
        checkpoints.save(step, make_state(step))
    checkpoints.wait()
    yield checkpoints, warnings
    checkpoints.close()


def array_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in (folder / "state").rglob("*") if p.is_file()]


def test_round_trip_of_every_kind_of_leaf(saved):
    checkpoints, warnings = saved
    step, state = checkpoints.restore(abstract(make_state()))
    assert step == 2 and warnings == []
    chex.assert_trees_all_equal(state, make_state(2))


def test_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path / "none").restore(abstract(make_state())) is None


def test_restored_on_another_mesh_with_the_same_fingerprint(saved):
    checkpoints, _ = saved
    mesh = meshes.make_mesh(fsdp=4)
    shapes = abstract(make_state())
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        meshes.state_shardings(shapes, mesh, min_size=64),
    )
    _, state = checkpoints.restore(placed)
    assert len(state["params"]["w"].sharding.device_set) == 8
    assert state["params"]["w"].addressable_shards[0].data.shape == (16, 32)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(make_state(2)))


def test_a_state_that_does_not_fit_is_refused_with_paths_shapes_and_dtypes(saved):
    checkpoints, _ = saved
    other = make_state()
    other["params"]["w"] = jnp.zeros((64, 31))
    other["half"] = other["half"].astype(jnp.float32)
    other["new"] = jnp.zeros(3)
    with pytest.raises(CheckpointMismatchError) as info:
        checkpoints.restore(abstract(other))
    text = str(info.value)
    assert "params/w: float32[64, 32] in the checkpoint, float32[64, 31] in the state" in text
    assert "half: bfloat16[8] in the checkpoint, float32[8] in the state" in text
    assert "new: absent in the checkpoint" in text


@pytest.fixture
def broken_reads():
    # Orbax leaves a coroutine behind that complains when it is collected: let it, here.
    yield
    gc.collect()


def damage_by_flipping(path: pathlib.Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_by_truncation(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [damage_by_flipping, damage_by_truncation, pathlib.Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(saved, broken_reads, damage):
    checkpoints, warnings = saved
    largest = max(array_files(checkpoints.folder / "2"), key=lambda p: p.stat().st_size)
    damage(largest)
    step, state = checkpoints.restore(abstract(make_state()))
    assert step == 1
    chex.assert_trees_all_equal(state, make_state(1))
    assert len(warnings) == 1
    assert "checkpoint 2 is damaged" in warnings[0] and "using 1" in warnings[0]
    # Nothing is deleted, and step 2 can be reached and saved again.
    assert (checkpoints.folder.parent / "damaged_checkpoints" / "2").is_dir()
    checkpoints.save(2, make_state(2))
    checkpoints.wait()
    assert checkpoints.restore(abstract(make_state()))[0] == 2


def test_the_description_of_a_checkpoint_is_checked_too(saved):
    checkpoints, warnings = saved
    for path in (checkpoints.folder / "2" / "meta").iterdir():
        path.write_text(path.read_text().replace("params/w", "params/v"))
    assert checkpoints.restore(abstract(make_state()))[0] == 1
    assert "description" in warnings[0]


def test_an_empty_folder_of_a_step_is_passed_over(saved, broken_reads):
    checkpoints, warnings = saved
    (checkpoints.folder / "3").mkdir()
    again = Checkpoints(checkpoints.folder, warn=warnings.append)
    assert again.restore(abstract(make_state()))[0] == 2
    assert "checkpoint 3" in warnings[0]
    again.close()


def test_if_all_are_damaged_nothing_is_started_afresh(saved, broken_reads):
    checkpoints, _ = saved
    for step in ("1", "2"):
        for path in array_files(checkpoints.folder / step):
            path.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read:\n.*2.*\n.*1"):
        checkpoints.restore(abstract(make_state()))
    assert (checkpoints.folder / "2").exists()


def test_the_best_one_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path, best=Best("accuracy", "max"))
    for step, value in enumerate([0.1, 0.9, 0.5, None, 0.6], start=1):
        metrics = None if value is None else {"accuracy": value, "other": 1.0}
        checkpoints.save(step, make_state(step), metrics)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_value() == 0.9
    checkpoints.close()


def test_a_damaged_best_one_does_not_stand_in_the_way(tmp_path, broken_reads):
    """Not even at the start: the metric is read from the checked description."""
    checkpoints = Checkpoints(tmp_path / "c", best=Best("loss"))
    for step, value in [(1, 0.5), (2, 0.1)]:
        checkpoints.save(step, make_state(step), {"loss": value})
    checkpoints.close()
    for path in (tmp_path / "c" / "2").rglob("*"):
        if path.is_file() and path.parent.name == "meta":
            path.write_bytes(b"")
    warnings = []
    again = Checkpoints(tmp_path / "c", best=Best("loss"), warn=warnings.append)
    assert again.best_value() == 0.5
    assert again.restore(abstract(make_state()))[0] == 1
    assert len(warnings) == 1
    again.save(2, make_state(2), {"loss": 0.2})
    again.wait()
    assert again.best_value() == 0.2
    again.close()


def test_a_damaged_best_one_takes_its_metric_along(tmp_path, broken_reads):
    checkpoints = Checkpoints(tmp_path / "c", best=Best("loss"), warn=lambda text: None)
    for step, value in [(1, 0.5), (2, 0.1)]:
        checkpoints.save(step, make_state(step), {"loss": value})
    checkpoints.wait()
    damage_by_flipping(max(array_files(tmp_path / "c" / "2"), key=lambda p: p.stat().st_size))
    assert checkpoints.restore(abstract(make_state()))[0] == 1
    checkpoints.save(2, make_state(2))  # another state 2, which was not evaluated
    checkpoints.wait()
    assert checkpoints.best_value() == 0.5
    checkpoints.close()


def test_a_step_is_never_silently_not_saved(saved):
    checkpoints, _ = saved
    with pytest.raises(CheckpointError, match=r"step 2.*\[1, 2\]"):
        checkpoints.save(2, make_state(2))


def test_a_folder_that_cannot_be_made_is_an_error_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot keep checkpoints in .*file"):
        Checkpoints(tmp_path / "file" / "checkpoints")


FULL_DISK = """
import resource, signal, sys
import jax, jax.numpy as jnp
from blogjax.train.checkpoint import CheckpointError, Checkpoints
checkpoints = Checkpoints(sys.argv[1])
small = {"w": jnp.arange(1000.0)}
checkpoints.save(1, small)
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, {"w": jax.random.normal(jax.random.key(0), (10**6,))})
    checkpoints.wait()
except CheckpointError as error:
    print("told:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
shape = jax.ShapeDtypeStruct((1000,), jnp.float32,
                             sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
step, state = Checkpoints(sys.argv[1]).restore({"w": shape})
assert step == 1 and bool((state["w"] == small["w"]).all())
print("intact")
"""


def test_a_full_disk_is_an_error_and_the_older_checkpoints_are_intact(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert "told: could not write" in done.stdout, done.stdout + done.stderr
    assert "intact: [1]" in done.stdout
    assert done.stdout.strip().endswith("intact")


@settings(max_examples=30)
@given(st.data())
def test_any_single_flipped_bit_changes_the_fingerprint(data):
    dtype = data.draw(st.sampled_from([np.float32, np.int32, np.uint8, np.float16]))
    array = np.random.default_rng(0).integers(0, 100, size=(3, 5)).astype(dtype)
    before = fingerprints({"x": jnp.asarray(array)})["x"]
    raw = bytearray(array.tobytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changed = np.frombuffer(bytes(raw), dtype).reshape(3, 5)
    assert fingerprints({"x": jnp.asarray(changed)})["x"] != before


def test_fingerprint_sees_the_place():
    x = jnp.arange(12.0).reshape(3, 4)
    swapped = x.at[0, 1].set(x[1, 0]).at[1, 0].set(x[0, 1])
    a, b, c = (fingerprints({"x": v})["x"] for v in (x, swapped, x.T))
    assert len({a, b, c}) == 3
