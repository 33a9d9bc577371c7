"""`lion-pytorch` on lists of tensors: the optimiser alone, with gradients that are given."""

import time
from collections.abc import Sequence
from typing import Any

import lion_pytorch  # pyright: ignore[reportMissingImports]
import lion_pytorch.foreach  # pyright: ignore[reportMissingImports]
import numpy as np
import torch  # pyright: ignore[reportMissingImports]


class Lion:
    """One of the library's optimisers over parameters of its own.

    Args:
      foreach: whether it is the one for lists of tensors.
      params: start values, one array for each leaf, all of one shape.
      grads: the same for the gradients.
      rates: `lr`, `betas` and `weight_decay`.
    """

    def __init__(
        self,
        foreach: bool,
        params: Sequence[np.ndarray],
        grads: Sequence[np.ndarray],
        rates: dict[str, Any],
    ):
        self.start, self.grads = params, [torch.from_numpy(g) for g in grads]
        self.params = [torch.from_numpy(p.copy()).requires_grad_() for p in params]
        module = lion_pytorch.foreach if foreach else lion_pytorch
        self.optimiser: Any = module.Lion(self.params, **rates)

    def _give(self, turn: int) -> None:
        for i, p in enumerate(self.params):
            p.grad = self.grads[(i + turn) % len(self.grads)]

    def after(self, steps: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Parameters and momenta so many steps after the start; the gradients move on by a leaf."""
        with torch.no_grad():
            for p, start in zip(self.params, self.start, strict=True):
                p.copy_(torch.from_numpy(start))
        self.optimiser.state.clear()
        for turn in range(steps):
            self._give(turn)
            self.optimiser.step()
        momenta = [self.optimiser.state[p]["exp_avg"].numpy() for p in self.params]
        return [p.detach().numpy() for p in self.params], momenta

    def seconds(self, steps: int) -> float:
        """Seconds per step."""
        self._give(0)
        self.optimiser.step()
        began = time.perf_counter()
        for _ in range(steps):
            self.optimiser.step()
        return (time.perf_counter() - began) / steps
