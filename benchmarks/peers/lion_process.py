"""`lion-pytorch` in a process of its own, which sleeps while others are measured."""

import contextlib
import multiprocessing
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

EAGER, FOREACH = "lion-pytorch", "lion-pytorch, foreach"
PACKAGES = ("lion-pytorch", "torch")


def _serve(connection: Any, threads: int, *where: Any) -> None:
    """The process: answers (name, method, argument) until told to end."""
    try:
        import torch  # pyright: ignore[reportMissingImports]

        from benchmarks.peers.torch_lion import Lion

        torch.set_num_threads(threads)
        lions = {name: Lion(name == FOREACH, *where) for name in (EAGER, FOREACH)}
        while (message := connection.recv()) is not None:
            name, method, argument = message
            connection.send(getattr(lions[name], method)(argument))
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))


class Peer:
    """One of its optimisers, seen from outside."""

    facts: Mapping[str, Any] = {}  # XLA has no part in it
    faults: Sequence[float] = ()

    def __init__(self, name: str, connection: Any):
        self._name, self._connection = name, connection

    def _ask(self, method: str, argument: int) -> Any:
        self._connection.send((self._name, method, argument))
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def after(self, steps: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Parameters and momenta so many steps after the start."""
        return self._ask("after", steps)

    def seconds(self, steps: int) -> float:
        """Seconds per step."""
        return self._ask("seconds", steps)


@contextlib.contextmanager
def peers(
    params: Sequence[np.ndarray],
    grads: Sequence[np.ndarray],
    rates: Mapping[str, Any],
    threads: int,
) -> Iterator[dict[str, Peer]]:
    """The contenders of lion-pytorch, on these start values, gradients and rates."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, threads, params, grads, rates)
    process = context.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    theirs.close()  # else its death would not be seen here
    try:
        yield {name: Peer(name, ours) for name in (EAGER, FOREACH)}
    finally:
        with contextlib.suppress(OSError):
            ours.send(None)
        process.join(5)
        process.kill()
