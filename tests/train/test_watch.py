import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from task_cases import CASES

from blogjax.train import checkpoint, profiling, reporting
from blogjax.train.loop import fit
from blogjax.train.watch import Compilations, StepClock

CASE = CASES["noisy_regression"]
TASK = CASE.make(optax.sgd(0.01), None)


class Source:
    """The case's batches; `before(step)` runs first."""

    batch_size = 16

    def __init__(self, before=lambda step: None):
        self.before = before

    def __call__(self, step):
        self.before(step)
        return CASE.batches()(step)


def timings(folder):
    return [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]


def test_rates_and_shares_by_a_clock_of_our_own():
    times = iter([0, 1, 4, 5, 10, 10, 11, 11])  # 5 s with 3 s of waiting, 1 s with 1 s of it
    clock = StepClock(lambda: float(next(times)))
    for _ in range(2):
        with clock.step(), clock.waiting():
            pass
    assert clock.take() == (2 / 6, 4 / 6)
    assert clock.take() is None
    assert clock.waited_share == 4 / 6
    assert clock.waited_share == 4 / 6  # of all that was taken, asked as often as one likes


def test_slow_data_is_seen_and_fast_data_is_not(tmp_path, capsys):
    fit(TASK, Source(lambda step: time.sleep(0.02)), 20, workdir=tmp_path / "slow", verbose=True)
    fit(TASK, Source(), 20, workdir=tmp_path / "fast", prefetch_depth=40)
    slow, fast = (
        np.median([r["data_wait_share"] for r in timings(tmp_path / name)])
        for name in ("slow", "fast")
    )
    assert 0.5 < slow <= 1
    assert 0 <= fast < slow / 2
    assert "waiting for data)" in capsys.readouterr().out


def test_what_is_compiled_first_is_expected_and_again_is_told(tmp_path, capsys):
    double = jax.jit(lambda x: 2 * x)
    inputs = [jnp.ones(2), jnp.ones(3)]

    def before(step):  # a program compiled anew for another shape, at step 6 only
        double(inputs[step >= 6])

    fit(
        TASK, Source(before), 10, workdir=tmp_path, evaluation=CASE.evaluation(),
        evaluate_every=3, render_every=4, save_every=5, prefetch_depth=0, verbose=True,
    )  # fmt: skip
    told = [line for line in capsys.readouterr().out.splitlines() if "compiled anew" in line]
    assert len(told) == 1
    assert "training compiled anew: jit(<lambda>)" in told[0]
    counts = {r["step"]: r["compilations"] for r in timings(tmp_path)}
    assert counts[5] == 0
    assert counts[10] == 1


def test_noting_ends_with_the_block():
    with Compilations() as compilations, compilations.within("a"):
        pass
    with compilations.within("a"):
        jax.jit(lambda x: x - 3)(np.ones(3))
    assert compilations.take() == []


@pytest.mark.parametrize("asked", ["argument", "around"])
def test_a_trace_of_the_steps_asked_for(tmp_path, asked, capsys):
    if asked == "argument":
        fit(TASK, Source(), 6, workdir=tmp_path, profile=(2, 4), verbose=True)
    else:
        with profiling.profiling(2, 4):
            fit(TASK, Source(), 6, workdir=tmp_path, verbose=True)
    assert "step 4: the trace is in" in capsys.readouterr().out
    assert list((tmp_path / "profile").glob("**/*.xplane.pb"))
    found = list((tmp_path / "profile").glob("**/perfetto_trace.json.gz"))
    assert len(found) == 1
    events = _events(found[0])
    assert {e["args"]["step_num"] for e in events if e.get("name") == "train"} == {"2", "3"}


def _events(path):
    import gzip

    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def test_a_trace_is_written_when_the_run_ends_inside_it(tmp_path, capsys):
    fit(TASK, Source(), 3, workdir=tmp_path, profile=(1, 100), verbose=True)
    assert "step 3: the trace is in" in capsys.readouterr().out
    assert list((tmp_path / "profile").glob("**/*.xplane.pb"))
    fit(TASK, Source(), 2, workdir=tmp_path / "again", profile=(0, 1))  # the profiler is free


def test_windows_that_cannot_be(tmp_path):
    for window in [(3, 3), (4, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="START to a later STOP"):
            profiling.check_window(window)
    with pytest.raises(ValueError, match="no workdir"):
        fit(TASK, Source(), 3, profile=(0, 1))
    with pytest.raises(ValueError, match="in a run of 3 steps is empty"):
        fit(TASK, Source(), 3, workdir=tmp_path, profile=(3, 4))


def test_runs_that_a_window_around_them_misses_go_on(tmp_path, capsys):
    with profiling.profiling(3, 4):
        fit(TASK, Source(), 3)
        fit(TASK, Source(), 3, workdir=tmp_path)
        fit(TASK, Source(), 6)
    assert not (tmp_path / "profile").exists()
    with profiling.profiling(1, 3):
        fit(TASK, Source(), 5, workdir=tmp_path, verbose=True)
    assert "no trace: the run goes on at 3, beyond 1:3" in capsys.readouterr().out


def test_a_trace_that_cannot_be_written_costs_a_line_only(tmp_path, monkeypatch, capsys):
    stop = jax.profiler.stop_trace

    def failing():
        stop()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", failing)
    state = fit(TASK, Source(), 4, workdir=tmp_path, profile=(1, 2), verbose=True)
    assert int(state.step) == 4
    assert "step 2: no trace: OSError(28" in capsys.readouterr().out


def test_the_program_is_described(tmp_path, capsys):
    state = fit(TASK, Source(), 1, workdir=tmp_path, verbose=True)
    described = json.loads((tmp_path / "program.json").read_text())
    # Two dense layers of 6 x 16 and 16 x 2 numbers: forward 2 b m n, backward at least as much
    # for the kernels and for the hidden layer; 2 rows on each of 8 devices.
    least = 2 * 2 * (6 * 16 + 16 * 2) * 2
    assert least < described["flops"] < 10 * least
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert size <= described["arguments"] < size + 2000
    assert described["aliased"] == pytest.approx(size, rel=0.2)  # the state is updated in place
    # What is updated in place counts once.
    assert (
        described["peak"]
        < described["arguments"] + described["temporaries"] + described["outputs"] / 2
    )
    assert described["peak"] >= described["arguments"]
    assert "a step on each device:" in capsys.readouterr().out


def test_records_are_on_the_disk_before_their_checkpoint(tmp_path, monkeypatch):
    """TensorBoard's too, which are synced now and then only."""
    monkeypatch.setattr(reporting, "_FLUSH_SECONDS", 1e9)
    found = []
    save = checkpoint.Checkpoints.save

    def noted(self, step, *args):
        events = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
        found.append((step, events.count(b"train/loss")))
        return save(self, step, *args)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", noted)
    fit(TASK, Source(), 5, workdir=tmp_path, save_every=2)
    assert found == [(2, 2), (4, 4), (5, 5)]
