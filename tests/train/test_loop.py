import dataclasses
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import threading

import chex
import jax
import numpy as np
import optax
import pytest
from task_cases import CASES

from blogjax.train import bookkeeping, compiled, loop
from blogjax.train.checkpoint import Best
from blogjax.train.interrupt import Interrupted
from blogjax.train.loop import NonfiniteError, fit
from blogjax.train.reporting import read_metrics

CASE = CASES["noisy_regression"]
TASK = CASE.make(optax.adam(0.01), None)


class Recorder:
    """Batches that note when they are asked for, and may do something at a step."""

    def __init__(self, events=None, at=None):
        self.batch_size = 16
        self.events = [] if events is None else events
        self.at = at or {}

    def __call__(self, step):
        self.events.append(f"batch {step}")
        batch = CASE.batches()(step)
        return self.at[step](batch) if step in self.at else batch


def test_order_and_cadence(tmp_path, monkeypatch):
    events = []

    def noting(name, index):
        original = getattr(bookkeeping.Bookkeeper, name)

        def method(self, *args):
            events.append(f"{name} {args[index]}")
            return original(self, *args)

        monkeypatch.setattr(bookkeeping.Bookkeeper, name, method)

    for name in ("evaluate", "save", "log", "_write", "render"):
        noting(name, 0)
    fit(
        TASK, Recorder(events), 5, workdir=tmp_path, evaluation=CASE.evaluation(),
        evaluate_every=2, render_every=4, save_every=3, prefetch_depth=0,
    )  # fmt: skip
    assert events == [
        "batch 0", "log 1",
        "batch 1", "log 2", "_write 1",
        "evaluate 2", "_write 2", "batch 2", "log 3",
        "save 3", "_write 3", "batch 3", "log 4",
        "evaluate 4", "_write 4", "render 4", "batch 4", "log 5",
        "evaluate 5", "_write 5", "render 5", "save 5",
    ]  # fmt: skip


def run_script(*args):
    script = pathlib.Path(__file__).with_name("killed_run.py")
    path = os.pathsep.join([str(script.parents[1] / "conformance"), str(script.parents[2])])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    return subprocess.run([sys.executable, script, *map(str, args)], env=env, capture_output=True)


def test_two_steps_a_kill_and_two_more_are_four_steps(tmp_path):
    assert run_script(tmp_path / "whole", 4).returncode == 0
    killed = run_script(tmp_path / "killed", 4, 3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (tmp_path / "killed" / "checkpoints" / "2").is_dir()
    again = run_script(tmp_path / "killed", 4)
    assert again.returncode == 0, again.stderr.decode()
    assert again.stdout.decode().split() == ["2", "3"]  # the batches asked for: it did resume
    for name in ("final.npy", "metrics.jsonl"):
        whole, killed = ((tmp_path / run / name).read_bytes() for run in ("whole", "killed"))
        assert whole == killed, name


def test_without_a_workdir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(TASK, CASE.batches(), 2, evaluation=CASE.evaluation())
    assert not list(tmp_path.iterdir())


def test_metrics_are_those_of_the_step(tmp_path):
    fit(TASK, CASE.batches(), 3, workdir=tmp_path, evaluation=CASE.evaluation())
    columns = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert columns["step"].tolist() == [1, 2, 3]
    state = TASK.init(jax.random.fold_in(jax.random.key(0), compiled.INIT))
    for i in range(3):
        key = jax.random.fold_in(jax.random.key(0), i)
        state, metrics = jax.jit(TASK.step)(state, CASE.batches()(i), key)
        for name in ("loss", "root", "grad_norm", "update_norm", "param_norm"):
            assert columns[name][i] == pytest.approx(float(metrics[name]), rel=1e-5), name
    evaluated = read_metrics(tmp_path / "metrics.jsonl", "evaluate")
    assert evaluated["step"].tolist() == [3]
    assert "moments" not in evaluated  # arrays stay out of the file


def test_latest_two_and_the_best_stay(tmp_path):
    def evaluate(state, batch, key):
        score = jax.numpy.array([9.0, 3.0, 1.0, 2.0, 4.0, 5.0])[state.step]
        return {"loss": (score, jax.numpy.ones(()))}

    fit(
        TASK._replace(evaluate=evaluate), CASE.batches(), 5, workdir=tmp_path,
        evaluation=CASE.evaluation(64), evaluate_every=1, save_every=1, best=Best("loss"),
    )  # fmt: skip
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [2, 4, 5]


def test_best_by_a_metric_that_is_not_evaluated_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'accuracy'.*\['loss', 'moments'\]"):
        fit(
            TASK, CASE.batches(), 1, workdir=tmp_path, evaluation=CASE.evaluation(),
            best=Best("accuracy"),
        )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on(tmp_path, number):
    def kill(batch):
        os.kill(os.getpid(), number)
        return batch

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="step 3"):
        fit(TASK, Recorder(at={2: kill}), 6, workdir=tmp_path / "a", prefetch_depth=0)
    assert signal.getsignal(number) is before
    state = fit(TASK, CASE.batches(), 6, workdir=tmp_path / "a")
    whole = fit(TASK, CASE.batches(), 6, workdir=tmp_path / "b")
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(whole))


