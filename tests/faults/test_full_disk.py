"""A disk that is full in the middle of a run: an error in words, and the run goes on later."""

import pathlib
import resource

import pytest
from process_pair import CLEAN, finish, start, wait_for_checkpoint

pytestmark = pytest.mark.slow  # three runs

FLAGS = ("--config=configs/ddpm.py:smoke", "--config.train.steps=120",
         "--config.train.evaluate_every=60", "--config.train.save_seconds=0.5")  # fmt: skip


def newest(folder: pathlib.Path) -> pathlib.Path:
    finished = [p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
    return max(finished, key=lambda p: int(p.name))


def test_a_run_whose_disk_is_full_says_so_and_goes_on(tmp_path, record_property):
    environment = {**CLEAN, "BLOGJAX_CACHE": str(tmp_path / "cache")}
    whole, full = tmp_path / "whole", tmp_path / "full"
    [(code, out)] = finish(start(whole, environment, *FLAGS, devices=1))
    assert code == 0, out
    largest = max(p.stat().st_size for p in newest(whole).rglob("*") if p.is_file())

    running = start(full, environment, *FLAGS, devices=1)
    reached = wait_for_checkpoint(full, 0, running)
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
    [(code, out)] = finish(running)
    assert code == 1, out
    # Orbax and TensorStore would print thousands of lines.
    assert "Traceback" not in out and "error: could not write" in out, out
    intact = int(newest(full).name)
    assert intact >= reached and f"{intact}]" in out.partition("intact: [")[2].partition(";")[0]

    [(code, out)] = finish(start(full, environment, *FLAGS, devices=1))
    assert code == 0 and f"resuming at {intact}" in out, out
    for name in ("metrics.jsonl", "measured.json", "samples.png"):
        assert (whole / name).read_bytes() == (full / name).read_bytes(), name
    record_property("full disks survived", 1)
