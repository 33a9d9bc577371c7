"""The digits U-Net on a CPU: a training step and 50-step sampling, beside PyTorch.

    python -m benchmarks.ddpm_step [--repeats=11] [--no-compile]

Needs the bench environment (benchmarks/README.md). Everyone has two cores. Contenders:

  blogjax               the default config, on one CPU device that uses both cores
  blogjax, 2 devices    the same program data-parallel over two CPU devices
                        (JAX_NUM_CPU_DEVICES=2)
  denoising-diffusion-pytorch
                        its Unet of about as many parameters, its loss, its DDIM, Adam and average
                        as its Trainer has them
  same network, torch   our network, loss, clipping, Adam, average and sampler in plain PyTorch,
                        eager, in two memory formats, and through torch.compile. That they are the
                        same function is checked first: outputs, samples, three training steps

Each lives in a process of its own, which sleeps while another one is measured. A repeat measures
all of them, one after the other, in turning order; a ratio is the median over repeats of the peer's
seconds to ours. Inputs are random: the time does not depend on them.
Writes benchmarks/results/ddpm_step.json.
"""

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.machine import CORES, settle

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 20  # training steps in one measurement
NUM_SAMPLES, SAMPLE_STEPS = 100, 50
LIMIT = 120.0  # seconds after which no further repeat of one kind is begun
COMPILE_LIMIT = 150.0  # seconds for torch.compile to be ready
OURS = ("blogjax", "blogjax, 2 devices")
LIBRARY = "denoising-diffusion-pytorch"
EAGER = ("same network, torch", "same network, torch, channels_last")
BEST = "same network, better of the two"
COMPILED = "same network, torch.compile"
TARGETS = {"step": {LIBRARY: 3.0, BEST: 0.7}, "sampling": {LIBRARY: 10.0, BEST: 0.8}}
TOLERANCE = 1e-4


class Blogjax:
    """Step and sampler of `experiments.ddpm`, default config, on so many CPU devices."""

    def __init__(self, devices: int = 1) -> None:
        import dataclasses

        import jax

        jax.config.update("jax_num_cpu_devices", devices)
        from blogjax.core.random import fold_in_rows
        from blogjax.diffusion.sampling import sample
        from blogjax.train.compiled import compile_task
        from blogjax.train.mesh import batch_sharding, put_batch, replicated
        from blogjax.train.state import init_state
        from experiments.diffusion.model import build
        from experiments.launch import configs

        config: Any = configs.load(str(ROOT / "configs" / "ddpm.py"))
        self.config, shape = config, (8, 8, 1)
        self.plan = plan = build(config, shape, num_classes=10)
        compiled = compile_task(plan.task, plan.mesh)
        self.key = jax.device_put(jax.random.key(0), replicated(plan.mesh))
        state = init_state(plan.task, compiled.abstract, plan.mesh, self.key)
        # Layers that start at zero would hide differences: everything is moved a little.
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda p: p + rng.normal(0, 0.05, p.shape).astype(p.dtype), state.params
        )
        copied = jax.tree.map(lambda p: p.copy(), params)
        self.state = dataclasses.replace(state, params=params, ema=copied)
        size = config.data.batch_size
        host = {
            "image": rng.uniform(-1, 1, (size, *shape)).astype(np.float32),
            "label": rng.integers(0, 10, size, dtype=np.int32),
            "row": np.arange(size, dtype=np.int32),
            "weight": np.ones(size, np.float32),
        }
        self.host, self.batch = host, put_batch(host, plan.mesh)
        self._step = compiled.step
        self.parameters = sum(p.size for p in jax.tree.leaves(params))
        self.rows = jax.device_put(
            np.arange(NUM_SAMPLES, dtype=np.int32), batch_sharding(plan.mesh)
        )

        @jax.jit
        def generate(params: Any, key: jax.Array, rows: jax.Array) -> jax.Array:
            return sample(
                fold_in_rows(key, rows),
                lambda x_t, t: plan.apply(params, x_t, t, rows % 10, None),
                plan.schedule,
                (NUM_SAMPLES, *shape),
                steps=SAMPLE_STEPS,
                prediction=plan.prediction,
                clip_x0=1.0,
            )

        self._generate = generate

    def step(self) -> Any:
        """One training step; returns the loss, not waited for."""
        self.state, metrics = self._step(self.state, self.batch, self.key)
        return metrics["loss"]

    def sample(self) -> np.ndarray:
        """Images of all classes in turn, from the average."""
        return np.asarray(self._generate(self.state.ema, self.key, self.rows))

    def spec(self) -> dict[str, Any]:
        """What a peer must know to be the same: plain data."""
        import jax

        from blogjax.diffusion.schedules import timesteps

        schedule, config = self.plan.schedule, self.config
        times = np.arange(schedule.num_steps + 1)
        return {
            "model": {
                "channels": config.model.channels,
                "multipliers": tuple(config.model.multipliers),
                "num_blocks": config.model.num_blocks,
                "num_heads": config.model.num_heads,
                "num_classes": 10,
                "in_channels": 1,
            },
            "multipliers": tuple(config.model.multipliers),
            "optim": config.optim.to_dict(),
            "steps": config.train.steps,
            "params": jax.device_get(self.state.params),
            "signal": np.asarray(schedule.signal(times), np.float64),
            "noise": np.asarray(schedule.noise(times), np.float64),
            "times": timesteps(schedule, SAMPLE_STEPS).tolist(),
            "images": self.host["image"],
            "labels": self.host["label"].astype(np.int64),
            "num_samples": NUM_SAMPLES,
        }

    def reference(self) -> dict[str, Any]:
        """Outputs, samples and three training steps, for a peer to compare itself with."""
        import jax

        from blogjax.core.random import fold_in_rows, normal, split_keys
        from blogjax.diffusion.gaussian import uniform_timesteps

        row, shape = self.batch["row"], self.host["image"].shape
        rng = np.random.default_rng(1)
        x, t = rng.normal(size=shape).astype(np.float32), rng.integers(1, 1001, len(row))
        labels = self.host["label"]
        apply = jax.jit(lambda p, x, t, y: self.plan.apply(p, x, t, y, None))
        output = np.asarray(apply(self.state.params, x, t, labels))
        start_keys = split_keys(fold_in_rows(self.key, self.rows))[0]
        start = normal(start_keys, (NUM_SAMPLES, *shape[1:]))
        samples = self.sample()
        steps, losses, norms = [], [], []
        for _ in range(3):
            # The draws of `tasks.denoising`; were they others, the losses would differ.
            rows = fold_in_rows(jax.random.fold_in(self.key, self.state.step), row)
            time_keys, noise_keys, _ = split_keys(rows, 3)
            times = np.asarray(uniform_timesteps(time_keys, row.shape, self.plan.schedule))
            eps = np.asarray(normal(noise_keys, shape))
            steps.append((self.host["image"], times.astype(np.int64), eps, labels))
            self.state, metrics = self._step(self.state, self.batch, self.key)
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
        return {
            "x": x, "t": t, "labels": labels, "output": output,
            "start": np.asarray(start), "samples": samples,
            "steps": steps, "losses": losses, "norms": norms,
            "params": jax.device_get(self.state.params), "average": jax.device_get(self.state.ema),
        }  # fmt: skip


