"""The side of a run that looks at results: pending metrics, evaluation, saving, stopping.

Metrics of a step are fetched once the next one is dispatched, so the host waits for a step only
while the device has work.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from blogjax.train.checkpoint import Best, Checkpoints
from blogjax.train.compiled import Compiled
from blogjax.train.distributed import on_first
from blogjax.train.reporting import Progress, Writer
from blogjax.train.task import EvaluationBatches, NonfiniteLeaves, leaf_paths
from blogjax.train.watch import Compilations, StepClock

_STOPPED = "nonfinite.json"
_TOLD = 5  # of what recurs, so many are told on the screen


class NonfiniteError(ArithmeticError):
    """Gradients or parameters became NaN or infinite, and the policy is to stop.

    Attributes:
      step: the step in which it was seen.
      paths: what was not finite: the gradients of these parameters, or `PARAMETERS`.
      checkpoint: the newest checkpoint with a good state, or None.
      state: the state when the loop stopped: the step in question left out, and one more taken if
        it was on its way. Bad only if `paths` is the parameters. None when read back from a folder.
    """

    def __init__(
        self, step: int, paths: tuple[str, ...], checkpoint: int | None, state: Any = None
    ):
        shown = ", ".join(paths[:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")
        kept = "" if checkpoint is None else f"; checkpoint {checkpoint} holds a good state"
        super().__init__(f"step {step}: not finite: {shown}{kept}")
        self.step, self.paths, self.checkpoint, self.state = step, paths, checkpoint, state


def check_not_stopped(folder: pathlib.Path, on_nonfinite: str) -> None:
    """Refuses to go on where a run stopped over NaN, unless the policy is now to skip.

    Raises:
      NonfiniteError: as when it stopped.
    """
    marker = folder / _STOPPED

    def look() -> dict[str, Any] | None:
        record = json.loads(marker.read_text()) if marker.exists() else None
        if record is not None and on_nonfinite != "stop":
            marker.unlink()
        return record

    record = on_first(look)
    if record is not None and on_nonfinite == "stop":
        raise NonfiniteError(record["step"], tuple(record["paths"]), record["checkpoint"])


@dataclasses.dataclass
class Bookkeeper:
    """Writes what a run gives and decides on what it must stop for; see `loop.fit`."""

    compiled: Compiled
    key: jax.Array
    evaluation: EvaluationBatches | None
    put: Callable[[Any], Any] | None
    writer: Writer
    checkpoints: Checkpoints | None
    progress: Progress
    compilations: Compilations
    clock: StepClock
    on_nonfinite: str
    log_every: int
    best: Best | None

    def __post_init__(self) -> None:
        self._pending: tuple[int, Any] | None = None
        self._told = self._compiled_again = 0
        self._bad: tuple[int, tuple[str, ...], bool] | None = None
        self._best = None if self.checkpoints is None else self.checkpoints.best_value()

    def log(self, step: int, metrics: Any) -> None:
        """Takes the metrics of the step just dispatched and writes those of the one before."""
        before, self._pending = self._pending, (step, metrics)
        if before is not None:
            self._write(*before)

    def flush(self, state: Any) -> None:
        """Writes what is pending, and stops if it must."""
        before, self._pending = self._pending, None
        if before is not None:
            self._write(*before)
        self.check(state)

    def _write(self, step: int, metrics: Any) -> None:
        values = dict(jax.device_get(metrics))
        bad: tuple[str, ...] = ()
        recoverable = True
        for name, value in list(values.items()):
            if isinstance(value, NonfiniteLeaves):
                bad += tuple(p for p, flag in zip(value.paths, value.flags, strict=True) if flag)
                recoverable &= bool(value.recoverable)
                del values[name]
        if self._bad is not None:  # the step after the one at fault may have lost the state
            at, what, good = self._bad
            self._bad = (at, what, good and recoverable)
        self._tell_compilations(step)
        if step % self.log_every == 0:
            self.writer.metrics("train", step, values)
            self._time(step)
        loss = np.asarray(values.get("loss", np.nan))
        loss = float(loss) if loss.size == 1 else math.nan
        self.progress.update(step, loss, self.clock.waited_share)
        if not bad:
            return
        if self.on_nonfinite == "stop" or not recoverable:
            self._bad = self._bad or (step, bad, recoverable)
        else:
            self._told += 1
            if self._told <= _TOLD:
                more = "; further ones are only counted" if self._told == _TOLD else ""
                self.progress.say(f"step {step}: left out, not finite: {', '.join(bad[:3])}{more}")

    def _time(self, step: int) -> None:
        taken = self.clock.take()
        if taken is not None and step > 1:  # the first step warms up
            self.writer.timing(
                step,
                steps_per_second=taken[0],
                data_wait_share=taken[1],
                compilations=self._compiled_again,
            )

    def _tell_compilations(self, step: int) -> None:
        for part, program, seconds in self.compilations.take():
            self._compiled_again += 1
            if self._compiled_again <= _TOLD:
                more = "; further ones are only counted" if self._compiled_again == _TOLD else ""
                self.progress.say(
                    f"step {step}: {part} compiled anew: {program}, {seconds:.2f} s{more}"
                )

    def check(self, state: Any) -> None:
        """Ends the run if a step seen so far was not finite.

        Raises:
          NonfiniteError: after the pending metrics, a checkpoint of the good state and a note for
            the next start are written.
        """
        if self._bad is None:
            return
        before, self._pending = self._pending, None
        if before is not None:
            self._write(*before)
        step, paths, recoverable = self._bad
        saved = None
        if self.checkpoints is not None:
            reached = int(jax.device_get(state.step))
            if recoverable and reached not in self.checkpoints.steps():
                self.writer.flush()
                self.checkpoints.save(reached, state)
            self.checkpoints.wait()
            saved = max(self.checkpoints.steps(), default=None)
        if self.writer.folder is not None and recoverable:
            record = {"step": step, "paths": list(paths), "checkpoint": saved}
            temporary = self.writer.folder / f"{_STOPPED}.tmp"
            temporary.write_text(json.dumps(record))
            os.replace(temporary, self.writer.folder / _STOPPED)  # half a note would stop all
        raise NonfiniteError(step, paths, saved, state)

    def evaluate(self, step: int, state: Any) -> Mapping[str, float] | None:
        """Evaluates and records; returns the metric that decides if it is the best so far."""
        self.flush(state)
        if self.compiled.evaluate is None or self.evaluation is None:
            return None
        sums = None
        for index in range(len(self.evaluation)):
            part = jax.device_get(self._call(self.compiled.evaluate, state, index))
            part = jax.tree.map(lambda x: np.asarray(x, np.float64), part)
            sums = part if sums is None else jax.tree.map(np.add, sums, part)
        values = {name: total / count for name, (total, count) in (sums or {}).items()}
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
        self.flush(state)
        if self.compiled.render is not None and self.evaluation is not None:
            images = jax.device_get(self._call(self.compiled.render, state, 0))
            self.writer.images(step, images)

    def _call(self, function: Callable[..., Any], state: Any, index: int) -> Any:
        assert self.evaluation is not None and self.put is not None
        number = jax.device_put(np.uint32(index), self.key.sharding)
        return function(state, self.put(self.evaluation(index)), number, self.key)

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None) -> None:
        """Everything up to `step` is on the disk before its checkpoint is.

        Raises:
          ValueError: if the task did not count its steps, or in a per-device view did not average
            something that it should have.
        """
        self.flush(state)
        self._check_replicas(step, state)
        counted = int(jax.device_get(state.step))
        if counted != step:
            raise ValueError(
                f"after {step} calls of Task.step, state.step is {counted}: step must add 1 to it"
            )
        self.writer.flush()
        if self.checkpoints is not None:
            self.checkpoints.save(step, state, metrics)

    def _check_replicas(self, step: int, state: Any) -> None:
        if self.compiled.differing is None:
            return
        flags = jax.device_get(self.compiled.differing(state))
        paths = [p for p, flag in zip(leaf_paths(state), flags, strict=True) if flag]
        if paths:
            shown = ", ".join(paths[:6]) + (f" and {len(paths) - 6} more" if paths[6:] else "")
            raise ValueError(
                f"after step {step} the devices hold different values of {shown}: the task must "
                "average over axis_name whatever these depend on"
            )

    def finish(self, step: int, state: Any) -> None:
        """Waits until all is on the disk."""
        self.flush(state)
        self._tell_compilations(step)
        if self.checkpoints is not None:
            self.checkpoints.wait()
