"""What a run leaves behind while it trains: lines on the screen, metrics, TensorBoard, images.

`metrics.jsonl` holds what the same config gives on the same machine every time, byte for byte,
however often the run was interrupted: no clock time is in it. Times go to `timings.jsonl`.
"""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_FLUSH_SECONDS = 2.0


def tile_images(images: np.ndarray, columns: int | None = None, pad: int = 1) -> np.ndarray:
    """Lays images out in a grid, row by row, separated by mid-grey lines.

    Args:
      images: `[n, h, w, c]` in [0, 1].
      columns: default about the square root of n.
      pad: width of the lines, pixels.

    Returns:
      `[H, W, c]` float32 in [0, 1].

    Raises:
      ValueError: if `images` is not of rank 4 or has no image.

    >>> tile_images(np.zeros((6, 8, 8, 1)), columns=3).shape
    (19, 28, 1)
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must have shape [n, h, w, c] with n > 0, got {images.shape}")
    n, h, w, c = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    grid = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, c), 0.5, np.float32)
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + pad) + pad, (i % columns) * (w + pad) + pad
        grid[top : top + h, left : left + w] = np.clip(image, 0, 1)
    return grid


def write_png(path: pathlib.Path, image: np.ndarray, min_height: int = 256) -> None:
    """Writes `[H, W, 1 or 3]` in [0, 1] as PNG, enlarged by whole pixels to be seen."""
    from PIL import Image

    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    factor = max(1, -(-min_height // image.shape[0]))
    pixels = pixels.repeat(factor, 0).repeat(factor, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path)


def keep_until(path: pathlib.Path, step: int) -> None:
    """Cuts a metrics file back to what had been written when `step` was about to be evaluated.

    Training records up to and including `step` stay, evaluations before it; a line torn by a kill
    goes. The file is replaced at once, so a kill here loses nothing either.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
            keep = record["step"] <= step if record["kind"] == "train" else record["step"] < step
        except (ValueError, KeyError, TypeError):
            keep = False
        if keep and line.endswith("\n"):
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def read_metrics(path: str | pathlib.Path, kind: str) -> dict[str, np.ndarray]:
    """Reads one kind of record of a `metrics.jsonl` as columns.

    Args:
      path: the file.
      kind: `"train"` or `"evaluate"`.

    Returns:
      `{name: float64 [records]}` with `step`; missing values are NaN.
    """
    records = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    records = [r for r in records if r.pop("kind") == kind]
    names = sorted({name for r in records for name in r})
    values = {n: [r.get(n) for r in records] for n in names}
    return {n: np.array([math.nan if v is None else v for v in vs]) for n, vs in values.items()}


