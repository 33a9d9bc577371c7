"""`blogjax.models.unet.UNet` once more, in plain PyTorch: the same layers, the same parameters.

Layers bear the names of ours, so that `load` can copy the parameters and the outputs be compared.
Written as one would for PyTorch: images `[B, C, H, W]`, `F.scaled_dot_product_attention`, queries,
keys and values from one matrix product. Only the default resampling ('space_to_depth'), no dropout.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]


def group_norm(channels: int) -> nn.GroupNorm:
    groups = max(g for g in range(1, 33) if channels % g == 0 and (channels // g >= 4 or g == 1))
    return nn.GroupNorm(groups, channels, eps=1e-6)


class TimeEmbedding(nn.Module):
    """Sinusoid, linear, silu, linear."""

    def __init__(self, features: int, dim: int):
        super().__init__()
        exponents = np.arange(dim // 2) / max(dim // 2 - 1, 1)
        frequencies = torch.tensor(10000.0**-exponents, dtype=torch.float32)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.hidden = nn.Linear(dim, features)
        self.out = nn.Linear(features, features)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Embeds times `[B]`."""
        phase = t.float()[:, None] * self.frequencies
        h = torch.cat([phase.sin(), phase.cos()], dim=-1)
        return self.out(F.silu(self.hidden(h)))


class ResidualBlock(nn.Module):
    """Two convolutions around an identity, steered by the embedding."""

    def __init__(self, inputs: int, features: int, embedding: int):
        super().__init__()
        self.norm_in = group_norm(inputs)
        self.conv_in = nn.Conv2d(inputs, features, 3, padding=1)
        self.embedding = nn.Linear(embedding, features)
        self.norm_out = group_norm(features)
        self.conv_out = nn.Conv2d(features, features, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == features else nn.Conv2d(inputs, features, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Takes features and the embedding after its silu."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = h + self.embedding(embedding)[:, :, None, None]
        return self.shortcut(x) + self.conv_out(F.silu(self.norm_out(h)))


class SpatialAttention(nn.Module):
    """Self-attention between all positions."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes and returns features `[B, C, H, W]`."""
        b, c, height, width = x.shape
        h = self.query_key_value(self.norm(x).flatten(2).transpose(1, 2))
        h = h.reshape(b, height * width, 3, self.num_heads, c // self.num_heads)
        h = F.scaled_dot_product_attention(*h.permute(2, 0, 3, 1, 4).unbind())
        h = self.out(h.transpose(1, 2).reshape(b, height * width, c))
        return x + h.transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """The whole network; arguments as those of ours."""

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        num_blocks: int,
        num_classes: int,
        in_channels: int,
        num_heads: int = 1,
    ):
        super().__init__()
        self.num_blocks, self.levels = num_blocks, len(multipliers)
        widths = [channels * m for m in multipliers]
        embedding = 4 * channels
        self.time = TimeEmbedding(embedding, channels)
        self.class_embedding = nn.Embedding(num_classes, embedding)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        now, skips = channels, [channels]
        for level, width in enumerate(widths):
            for i in range(num_blocks):
                self.add_module(f"down_{level}_block_{i}", ResidualBlock(now, width, embedding))
                now = width
                skips.append(now)
            if level < self.levels - 1:
                self.add_module(f"down_{level}_resample", nn.Conv2d(now, now, 2, stride=2))
                skips.append(now)
        self.middle_block_0 = ResidualBlock(now, now, embedding)
        self.middle_attention = SpatialAttention(now, num_heads)
        self.middle_block_1 = ResidualBlock(now, now, embedding)
        for level in reversed(range(self.levels)):
            for i in range(num_blocks + 1):
                block = ResidualBlock(now + skips.pop(), widths[level], embedding)
                self.add_module(f"up_{level}_block_{i}", block)
                now = widths[level]
            if level > 0:
                finer = nn.Conv2d(now, 4 * widths[level - 1], 1)
                self.add_module(f"up_{level}_resample", finer)
                now = widths[level - 1]
        self.norm_out = group_norm(now)
        self.conv_out = nn.Conv2d(now, in_channels, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Maps `x` `[B, C, H, W]`, times and labels `[B]` to an image like `x`."""
        # Every block applies swish to the embedding: once is enough.
        embedding = F.silu(self.time(t) + self.class_embedding(labels))
        h = self.conv_in(x)
        skips = [h]
        for level in range(self.levels):
            for i in range(self.num_blocks):
                h = self.get_submodule(f"down_{level}_block_{i}")(h, embedding)
                skips.append(h)
            if level < self.levels - 1:
                h = self.get_submodule(f"down_{level}_resample")(h)
                skips.append(h)
        h = self.middle_block_0(h, embedding)
        h = self.middle_block_1(self.middle_attention(h), embedding)
        for level in reversed(range(self.levels)):
            for i in range(self.num_blocks + 1):
                h = torch.cat([h, skips.pop()], dim=1)
                h = self.get_submodule(f"up_{level}_block_{i}")(h, embedding)
            if level > 0:
                h = F.pixel_shuffle(self.get_submodule(f"up_{level}_resample")(h), 2)
        return self.conv_out(F.silu(self.norm_out(h)))


def load(model: UNet, params: Mapping[str, Any]) -> None:
    """Copies the parameters of our network, a tree of numpy arrays, into `model`.

    Raises RuntimeError, listing them, if a parameter is left over on either side.
    """
    state: dict[str, np.ndarray] = {}

    def visit(tree: Mapping[str, Any], path: tuple[str, ...]) -> None:
        if {"query", "key", "value"} <= set(tree):
            parts = [tree[name] for name in ("query", "key", "value")]
            fused = {k: np.concatenate([p[k] for p in parts], axis=-1) for k in ("kernel", "bias")}
            rest = {k: v for k, v in tree.items() if k not in ("query", "key", "value")}
            tree = {**rest, "query_key_value": fused}
        for name, value in tree.items():
            if isinstance(value, Mapping):
                visit(value, (*path, name))
            else:
                key, array = _converted(path, name, np.asarray(value))
                state[key] = array

    def _converted(path: tuple[str, ...], name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
        path = tuple("class_embedding" if p == "class" else p for p in path)  # a keyword of Python
        resample = len(path) > 1 and path[-2].endswith("_resample")
        module = ".".join(path[:-1] if resample else path)
        layer = model.get_submodule(module)
        if resample and module.startswith("down"):  # rows (p, q, c) of 2 x 2 pixels
            value = value.reshape(2, 2, -1, value.shape[-1]) if name == "kernel" else value
        elif resample:  # columns (p, q, c) there, (c, p, q) here
            value = value.reshape(*value.shape[:-1], 4, -1).swapaxes(-1, -2)
            value = value.reshape(*value.shape[:-2], -1)
        if name == "kernel" and isinstance(layer, nn.Conv2d):
            value = value if value.ndim == 4 else value[None, None]
            value = value.transpose(3, 2, 0, 1)
        elif name == "kernel":
            value = value.T
        return f"{module}.{'bias' if name == 'bias' else 'weight'}", value

    visit(params, ())
    model.load_state_dict({k: torch.tensor(np.ascontiguousarray(v)) for k, v in state.items()})
