"""Training and sampling of `torch_unet.UNet`, step for step what `experiments.ddpm` does.

v-prediction, summed squared error, gradients clipped to a global norm, Adam under a warm-up and a
cosine, an average of the parameters with warm-up; deterministic DDIM with clipped x_0. Optimiser
and average are the fused and multi-tensor forms, which are PyTorch's fastest.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from benchmarks.peers import torch_unet


class SameNetwork:
    """Our network, loss, optimiser, average and sampler in PyTorch.

    Args:
      spec: plain data, see `benchmarks.ddpm_step.Blogjax.spec`.
      channels_last: memory format of images and kernels.
      compiled: whether network and loss go through `torch.compile`.
    """

    def __init__(self, spec: Mapping[str, Any], *, channels_last: bool, compiled: bool):
        self.spec, self.optim = spec, spec["optim"]
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = torch_unet.UNet(**spec["model"])
        torch_unet.load(self.model, spec["params"])
        self.model = self.model.to(memory_format=self.format)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.weights = list(self.model.parameters())
        self.averages = list(self.average.parameters())
        self.adam = torch.optim.Adam(
            self.weights, betas=(self.optim["b1"], self.optim["b2"]), fused=True
        )
        self.steps = 0
        self.parameters = sum(w.numel() for w in self.weights)
        self.signal, self.noise = (torch.tensor(spec[k]).float() for k in ("signal", "noise"))
        self.images, self.labels = self.image(spec["images"]), torch.tensor(spec["labels"])
        self.losses = torch.compile(self._losses) if compiled else self._losses
        self.denoise = torch.compile(self.average) if compiled else self.average

    def image(self, array: np.ndarray) -> torch.Tensor:
        """`[B, H, W, C]` of numpy as `[B, C, H, W]` in this contender's memory format."""
        return torch.tensor(array).permute(0, 3, 1, 2).contiguous(memory_format=self.format)

    def _losses(self, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, labels: torch.Tensor):
        a, b = self.signal[t, None, None, None], self.noise[t, None, None, None]
        value = self.model(a * x0 + b * eps, t, labels)
        return (value - (a * eps - b * x0)).square().sum((1, 2, 3)).mean()

    def _rate(self) -> float:
        warmup = int(self.optim["warmup_fraction"] * self.spec["steps"])
        if self.steps < warmup:
            return self.optim["learning_rate"] * self.steps / warmup
        done = min((self.steps - warmup) / (self.spec["steps"] - warmup), 1.0)
        return self.optim["learning_rate"] * 0.5 * (1 + math.cos(math.pi * done))

    def step(
        self, x0: Any = None, t: Any = None, eps: Any = None, labels: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One training step, of random times and noise unless told; returns loss, gradient norm."""
        if x0 is None:
            x0, labels = self.images, self.labels
            t = torch.randint(1, len(self.signal), (len(x0),))
            eps = torch.randn_like(x0)
        self.adam.zero_grad(set_to_none=True)
        loss = self.losses(x0, t, eps, labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.optim["clip_norm"])
        self.adam.param_groups[0]["lr"] = self._rate()
        self.adam.step()
        decay = min(self.optim["ema_decay"], (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.weights, 1 - decay)
        self.steps += 1
        return loss.detach(), norm

    @torch.no_grad()
    def sample(self, start: np.ndarray | None = None) -> np.ndarray:
        """Images of all classes in turn, from the average, `[B, H, W, C]`."""
        num = self.spec["num_samples"]
        labels = torch.arange(num) % self.spec["model"]["num_classes"]
        x = torch.randn((num, *self.images.shape[1:])) if start is None else self.image(start)
        x = x.contiguous(memory_format=self.format)
        times = self.spec["times"]
        signal, noise = self.spec["signal"].tolist(), self.spec["noise"].tolist()
        for t, s in itertools.pairwise(times):
            v = self.denoise(x, torch.full((num,), t), labels)
            x0 = (signal[t] * x - noise[t] * v).clamp(-1, 1)
            eps = (x - signal[t] * x0) / noise[t]
            x = signal[s] * x0 + noise[s] * eps
        return x.permute(0, 2, 3, 1).numpy()

    def compare(self, reference: Mapping[str, Any]) -> dict[str, float]:
        """Greatest differences from what our network gave, over its outputs and a few steps."""

        def apart(model: torch.nn.Module, params: Any) -> float:
            torch_unet.load(other, params)
            pairs = zip(model.parameters(), other.parameters(), strict=True)
            return max((a - b).abs().max().item() for a, b in pairs)

        def relative(values: list[float], wanted: list[float]) -> float:
            return max(abs(v / w - 1) for v, w in zip(values, wanted, strict=True))

        other = copy.deepcopy(self.average)
        x, t, labels = (torch.tensor(reference[k]) for k in ("x", "t", "labels"))
        with torch.no_grad():
            output = self.denoise(self.image(reference["x"]), t, labels)
        output = output.permute(0, 2, 3, 1).numpy()
        sampled = self.sample(reference["start"])
        losses, norms = [], []
        for x, t, eps, labels in reference["steps"]:
            inputs = self.image(x), torch.tensor(t), self.image(eps), torch.tensor(labels)
            loss, norm = self.step(*inputs)
            losses.append(loss.item())
            norms.append(norm.item())
        return {
            "output": float(np.abs(output - reference["output"]).max()),
            "samples": float(np.abs(sampled - reference["samples"]).max()),
            "loss, relative": relative(losses, reference["losses"]),
            "gradient norm, relative": relative(norms, reference["norms"]),
            "parameters after the steps": apart(self.model, reference["params"]),
            "their average": apart(self.average, reference["average"]),
        }


class Library:
    """`denoising-diffusion-pytorch` as its Trainer uses it, without its data loader.

    Its Unet has no classes in this class of diffusion; about as many parameters as ours.
    """

    def __init__(self, spec: Mapping[str, Any], *, dim: int):
        from denoising_diffusion_pytorch import (  # pyright: ignore[reportMissingImports]
            GaussianDiffusion,
            Unet,
        )
        from ema_pytorch import EMA  # pyright: ignore[reportMissingImports]

        _, height, width, channels = spec["images"].shape
        model = Unet(dim=dim, dim_mults=tuple(spec["multipliers"]), channels=channels)
        self.diffusion = GaussianDiffusion(
            model,
            image_size=(height, width),
            timesteps=len(spec["signal"]) - 1,
            sampling_timesteps=len(spec["times"]) - 1,
            objective="pred_v",
            beta_schedule="cosine",
        )
        self.adam = torch.optim.Adam(self.diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
        self.ema = EMA(self.diffusion, beta=0.995, update_every=10)
        images = torch.tensor(spec["images"]).permute(0, 3, 1, 2).contiguous()
        self.images = images / 2 + 0.5  # it takes [0, 1]
        self.num = spec["num_samples"]
        self.parameters = sum(p.numel() for p in model.parameters())

    def step(self) -> torch.Tensor:
        """One training step; returns the loss."""
        loss = self.diffusion(self.images)
        value = loss.detach()
        value.item()  # for its progress bar
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.adam.step()
        self.adam.zero_grad()
        self.ema.update()
        return value

    def sample(self) -> np.ndarray:
        """Images from the average, without classes."""
        with contextlib.redirect_stderr(None):
            return self.ema.ema_model.sample(batch_size=self.num).numpy()
