"""What a run costs beside its arithmetic: waiting for data, programs compiled again."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


class StepClock:
    """Measures the time of the steps, and how much of it went by waiting for data.

    >>> clock = StepClock()
    >>> with clock.step():
    ...     with clock.waiting():
    ...         time.sleep(0.01)
    >>> rate, share = clock.take()
    >>> rate < 100, share > 0.5, clock.take()
    (True, True, None)

    Args:
      now: what tells the time, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._count, self._steps, self._waited, self._waiting = 0, 0.0, 0.0, 0.0
        self._all = [0.0, 0.0]

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a step: next batch, dispatch, log. Only whole steps count."""
        began, self._waiting = self._now(), 0.0
        yield
        self._count += 1
        self._steps += self._now() - began
        self._waited += self._waiting

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data, inside `step`."""
        began = self._now()
        yield
        self._waiting += self._now() - began

    def take(self) -> tuple[float, float] | None:
        """Returns steps per second and the share of waiting since it was last asked.

        Evaluations, saving and whatever else lies between the steps is not in them. None if there
        was no step.
        """
        if not self._steps:
            return None
        found = self._count / self._steps, self._waited / self._steps
        self._all = [self._all[0] + self._steps, self._all[1] + self._waited]
        self._count, self._steps, self._waited = 0, 0.0, 0.0
        return found

    @property
    def waited_share(self) -> float:
        """The share of waiting in all that was taken so far."""
        return self._all[1] / self._all[0] if self._all[0] else 0.0


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
