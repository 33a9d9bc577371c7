"""The loop: `fit` runs any `Task`, on any mesh, in one fixed order, and loses nothing.

Order of one turn, at a state of `step` updates: evaluate, save, next batch, step, log. After the
last step: evaluate, save once more. Everything depends on that order: a record of step n is on the
disk before the checkpoint of step n, so a run resumed from it writes the same files.

Randomness is `fold_in(key(seed), state.step)` and a batch is a pure function of its step, so a
checkpoint is the state and nothing else, and resuming is exact to the bit.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from blogjax.train import mesh as meshes
from blogjax.train.checkpoint import Best, Checkpoints
from blogjax.train.interrupt import Interrupted, StopRequest, agreed
from blogjax.train.prefetch import prefetch
from blogjax.train.reporting import Progress, Writer, show_start
from blogjax.train.state import abstract_state, init_state
from blogjax.train.task import Batches, EvaluationBatches, NonfiniteLeaves, Task

# Streams beside those of the steps, which count up from 0.
_INIT, _EVALUATE, _RENDER = (2**32 - 1 - i for i in range(3))


class NonfiniteError(ArithmeticError):
    """Gradients were not finite and the policy is to stop; the state of before is kept.

    Attributes:
      step: the step whose gradients they were.
      paths: the parameters they belong to.
      checkpoint: step of the checkpoint that holds the good state, or None.
    """

    def __init__(self, step: int, paths: tuple[str, ...], checkpoint: int | None):
        shown = ", ".join(paths[:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")
        kept = "" if checkpoint is None else f"; the state of before is checkpoint {checkpoint}"
        super().__init__(f"step {step}: gradients are not finite in {shown}{kept}")
        self.step, self.paths, self.checkpoint = step, paths, checkpoint


class Compiled(NamedTuple):
    """The functions of a task jitted for a mesh, and the shapes they work on."""

    abstract: Any
    step: Any
    evaluate: Callable[..., Any] | None
    render: Callable[..., Any] | None


def compile_task(task: Task, mesh: Mesh) -> Compiled:
    """Puts a task on a mesh: global view, one program, the state donated to each step.

    The compiled functions take the root key of the run; each folds in what it needs.
    """
    abstract = abstract_state(task, mesh)
    placed = jax.tree.map(lambda x: x.sharding, abstract)
    split, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)

    def step(state: Any, batch: Any, key: jax.Array) -> Any:
        return task.step(state, batch, jax.random.fold_in(key, state.step))

    def on_batch(function: Callable[..., Any] | None, stream: int) -> Callable[..., Any] | None:
        if function is None:
            return None

        # The same numbers at every evaluation: what changes is the state alone.
        def call(state: Any, batch: Any, index: jax.Array, key: jax.Array) -> Any:
            key = jax.random.fold_in(jax.random.fold_in(key, stream), index)
            return function(state, batch, key)

        return jax.jit(call, in_shardings=(placed, split, whole, whole), out_shardings=whole)

    return Compiled(
        abstract=abstract,
        step=jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(placed, split, whole),
            out_shardings=(placed, whole),
        ),
        evaluate=on_batch(task.evaluate, _EVALUATE),
        render=on_batch(task.render, _RENDER),
    )


def fit(
    task: Task,
    batches: Batches,
    steps: int,
    *,
    mesh: Mesh | None = None,
    seed: int = 0,
    workdir: str | pathlib.Path | None = None,
    evaluation: EvaluationBatches | None = None,
    evaluate_every: int | None = None,
    render_every: int | None = None,
    save_every: int | None = None,
    save_seconds: float | None = None,
    log_every: int = 1,
    keep: int = 2,
    best: Best | None = None,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    prefetch_depth: int = 2,
    verbose: bool = False,
) -> Any:
    """Trains a task for `steps` steps and returns its last state.

    With a `workdir` the run resumes from its newest sound checkpoint, and the result, bit for bit,
    is that of a run never interrupted. It holds `checkpoints/`, `metrics.jsonl` (a record every
    `log_every` steps, one per evaluation; the same bytes on every run), `timings.jsonl`,
    `tensorboard/`, `images/`. SIGINT and SIGTERM write a checkpoint and raise `Interrupted`.

    Args:
      task: what to train.
      batches: called as `batches(step)`; `batch_size` must divide over the mesh.
      steps: how many steps in all, those of earlier starts included.
      mesh: default all devices along `data`.
      seed: of initialisation, steps and evaluation.
      workdir: None writes and resumes nothing.
      evaluation: batches for `task.evaluate` and, the first of them, for `task.render`.
      evaluate_every: steps between evaluations; there is always one after the last step.
      render_every: the same for `render`.
      save_every: steps between checkpoints.
      save_seconds: seconds between checkpoints; may be given beside `save_every`. Several
        processes agree on the moment at multiples of `log_every`.
      log_every: steps between records of the training metrics, which are those of that one step.
      keep: how many of the latest checkpoints stay.
      best: which evaluated metric decides on one more checkpoint to keep; one is then written
        after every evaluation that improves it.
      on_nonfinite: `"stop"` raises `NonfiniteError` at the first non-finite gradient, `"skip"`
        leaves the step out and counts it.
      prefetch_depth: batches prepared ahead by a thread; 0 for none.
      verbose: shows progress on stdout.

    Returns:
      The state after `steps` steps, on the mesh.

    Raises:
      ValueError: if a number is out of range, the batch does not divide over the devices, or the
        checkpoints found are of another state (`CheckpointMismatchError`) or beyond `steps`.
      CheckpointError: if none of the checkpoints found can be read, or one cannot be written.
      NonfiniteError: see `on_nonfinite`.
      Interrupted: after SIGINT or SIGTERM.
    """
    for name, value in {
        "steps": steps,
        "evaluate_every": evaluate_every,
        "render_every": render_every,
        "save_every": save_every,
        "log_every": log_every,
        "keep": keep,
    }.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if on_nonfinite not in ("stop", "skip"):
        raise ValueError(f"on_nonfinite must be 'stop' or 'skip', got {on_nonfinite!r}")
    mesh = meshes.make_mesh() if mesh is None else mesh
    meshes.check_batch_size(batches.batch_size, mesh)
    if evaluation is not None:
        meshes.check_batch_size(evaluation.batch_size, mesh)

    key = jax.device_put(jax.random.key(seed), meshes.replicated(mesh))
    compiled = compile_task(task, mesh)
    folder = None if workdir is None else pathlib.Path(workdir)
    checkpoints = None
    start, state = 0, None
    if folder is not None:
        checkpoints = Checkpoints(folder / "checkpoints", keep=keep, best=best)
        restored = checkpoints.restore(compiled.abstract)
        if restored is not None:
            start, state = restored
            if start > steps:
                raise ValueError(
                    f"{folder} has been trained for {start} steps already, more than {steps}"
                )
    ahead = prefetch(
        batches, start, steps, lambda b: meshes.put_batch(b, mesh), depth=prefetch_depth
    )
    first = list(itertools.islice(ahead, 1))
    # XLA works on the step in a thread while this one makes the state and opens the files. A later
    # batch of other shapes is an error, not a silent second compilation.
    lowered = [compiled.step.lower(compiled.abstract, batch, key) for batch in first]
    making_step = _in_thread(lambda: [program.compile() for program in lowered])
    if state is None:
        first_key = jax.random.fold_in(jax.random.key(seed), _INIT)
        first_key = jax.device_put(first_key, meshes.replicated(mesh))
        state = init_state(task, compiled.abstract, mesh, first_key)

    run = _Run(
        compiled=compiled,
        mesh=mesh,
        key=key,
        evaluation=evaluation,
        writer=Writer(folder, start),
        checkpoints=checkpoints,
        progress=Progress(start, steps, show=verbose),
        on_nonfinite=on_nonfinite,
        log_every=log_every,
        best=best,
    )
    if verbose:
        show_start(mesh, compiled.abstract, batches.batch_size, steps, start)
    saved_at = time.monotonic()
    with StopRequest() as stop:
        try:
            step_once = making_step.result()
            upcoming = itertools.chain(first, ahead)
            del first  # a batch is freed once its step is over
            for step in range(start, steps + 1):
                last = step == steps
                # At the step resumed from, too: its evaluation was cut off with what came after.
                improved = None
                if _due(step, evaluate_every) or last:
                    improved = run.evaluate(step, state)
                if _due(step, render_every) or last:
                    run.render(step, state)

                together = jax.process_count() == 1 or step % log_every == 0
                stopping = together and agreed(stop.requested)
                timely = (
                    save_seconds is not None
                    and together
                    and agreed(time.monotonic() - saved_at >= save_seconds)
                )
                wanted = last or stopping or timely or improved is not None
                if step > start and (wanted or _due(step, save_every)):
                    run.save(step, state, improved)
                    saved_at = time.monotonic()
                if last:
                    break
                if stopping:
                    if checkpoints is not None:
                        checkpoints.wait()
                    raise Interrupted(step)

                with jax.transfer_guard("disallow"):
                    batch = next(upcoming)
                    state, metrics = step_once[0](state, batch, key)
                    run.log(step + 1, metrics, state)
            if checkpoints is not None:
                checkpoints.wait()
        except BaseException:
            ahead.close()
            with contextlib.suppress(Exception):  # what went wrong first is what to tell
                run.close()
            raise
        ahead.close()
        run.close()
    return state


def _in_thread(function: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    pool = concurrent.futures.ThreadPoolExecutor(1)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future


def _due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0


@dataclasses.dataclass
class _Run:
    """The side of `fit` that looks at results: pending metrics, evaluation, saving."""

    compiled: Compiled
    mesh: Mesh
    key: jax.Array
    evaluation: EvaluationBatches | None
    writer: Writer
    checkpoints: Checkpoints | None
    progress: Progress
    on_nonfinite: str
    log_every: int
    best: Best | None

    def __post_init__(self) -> None:
        self._pending: tuple[int, Any] | None = None
        self._best = None if self.checkpoints is None else self.checkpoints.best_value()

    def log(self, step: int, metrics: Any, state: Any) -> None:
        """Takes the metrics of the step just dispatched and writes those of the one before.

        So the host waits for a step only when the device has the next one to work on.
        """
        before, self._pending = self._pending, (step, metrics)
        if before is not None:
            self._write(*before, state)

    def flush(self, state: Any) -> None:
        """Writes what is pending."""
        before, self._pending = self._pending, None
        if before is not None:
            self._write(*before, state)

    def _write(self, step: int, metrics: Any, state: Any) -> None:
        values = dict(jax.device_get(metrics))
        bad: tuple[str, ...] = ()
        for name, value in list(values.items()):
            if isinstance(value, NonfiniteLeaves):
                bad += tuple(p for p, flag in zip(value.paths, value.flags, strict=True) if flag)
                del values[name]
        if step % self.log_every == 0:
            self.writer.metrics("train", step, values)
            rate = self.progress.steps_per_second(step)
            if rate is not None:
                self.writer.timing(step, steps_per_second=rate)
        loss = values.get("loss")
        self.progress.update(step, None if loss is None else float(loss))
        if bad:
            if self.on_nonfinite == "stop":
                self._stop(step, bad, state)
            self.progress.say(f"step {step}: skipped, gradients not finite in {', '.join(bad[:3])}")

    def _stop(self, step: int, bad: tuple[str, ...], state: Any) -> None:
        reached = int(jax.device_get(state.step))
        saved = None
        if self.checkpoints is not None:
            if reached not in self.checkpoints.steps():
                self.checkpoints.save(reached, state)
            self.checkpoints.wait()
            saved = reached
        raise NonfiniteError(step, bad, saved)

    def evaluate(self, step: int, state: Any) -> Mapping[str, float] | None:
        """Evaluates and records; returns the values if they are the best so far."""
        self.flush(state)
        if self.compiled.evaluate is None or self.evaluation is None:
            return None
        totals: dict[str, list[np.ndarray]] = {}
        for index in range(len(self.evaluation)):
            for name, pair in jax.device_get(
                self._call(self.compiled.evaluate, state, index)
            ).items():
                pair = [np.asarray(x, np.float64) for x in pair]
                totals[name] = (
                    [a + b for a, b in zip(totals[name], pair, strict=True)]
                    if name in totals
                    else pair
                )
        values = {name: total / count for name, (total, count) in totals.items()}
        self.writer.metrics("evaluate", step, values)
        if self.best is None:
            return None
        if self.best.metric not in values:
            raise ValueError(
                f"best checkpoint by {self.best.metric!r}, but the task evaluates {sorted(values)}"
            )
        value = float(values[self.best.metric])
        sign = 1 if self.best.mode == "min" else -1
        if math.isfinite(value) and (self._best is None or sign * value < sign * self._best):
            self._best = value
            return {self.best.metric: value}
        return None

    def render(self, step: int, state: Any) -> None:
        """Draws the first evaluation batch."""
        if self.compiled.render is None or self.evaluation is None:
            return
        self.flush(state)
        self.writer.images(step, jax.device_get(self._call(self.compiled.render, state, 0)))

    def _call(self, function: Callable[..., Any], state: Any, index: int) -> Any:
        assert self.evaluation is not None
        batch = meshes.put_batch(self.evaluation(index), self.mesh)
        number = jax.device_put(np.uint32(index), meshes.replicated(self.mesh))
        return function(state, batch, number, self.key)

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None) -> None:
        """Everything up to `step` is on the disk before its checkpoint is."""
        self.flush(state)
        if self.checkpoints is not None:
            self.checkpoints.save(step, state, metrics)

    def close(self) -> None:
        """Closes files and threads."""
        self.progress.close()
        self.writer.close()
        if self.checkpoints is not None:
            self.checkpoints.close()
