"""How long the updates of generators and critics take, compared."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blogjax.losses.adversarial import generator_loss
from blogjax.tasks.critics import ConstrainedCritic
from blogjax.train import mesh as meshes
from blogjax.train.compiled import compile_task
from blogjax.train.state import init_state
from blogjax.train.task import Task
from experiments.adversarial.plane import Plane, points


def interleaved_times(
    programs: Mapping[str, Callable[[], Any]], rounds: int, calls: int
) -> dict[str, list[float]]:
    """Seconds per call of each program, in every one of several rounds of all programs.

    Args:
      programs: each returns arrays, for which it is waited.
      rounds: how often each has its turn.
      calls: calls in a turn; one more, before the first round, is not counted.
    """
    for program in programs.values():
        jax.block_until_ready(program())
    found: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            began = time.perf_counter()
            for _ in range(calls):
                jax.block_until_ready(program())
            found[name].append((time.perf_counter() - began) / calls)
    return found


def median_ratios(times: Mapping[str, Sequence[float]], reference: str) -> dict[str, float]:
    """Median over the rounds of each program's time by that of the reference in the same round.

    >>> median_ratios({"a": [1.0, 2.0, 1.0], "b": [2.0, 6.0, 2.5]}, "a")
    {'a': 1.0, 'b': 2.5}
    """
    below = np.array(times[reference])
    return {name: float(np.median(np.array(row) / below)) for name, row in times.items()}


def training_step(task: Task, plane: Plane, rows: int) -> Callable[[], Any]:
    """The step as `fit` compiles it, to be called again and again: it goes on training."""
    mesh = meshes.make_mesh()
    key = meshes.put_key(jax.random.key(0), mesh)
    batch = meshes.BatchPutter(mesh, rows)(
        {
            "x": points(plane.data, rows, 0, "train"),
            "row": np.arange(rows, dtype=np.int32),
            "weight": np.ones(rows, np.float32),
        }
    )
    compiled = compile_task(task, mesh)
    state = init_state(task, compiled.abstract, mesh, key)

    def step() -> Any:
        nonlocal state  # the old one is donated
        state, metrics = compiled.step(state, batch, key)
        return metrics["loss"]

    return step


def generator_gradient(
    task: Task, critic: ConstrainedCritic, plane: Plane, loss: Any, rows: int
) -> Callable[[], Any]:
    """The gradient of the generator's update, alone."""
    state = jax.jit(task.init)(jax.random.key(0))

    @jax.jit
    def gradient(params: Any, seed: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(seed), rows)

        def mean(params: Any) -> jax.Array:
            scores = critic(
                state.params["critic"], state.model_state["critic"], plane.generate(params, keys)
            )
            return generator_loss(scores, loss).mean()

        return jax.grad(mean)(params)

    seed = jnp.int32(1)
    return lambda: gradient(state.params["generator"], seed)


def clock(
    config: Any, plane: Plane, arms: Mapping[str, tuple[ConstrainedCritic, Task]], repeats: int
) -> list[dict[str, dict[str, float]]]:
    """Times of all arms, as ratios to `none`.

    Args:
      config: with the groups `data`, `optim` and `measure`.
      plane: what the arms share.
      arms: critic and task by name.
      repeats: how often to measure all, the programs being compiled once.

    Returns:
      For each repeat `step`, of a training step, and `generator`, of the generator's gradient
      alone, both `{arm: ratio}`, and `milliseconds`, median time of a step.
    """
    size, measure = config.data.batch_size, config.measure
    rows = size * config.optim.critic_steps
    steps = {name: training_step(task, plane, rows) for name, (_, task) in arms.items()}
    gradients = {
        name: generator_gradient(task, critic, plane, config.optim.loss, size)
        for name, (critic, task) in arms.items()
    }
    found = []
    for _ in range(repeats):
        whole = interleaved_times(steps, measure.rounds, measure.calls)
        alone = interleaved_times(gradients, measure.rounds, measure.calls)
        found.append(
            {
                "step": median_ratios(whole, "none"),
                "generator": median_ratios(alone, "none"),
                "milliseconds": {k: float(1e3 * np.median(row)) for k, row in whole.items()},
            }
        )
    return found
