"""TorchJD on the steps of `benchmarks.multitask_steps`, in a process of its own.

What its users write: the losses, `mtl_backward` from the features, `jac_to_grad` of the trunk, and
an optimiser. Parameters and batches are ours.
"""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

PREFIX = "PyTorch, "
PLAIN = PREFIX + "sum of the losses"
MGDA, UPGRAD = PREFIX + "TorchJD MGDA", PREFIX + "TorchJD UPGrad"
UPGRAD_ONE = UPGRAD + ", one task at a time"
NAMES = (PLAIN, MGDA, UPGRAD, UPGRAD_ONE)
PACKAGES = ("torch", "torchjd", "quadprog", "qpsolvers")
LIMIT = 180.0  # seconds for one answer


def _trunk(model: str, params: Mapping[str, Any], channels: int) -> Any:
    """Our trunk in PyTorch, with our parameters."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import (  # pyright: ignore[reportMissingImports]
        SDPBackend,
        sdpa_kernel,
    )

    from benchmarks.peers import torch_unet

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            wide, embedding = 2 * channels, 4 * channels
            self.time = torch_unet.TimeEmbedding(embedding, channels)
            self.conv_in = nn.Conv2d(1, channels, 3, padding=1)
            self.down_0_block_0 = torch_unet.ResidualBlock(channels, channels, embedding)
            self.down_0_resample = nn.Conv2d(channels, channels, 2, stride=2)
            self.down_1_block_0 = torch_unet.ResidualBlock(channels, wide, embedding)
            self.middle_block_0 = torch_unet.ResidualBlock(wide, wide, embedding)
            self.middle_attention = torch_unet.SpatialAttention(wide, 1)
            self.middle_block_1 = torch_unet.ResidualBlock(wide, wide, embedding)

        def forward(self, x: Any, t: Any) -> Any:
            embedding = torch.nn.functional.silu(self.time(t))
            h = self.down_0_block_0(self.conv_in(x), embedding)
            h = self.down_1_block_0(self.down_0_resample(h), embedding)
            # The other kernels have no batching rule, which TorchJD's vmap would need.
            with sdpa_kernel(SDPBackend.MATH):
                h = self.middle_attention(self.middle_block_0(h, embedding))
            return self.middle_block_1(h, embedding).mean((2, 3))

    if model == "encoder":
        trunk = Encoder()
    else:
        layers: list[Any] = []
        for layer in params.values():
            layers += [nn.Linear(*layer["kernel"].shape), nn.ReLU()]
        trunk = nn.Sequential(*layers)
        params = {str(2 * i): layer for i, layer in enumerate(params.values())}
    torch_unet.load(trunk, params)
    return trunk


class Steps:
    """The contenders on one problem.

    Args:
      model: which trunk.
      params: `{"trunk": tree, "heads": {"kernel": [features, K], "bias": [K]}}`.
      batch: `x`, perhaps `t`, and `y` `[B, K]`.
      channels: of the encoder's first level.
      rate: learning rate.
    """

    def __init__(
        self,
        model: str,
        params: Mapping[str, Any],
        batch: Mapping[str, np.ndarray],
        channels: int,
        rate: float,
    ):
        import torch  # pyright: ignore[reportMissingImports]
        from torchjd import aggregation, autojac  # pyright: ignore[reportMissingImports]

        self.torch: Any = torch
        self.autojac: Any = autojac
        self.aggregators = {MGDA: aggregation.MGDA(), UPGRAD: aggregation.UPGrad()}
        self.aggregators[UPGRAD_ONE] = self.aggregators[UPGRAD]
        self.trunk = _trunk(model, params["trunk"], channels)
        kernel, bias = params["heads"]["kernel"], params["heads"]["bias"]
        self.heads = torch.nn.ModuleList(torch.nn.Linear(len(kernel), 1) for _ in bias)
        for k, head in enumerate(self.heads):
            state = {"weight": kernel[:, k : k + 1].T, "bias": bias[k : k + 1]}
            head.load_state_dict({n: torch.tensor(v.copy()) for n, v in state.items()})
        x = batch["x"].transpose(0, 3, 1, 2) if batch["x"].ndim == 4 else batch["x"]
        self.inputs = [torch.tensor(np.ascontiguousarray(x))]
        self.inputs += [torch.tensor(batch["t"])] if "t" in batch else []
        self.y = torch.tensor(batch["y"])
        both = itertools.chain(self.trunk.parameters(), self.heads.parameters())
        self.optimiser = torch.optim.SGD(both, lr=rate)

    def _losses(self) -> tuple[list[Any], Any]:
        features = self.trunk(*self.inputs)
        heads = enumerate(self.heads)
        return [(h(features)[:, 0] - self.y[:, k]).square().mean() for k, h in heads], features

    def step(self, name: str) -> tuple[list[Any], Any]:
        """One step; returns losses and weights."""
        self.optimiser.zero_grad(set_to_none=True)
        losses, features = self._losses()
        weights = None
        if name == PLAIN:
            sum(losses).backward()  # type: ignore
        else:
            chunk = 1 if name == UPGRAD_ONE else None
            self.autojac.mtl_backward(losses, features, parallel_chunk_size=chunk)
            weights = self.autojac.jac_to_grad(self.trunk.parameters(), self.aggregators[name])
        self.optimiser.step()
        return losses, weights

    def outcome(self, name: str) -> list[np.ndarray]:
        """Losses; but for the sum also the Gram matrix over the trunk, and weights."""
        if name == PLAIN:
            return [np.array([loss.item() for loss in self.step(name)[0]], np.float32)]
        losses, features = self._losses()
        self.autojac.mtl_backward(losses, features)
        flat = [p.jac.flatten(1) for p in self.trunk.parameters()]
        matrix = self.torch.stack([j @ j.T for j in flat]).sum(0).numpy()
        for p in self.trunk.parameters():
            del p.jac
        losses, weights = self.step(name)
        values = np.array([loss.item() for loss in losses], np.float32)
        return [values, matrix, weights.numpy()]

    def seconds(self, name: str, steps: int) -> tuple[float, float]:
        """Seconds per step, by the clock and of processors."""
        self.step(name)
        began, worked = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step(name)
        return (time.perf_counter() - began) / steps, (time.process_time() - worked) / steps

    def peak(self, name: str) -> int:
        """Most bytes of tensors held at once, beyond those held before the step."""
        from torch.profiler import (  # pyright: ignore[reportMissingImports]
            ProfilerActivity,
            profile,
        )

        self.step(name)
        self.optimiser.zero_grad(set_to_none=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self.step(name)
        events = found.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        return max(itertools.accumulate(n for _, n in changes))


_steps: Steps | None = None


def _start(threads: int) -> None:
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)


def _load(*arguments: Any) -> None:
    global _steps
    _steps = Steps(*arguments)


def _ask(method: str, *arguments: Any) -> Any:
    return getattr(_steps, method)(*arguments)


def _solves(matrices: list[np.ndarray], turns: int) -> tuple[list[np.ndarray], float]:
    """Weights of TorchJD's MGDA, and seconds per solve."""
    import torch  # pyright: ignore[reportMissingImports]
    from torchjd.aggregation import MGDAWeighting  # pyright: ignore[reportMissingImports]

    weigh, given = MGDAWeighting(), [torch.tensor(m) for m in matrices]
    found = [weigh(m).numpy() for m in given]
    began = time.perf_counter()
    for _ in range(turns):
        for matrix in given:
            weigh(matrix)
    return found, (time.perf_counter() - began) / max(turns * len(given), 1)


