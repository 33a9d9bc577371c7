"""Checkpoints that are written behind the training and checked when they are read.

Orbax writes and commits them; what it does not do is done here: it returns damaged arrays without
a word and casts dtypes silently. Every checkpoint therefore carries the path, shape, dtype and a
content fingerprint of each leaf. What does not fit the state is refused; what is damaged is named,
moved aside, and the next older checkpoint is used.
"""

import contextlib
import json
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import jax

from blogjax.core.per_device import holds_per_device
from blogjax.train.distributed import OtherProcessError, any_process, on_first
from blogjax.train.fingerprints import fingerprints
from blogjax.train.orbax_logs import leave_out_failed_writes
from blogjax.train.task import leaf_paths

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those found can be read."""


class CheckpointMismatchError(ValueError):
    """A sound checkpoint holds another state than the one asked for."""


_NO_DAMAGE = (CheckpointMismatchError, MemoryError, PermissionError, jax.errors.JaxRuntimeError)


class Best(NamedTuple):
    """Which checkpoint to keep besides the latest: by an evaluated metric, smallest or largest."""

    metric: str
    mode: Literal["min", "max"] = "min"


def _layout(state: Any) -> dict[str, list[Any]]:
    return {
        path: [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in zip(leaf_paths(state), jax.tree.leaves(state), strict=True)
    }


def _checksum(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def check_description(meta: dict[str, Any], step: int) -> dict[str, Any]:
    """The description of a checkpoint as read from it, without its checksum.

    Raises:
      CheckpointError: if it is not what was written, or is that of another step.
    """
    record = {name: value for name, value in meta.items() if name != "checksum"}
    if meta["checksum"] != _checksum(record) or record["step"] != step:
        raise CheckpointError("its description was changed")
    return record


def check_content(recorded: Mapping[str, int], restored: Any) -> None:
    """Compares what was read with the fingerprints taken when it was written.

    Args:
      recorded: fingerprint of each leaf by path; more of them do no harm.
      restored: tree of arrays.

    Raises:
      CheckpointError: naming the leaves that differ.
    """
    changed = [path for path, now in fingerprints(restored).items() if recorded[path] != now]
    if changed:
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise CheckpointError(f"changed content in {', '.join(changed[:4])}{more}")


def read_by_all(read: Callable[[], T]) -> T:
    """What `read()` gives on this process, if it succeeds on all of them.

    So that none goes on with a checkpoint that another one cannot read. All must call it at the
    same place; inside of `read` only computations may wait for other processes.

    Raises:
      CheckpointError: on all processes, where one finds damage.
      Exception: what is no fault of the checkpoint's, as it is where it was raised; on the other
        processes `OtherProcessError`.
    """
    value = error = None
    try:
        value = read()
    except Exception as raised:
        error = raised
    told = any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED"))
    sound = told or isinstance(error, _NO_DAMAGE)
    failed, damaged = any_process(error is not None and sound, error is not None and not sound)
    if failed:
        raise error if error is not None and sound else OtherProcessError("another process failed")
    if damaged:
        found = "another process cannot read its part of it" if error is None else damage(error)
        raise CheckpointError(found) from error
    return value  # type: ignore[return-value]


def layout_differences(
    saved: Mapping[str, Any],
    wanted: Mapping[str, Any],
    places: tuple[str, str] = ("checkpoint", "state"),
    limit: int = 12,
) -> str:
    """A line for each leaf that is not alike on both sides; empty if all are.

    Args:
      saved: `{path: [shape, dtype]}`.
      wanted: the same.
      places: what the two sides are called.
      limit: how many lines at most.

    >>> print(layout_differences({"a": [[2], "int8"]}, {"a": [[3], "int8"]}))
      a: int8[2] in the checkpoint, int8[3] in the state
    """
    lines = []
    for path in sorted(saved.keys() | wanted.keys()):
        here, there = saved.get(path), wanted.get(path)
        if here != there:
            a, b = ("absent" if x is None else f"{x[1]}{x[0]}" for x in (here, there))
            lines.append(f"  {path}: {a} in the {places[0]}, {b} in the {places[1]}")
    more = [f"  and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join(lines[:limit] + more)


class Checkpoints:
    """The checkpoints of one run: the latest ones and the best one.

    Saving returns at once and the writing goes on in the background; the state may be donated
    right after. A checkpoint appears under its final name only when it is complete, so a process
    killed at any moment leaves only whole ones.

    Args:
      folder: made if absent. One sub-folder per step.
      keep: how many of the latest are kept.
      best: which metric of `save` decides on the best one, which is kept as well.
      warn: is told in one line about each damaged checkpoint.

    Raises:
      CheckpointError: if the folder cannot be made or written to.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        *,
        keep: int = 2,
        best: Best | None = None,
        warn: Callable[[str], None] = print,
    ):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        leave_out_failed_writes()
        self._ocp: Any = ocp
        self._warn = warn
        self.best = best
        # Orbax needs an absolute path: processes may run in different folders.
        self.folder = pathlib.Path(folder).absolute()
        self._values: dict[int, float] = {}

        best_step = self._best_step

        class LatestAndBest(policies.PreservationPolicy):
            def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
                del context
                steps = [info.step for info in checkpoints]
                kept = {*sorted(steps)[-keep:], best_step(steps)}
                return [step in kept for step in steps]

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager: Any = ocp.CheckpointManager(
                self.folder,
                item_names=("state", "meta"),
                options=ocp.CheckpointManagerOptions(
                    cleanup_tmp_directories=True,
                    preservation_policy=LatestAndBest(),
                ),
            )
        except OSError as error:
            raise CheckpointError(f"cannot keep checkpoints in {self.folder}: {error}") from error
        if best is not None:
            self._values = on_first(lambda: self._read_values(best.metric))

    def _read_values(self, metric: str) -> dict[int, float]:
        values = {}
        for step in self.steps():
            with contextlib.suppress(Exception):  # a damaged one is dealt with by `restore`
                values[step] = self._meta(step)["metrics"][metric]
        return values

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def _best_step(self, steps: Iterable[int]) -> int | None:
        known = [step for step in steps if step in self._values]
        if self.best is None or not known:
            return None
        choose = min if self.best.mode == "min" else max
        return choose(known, key=self._values.__getitem__)

    def best_value(self) -> float | None:
        """The metric of the best checkpoint kept, None if there is none."""
        step = self._best_step(self.steps())
        return None if step is None else self._values[step]

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Starts to write `state` as the checkpoint of `step`.

        Args:
          step: larger than any saved before.
          state: pytree of arrays.
          metrics: evaluated at this very state; without them it cannot become the best one.

        Raises:
          CheckpointError: if this or the previous checkpoint could not be written. The older ones
            are intact.
        """
        value = None
        if metrics is not None and self.best is not None and self.best.metric in metrics:
            value = self._values[step] = float(metrics[self.best.metric])
        record = {
            "step": step,
            "layout": _layout(state),
            "fingerprints": fingerprints(state),
            "metrics": {} if value is None or self.best is None else {self.best.metric: value},
        }
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state),
            meta=self._ocp.args.JsonSave({**record, "checksum": _checksum(record)}),
        )
        with self._clear_errors(step):
            if not self._manager.save(step, args=args, force=True):
                raise CheckpointError(
                    f"the checkpoint of step {step} was not taken; {self.folder} has {self.steps()}"
                )

    def wait(self) -> None:
        """Waits until everything is on the disk.

        Raises:
          CheckpointError: if the last checkpoint could not be written.
        """
        with self._clear_errors(None):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees threads; the object is of no use afterwards."""
        with self._clear_errors(None):
            self._manager.close()

    @contextlib.contextmanager
    def _clear_errors(self, step: int | None):
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            if lost := _lost_process(error):
                raise lost from None
            which = "the last checkpoint" if step is None else f"the checkpoint of step {step}"
            whole = sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())
            raise CheckpointError(
                f"could not write {which} in {self.folder} "
                f"({type(error).__name__}: {_first_line(error)}); intact: {whole or 'none'}; "
                "free space or mend the folder, then start again"
            ) from error

    def restore(self, abstract: Any) -> tuple[int, Any] | None:
        """Reads the newest sound checkpoint.

        Args:
          abstract: tree of `ShapeDtypeStruct` with the shardings wanted; they need not be those
            the state was saved under.

        Returns:
          `(step, state)`, or None if there is no checkpoint at all.

        Raises:
          CheckpointMismatchError: if the newest sound one holds other leaves, shapes or dtypes.
          CheckpointError: if there are checkpoints and every one is damaged.
        """
        rejected = []
        # As the first process sees them: what another sees of a shared folder may be older.
        for step in reversed(on_first(self.steps)):
            try:
                state = self._restore_one(step, abstract)
            except CheckpointError as error:
                rejected.append((step, f"checkpoint {step} is damaged: {error}"))
                continue
            for bad, reason in rejected:
                self._warn(f"{reason}; moved to {self._move_aside(bad)}, using {step} instead")
            return step, state
        if rejected:
            reasons = "\n".join(f"  {reason}" for _, reason in rejected)
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read:\n{reasons}\n"
                "nothing was changed; to start from nothing, use another folder"
            )
        return None

    def _meta(self, step: int) -> dict[str, Any]:
        meta = self._ocp.JsonCheckpointHandler().restore(self._item(step, "meta"))
        return check_description(meta, step)

    def _item(self, step: int, name: str) -> Any:
        from etils import epath

        return epath.Path(self.folder) / str(step) / name

    def _restore_one(self, step: int, abstract: Any) -> Any:
        meta, state = read_by_all(lambda: self._read(step, abstract))
        # A process sees the copy that it holds of what is not split: they may not all be alike.
        read_by_all(lambda: check_content(meta["fingerprints"], state))
        return state

    def _read(self, step: int, abstract: Any) -> tuple[dict[str, Any], Any]:
        """What this process can say of a checkpoint; in here none waits for another.

        Orbax's manager would: where one process cannot read its part, the others would wait for it
        until their patience is over.
        """
        meta = self._meta(step)
        wanted = _layout(abstract)
        if meta["layout"] != wanted:
            own = holds_per_device(abstract)
            devices = ", or to another number of devices" if own else ""
            raise CheckpointMismatchError(
                f"checkpoint {step} in {self.folder} does not fit the state:\n"
                + layout_differences(meta["layout"], wanted)
                + f"\nit belongs to another model or optimiser{devices}; "
                "use another folder for this one"
            )
        handler = self._ocp.StandardCheckpointHandler()
        return meta, handler.restore(
            self._item(step, "state"), args=self._ocp.args.StandardRestore(abstract)
        )

    def _move_aside(self, step: int) -> pathlib.Path:
        """Out of the way, so that the step can be saved again; nothing is deleted."""
        self._values.pop(step, None)

        def move() -> pathlib.Path:
            target = self.folder.parent / "damaged_checkpoints" / str(step)
            number = 1
            while target.exists():
                number += 1
                target = target.with_name(f"{step}.{number}")
            target.parent.mkdir(exist_ok=True)
            shutil.move(self.folder / str(step), target)
            return target

        target = on_first(move)
        self._manager.reload()
        return target


def _lost_process(error: BaseException) -> BaseException | None:
    """What jax says where a process has ended while others wait for it to write its part."""
    if jax.process_count() == 1:
        return None
    kinds = (error, error.__cause__)  # Orbax makes a TimeoutError of it, however it came
    return next((e for e in kinds if isinstance(e, jax.errors.JaxRuntimeError)), None)


def damage(error: BaseException) -> str:
    """What a reading error means, without the reader's own details."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, (KeyError, ValueError, UnicodeDecodeError)) and "CRC" not in str(error):
        return f"its metadata cannot be read ({type(error).__name__})"
    return _first_line(error).partition(" See full TensorStore details")[0]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