class Writer:
    """Files of one run; every method does nothing without a folder or off process 0.

    Args:
      folder: the run's folder, or None.
      start: the step the run starts from; whatever was written beyond it is cut off.
    """

    def __init__(self, folder: pathlib.Path | None, start: int = 0):
        self.folder = folder if jax.process_index() == 0 else None
        if self.folder is None:
            return
        # Not SummaryWriter: it hands events to a thread, and when that dies of a full disk, the
        # next event blocks for ever.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._summary: Any = summary
        proto: Any = event_pb2  # its names are made at run time
        self._event = proto.Event
        events = self.folder / "tensorboard"
        events.mkdir(parents=True, exist_ok=True)
        self._flushed = time.monotonic()
        again = any(events.iterdir())
        keep_until(self.folder / "metrics.jsonl", start)
        self._metrics = (self.folder / "metrics.jsonl").open("a")
        self._timings = (self.folder / "timings.jsonl").open("a")
        # Event files are named by the second; two writers of one second would overwrite.
        self._events: Any = EventsWriter(str(events / "events"), f".{time.time_ns()}")
        if again:  # what an earlier start wrote beyond this one's first step is void
            log = proto.SessionLog(status=proto.SessionLog.START)
            event = proto.Event(wall_time=time.time(), step=start + 1, session_log=log)
            self._events.write_event(event)

    def _log(self, step: int, *summaries: Any) -> None:
        for summary in summaries:
            event = self._event(wall_time=time.time(), step=step, summary=summary)
            self._events.write_event(event)
        # Each flush waits for the disk, some milliseconds.
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Waits until all that was written so far is on the disk."""
        if self.folder is not None:
            self._events.flush()
            self._flushed = time.monotonic()

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends one record; arrays of more than one entry are left out.

        Raises:
          ValueError: if a value is called like one of the record's own fields.
        """
        taken = {"kind", "step"} & set(values)
        if taken:
            raise ValueError(f"no metric may be called {' or '.join(sorted(taken))}")
        if self.folder is None:
            return
        scalars = {k: np.asarray(v).item() for k, v in values.items() if np.size(v) == 1}
        # JSON has no NaN.
        clean = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        self._metrics.write(json.dumps({"kind": kind, "step": step, **clean}) + "\n")
        self._metrics.flush()
        finite = {k: v for k, v in scalars.items() if math.isfinite(v)}
        self._log(step, *(self._summary.scalar(f"{kind}/{k}", v) for k, v in finite.items()))

    def timing(self, step: int, **values: float) -> None:
        """Appends one record of clock times."""
        if self.folder is None:
            return
        self._timings.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._timings.flush()
        self._log(step, *(self._summary.scalar(f"timing/{k}", v) for k, v in values.items()))

    def program(self, described: Mapping[str, float]) -> None:
        """Writes what XLA says of the step; see `profiling.describe_program`."""
        if self.folder is not None:
            (self.folder / "program.json").write_text(json.dumps(described, indent=2) + "\n")

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Tiles, writes and logs `{name: [n, h, w, c] in [0, 1]}`."""
        if self.folder is None:
            return
        for name, batch in images.items():
            grid = tile_images(np.asarray(batch, np.float32))
            write_png(self.folder / "images" / f"{name}_{step:07d}.png", grid)
            self._log(step, self._summary.image(name, grid, dataformats="HWC"))

    def close(self) -> None:
        """Closes the files."""
        if self.folder is None:
            return
        self._metrics.close()
        self._timings.close()
        self._events.close()


def show_start(mesh: Any, abstract: Any, batch_size: int, steps: int, start: int) -> None:
    """Prints what is about to run: devices, mesh, what the state holds, batch, steps."""
    if jax.process_index():
        return
    from rich.console import Console
    from rich.table import Table

    from blogjax.train.state import sizes

    devices = list(mesh.devices.flat)
    kinds = ", ".join(sorted({d.device_kind for d in devices}))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("devices", f"{len(devices)} x {kinds}, {jax.process_count()} process(es)")
    table.add_row("mesh", " x ".join(f"{name}={n}" for name, n in mesh.shape.items()))
    for name, size in sizes(abstract).items():
        if size.entries > 1:
            table.add_row(
                name.replace("_", " "),
                f"{size.entries:,} numbers, {size.bytes / 2**20:.2f} MiB, "
                f"{size.bytes_per_device / 2**20:.2f} MiB on each device",
            )
    table.add_row("batch", f"{batch_size}, {batch_size // len(devices)} on each device")
    resumed = f", resuming at {start}" if start else ""
    table.add_row("steps", f"{steps}{resumed}")
    Console().print(table)


def show_program(described: Mapping[str, float]) -> None:
    """Prints what a step costs on each device; see `profiling.describe_program`."""
    if jax.process_index():
        return
    parts = []
    if "flops" in described:
        parts.append(f"{described['flops'] / 1e9:.3g} GFLOP")
    if "peak" in described:
        parts.append(
            f"{described['peak'] / 2**20:.4g} MiB at its peak, "
            f"{described['temporaries'] / 2**20:.4g} MiB of it temporary"
        )
    if parts:
        print(f"a step on each device: {', '.join(parts)}", flush=True)


def duration(seconds: float) -> str:
    """Returns seconds as people read them.

    >>> duration(7.25), duration(75), duration(7384)
    ('7.2 s', '1 min 15 s', '2 h 03 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Shows a run's progress: a bar on a terminal, a plain line every few seconds elsewhere.

    Args:
      start, steps: the first step and the one to end at.
      show: False shows nothing.
      interval: seconds between plain lines.
    """

    def __init__(self, start: int, steps: int, *, show: bool, interval: float = 5.0):
        self._start, self._steps, self._interval = start, steps, interval
        self._show = show and jax.process_index() == 0
        self._bar = None
        self._first: tuple[int, float] | None = None
        self._last_line = -math.inf
        if self._show and sys.stdout.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("training"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("loss {task.fields[loss]}  {task.fields[speed]}"),
                progress.TextColumn("ETA {task.fields[eta]}"),
                transient=False,
            )
            self._task = self._bar.add_task(
                "", total=steps, completed=start, loss="-", speed="compiling", eta="-"
            )
            self._bar.start()

    def steps_per_second(self, step: int) -> float | None:
        """The mean rate since the first step of this process, whatever lay between the steps."""
        if self._first is None or step <= self._first[0]:
            return None
        return (step - self._first[0]) / max(time.monotonic() - self._first[1], 1e-9)

    def update(self, step: int, loss: float, waited: float = 0.0) -> None:
        """Tells that `step` steps are done, with a share of their time spent waiting for data."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        if not self._show:
            return
        rate = self.steps_per_second(step)
        speed = "-" if rate is None else f"{rate:.1f} steps/s"
        eta = "-" if rate is None else duration((self._steps - step) / rate)
        if waited >= 0.1:
            speed += f" ({waited:.0%} waiting for data)"
        text = f"{loss:.4g}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=text, speed=speed, eta=eta)
        elif now - self._last_line >= self._interval or step == self._steps:
            self._last_line = now
            width = len(str(self._steps))
            print(
                f"step {step:{width}d}/{self._steps}  loss {text}  {speed}  ETA {eta}", flush=True
            )

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._show:
            print(text, flush=True) if self._bar is None else self._bar.console.print(text)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
