"""Seconds from starting `python -m experiments.ddpm` to its first step, cold and warm cache.

    python -m benchmarks.start_time [--repeats=5]

Each start is a process of its own with the default config and a fresh work folder; it is stopped
once the first step is done. Cold: an empty cache folder, so that the dataset is prepared and every
program compiled. Warm: the cache of an earlier start. Cold and warm alternate; medians are given.
One start before them writes Python's bytecode, as any earlier use of the environment does.
Writes benchmarks/results/start_time.json.
"""

import argparse
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.machine import surroundings, write

ROOT = pathlib.Path(__file__).resolve().parents[1]
TARGETS = {"cold": 10.0, "warm": 4.0}


def first_step(cache: pathlib.Path, workdir: pathlib.Path) -> float:
    """Starts a run and returns the seconds until its first step is done."""
    command = [
        sys.executable, "-m", "experiments.ddpm", "--config=configs/ddpm.py",
        f"--workdir={workdir}",
    ]  # fmt: skip
    began = time.time()
    environment = {**os.environ, "BLOGJAX_CACHE": str(cache)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step "):
                seconds = time.time() - began
                process.send_signal(signal.SIGKILL)
                return seconds
    raise RuntimeError("no first step:\n" + "".join(lines))


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        first_step(pathlib.Path(folder) / "cache", pathlib.Path(folder) / "run")
        for i in range(repeats):
            cache = pathlib.Path(folder) / f"cache{i}"
            for kind in seconds:
                workdir = pathlib.Path(folder) / f"run_{kind}_{i}"
                seconds[kind].append(round(first_step(cache, workdir), 2))
                print(f"{kind}: {seconds[kind][-1]} s", flush=True)
    record = {
        "benchmark": "seconds from process start to the first step done, experiments.ddpm default",
        "command": f"python -m benchmarks.start_time --repeats={repeats}",
        "median": {kind: statistics.median(values) for kind, values in seconds.items()},
        "all": seconds,
        "target": TARGETS,
        **surroundings(),
    }
    write("start_time", record)
    print(record["median"])


if __name__ == "__main__":
    main()