def spoil(batch):
    return {**batch, "x": np.full_like(batch["x"], np.nan)}


def test_stop_at_nonfinite_gradients_names_step_and_leaves(tmp_path):
    with pytest.raises(NonfiniteError, match=r"step 3: .*Dense_0/bias.*checkpoint 4") as info:
        fit(TASK, Recorder(at={2: spoil}), 9, workdir=tmp_path / "a")
    assert info.value.step == 3
    assert "Dense_1/kernel" in info.value.paths
    chex.assert_tree_all_finite(info.value.state.params)
    # Started again it refuses again; told to skip it goes on as if told so from the start.
    with pytest.raises(NonfiniteError, match=r"step 3: .*checkpoint 4"):
        fit(TASK, Recorder(at={2: spoil}), 9, workdir=tmp_path / "a")
    for run in ("a", "b"):
        state = fit(TASK, Recorder(at={2: spoil}), 6, workdir=tmp_path / run, on_nonfinite="skip")
        assert int(state.opt_state.skipped) == 1
    files = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("a", "b")]
    assert files[0] == files[1]


def test_nonfinite_gradients_of_the_last_step_stop_too(tmp_path):
    for _ in range(2):
        with pytest.raises(NonfiniteError, match="step 2"):
            fit(TASK, Recorder(at={1: spoil}), 2, workdir=tmp_path)


def test_the_stop_saves_outside_of_the_transfer_guard(tmp_path, monkeypatch):
    guards = []
    original = loop.Checkpoints.save

    def save(self, *args):
        guards.append(jax.config.jax_transfer_guard)  # pyright: ignore
        return original(self, *args)

    monkeypatch.setattr(loop.Checkpoints, "save", save)
    with pytest.raises(NonfiniteError):
        fit(TASK, Recorder(at={2: spoil}), 9, workdir=tmp_path)
    assert guards == [None]


def test_parameters_that_overflow_are_lost_and_not_saved(tmp_path):
    """The optimiser may make infinities of finite gradients: no policy can go on from there."""
    huge = optax.inject_hyperparams(optax.sgd)(
        learning_rate=lambda count: jax.numpy.where(count == 2, 3e38, 0.01)
    )
    task = CASE.make(optax.chain(huge, optax.scale(1e3)), None)
    with pytest.raises(
        NonfiniteError, match=r"step 3: .*parameters after the update.*checkpoint 2 holds"
    ):
        fit(task, Recorder(), 6, workdir=tmp_path, save_every=1, on_nonfinite="skip")
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [1, 2]