class Peer:
    """One of its steps, seen from outside."""

    def __init__(self, pool: concurrent.futures.Executor, name: str):
        self._pool, self._name = pool, name
        self.facts: Mapping[str, Any] = {"peak_bytes": self._ask("peak")}

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self._pool.submit(_ask, method, self._name, *arguments).result(LIMIT)

    def outcome(self) -> list[np.ndarray]:
        """Losses, Gram matrix and weights."""
        return self._ask("outcome")

    def seconds(self, steps: int) -> tuple[float, float]:
        """Seconds per step, by the clock and of processors."""
        return self._ask("seconds", steps)


class Peers:
    """The process, which sleeps while others are measured."""

    def __init__(self, pool: concurrent.futures.Executor):
        self._pool = pool

    def load(self, *arguments: Any) -> dict[str, Peer]:
        """The contenders on a problem in place of the last; the arguments are those of `Steps`."""
        self._pool.submit(_load, *arguments).result(LIMIT)
        return {name: Peer(self._pool, name) for name in NAMES}

    def solves(self, matrices: list[np.ndarray], turns: int) -> tuple[list[np.ndarray], float]:
        """Weights of its MGDA from Gram matrices, and seconds per solve."""
        return self._pool.submit(_solves, matrices, turns).result(LIMIT)


@contextlib.contextmanager
def peers(threads: int) -> Iterator[Peers]:
    """Starts the process and ends it."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=context, initializer=_start, initargs=(threads,)
    ) as pool:
        yield Peers(pool)
