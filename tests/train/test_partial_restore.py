"""Parts of a checkpoint taken into other states: what is taken, what is not, what is said."""

import gc
import json
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from blogjax.data.batches import Batches
from blogjax.tasks.gradient import LossOutput, gradient_task
from blogjax.train import mesh as meshes
from blogjax.train.checkpoint import CheckpointError, Checkpoints
from blogjax.train.loop import fit
from blogjax.train.partial_restore import Mismatch, restore_partial
from blogjax.train.state import abstract_state, init_state

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

RNG = np.random.default_rng(0)
TRUNK, HEAD, AVERAGE = (
    RNG.normal(size=s).astype(np.float32) for s in [(64, 128), (128, 10), (64, 128)]
)


def checkpointed():
    mesh = meshes.make_mesh(fsdp=4)
    state = {
        "params": {"trunk": jnp.asarray(TRUNK), "head": jnp.asarray(HEAD)},
        "ema": {"trunk": jnp.asarray(AVERAGE), "head": jnp.asarray(HEAD + 1)},
        "moments": [jnp.ones(3), jnp.full(3, 2.0)],
        "half": jnp.asarray(TRUNK[0], jnp.bfloat16),
        "key": jax.random.key(5),
        "step": jnp.int32(40),
    }
    return jax.device_put(state, meshes.state_shardings(state, mesh))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(run / "checkpoints", keep=9)
    checkpoints.save(20, {"old": jnp.ones(2)})
    checkpoints.save(40, checkpointed())
    checkpoints.close()
    return run


def state_of(head=3):
    return {"params": {"trunk": jnp.zeros((64, 128)), "head": jnp.full((128, head), 7.0)},
            "step": jnp.int32(0)}  # fmt: skip


def test_what_fits_is_taken_and_the_rest_is_named(folder):
    given = {**state_of(), "new": jnp.ones(2)}
    state, report = restore_partial(folder, given)
    np.testing.assert_array_equal(state["params"]["trunk"], TRUNK)
    assert int(state["step"]) == 40
    assert state["params"]["head"] is given["params"]["head"] and state["new"] is given["new"]
    assert (report.folder, report.step) == (folder / "checkpoints", 40)
    assert report.taken == {"params/trunk": "params/trunk", "step": "step"}
    assert report.mismatched == {
        "params/head": Mismatch("params/head", "float32[128, 10]", "float32[128, 3]")
    }
    assert report.missing == {"new": "new"} and report.excluded == ()
    assert set(report.left_over) == {
        "ema/trunk", "ema/head", "moments/0", "moments/1", "half", "key"
    }  # fmt: skip
    assert str(report).splitlines() == [
        f"2 of 4 leaves taken from step 40 of {folder}/checkpoints:",
        "  params/trunk",
        "  step",
        "mismatched, left as they were:",
        "  params/head: float32[128, 10] in the checkpoint, float32[128, 3] in the state",
        "missing in the checkpoint, left as they were:",
        "  new",
        "left over in the checkpoint:",
        "  ema (2 leaves)",
        "  half",
        "  key",
        "  moments (2 leaves)",
    ]


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (8, 1), (4, 2)])
def test_under_any_mesh_from_shapes_or_arrays(folder, data, fsdp):
    mesh = meshes.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    state = {"params": {"trunk": jnp.zeros((64, 128))}, "key": jax.random.key(0)}
    placed = jax.device_put(state, meshes.state_shardings(state, mesh))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed
    )
    for asked in (placed, abstract):
        got, report = restore_partial(folder / "checkpoints", asked)
        assert len(report.taken) == 2
        np.testing.assert_array_equal(got["params"]["trunk"], TRUNK)
        assert jnp.all(jax.random.key_data(got["key"]) == np.array([0, 5]))
        trunk = got["params"]["trunk"]
        assert trunk.sharding.spec == (P(None, "fsdp") if fsdp > 1 else P())
        assert {s.data.shape for s in trunk.addressable_shards} == {(64, 128 // fsdp)}
        assert len(trunk.sharding.device_set) == data * fsdp


def test_shapes_that_are_not_taken_stay_shapes(folder):
    asked = {"params": jax.eval_shape(lambda: {"trunk": jnp.zeros((64, 128)), "x": jnp.ones(2)})}
    state, _ = restore_partial(folder, asked)
    np.testing.assert_array_equal(state["params"]["trunk"], TRUNK)
    assert state["params"]["x"] == jax.ShapeDtypeStruct((2,), jnp.float32)


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"include": "params"}, ["params/head", "params/trunk"]),
        ({"include": r".*/trunk"}, ["params/trunk"]),
        ({"include": ["step", r"params/h\w+"]}, ["params/head", "step"]),
        ({"exclude": "params"}, ["step"]),
        ({"include": "params", "exclude": ".*/head"}, ["params/trunk"]),
    ],
)
def test_nodes_are_chosen_by_patterns(folder, options, taken):
    given = state_of(head=10)
    state, report = restore_partial(folder, given, **options)
    assert sorted(report.taken) == taken
    assert sorted({*report.taken, *report.excluded}) == ["params/head", "params/trunk", "step"]
    for path, (got, before) in {
        "params/head": (state["params"]["head"], given["params"]["head"]),
        "params/trunk": (state["params"]["trunk"], given["params"]["trunk"]),
        "step": (state["step"], given["step"]),
    }.items():
        assert (got is before) == (path not in taken), path