def test_a_state_lost_right_after_the_step_at_fault_is_not_saved(tmp_path):
    huge = optax.inject_hyperparams(optax.sgd)(
        # The bad step is left out and not counted, so the next one is the third.
        learning_rate=lambda count: jax.numpy.where(count == 2, 3e38, 0.01)
    )
    task = CASE.make(optax.chain(huge, optax.scale(1e3)), None)
    with pytest.raises(NonfiniteError, match=r"step 3: .*checkpoint 2 holds"):
        fit(task, Recorder(at={2: spoil}), 6, workdir=tmp_path, save_every=2)
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [2]


def test_skip_nonfinite_goes_on_and_counts(tmp_path):
    state = fit(TASK, Recorder(at={1: spoil}), 4, workdir=tmp_path, on_nonfinite="skip")
    chex.assert_tree_all_finite(state.params)
    columns = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert columns["skipped"].tolist() == [0, 1, 1, 1]
    assert np.isnan(columns["loss"]).tolist() == [False, True, False, False]


def test_a_signal_during_the_last_evaluation_is_heard(tmp_path):
    evaluation = CASE.evaluation()

    class Killing:
        batch_size = evaluation.batch_size

        def __len__(self):
            return len(evaluation)

        def __call__(self, index):
            if index == 1:  # rendering asks for the first batch again
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluation(index)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match="step 2"):
        fit(TASK, CASE.batches(), 2, workdir=tmp_path, evaluation=Killing())
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    state = fit(TASK, CASE.batches(), 2, workdir=tmp_path, evaluation=evaluation)
    assert int(state.step) == 2
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("depth", [0, 2])
def test_a_batch_unlike_the_first_is_refused_with_its_step(depth):
    def cut(batch):
        return {name: rows[:8] for name, rows in batch.items()}

    def widen(batch):
        return {**batch, "x": batch["x"].astype(np.float16)}

    with pytest.raises(ValueError, match="means 16 rows here, but x has shape") as info:
        fit(TASK, Recorder(at={1: cut}), 3, prefetch_depth=depth)
    assert "step 1" in str(info.value.__notes__)
    with pytest.raises(ValueError, match=r"x is .*float16.* in this batch, .*float32"):
        fit(TASK, Recorder(at={1: widen}), 3, prefetch_depth=depth)


def test_a_task_that_does_not_count_its_steps_is_refused():
    def step(state, batch, key):
        new, metrics = TASK.step(state, batch, key)
        return dataclasses.replace(new, step=state.step), metrics

    with pytest.raises(ValueError, match=r"after 2 calls of Task.step, state.step is 0"):
        fit(TASK._replace(step=step), CASE.batches(), 2)


def test_a_metric_named_like_the_records_own_fields_is_refused(tmp_path):
    def step(state, batch, key):
        new, metrics = TASK.step(state, batch, key)
        return new, {**metrics, "kind": metrics["loss"]}

    with pytest.raises(ValueError, match="no metric may be called kind"):
        fit(TASK._replace(step=step), CASE.batches(), 1, workdir=tmp_path)


def test_what_was_opened_is_closed_after_an_error(tmp_path, monkeypatch):
    fit(TASK, CASE.batches(), 3, workdir=tmp_path)
    closed = []
    for owner in (loop.Checkpoints, loop.Writer):
        original = owner.close
        monkeypatch.setattr(
            owner, "close", lambda self, f=original: (closed.append(type(self).__name__), f(self))
        )
    with pytest.raises(ValueError, match="more than 2"):
        fit(TASK, CASE.batches(), 2, workdir=tmp_path)
    assert closed == ["Checkpoints"]
    with pytest.raises(NonfiniteError) as held:  # as a notebook holds it
        fit(TASK, Recorder(at={3: spoil}), 9, workdir=tmp_path)
    assert held.value.step == 4
    assert closed == ["Checkpoints", "Writer", "Checkpoints"]
    assert "blogjax-prefetch" not in [t.name for t in threading.enumerate()]


