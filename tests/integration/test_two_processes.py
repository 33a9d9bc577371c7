"""Two real processes: the same losses, one folder, stopping together. Minutes; `make slow`."""

import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from process_pair import (
    CLEAN,
    ROOT,
    SGD,
    finish,
    free_port,
    start,
    start_pair,
    wait_for_checkpoint,
)
from tiny_celeb_a import prepare

from blogjax.train.reporting import read_metrics

pytestmark = pytest.mark.slow

VIEWED = {
    "ddpm": ("optim.name=sgd", "optim.learning_rate=1e-3"),
    "gan": ("optim.name=sgd", "optim.generator_rate=1e-2", "optim.critic_rate=1e-2"),
    "multitask_images": ("optim.name=sgd", "optim.learning_rate=1e-2"),
}
LONG = (*SGD, "--config.train.steps=60", "--config.train.evaluate_every=30",
        "--config.train.save_seconds=0.2")  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return {**CLEAN, "BLOGJAX_CACHE": str(tmp_path_factory.mktemp("cache"))}


def losses(folder: pathlib.Path, name: str = "loss") -> np.ndarray:
    """Of all steps, then of all evaluations."""
    records = [read_metrics(folder / "metrics.jsonl", kind) for kind in ("train", "evaluate")]
    return np.concatenate([r[n] for r in records for n in sorted(r) if name in n])


@pytest.fixture(scope="module")
def alone(tmp_path_factory, environment):
    """A run of one process with one device, short and long."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in (("short", SGD), ("long", LONG)):
        [(code, out)] = finish(start(folder / name, environment, *flags, devices=1))
        assert code == 0, out
    return {name: losses(folder / name) for name in ("short", "long")}


@pytest.mark.parametrize("fsdp", [1, 2])
def test_the_losses_are_those_of_one_process(tmp_path, environment, alone, fsdp, record_property):
    """Two processes of four devices against one of eight and one of one."""
    flags = (*SGD, f"--config.mesh.fsdp={fsdp}")
    (code, out), (other, quiet) = finish(
        *start_pair(tmp_path / "pair", environment, *flags, devices=4)
    )
    assert (code, other) == (0, 0), out + quiet
    assert "2 process(es)" in out and "8, 1 on each device" in out
    assert "devices" not in quiet and "sampling" not in quiet  # only the first one tells
    [(code, out)] = finish(start(tmp_path / "one", environment, *flags, devices=8))
    assert code == 0, out
    found = losses(tmp_path / "pair")
    assert len(found) == 8 and np.ptp(found) > 1
    np.testing.assert_allclose(found, losses(tmp_path / "one"), rtol=1e-6)
    np.testing.assert_allclose(found, alone["short"], rtol=1e-6)
    for name, folder in (
        (f"one process, eight devices, fsdp={fsdp}", tmp_path / "one"),
        (f"two processes, four devices each, fsdp={fsdp}", tmp_path / "pair"),
    ):
        numbers = read_metrics(folder / "metrics.jsonl", "train")["loss"]
        record_property(f"losses of {name}", " ".join(f"{x:.7f}" for x in numbers))
    claims = [
        [claim["value"] for claim in json.loads((folder / "result.json").read_text())["claims"]]
        for folder in (tmp_path / "pair", tmp_path / "one")
    ]
    np.testing.assert_allclose(*claims, rtol=1e-3)


@pytest.mark.parametrize("experiment", VIEWED)
def test_shard_map_over_two_processes(tmp_path, environment, experiment):
    """Against one device under jit."""
    flags = [f"--config=configs/{experiment}.py:smoke", "--config.train.log_every=1",
             *(f"--config.{change}" for change in VIEWED[experiment])]  # fmt: skip
    if experiment == "multitask_images":
        flags.append(f"--config.data.dir={prepare(tmp_path / 'faces')}")
    [(code, out)] = finish(
        start(tmp_path / "one", environment, *flags, devices=1, experiment=experiment)
    )
    assert code == 0, out
    (code, out), (other, quiet) = finish(
        *start_pair(
            tmp_path / "pair", environment, *flags, "--config.mesh.view=shard_map",
            devices=1, experiment=experiment,
        )
    )  # fmt: skip
    assert (code, other) == (0, 0), out + quiet
    expected = losses(tmp_path / "one")
    assert len(expected) >= 4 and np.isfinite(expected).all() and np.ptp(expected) > 0
    np.testing.assert_allclose(losses(tmp_path / "pair"), expected, rtol=1e-6)


def test_pmap_is_refused_and_says_what_to_take(tmp_path, environment):
    pair = start_pair(tmp_path, environment, *SGD, "--config.mesh.view=pmap", devices=1)
    for code, out in finish(*pair):
        assert code == 2 and "'shard_map' is the same step on all of them" in out


def test_one_is_asked_to_stop_and_both_save(tmp_path, environment, alone):
    """Written by two processes, gone on with by one; then that one stops, and two go on."""
    folder = tmp_path / "run"
    pair = start_pair(folder, environment, *LONG, "--config.mesh.fsdp=2", devices=1)
    wait_for_checkpoint(folder, 3, pair[0])
    pair[1].send_signal(signal.SIGTERM)
    (code, out), (other, _) = finish(*pair)
    assert (code, other) == (75, 75), out
    assert "interrupted at step" in out and "go on, on all processes, with:" in out
    assert "--process_id" not in out.partition("go on,")[2]
    reached = max(int(p.name) for p in (folder / "checkpoints").glob("[0-9]*"))

    one = start(folder, environment, *LONG, devices=1)
    reached = wait_for_checkpoint(folder, reached, one)
    one.send_signal(signal.SIGTERM)
    [(code, out)] = finish(one)
    assert code == 75 and "resuming at" in out, out

    (code, out), (other, quiet) = finish(*start_pair(folder, environment, *LONG, devices=2))
    assert (code, other) == (0, 0), out + quiet
    assert "resuming at" in out
    np.testing.assert_allclose(losses(folder), alone["long"], rtol=1e-5)


@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_is_killed_the_other_ends_and_both_go_on(tmp_path, environment, alone, victim):
    folder = tmp_path / "run"
    flags = (*LONG, "--heartbeat_seconds=10")
    pair = start_pair(folder, environment, *flags, devices=1)
    reached = wait_for_checkpoint(folder, 3, pair[0])
    pair[victim].send_signal(signal.SIGKILL)
    ended = finish(*pair)
    assert ended[victim][0] == -signal.SIGKILL
    # By jax, which has missed the other's sign of life, or by itself, in the middle of a step.
    assert ended[1 - victim][0] in (75, -signal.SIGABRT)
    assert not (folder / "result.json").exists()
    (code, out), (other, quiet) = finish(*start_pair(folder, environment, *flags, devices=1))
    assert (code, other) == (0, 0), out + quiet
    resumed = int(out.partition("resuming at ")[2].split()[0])
    assert resumed >= reached
    np.testing.assert_allclose(losses(folder), alone["long"], rtol=1e-5)
    again = finish(*start_pair(folder, environment, *flags, devices=1))
    assert [code for code, _ in again] == [0, 0]
    assert "is finished" in again[0][1]


def test_damage_that_one_process_finds_is_told_to_both(tmp_path, environment, alone):
    """Parameters are split: the second process alone reads what it has written itself."""
    folder, flags = tmp_path / "run", (*LONG, "--config.mesh.fsdp=2")
    pair = start_pair(folder, environment, *flags, devices=1)
    first = wait_for_checkpoint(folder, 1, pair[0])
    wait_for_checkpoint(folder, first, pair[0])
    pair[0].send_signal(signal.SIGTERM)
    assert [code for code, _ in finish(*pair)] == [75, 75]
    newest = max((folder / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    own = [p for p in newest.rglob("*") if p.is_file() and "ocdbt.process_1" in str(p)]
    largest = max(own, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    (code, out), (other, quiet) = finish(*start_pair(folder, environment, *flags, devices=1))
    assert (code, other) == (0, 0), out + quiet
    assert f"checkpoint {newest.name} is damaged" in out
    assert 0 < int(out.partition("resuming at ")[2].split()[0]) < int(newest.name)
    assert (folder / "damaged_checkpoints" / newest.name).is_dir()
    np.testing.assert_allclose(losses(folder), alone["long"], rtol=1e-5)


def test_what_cannot_be_run_ends_all_processes(tmp_path, environment):
    (tmp_path / "file").write_text("")
    for code, out in finish(*start_pair(tmp_path / "file", environment, *SGD, devices=1)):
        assert code == 1
        assert "cannot use" in out and "it is a file" in out
    bad = start_pair(tmp_path / "bad", environment, *SGD, "--config.mesh.fsdp=5", devices=1)
    for code, out in finish(*bad):
        assert code == 2
        assert "fsdp=5 needs" in out
    assert not (tmp_path / "bad" / "config.json").exists()


HOLD = """
import pathlib, sys
from blogjax.train import distributed
from experiments.launch import folder
distributed.start(distributed.detect(sys.argv[1], 2, int(sys.argv[2])))
folder._SHARED_SECONDS = 1.0
try:
    with folder.hold(pathlib.Path(sys.argv[3]), False):
        print("held")
