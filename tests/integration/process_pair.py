"""Two processes of one run, as two hosts would start them."""

import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The tests' own settings of XLA and jax are not the user's.
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "BLOGJAX_"))}
SGD = (
    "--config=configs/ddpm.py:smoke", "--config.optim.name=sgd",
    "--config.optim.learning_rate=1e-3",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(
    folder: pathlib.Path,
    environment: dict[str, str],
    *flags: str,
    devices: int,
    experiment: str = "ddpm",
):
    """One process with so many devices."""
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{experiment}", f"--workdir={folder}", *flags],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**environment, "JAX_NUM_CPU_DEVICES": str(devices)},
    )  # fmt: skip


def start_pair(folder: pathlib.Path, environment: dict[str, str], *flags: str, **options):
    """Two processes with so many devices each."""
    together = (f"--coordinator_address=localhost:{free_port()}", "--num_processes=2")
    return [
        start(folder, environment, *flags, *together, f"--process_id={i}", **options)
        for i in range(2)
    ]


def finish(*processes: subprocess.Popen) -> list[tuple[int, str]]:
    """Exit codes and what was printed; nothing is left running."""
    try:
        said = [p.communicate(timeout=300)[0] for p in processes]
        return [(p.returncode, out) for p, out in zip(processes, said, strict=True)]
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
                p.communicate()


def wait_for_checkpoint(folder: pathlib.Path, after: int, process: subprocess.Popen) -> int:
    """The first checkpoint beyond a step."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        steps = [int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
        if steps and max(steps) > after:
            return max(steps)
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint after {after}: {process.communicate()[0]}")
