"""Where the time and the memory of a step go: traces, and what XLA says of the program."""

import contextlib
import contextvars
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

_asked_for: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "profile", default=None
)


@contextlib.contextmanager
def profiling(start: int, stop: int) -> Iterator[None]:
    """Every `fit` inside that is not told otherwise traces the steps from `start` to `stop`.

    >>> with profiling(10, 20):
    ...     pass  # fit(...)
    """
    token = _asked_for.set(check_window((start, stop)))
    try:
        yield
    finally:
        _asked_for.reset(token)


def asked_for() -> tuple[int, int] | None:
    """Returns the window of the `profiling` around the caller, None without one."""
    return _asked_for.get()


def parse_window(text: str) -> tuple[int, int]:
    """Reads `START:STOP`.

    Raises:
      ValueError: if it is none, or empty (see `check_window`).

    >>> parse_window("10:20")
    (10, 20)
    """
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal()):
        raise ValueError(f"a profile is given as START:STOP, two numbers of steps, got {text!r}")
    return check_window((int(start), int(stop)))


def check_window(window: tuple[int, int]) -> tuple[int, int]:
    """Returns the window of a profile.

    Raises:
      ValueError: unless `0 <= start < stop`.
    """
    start, stop = window
    if not 0 <= start < stop:
        raise ValueError(f"a profile runs from START to a later STOP, got {start}:{stop}")
    return start, stop


class Profile:
    """Traces the steps `start <= step < stop` into `folder/profile`, for TensorBoard or Perfetto.

    With several processes each has its own folder in there. A trace that cannot be written costs
    the run nothing but a line.

    Args:
      folder: of the run.
      window: `(start, stop)`; None for what `profiling` asks for, which a run without a folder or
        with fewer steps passes over, and else nothing.
      steps: how many there will be.

    Raises:
      ValueError: if a window is given that is empty or begins after the last step, or one is given
        and no folder.
    """

    def __init__(self, folder: pathlib.Path | None, window: tuple[int, int] | None, steps: int):
        given, window = window, window or asked_for()
        if given is not None:
            start, stop = check_window(given)
            if folder is None:
                raise ValueError("profile is given, but no workdir to write the trace to")
            if start >= steps:
                raise ValueError(
                    f"a profile of steps {start} to {stop} in a run of {steps} steps is empty"
                )
        if window is None or folder is None or window[0] >= steps:
            folder, window = pathlib.Path(), None
        self._window, self._running = window, False
        self._folder = folder / "profile"
        if jax.process_count() > 1:
            self._folder /= f"process{jax.process_index()}"

    def missed(self, start: int) -> str:
        """What to tell if a run that begins at `start` is beyond the window already."""
        if self._window is None or start < self._window[1]:
            return ""
        return f"no trace: the run goes on at {start}, beyond {self._window[0]}:{self._window[1]}"

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Marks one step in the trace."""
        if not self._running:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def switch(self, step: int, state: Any, last: bool) -> str:
        """Starts or ends the trace if it is time; returns what to tell of it."""
        if self._window is None:
            return ""
        start, stop = self._window
        if self._running and (step >= stop or last):
            jax.block_until_ready(state)
            return self.close()
        if not self._running and start <= step < stop and not last:
            jax.block_until_ready(state)
            try:
                jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            except Exception as error:
                self._window = None
                return f"no trace: {error!r}"
            self._running = True
        return ""

    def close(self) -> str:
        """Ends a trace that runs, and writes it; returns what to tell."""
        if not self._running:
            return ""
        self._running, self._window = False, None
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            return f"no trace: {error!r}"
        return f"the trace is in {self._folder}"


def describe_program(program: Any) -> dict[str, float]:
    """What XLA says of a compiled step, per device.

    Args:
      program: a `jax.stages.Compiled`.

    Returns:
      `flops` (floating-point operations), and in bytes `arguments`, `outputs`, `aliased` (outputs
      that lie in donated arguments), `temporaries` and `peak` (arguments, outputs and temporaries,
      what is aliased counted once). What the backend does not tell is left out.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((4, 4))
    >>> describe_program(jax.jit(jnp.matmul).lower(x, x).compile())["flops"]
    128.0
    """
    found: dict[str, float] = {}
    cost: Any = program.cost_analysis()
    if isinstance(cost, list):  # as some backends give it
        cost = cost[0] if cost else None
    if cost and cost.get("flops", 0) > 0:
        found["flops"] = float(cost["flops"])
    memory = program.memory_analysis()
    if memory is not None:
        found["arguments"] = float(memory.argument_size_in_bytes)
        found["outputs"] = float(memory.output_size_in_bytes)
        found["aliased"] = float(memory.alias_size_in_bytes)
        found["temporaries"] = float(memory.temp_size_in_bytes)
        found["peak"] = (
            found["arguments"] + found["outputs"] + found["temporaries"] - found["aliased"]
        )
    return found