except folder.FolderError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("shared", [True, False])
def test_all_must_see_one_folder(tmp_path, environment, shared):
    address = f"localhost:{free_port()}"
    folders = (tmp_path / "a", tmp_path / ("a" if shared else "b"))
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, address, str(i), folder], cwd=ROOT, text=True,
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i, folder in enumerate(folders)
    ]  # fmt: skip
    for i, (code, out) in enumerate(finish(*pair)):
        assert code == 0, out
        who = ("another process does", "this process does")[i]
        last = "held" if shared else f"refused: {who} not see what process 0 writes to {folders[i]}"
        assert out.splitlines()[-1].startswith(last)
    assert not list(tmp_path.glob("*/.shared-*"))


def test_processes_of_two_configs_are_refused(tmp_path, environment):
    one, other = start_pair(tmp_path, environment, *SGD, devices=1)
    other.kill()
    other.communicate()
    command = [*other.args, "--config.optim.ema_decay=0.5"]  # type: ignore[misc]
    other = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**environment, "JAX_NUM_CPU_DEVICES": "1"},
    )  # fmt: skip
    (code, said), (refused, out) = finish(one, other)
    assert (code, refused) == (2, 2)
    assert "optim.ema_decay: 0.99 there, 0.5 asked for" in out
    assert "another process was started with another config" in said


def test_the_script_for_two_processes(tmp_path, environment):
    command = [ROOT / "experiments" / "launch" / "local_two_process.sh", "experiments.ddpm", *SGD,
               f"--workdir={tmp_path}/run"]  # fmt: skip
    began = {**environment, "DEVICES": "1"}
    done = subprocess.run(command, env=began, capture_output=True, text=True, check=True)
    assert "2 process(es)" in done.stdout
    assert (tmp_path / "run" / "result.json").exists()
    (tmp_path / "file").write_text("")
    refused = subprocess.run([*command[:-1], f"--workdir={tmp_path}/file"], env=began,
                             capture_output=True, text=True)  # fmt: skip
    assert refused.returncode == 1
    assert refused.stderr.count("it is a file") == 2
