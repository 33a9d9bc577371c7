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

    Args:
      folder: of the run; None traces nothing.
      window: `(start, stop)`; None for what `profiling` asks for, and else nothing.
      steps: how many there will be.

    Raises:
      ValueError: if the window is empty or begins after the last step, or a window is given and no
        folder.
    """

    def __init__(self, folder: pathlib.Path | None, window: tuple[int, int] | None, steps: int):
        if window is not None and folder is None:
            raise ValueError("profile is given, but no workdir to write the trace to")
        window = asked_for() if window is None else check_window(window)
        if window is not None and window[0] >= steps:
            raise ValueError(
                f"a profile of steps {window[0]} to {window[1]} in a run of {steps} steps is empty"
            )
        self._folder, self._window = folder, window
        self._running = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Marks one step in the trace."""
        if not self._running:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def switch(self, step: int, state: Any) -> pathlib.Path | None:
        """Starts or ends the trace if it is time; returns its folder once it is written."""
        if self._window is None or self._folder is None:
            return None
        start, stop = self._window
        if self._running and step >= stop:
            jax.block_until_ready(state)
            self.close()
            return self._folder / "profile"
        if not self._running and start <= step < stop:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder / "profile"), create_perfetto_trace=True)
            self._running = True
        return None

    def close(self) -> None:
        """Ends a trace that runs, and writes it."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


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
