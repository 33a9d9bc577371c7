"""Whole processes: what a newcomer types, and what a power cut does. Minutes; `make slow`."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from process_pair import wait_for_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

# The tests' own settings of XLA and jax are not the user's.
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "BLOGJAX_"))}
RUN = [
    sys.executable, "-m", "experiments.ddpm", "--config=configs/ddpm.py:smoke",
    "--config.train.steps=120", "--config.train.evaluate_every=50",
    "--config.train.save_seconds=0.2",
]  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return {**CLEAN, "BLOGJAX_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run([*RUN, f"--workdir={folder}"], cwd=ROOT, env=environment, check=True)
    return folder


def same_files(one: pathlib.Path, other: pathlib.Path) -> None:
    for name in ("metrics.jsonl", "measured.json", "samples.png"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def started(folder: pathlib.Path, environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [*RUN, f"--workdir={folder}"], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_killed_three_times_it_ends_with_the_same_bits(tmp_path, environment, uninterrupted):
    folder, reached = tmp_path / "killed", 0
    for _ in range(3):
        process = started(folder, environment)
        reached = wait_for_checkpoint(folder, reached, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "result.json").exists()
    last = started(folder, environment)
    out, _ = last.communicate()
    assert last.returncode == 0, out
    assert "resuming at" in out
    same_files(folder, uninterrupted)
    record = json.loads((folder / "result.json").read_text())
    assert record["resumed"] is True


def test_a_terminated_run_says_how_to_go_on_and_does(tmp_path, environment, uninterrupted):
    folder = tmp_path / "stopped"
    process = started(folder, environment)
    wait_for_checkpoint(folder, 0, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 75, out
    command = out.strip().splitlines()[-1].strip()
    assert command.startswith(f"{sys.executable} -m experiments.ddpm")
    subprocess.run(command, shell=True, cwd=ROOT, env=environment, check=True)
    same_files(folder, uninterrupted)


def test_the_commands_of_the_readme(tmp_path):
    """A fresh clone, an empty cache, the README's commands in order, nothing else."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    here, _, _ = (clone / "README.md").read_text().partition("## On GPUs")
    blocks = re.findall(r"```sh\n(.*?)```", here, re.S)
    commands = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    assert commands[:2] == ["make train", "make test"]
    # `make test` is run elsewhere in full; here only that it works as typed.
    environment = {**CLEAN, "BLOGJAX_CACHE": str(tmp_path / "cache"),
                   "PYTEST_ADDOPTS": "-k test_core"}  # fmt: skip
    environment.pop("VIRTUAL_ENV", None)
    for command in filter(None, commands):
        subprocess.run(command, shell=True, cwd=clone, env=environment, check=True)
    record = json.loads((clone / "runs" / "ddpm" / "result.json").read_text())
    published = json.loads((ROOT / "docs" / "results" / "ddpm" / "result.json").read_text())
    pairs = zip(record["claims"], published["claims"], strict=True)
    for now, then in pairs:
        assert now["verdict"] == then["verdict"], now["statement"]
    again = subprocess.run(
        ["make", "train"], cwd=clone, env=environment, capture_output=True, text=True, check=True
    )
    assert "is finished" in again.stdout and "make train RUN=" in again.stdout


@pytest.mark.parametrize(
    "name",
    [
        "lion_embedding_drift",
        "lion_vs_adamw",
        "gradient_penalty_inequality",
        "gan_ring_2d",
        "adversarial_digits",
        "vat_digits",
        "gan",
        "pareto_front_2d",
        "multitask_digits",
        "primary_auxiliary_digits",
    ],
)
def test_a_default_run_does_not_contradict_the_published_one(tmp_path, environment, name):
    """One seed against three: what is clear in both must be the same."""
    published = ROOT / "docs" / "results" / name / "result.json"
    command = [
        sys.executable, "-m", f"experiments.{name}", f"--config=configs/{name}.py",
        f"--workdir={tmp_path}/run",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    for now, then in zip(
        record["claims"], json.loads(published.read_text())["claims"], strict=True
    ):
        assert now["statement"] == then["statement"]
        assert {now["verdict"], then["verdict"]} != {"holds", "fails"}, now["statement"]
