"""The loop: `fit` runs any `Task`, on any mesh, in one fixed order, and loses nothing.

Order of one turn, at a state of `step` updates: evaluate, save, next batch, step, log. After the
last step: evaluate, save once more. Everything depends on that order: a record of step n is on the
disk before the checkpoint of step n, so a run resumed from it writes the same files.

Randomness is `fold_in(key(seed), state.step)` and a batch is a pure function of its step, so a
checkpoint is the state and nothing else, and resuming is exact to the bit.
"""

import concurrent.futures
import contextlib
import itertools
import operator
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from blogjax.train import mesh as meshes
from blogjax.train.bookkeeping import Bookkeeper, NonfiniteError, check_not_stopped
from blogjax.train.checkpoint import Best, Checkpoints
from blogjax.train.compiled import INIT, compile_task
from blogjax.train.distributed import any_process
from blogjax.train.interrupt import Interrupted, StopRequest
from blogjax.train.per_device import View
from blogjax.train.prefetch import prefetch
from blogjax.train.profiling import Profile, describe_program
from blogjax.train.reporting import Progress, Writer, show_program, show_start
from blogjax.train.state import init_state
from blogjax.train.task import Batches, EvaluationBatches, Task
from blogjax.train.watch import Compilations, StepClock

__all__ = ["Best", "Interrupted", "NonfiniteError", "fit"]


