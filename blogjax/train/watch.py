"""What a run costs beside its arithmetic: waiting for data, programs compiled again."""

import contextlib
import time
from collections.abc import Iterator

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


class StepClock:
    """Measures the time of the steps, and how much of it went by waiting for data.

    >>> clock = StepClock()
    >>> with clock.step():
    ...     with clock.waiting():
    ...         time.sleep(0.01)
    >>> clock.take_share() > 0.5, clock.take_share()
    (True, None)
    """

    def __init__(self) -> None:
        self._steps = self._waited = self._waiting = 0.0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a step: next batch, dispatch, log. Only whole steps count."""
        began, self._waiting = time.perf_counter(), 0.0
        yield
        self._steps += time.perf_counter() - began
        self._waited += self._waiting

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data, inside `step`."""
        began = time.perf_counter()
        yield
        self._waiting += time.perf_counter() - began

    def take_share(self) -> float | None:
        """Returns waiting / steps since it was last asked, None if there was no step."""
        share = self._waited / self._steps if self._steps else None
        self._steps = self._waited = 0.0
        return share


class Compilations:
    """Notes what XLA compiles while it is entered, so that nothing is compiled twice unseen.

    The first time that a part of the loop runs, compiling is its due; later it means that shapes,
    dtypes or static values changed, which costs seconds each time.

    >>> import jax, jax.numpy as jnp
    >>> double = jax.jit(lambda x: 2 * x)
    >>> with Compilations() as compilations:
    ...     for size in (2, 2, 3):
    ...         x = jax.device_put(jnp.zeros(size))
    ...         with compilations.within("step"):
    ...             _ = double(x)
    >>> [(part, program) for part, program, _ in compilations.take()]
    [('step', 'jit(<lambda>)')]
    """

    def __init__(self) -> None:
        self._noted: list[tuple[str, float]] = []
        self._seen: set[str] = set()
        self._again: list[tuple[str, str, float]] = []

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            self._noted.append((str(kwargs.get("fun_name", "a program")), duration_secs))

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Whatever is compiled inside belongs to `part`; its first time is expected."""
        self._noted.clear()
        yield
        if part in self._seen:
            self._again += [(part, program, seconds) for program, seconds in self._noted]
        self._seen.add(part)
        self._noted.clear()

    def take(self) -> list[tuple[str, str, float]]:
        """Returns, once, `(part, program, seconds)` of what was compiled out of turn."""
        taken, self._again = self._again, []
        return taken
