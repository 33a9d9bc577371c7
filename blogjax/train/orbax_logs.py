"""Orbax's threads log every failed write with all their calls: pages that bury the one error.

`Checkpoints` raises that error, in one line, where the run can end with it.
"""

import logging
import sys


class _FailedWrites(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        lost = "Task exception was never retrieved" in text and "orbax" in text
        # With a trace: of a thread, of the wait for it, of the commit.
        return not lost and not (text.startswith("[process=") and record.exc_info)


def leave_out_failed_writes() -> None:
    """Filters them from the loggers that Orbax uses; again does no harm."""
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, _FailedWrites) for known in logger.filters):
            logger.addFilter(_FailedWrites())


def leave_out_closed_loops() -> None:
    """Leaves out, too, what TensorStore says of each array when nobody waits for it any more.

    For programs, not libraries: it wraps `sys.unraisablehook`.
    """
    usual = sys.unraisablehook

    def told(what: "sys.UnraisableHookArgs") -> None:
        if str(what.exc_value) != "Event loop is closed":
            usual(what)

    sys.unraisablehook = told
