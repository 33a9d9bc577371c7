"""What one process sees and another does not, with the other's answers put in."""

import gc
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blogjax.train import bookkeeping, checkpoint, partial_restore
from blogjax.train.bookkeeping import NonfiniteError, check_not_stopped
from blogjax.train.checkpoint import Best, CheckpointError, Checkpoints
from blogjax.train.distributed import OtherProcessError
from blogjax.train.partial_restore import restore_partial

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

FAILED, DAMAGED = (True, False), (False, True)


def make_state(step):
    return {"w": jnp.arange(8.0) + step, "step": jnp.int32(step)}


def abstract():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), make_state(0)
    )


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", best=Best("loss"), warn=lambda text: None)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {"loss": 1.0 / step})
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()
    gc.collect()


@pytest.fixture
def other(monkeypatch):
    """`other(*answers)` of another process, one for each time that all are asked; then none."""

    def says(*answers):
        asked = []

        def any_process(*flags):
            theirs = answers[len(asked)] if len(asked) < len(answers) else (False, False)
            asked.append(flags)
            return tuple(a or b for a, b in zip(flags, theirs, strict=True))

        monkeypatch.setattr(checkpoint, "any_process", any_process)
        return asked

    return says


@pytest.mark.parametrize("answers", [(DAMAGED,), ((False, False), DAMAGED)])
def test_none_goes_on_with_what_another_has_found_damaged(saved, other, answers):
    """Be it its file or, read without a complaint, its content."""
    other(*answers)
    step, state = saved.restore(abstract())
    assert step == 1
    chex.assert_trees_all_equal(state, make_state(1))
    assert (saved.folder.parent / "damaged_checkpoints" / "2").is_dir()


def test_content_that_differs_here_is_told_to_the_others(saved, other, monkeypatch):
    asked = other()
    before = checkpoint.check_content
    states = []

    def differs_once(recorded, state):
        states.append(state)
        before(recorded, {**state, "w": state["w"] + 1} if len(states) == 1 else state)

    monkeypatch.setattr(checkpoint, "check_content", differs_once)
    assert saved.restore(abstract())[0] == 1
    assert asked == [(False, False), DAMAGED, (False, False), (False, False)]


@pytest.mark.parametrize("answer", [FAILED, (True, True)])
def test_another_process_that_fails_is_no_damage(saved, other, answer):
    other(answer)
    with pytest.raises(OtherProcessError, match="another process failed"):
        saved.restore(abstract())
    assert sorted(p.name for p in saved.folder.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("not for you"),
        ValueError("PERMISSION_DENIED: Error opening file"),
        ValueError("RESOURCE_EXHAUSTED: Too many open files"),
        jax.errors.JaxRuntimeError("INTERNAL: no device"),
    ],
)
def test_what_is_no_damage_is_told_before_it_is_raised(saved, other, monkeypatch, error):
    """Or the others would wait for this process."""

    def fail(*arguments):
        raise error

    asked = other()
    monkeypatch.setattr(saved, "_read", fail)
    with pytest.raises(type(error)) as info:
        saved.restore(abstract())
    assert info.value is error and asked == [FAILED]
    assert sorted(p.name for p in saved.folder.iterdir()) == ["1", "2"]


def test_which_checkpoints_there_are_the_first_process_says(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "on_first", lambda function: [1])
    assert saved.restore(abstract())[0] == 1


def test_which_one_is_the_best_the_first_process_says(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "on_first", lambda function: {1: 0.25})
    again = Checkpoints(saved.folder, best=Best("loss"))
    assert again.best_value() == 0.25  # both were read here: 0.5, of the second
    again.close()


def lost_while_writing():
    lost = jax.errors.JaxRuntimeError("UNAVAILABLE: a task has died")
    try:
        raise TimeoutError("Timed out while waiting for async_write_complete barrier.") from lost
    except TimeoutError as error:
        return error


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_lost_in_the_middle_of_a_checkpoint_is_no_fault_of_the_folders(
    saved, monkeypatch, processes
):
    """The run can go on as it is: nobody has to free space first."""

    def wait():
        raise lost_while_writing()

    with monkeypatch.context() as patched:
        patched.setattr(saved._manager, "wait_until_finished", wait)
        patched.setattr(jax, "process_count", lambda: processes)
        expected = CheckpointError if processes == 1 else jax.errors.JaxRuntimeError
        with pytest.raises(expected, match="could not write" if processes == 1 else "has died"):
            saved.wait()


def test_all_stop_over_the_note_that_the_first_one_reads(tmp_path, monkeypatch):
    """With "skip" it deletes the note, and the others must not look for it."""
    record = {"step": 3, "paths": ["w"], "checkpoint": 2}
    monkeypatch.setattr(bookkeeping, "on_first", lambda function: record)
    with pytest.raises(NonfiniteError, match="step 3: not finite: w; checkpoint 2 holds"):
        check_not_stopped(tmp_path, "stop")
    check_not_stopped(tmp_path, "skip")
    monkeypatch.setattr(bookkeeping, "on_first", lambda function: None)
    (tmp_path / "nonfinite.json").write_text(json.dumps(record))
    check_not_stopped(tmp_path, "stop")


def test_a_part_is_taken_from_the_step_that_the_first_process_saw(saved, other, monkeypatch):
    """The other run may have saved again in between."""
    asked = other()
    with monkeypatch.context() as patched:
        patched.setattr(partial_restore, "on_first", lambda function: (saved.folder, [1]))
        state, report = restore_partial(saved.folder, make_state(0))
    assert report.step == 1 and asked == [(False, False)] * 3
    np.testing.assert_array_equal(state["w"], np.arange(8) + 1)


@pytest.mark.parametrize("asked_before", [0, 1, 2])
def test_a_part_that_another_process_cannot_read_is_taken_by_none(saved, other, asked_before):
    other(*[(False, False)] * asked_before, DAMAGED)
    with pytest.raises(CheckpointError, match=r"2 .* damaged: another process .*: \[1\]"):
        restore_partial(saved.folder, make_state(0))