def test_parameters_from_the_average(folder):
    given = {**state_of(10), "ema": state_of(10)["params"]}
    state, report = restore_partial(
        folder, given, include=["params", "ema"], rename={"params": "ema"}
    )
    for name in ("params", "ema"):
        np.testing.assert_array_equal(state[name]["trunk"], AVERAGE)
        np.testing.assert_array_equal(state[name]["head"], HEAD + 1)
    assert str(report).splitlines()[1:3] == ["  ema (2 leaves)", "  params <- ema (2 leaves)"]
    # Two leaves of one origin: a step that donates its state must not find one buffer twice.
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    np.testing.assert_array_equal(step(state)["ema"]["trunk"], AVERAGE + 1)


def test_the_longest_name_counts_and_the_root_is_empty(folder):
    given = {"trunk": jnp.zeros((64, 128)), "head": {"kernel": jnp.zeros((128, 10))}}
    names = {"": "params", "head/kernel": "ema/head"}
    state, report = restore_partial(folder, given, rename=names)
    np.testing.assert_array_equal(state["trunk"], TRUNK)
    np.testing.assert_array_equal(state["head"]["kernel"], HEAD + 1)
    assert report.taken == {"trunk": "params/trunk", "head/kernel": "ema/head"}
    nested = {"model": {"params": {"trunk": jnp.zeros((64, 128))}}}
    state, report = restore_partial(folder, nested, rename={"model": ""})
    np.testing.assert_array_equal(state["model"]["params"]["trunk"], TRUNK)
    assert "  model <- the root (1 leaf)" in str(report)


def test_a_subtree_from_two_places_is_not_told_as_one(folder):
    given = {"params": {"trunk": jnp.zeros((64, 128)), "head": jnp.zeros((128, 10))}}
    _, report = restore_partial(folder, given, rename={"params/trunk": "ema/trunk"})
    assert str(report).splitlines()[1:3] == ["  params/head", "  params/trunk <- ema/trunk"]


def test_dtypes_are_cast_only_if_asked_and_only_among_floats(folder):
    given = {
        "params": {"trunk": jnp.zeros((64, 128), jnp.bfloat16)},
        "half": jnp.zeros(128),
        "step": jnp.float32(0),
        "key": jnp.float32(0),
    }
    with pytest.raises(ValueError, match="nothing to take") as told:
        restore_partial(folder, given)
    assert "half: bfloat16[128] in the checkpoint, float32[128] in the state" in str(told.value)
    state, report = restore_partial(folder, given, cast=True)
    assert sorted(report.taken) == ["half", "params/trunk"]
    assert sorted(report.mismatched) == ["key", "step"]
    np.testing.assert_array_equal(state["params"]["trunk"], TRUNK.astype(jnp.bfloat16))
    np.testing.assert_array_equal(state["half"], TRUNK[0].astype(jnp.bfloat16).astype(np.float32))
    assert state["half"].dtype == jnp.float32


