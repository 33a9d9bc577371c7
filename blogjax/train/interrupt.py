"""SIGINT and SIGTERM as a wish that the loop fulfils between two steps."""

import signal
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The run was asked to stop and did, after a checkpoint where there is a folder for it.

    Attributes:
      step: the step it stopped at, None outside of a loop.
      state: the state there.
    """

    def __init__(self, step: int | None = None, state: object = None):
        at = "" if step is None else f" at step {step}"
        super().__init__(f"interrupted{at}")
        self.step, self.state = step, state


class StopRequest:
    """Notes the first SIGINT or SIGTERM while it is entered; a second one acts as usual.

    Python allows signal handlers in the main thread only; elsewhere nothing is noted.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = True
        signal.signal(number, self._previous[number])  # type: ignore[arg-type]

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.getsignal(number)
                signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