def test_implicit_transfers_are_refused(monkeypatch):
    monkeypatch.setattr(loop.meshes, "put_batch", lambda batch, mesh: dict(batch))
    with pytest.raises(Exception, match=r"[Dd]isallow.*transfer"):
        fit(TASK, CASE.batches(), 1)


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
    with pytest.raises(ValueError, match="batch of 12 does not divide over data=8 x fsdp=1"):
        fit(TASK, CASE.batches(12), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"on_nonfinite": "ignore"}, "'stop' or 'skip', got 'ignore'"),
        ({"seed": 2**32}, r"seed must be in \[0, 2\^32\)"),
        ({"save_seconds": -1.0}, "save_seconds must not be negative"),
        ({"evaluate_every": 2}, "evaluate_every is given, but no evaluation batches"),
        ({"best": Best("loss")}, "best is given, but no evaluation batches"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit(TASK, CASE.batches(), **{"steps": 1, **options})


def test_a_folder_trained_further_is_refused(tmp_path):
    fit(TASK, CASE.batches(), 3, workdir=tmp_path)
    with pytest.raises(ValueError, match="trained for 3 steps already, more than 2"):
        fit(TASK, CASE.batches(), 2, workdir=tmp_path)


def test_a_finished_run_is_read_back_without_a_step(tmp_path):
    first = jax.device_get(fit(TASK, CASE.batches(), 3, workdir=tmp_path))
    recorder = Recorder()
    again = fit(TASK, recorder, 3, workdir=tmp_path, prefetch_depth=0)
    assert recorder.events == []
    chex.assert_trees_all_equal(first, jax.device_get(again))


def test_seeds_differ():
    a, b = (fit(TASK, CASE.batches(), 1, seed=s) for s in (0, 1))
    assert not np.array_equal(a.params["Dense_0"]["kernel"], b.params["Dense_0"]["kernel"])


def events_of(path):
    """The records of a TensorBoard file: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_tensorboard_is_purged_from_the_restored_step(tmp_path):
    fit(TASK, CASE.batches(), 2, workdir=tmp_path)
    fit(TASK, CASE.batches(), 4, workdir=tmp_path)
    first, second = (events_of(p) for p in sorted((tmp_path / "tensorboard").iterdir()))
    for events, steps in [(first, [1, 2]), (second, [3, 4])]:
        tags = [(v.tag, e.step) for e in events for v in e.summary.value]
        assert [step for tag, step in tags if tag == "train/loss"] == steps
    starts = [e.step for e in second if e.HasField("session_log")]
    assert starts == [3]  # what the first file says from step 3 on is void


def test_tensorboard_is_purged_if_a_run_starts_again_from_nothing(tmp_path):
    with pytest.raises(NonfiniteError):
        fit(TASK, Recorder(at={1: spoil}), 4, workdir=tmp_path)
    for name in ("checkpoints", "nonfinite.json"):
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    fit(TASK, CASE.batches(), 2, workdir=tmp_path)
    last = events_of(sorted((tmp_path / "tensorboard").iterdir())[-1])
    assert [e.step for e in last if e.HasField("session_log")] == [1]


def test_a_full_disk_ends_the_run_with_its_error(tmp_path, monkeypatch):
    """Also where TensorBoard notices it: nothing may wait for a thread that died."""
    from tensorboardX.event_file_writer import EventsWriter

    written = []

    def write_event(self, event):
        written.append(event)
        if len(written) > 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", write_event)
    with pytest.raises(OSError, match="No space left"):
        fit(TASK, CASE.batches(), 50, workdir=tmp_path)


def test_progress_lines(capsys):
    fit(TASK, CASE.batches(), 2, verbose=True)
    out = capsys.readouterr().out
    assert "data=8 x fsdp=1" in out
    assert "params" in out
    assert "step 2/2  loss" in out