def _make(name: str, spec: Any) -> Any:
    if name in OURS:
        return Blogjax(1 + OURS.index(name))
    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks.peers import torch_ddpm

    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    if name == LIBRARY:
        return torch_ddpm.Library(spec, dim=20)
    last = name in (EAGER[1], COMPILED)
    return torch_ddpm.SameNetwork(spec, channels_last=last, compiled=name == COMPILED)


def _wait(value: Any) -> None:
    value = value[0] if isinstance(value, tuple) else value
    value.block_until_ready() if hasattr(value, "block_until_ready") else value.item()


def _serve(connection: Any, name: str, spec: Any) -> None:
    """A contender's process: answers ('method', arguments) until told to end."""
    try:
        contender = _make(name, spec)
        connection.send(contender.parameters)
        while (message := connection.recv()) is not None:
            what, argument = message
            if what == "step":
                _wait(contender.step())  # wakes the threads, fills the caches
                began = time.perf_counter()
                for _ in range(argument - 1):
                    contender.step()
                _wait(contender.step())
                connection.send((time.perf_counter() - began) / argument)
            elif what == "sampling":
                began = time.perf_counter()
                images = contender.sample()
                connection.send(time.perf_counter() - began)
                assert images.shape[0] == NUM_SAMPLES and np.isfinite(images).all()
            else:
                connection.send(getattr(contender, what)(*argument))
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))


