"""Twenty kills at random moments of one run: nothing is lost, nothing is there twice."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # more than twenty starts

HERE = pathlib.Path(__file__).resolve().parent
STEPS = 240
# What the run has just said when the clock of the kill starts, and how far ahead that may be. Also:
# right after it was started, on the way to the first step.
MOMENTS = [("saving", 4)] * 7 + [("evaluating", 4)] * 5 + [("step", 12)] * 5 + [("", 0)] * 3


def start(folder: pathlib.Path) -> subprocess.Popen:
    path = os.pathsep.join([str(HERE.parent / "conformance"), str(HERE.parents[1])])
    return subprocess.Popen(
        [sys.executable, HERE / "talking_run.py", folder, str(STEPS)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
    )  # fmt: skip


def kill(folder: pathlib.Path, word: str, count: int, seconds: float) -> None:
    """Starts the run and kills it so many seconds after it has said a word so often."""
    process = start(folder)
    assert process.stdout is not None
    for line in process.stdout if word else ():
        count -= line.strip() == word
        if count == 0:
            break
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, out + err


def in_the_middle(folder: pathlib.Path) -> set[tuple[str, int]]:
    """The checkpoints that have been begun; of two attempts at the same step each counts."""
    found = (folder / "checkpoints").glob("*")
    return {(p.name, p.stat().st_ino) for p in found if not p.name.isdigit()}


def finished(folder: pathlib.Path) -> str:
    process = start(folder)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return err


def test_a_run_killed_twenty_times_is_the_run_that_was_not(tmp_path, record_property):
    rng = random.Random(0)
    finished(tmp_path / "whole")
    moments = rng.sample(MOMENTS, len(MOMENTS))
    unfinished = 0
    for word, most in moments:
        # Of a tenth of a second a checkpoint takes the larger part; a start takes some seconds.
        seconds = rng.uniform(0, 0.1) if word else rng.uniform(0.3, 4)
        before = in_the_middle(tmp_path / "killed")
        kill(tmp_path / "killed", word, rng.randint(1, most) if word else 0, seconds)
        # One killed at its start has not cleared away what the one before has left.
        unfinished += bool(in_the_middle(tmp_path / "killed") - before)
    assert unfinished >= 2  # it did happen in the middle of a checkpoint
    err = finished(tmp_path / "killed")
    for name in ("final.npy", "metrics.jsonl"):
        whole, killed = ((tmp_path / run / name).read_bytes() for run in ("whole", "killed"))
        assert whole == killed, name
    assert len(np.load(tmp_path / "whole" / "final.npy")) > 10
    assert "damaged" not in err and not (tmp_path / "killed" / "damaged_checkpoints").exists()
    lines = len((tmp_path / "killed" / "metrics.jsonl").read_bytes().splitlines())
    record_property("kills survived", len(moments))
    record_property("of these in the middle of a checkpoint", unfinished)
    record_property("metrics lines, none missing or twice", lines)
