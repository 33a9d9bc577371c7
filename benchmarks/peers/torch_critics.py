"""Gradient normalisation in PyTorch: the MLP critic's and the generator's step, in a process.

What its users write: the slope by `autograd.grad` with `create_graph=True`, then the loss's
gradient through it. Parameters and inputs are ours.
"""

import concurrent.futures
import contextlib
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

PREFIX = "PyTorch, "
PACKAGES = ("torch",)
LIMIT = 120.0  # seconds for one answer


class Critics:
    """Steps of both players; a network is a list of biases and `[in, out]` kernels in turn.

    Args:
      threads: for PyTorch.
      critic: its parameters.
      generator: the same.
      real: `[B, D]`, examples.
      fake: `[B, D]`, what the critic is given as generated.
      latent: `[B, Z]`, what the generator makes its own from.
    """

    def __init__(
        self,
        threads: int,
        critic: Sequence[np.ndarray],
        generator: Sequence[np.ndarray],
        real: np.ndarray,
        fake: np.ndarray,
        latent: np.ndarray,
    ):
        import torch  # pyright: ignore[reportMissingImports]

        self.torch: Any = torch
        torch.set_num_threads(threads)
        self.critic = [torch.tensor(p, requires_grad=True) for p in critic]
        self.generator = [torch.tensor(p, requires_grad=True) for p in generator]
        self.real, self.fake, self.latent = (torch.tensor(a) for a in (real, fake, latent))

    def _network(self, params: Sequence[Any], h: Any) -> Any:
        for i in range(0, len(params), 2):
            h = self.torch.addmm(params[i], h, params[i + 1])
            h = self.torch.relu(h) if i + 2 < len(params) else h
        return h

    def _score(self, kind: str, x: Any) -> Any:
        if kind == "plain":
            return self._network(self.critic, x)[:, 0]
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = self._network(self.critic, x)[:, 0]
        (slope,) = self.torch.autograd.grad(value.sum(), x, create_graph=True)
        return value / (slope.norm(dim=1) + value.abs())

    def _step(self, player: str, kind: str) -> tuple[Any, Any]:
        if player == "critic":
            real, fake = self._score(kind, self.real), self._score(kind, self.fake)
            loss = (self.torch.relu(1 - real) + self.torch.relu(1 + fake)).mean()
            return loss, self.torch.autograd.grad(loss, self.critic)
        # The critic's own gradient is not asked for, and not computed.
        loss = -self._score(kind, self._network(self.generator, self.latent)).mean()
        return loss, self.torch.autograd.grad(loss, self.generator)

    def outcome(self, player: str, kind: str) -> list[np.ndarray]:
        """Loss and gradients."""
        loss, grads = self._step(player, kind)
        return [loss.detach().numpy(), *(g.numpy() for g in grads)]

    def seconds(self, player: str, kind: str, steps: int) -> tuple[float, float]:
        """Seconds per step, by the clock and of processors."""
        self._step(player, kind)
        began, worked = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self._step(player, kind)
        return (time.perf_counter() - began) / steps, (time.process_time() - worked) / steps


_critics: Critics | None = None


def _start(*where: Any) -> None:
    global _critics
    _critics = Critics(*where)


def _ask(method: str, *arguments: Any) -> Any:
    return getattr(_critics, method)(*arguments)


class Peer:
    """One of its steps, seen from outside."""

    facts: Mapping[str, Any] = {}  # XLA has no part in it

    def __init__(self, pool: concurrent.futures.Executor, player: str, kind: str):
        self._pool, self._step = pool, (player, kind)

    def outcome(self) -> list[np.ndarray]:
        """Loss and gradients."""
        return self._pool.submit(_ask, "outcome", *self._step).result(LIMIT)

    def seconds(self, steps: int) -> tuple[float, float]:
        """Seconds per step, by the clock and of processors."""
        return self._pool.submit(_ask, "seconds", *self._step, steps).result(LIMIT)


@contextlib.contextmanager
def peers(threads: int, *where: Any) -> Iterator[dict[str, dict[str, Peer]]]:
    """Its contenders by player and name; the arguments are those of `Critics`.

    The process sleeps while others are measured.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=context, initializer=_start, initargs=(threads, *where)
    ) as pool:
        yield {
            player: {PREFIX + kind: Peer(pool, player, kind) for kind in ("plain", "gn")}
            for player in ("critic", "generator")
        }