def test_float64_is_cast_where_it_can_be_read(tmp_path):
    thirds = np.arange(3) / 3
    with jax.enable_x64(True):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, {"a": jnp.asarray(thirds), "b": jnp.ones(2, jnp.float32)})
        checkpoints.close()
    given = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
    for a in (given["a"], np.zeros(3)):
        _, report = restore_partial(tmp_path, {**given, "a": a}, cast=True)
        assert [*report.taken] == ["b"]
        assert "a: float64[3] (to read it: jax_enable_x64) in the checkpoint, " in str(report)
    with jax.enable_x64(True):
        state, _ = restore_partial(tmp_path, given, cast=True)
    np.testing.assert_array_equal(state["a"], thirds.astype(np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "parms"}, r"include: 'parms' matches nothing .* did you mean 'params'"),
        ({"exclude": ["params", "heads"]}, "exclude: 'heads' matches nothing in the state"),
        ({"include": "par(ams"}, "include: .* is no regular expression"),
        ({"rename": {"params": "emma"}}, "no 'emma' in the checkpoint; did you mean 'ema'"),
        ({"rename": {"weights": "ema"}}, r"no 'weights' in the state; at its top are \['params'"),
        ({"step": 30}, r"no checkpoint of step 30 .* it has \[20, 40\]"),
        ({"step": 20}, "nothing to take: 0 of 3 leaves taken from step 20"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        restore_partial(folder, state_of(), **options)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        restore_partial(tmp_path / "nowhere", state_of())
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        restore_partial(tmp_path, state_of())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def own_run(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, {"a": jnp.asarray(TRUNK), "b": jnp.asarray(HEAD)})
    checkpoints.close()
    yield tmp_path / "checkpoints"
    gc.collect()  # Orbax leaves a coroutine behind that complains when it is collected


def test_only_what_is_read_is_checked_but_that_to_the_bit(own_run):
    (file,) = (p for p in (own_run / "2" / "meta").iterdir() if p.name == "metadata")
    meta = json.loads(file.read_text())
    meta.pop("checksum")
    meta["fingerprints"]["a"] ^= 1
    text = json.dumps(meta, sort_keys=True)
    file.write_text(json.dumps({**meta, "checksum": zlib.crc32(text.encode())}))
    given = {"a": jnp.zeros((64, 128)), "b": jnp.zeros((128, 10))}
    state, _ = restore_partial(own_run, given, include="b")
    np.testing.assert_array_equal(state["b"], HEAD)
    with pytest.raises(CheckpointError, match=r"2 .* damaged: changed content in a; .*: \[1\]"):
        restore_partial(own_run, given)
    state, report = restore_partial(own_run, given, step=1)
    np.testing.assert_array_equal(state["a"], TRUNK)
    assert report.step == 1


def test_damage_is_told_and_nothing_is_moved(own_run):
    unfinished = own_run / "3.orbax-checkpoint-tmp"  # of a run that is still going on
    unfinished.mkdir()
    given = {"a": jnp.zeros((64, 128))}
    assert restore_partial(own_run, given)[1].step == 2
    assert unfinished.is_dir()
    data = [p for p in (own_run / "2" / "state").rglob("*") if p.is_file()]
    largest = max(data, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    before = sorted(own_run.parent.rglob("*"))
    with pytest.raises(CheckpointError, match=r"checkpoint 2 in .* is damaged: .*others: \[1\]"):
        restore_partial(own_run, given)
    (own_run / "2" / "meta" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged: its metadata cannot be read"):
        restore_partial(own_run, given)
    assert sorted(own_run.parent.rglob("*")) == before


def task(outputs, tx):
    def init(key):
        trunk = jax.random.normal(key, (4, 8))
        return {"params": {"trunk": trunk, "head": jnp.zeros((8, outputs))}}

    def loss(params, model_state, batch, key):
        out = jnp.tanh(batch["x"] @ params["trunk"]) @ params["head"]
        return LossOutput(jnp.sum(jnp.square(out - batch["y"]), axis=1))

    return gradient_task(init, loss, tx, ema_decay=0.9)


def batches(outputs):
    arrays = {"x": RNG.normal(size=(16, 4)), "y": RNG.normal(size=(16, outputs))}
    return Batches({k: v.astype(np.float32) for k, v in arrays.items()}, 8, seed=0)


@pytest.mark.slow
def test_fine_tuning_another_head_with_another_optimiser(tmp_path):
    """As a user does it: the state of a new task with another run's trunk is what `fit` begins."""
    first = fit(task(3, optax.adam(0.01)), batches(3), 2, workdir=tmp_path)
    mesh = meshes.make_mesh(devices=jax.devices()[:2])
    tuned = task(2, optax.sgd(0.1, momentum=0.9))
    fresh = init_state(tuned, abstract_state(tuned, mesh), mesh, jax.random.key(9))
    start, report = restore_partial(tmp_path, fresh, include=["params", "ema"])
    assert sorted(report.taken) == ["ema/trunk", "params/trunk"]
    assert sorted(report.mismatched) == ["ema/head", "params/head"]
    for name in ("params", "ema"):
        got, there = (getattr(s, name)["trunk"] for s in (start, first))
        chex.assert_trees_all_equal(*jax.device_get((got, there)))
    last = fit(tuned._replace(init=lambda key: start), batches(2), 1, mesh=mesh)
    assert int(last.step) == 1 and last.params["head"].shape == (8, 2)
    moved = np.abs(np.asarray(last.params["trunk"]) - np.asarray(first.params["trunk"]))
    assert moved.max() == 0  # behind a head of zeros the trunk has no gradient yet
    assert np.any(np.asarray(last.params["head"]))