class Worker:
    """A contender in its process."""

    def __init__(self, name: str, spec: Any = None):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, name, spec), daemon=True)
        self._process.start()
        other.close()  # else its death would not be seen here
        self.parameters = self._receive(120.0)

    def _receive(self, limit: float) -> Any:
        if not self._connection.poll(limit):
            raise TimeoutError(f"{self.name}: no answer within {limit:g} s")
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(self, what: str, argument: Any = (), limit: float = 120.0) -> Any:
        """Calls a method there."""
        self._connection.send((what, argument))
        return self._receive(limit)

    def end(self) -> None:
        """Lets the process go."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(2)
        self._process.kill()


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    return platform.processor()


def measure(workers: Mapping[str, Worker], what: str, argument: int, repeats: int) -> Any:
    """Seconds, by contender, one number per repeat; the order turns. Ends early after `LIMIT`."""
    began = time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    names = list(workers)
    for i in range(repeats):
        if i and time.perf_counter() - began > LIMIT:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(workers[name].ask(what, argument))
        shown = ", ".join(f"{n} {1e3 * s[-1]:.1f}" for n, s in seconds.items())
        print(f"{what} {i + 1}/{repeats}, ms: {shown}", flush=True)
    return seconds


def summary(seconds: Mapping[str, list[float]], targets: Mapping[str, float]) -> dict[str, Any]:
    """Medians, and how many times our time every peer takes."""
    median = {name: statistics.median(s) for name, s in seconds.items()}
    best = min(EAGER, key=lambda name: median[name])
    peers = {name: s for name, s in seconds.items() if name not in OURS} | {BEST: seconds[best]}

    def ratios(ours: str, peer: str) -> list[float]:
        return [p / o for p, o in zip(peers[peer], seconds[ours], strict=True)]

    return {
        "unit": "ms",
        "median": {name: round(1e3 * m, 2) for name, m in median.items()},
        BEST: best,
        "target": targets,
        "ratio": {o: {p: round(statistics.median(ratios(o, p)), 3) for p in peers} for o in OURS},
        "ratio, least and greatest": {
            o: {p: [round(f(ratios(o, p)), 3) for f in (min, max)] for p in peers} for o in OURS
        },
        "all": {name: [round(1e3 * t, 2) for t in s] for name, s in seconds.items()},
    }


def differences(ours: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """Greatest differences between what two of our contenders gave."""
    names = ("output", "samples", "losses", "norms")
    return {n: float(np.abs(np.subtract(ours[n], other[n])).max()) for n in names}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    os.environ.update(TQDM_DISABLE="1", JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
    load = settle()

    workers = {name: Worker(name) for name in OURS}
    spec = workers[OURS[0]].ask("spec")
    reference, other = (workers[name].ask("reference") for name in OURS)
    check = {OURS[1]: differences(reference, other)}
    for name in (LIBRARY, *EAGER):
        workers[name] = Worker(name, spec)
    for name in EAGER:
        check[name] = workers[name].ask("compare", (reference,))
    for name, found in check.items():
        print(f"{name}: greatest differences from blogjax: {found}", flush=True)
        worst = max(found, key=lambda k: found[k])
        if workers[name].parameters != workers[OURS[0]].parameters or found[worst] > TOLERANCE:
            sys.exit(f"error: '{name}' is not the same function: {worst}")
    compiled = "left out"
    if not options.no_compile:
        worker, began = Worker(COMPILED, spec), time.perf_counter()
        try:
            check[COMPILED] = worker.ask("compare", (reference,), COMPILE_LIMIT)
            compiled = f"ready after {time.perf_counter() - began:.0f} s"
            workers[COMPILED] = worker
        except (RuntimeError, TimeoutError, EOFError) as error:
            worker.end()
            compiled = f"did not work: {(str(error).strip() or repr(error)).splitlines()[-1]}"
        print(f"torch.compile: {compiled}", flush=True)

    for worker in workers.values():  # compile, allocate
        worker.ask("step", 3)
        worker.ask("sampling")
    step = measure(workers, "step", STEPS, options.repeats)
    sampling = measure(workers, "sampling", 0, options.repeats)
    record = {
        "benchmark": "digits U-Net on a CPU: one training step of 64, and 100 samples in 50 steps",
        "command": "python -m benchmarks.ddpm_step " + " ".join(sys.argv[1:]),
        "cores": CORES,
        "repeats": {"step": len(step[OURS[0]]), "sampling": len(sampling[OURS[0]])},
        "ratio": "the peer's time to ours, median over repeats: above 1, blogjax is faster",
        "parameters": {name: w.parameters for name, w in workers.items()},
        "same function, greatest differences": check,
        "torch.compile": compiled,
        "step": summary(step, TARGETS["step"]),
        "sampling": summary(sampling, TARGETS["sampling"]),
        "load before": load,
        "machine": f"{os.cpu_count()} x {_processor()}, {platform.machine()}, {platform.system()}",
        "versions": {
            "python": platform.python_version(),
            **{
                p: importlib.metadata.version(p)
                for p in ("jax", "jaxlib", "flax", "optax", "torch", LIBRARY, "ema-pytorch")
            },
        },
    }
    for worker in workers.values():
        worker.end()
    path = ROOT / "benchmarks" / "results" / "ddpm_step.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    for what in ("step", "sampling"):
        print(what, json.dumps(record[what]["ratio"], indent=2))


if __name__ == "__main__":
    main()
