"""How one of several processes is refused and how it leaves, without the others."""

import contextlib
import errno
import fcntl
import os
import signal
import sys
import threading
import time
import types

import jax
import pytest
from ml_collections import ConfigDict

from blogjax.train import distributed
from experiments.launch import folder, processes
from experiments.launch import main as launcher
from experiments.launch.configs import ConfigError


class LeftError(Exception):
    """Instead of `os._exit`."""


@pytest.fixture
def leaving(monkeypatch):
    def leave(code):
        raise LeftError(code, [signal.getsignal(number) for number in processes.STOP_SIGNALS])

    before = {number: signal.getsignal(number) for number in processes.STOP_SIGNALS}
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("code", [1, 2, 75])
def test_a_signal_does_not_change_the_code_of_a_process_that_leaves(leaving, monkeypatch, code):
    """What started it ends all when it sees the first one fail."""
    monkeypatch.setattr(processes, "alone", lambda: False)
    with pytest.raises(LeftError) as info:
        processes.leave(code)
    assert info.value.args == (code, [signal.SIG_IGN] * 2)


def test_processes_that_have_not_found_each_other_can_be_started_again(
    leaving, monkeypatch, tmp_path, capsys
):
    def start(*arguments, **options):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: no others")

    def asks(*arguments):
        raise AssertionError("jax would look for the others again")

    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'a': 1})"
    )
    arguments = [f"--config={tmp_path}/config.py", "--workdir=w", "--num_processes=2"]
    arguments += ["--coordinator_address=localhost:80", "--process_id=0"]
    monkeypatch.setattr(sys, "argv", ["experiment", *arguments])
    monkeypatch.setattr(distributed, "start", start)
    monkeypatch.setattr(jax, "process_count", asks)
    with pytest.raises(LeftError) as info:
        launcher.main(lambda config, workdir: asks())
    assert info.value.args[0] == launcher.INTERRUPTED
    told = capsys.readouterr().err
    assert "did not find each other: DEADLINE_EXCEEDED: no others" in told
    assert "because of flags" in told and "go on, on all of them, with:" in told


def test_who_waits_long_for_the_others_says_why(monkeypatch, capsys):
    """Jax says nothing, and at last that a task has died."""
    values = types.SimpleNamespace(
        coordinator_address="host:80", num_processes=2, process_id=0, heartbeat_seconds=100
    )
    told = threading.Event()
    monkeypatch.setattr(distributed, "start", lambda found, **options: told.wait(0.3))
    processes.start(values)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(processes, "_PATIENCE_SECONDS", 0.0)
    processes.start(values)
    said = capsys.readouterr().err
    assert "still waiting for the other processes at host:80, looked for because of flags" in said
    assert "--num_processes=1 runs one on its own" in said


@pytest.mark.parametrize("mine", [1, 2])
def test_all_are_refused_where_one_has_another_config(monkeypatch, mine):
    """The first one has 1, and one of the others 2."""
    first = {"config": "a.py", "workdir": "w", "n": 1}
    monkeypatch.setattr(distributed, "on_first", lambda function: first)
    monkeypatch.setattr(distributed, "any_process", lambda flag: (True,))
    message = "another process was started" if mine == 1 else "n: 1 there, 2 asked for"
    with pytest.raises(ConfigError, match=message):
        processes.check_same(ConfigDict({"n": mine}), "a.py", "w")


def held(path):
    with folder.hold(path, False):
        return True


def test_a_file_system_without_locks_is_told_of_and_used(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert held(tmp_path)
    assert "cannot be locked" in capsys.readouterr().out


def test_several_processes_wait_for_a_lock_that_a_lost_host_has_left(tmp_path, monkeypatch, capsys):
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds
        if now[0] > 30:
            stale.close()

    stale = contextlib.ExitStack()
    stale.enter_context(folder._lock(tmp_path))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(folder.FolderError, match="another process is running"):
        held(tmp_path)
    assert now == [0.0] and capsys.readouterr().out == ""
    monkeypatch.setattr(processes, "alone", lambda: False)
    assert held(tmp_path)
    assert 30 < now[0] < 31
    assert capsys.readouterr().out.count("or was lost: waiting") == 1