def fit(
    task: Task,
    batches: Batches,
    steps: int,
    *,
    mesh: Mesh | None = None,
    view: View = "jit",
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
    profile: tuple[int, int] | None = None,
    verbose: bool = False,
) -> Any:
    """Trains a task for `steps` steps and returns its last state.

    With a `workdir` the run resumes from its newest sound checkpoint, and the result, bit for bit,
    is that of a run never interrupted. It holds `checkpoints/`, `metrics.jsonl` (a record every
    `log_every` steps, one per evaluation; the same bytes on every run), `timings.jsonl` (rate,
    share of the time spent waiting for data, programs compiled again), `program.json` (what XLA
    says of the step), `tensorboard/`, `images/`. SIGINT and SIGTERM write a checkpoint and raise
    `Interrupted`.

    Args:
      task: what to train.
      batches: called as `batches(step)`; `batch_size` must divide over the mesh.
      steps: how many steps in all, those of earlier starts included.
      mesh: default all devices along `data`.
      view: `"jit"`, or `"pmap"` or `"shard_map"` for a task built with `axis_name`; see
        `train.per_device`.
      seed: of initialisation, steps and evaluation.
      workdir: None writes and resumes nothing.
      evaluation: batches for `task.evaluate` and, the first of them, for `task.render`.
      evaluate_every: steps between evaluations; there is always one after the last step.
      render_every: the same for `render`.
      save_every: steps between checkpoints.
      save_seconds: seconds between checkpoints; may be given beside `save_every`. Several
        processes agree on the moment, and on stopping, at multiples of `log_every`.
      log_every: steps between records of the training metrics, which are those of that one step.
      keep: how many of the latest checkpoints stay.
      best: which evaluated metric decides on one more checkpoint to keep; one is then written
        after every evaluation that improves it.
      on_nonfinite: `"stop"` raises `NonfiniteError` at the first non-finite gradient, and again
        whenever the run is started anew; `"skip"` leaves the step out, counts it and goes on.
      prefetch_depth: batches prepared ahead by a thread; 0 for none.
      profile: `(start, stop)` writes a trace of those steps to `workdir/profile`, to be opened in
        TensorBoard or Perfetto; default what `profiling.profiling` asks for, else none.
      verbose: shows progress on stdout.

    Returns:
      The state after `steps` steps, on the mesh.

    Raises:
      ValueError: if an option is out of range or has nothing to work on, a batch does not divide
        over the devices or has not the rows announced, or the checkpoints found are of another
        state (`CheckpointMismatchError`) or beyond `steps`.
      CheckpointError: if none of the checkpoints found can be read, or one cannot be written.
      NonfiniteError: see `on_nonfinite`.
      Interrupted: after SIGINT or SIGTERM.
    """
    every = {"evaluate_every": evaluate_every, "render_every": render_every}
    _check_counts(steps=steps, save_every=save_every, log_every=log_every, keep=keep, **every)
    _check_options(task, evaluation, {**every, "best": best}, seed, save_seconds, on_nonfinite)
    mesh = meshes.make_mesh() if mesh is None else mesh
    meshes.check_batch_size(batches.batch_size, mesh)
    if evaluation is not None:
        meshes.check_batch_size(evaluation.batch_size, mesh)
    key = meshes.put_key(jax.random.key(seed), mesh)
    compiled = compile_task(task, mesh, view)
    folder = None if workdir is None else pathlib.Path(workdir)
    tracing = Profile(folder, profile, steps)
    with contextlib.ExitStack() as stack:
        checkpoints, start, state = None, 0, None
        if folder is not None:
            check_not_stopped(folder, on_nonfinite)
            checkpoints = Checkpoints(folder / "checkpoints", keep=keep, best=best)
            stack.push(_closing(checkpoints.close))
            start, state = checkpoints.restore(compiled.abstract) or (0, None)
            if start > steps:
                raise ValueError(
                    f"{folder} has been trained for {start} steps already, more than {steps}"
                )
        put = meshes.BatchPutter(mesh, batches.batch_size)
        ahead = prefetch(batches, start, steps, put, depth=prefetch_depth)
        stack.push(_closing(ahead.close))
        first = list(itertools.islice(ahead, 1))
        # XLA works on the step in a thread while this one makes the state and opens the files.
        lowered = [compiled.step.lower(compiled.abstract, batch, key) for batch in first]
        making_step = _in_thread(lambda: [program.compile() for program in lowered])
        if state is None:
            init_key = meshes.put_key(jax.random.fold_in(jax.random.key(seed), INIT), mesh)
            state = init_state(task, compiled.abstract, mesh, init_key)
        writer = Writer(folder, start)
        stack.push(_closing(writer.close))
        if verbose:
            show_start(mesh, compiled.abstract, batches.batch_size, steps, start)
        progress = Progress(start, steps, show=verbose)
        stack.push(_closing(progress.close))
        compilations, clock = stack.enter_context(Compilations()), StepClock()
        stack.callback(tracing.close)
        if told := tracing.missed(start):
            progress.say(told)
        books = Bookkeeper(
            compiled=compiled,
            key=key,
            evaluation=evaluation,
            put=None if evaluation is None else meshes.BatchPutter(mesh, evaluation.batch_size),
            writer=writer,
            checkpoints=checkpoints,
            progress=progress,
            compilations=compilations,
            clock=clock,
            on_nonfinite=on_nonfinite,
            log_every=log_every,
            best=best,
        )
        stop = stack.enter_context(StopRequest())
        take_step = making_step.result()
        upcoming = itertools.chain(first, ahead)
        for program in take_step:
            writer.program(shown := describe_program(program))
            if verbose:
                show_program(shown)
        del first  # a batch is freed once its step is over
        saved_at = time.monotonic()
        for step in range(start, steps + 1):
            last = step == steps
            if told := tracing.switch(step, state, last):
                progress.say(f"step {step}: {told}")
            # At the step resumed from, too: its evaluation was cut off with what came after.
            improved = None
            if _due(step, evaluate_every) or last:
                with compilations.within("evaluation"):
                    improved = books.evaluate(step, state)
            if _due(step, render_every) or last:
                with compilations.within("rendering"):
                    books.render(step, state)

            stopping = timely = False
            # Several processes must agree, which costs them a moment.
            if jax.process_count() == 1 or last or step % log_every == 0:
                overdue = save_seconds is not None and time.monotonic() - saved_at >= save_seconds
                stopping, timely = any_process(stop.requested, overdue)
            wanted = last or stopping or timely or improved is not None
            if step > start and (wanted or _due(step, save_every)):
                with compilations.within("saving"):
                    books.save(step, state, improved)
                saved_at = time.monotonic()
            if last or stopping:
                books.finish(step, state)
            if stopping:
                raise Interrupted(step, state)
            if last:
                break

            with (
                compilations.within("training"),
                clock.step(),
                tracing.step(step),
                jax.transfer_guard("disallow"),
            ):
                with clock.waiting():
                    batch = next(upcoming)
                state, metrics = take_step[0](state, batch, key)
                books.log(step + 1, metrics)
            books.check(state)
    return state


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and operator.index(value) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_options(
    task: Task,
    evaluation: EvaluationBatches | None,
    wanted: dict[str, Any],
    seed: int,
    save_seconds: float | None,
    on_nonfinite: str,
) -> None:
    if not 0 <= operator.index(seed) < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}")
    if save_seconds is not None and not save_seconds >= 0:
        raise ValueError(f"save_seconds must not be negative, got {save_seconds}")
    if on_nonfinite not in ("stop", "skip"):
        raise ValueError(f"on_nonfinite must be 'stop' or 'skip', got {on_nonfinite!r}")
    if evaluation is not None and len(evaluation) == 0:
        raise ValueError("evaluation has no batches")
    needed = {"evaluate_every": "evaluate", "best": "evaluate", "render_every": "render"}
    for name, function in needed.items():
        if wanted[name] is not None and evaluation is None:
            raise ValueError(f"{name} is given, but no evaluation batches")
        if wanted[name] is not None and getattr(task, function) is None:
            raise ValueError(f"{name} is given, but the task has no function {function!r}")


class _closing:
    """Closes at the end; after an error it stays silent, for that error is what to tell."""

    def __init__(self, close: Callable[[], None]):
        self._close = close

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._close()
            return
        with contextlib.suppress(Exception):
            self._close()


def _in_thread(function: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    pool = concurrent.futures.ThreadPoolExecutor(1)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future


def _due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0
