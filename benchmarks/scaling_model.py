"""Bytes of a training step by formula: what lies on each device, and what each one sends.

P entries of parameters, b bytes each, on n = data x fsdp devices. Of the P, S lie in leaves that
`train.mesh.state_shardings` splits over fsdp, U = P - S in leaves that it leaves whole.

Memory: (S / fsdp + U) b of parameters, as much of gradients, one (Lion) or two (AdamW) times as
much of moments, 4 instead of b for an average in float32.
Sent on a ring: 2 (n - 1) / n P b by the all-reduce of data-parallel training; with fsdp see
`traffic`; 2 (n - 1) / n P / 8 by a majority vote in which nobody abstains.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from blogjax.train.mesh import AXES, state_shardings

Shape = tuple[int, ...]

# Dtypes of parameters, gradients and moments, and of the arithmetic, in which kernels and their
# gradients travel.
PRECISIONS = {
    "float32": ("float32", "float32"),
    "mixed": ("float32", "bfloat16"),
    "bfloat16": ("bfloat16", "bfloat16"),
}
MOMENTS = {"adamw": 2, "lion": 1, "vote": 1}


class Layout(NamedTuple):
    """A mesh of `data x fsdp` devices."""

    data: int
    fsdp: int

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.data * self.fsdp


def is_split(shapes: Sequence[Shape], fsdp: int) -> list[bool]:
    """Tells for each leaf whether it is split over fsdp.

    >>> is_split([(3, 3, 64, 128), (128,), (64, 65)], 8)
    [True, False, True]
    """
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    mesh: Any = AbstractMesh((1, fsdp), AXES)
    placed = state_shardings(leaves, mesh)
    return [not sharding.is_fully_replicated for sharding in placed]


def entries(shapes: Sequence[Shape], fsdp: int) -> tuple[int, int]:
    """The entries S of the leaves that are split over fsdp, and U of the others.

    >>> entries([(64, 64), (64,)], 4)
    (4096, 64)
    """
    split = is_split(shapes, fsdp)
    sizes = [_size(shape) for shape in shapes]
    total = sum(size for size, s in zip(sizes, split, strict=True) if s)
    return total, sum(sizes) - total


def memory(
    shapes: Sequence[Shape], layout: Layout, precision: str, optimizer: str, *, ema: bool
) -> dict[str, int]:
    """Bytes on each device of parameters, gradients, moments and average.

    Without activations, batch, and what XLA needs in between.

    Args:
      shapes: of the parameters, one per leaf.
      layout: the mesh; under a vote fsdp must be 1.
      precision: one of `PRECISIONS`.
      optimizer: one of `MOMENTS`; each device that votes has a whole momentum of its own.
      ema: whether there is an average, in float32.

    >>> memory([(64, 64), (64,)], Layout(1, 4), "float32", "adamw", ema=True)
    {'parameters': 4352, 'gradients': 4352, 'moments': 8704, 'average': 4352}
    """
    _check(layout, optimizer)
    split, whole = entries(shapes, layout.fsdp)
    own = split // layout.fsdp + whole
    each = own * jnp.dtype(PRECISIONS[precision][0]).itemsize
    return {
        "parameters": each,
        "gradients": each,
        "moments": MOMENTS[optimizer] * each,
        "average": 4 * own * ema,
    }


def traffic(
    shapes: Sequence[Shape],
    layout: Layout,
    precision: str,
    optimizer: str = "lion",
    *,
    reduce_scatter: bool = True,
) -> dict[str, float]:
    """Bytes that each device sends in a step, by kind of collective, on a ring.

    With fsdp a leaf is gathered for the way forward, `(fsdp - 1) / fsdp S b`. A kernel of a
    convolution, rank 4, is gathered once more for the way back, where it is reversed; a matrix is
    not: XLA keeps it. The gradient is summed over fsdp and cut, by a reduce-scatter as large as a
    gather or by an all-reduce of twice that; then what is left is summed over data by an
    all-reduce. Leaves that are not split are summed over all devices.

    Args:
      shapes, layout, precision, optimizer: as in `memory`.
      reduce_scatter: False for an all-reduce in its place, as XLA's partitioner writes it.

    >>> traffic([(64, 64)], Layout(4, 1), "float32")
    {'all-reduce': 24576.0}
    >>> traffic([(64, 64)], Layout(1, 4), "float32")
    {'all-reduce': 0.0, 'all-gather': 12288.0, 'reduce-scatter': 12288.0}
    >>> traffic([(64, 64)], Layout(4, 1), "float32", "vote")
    {'all-to-all': 384.0, 'all-gather': 384.0}
    """
    _check(layout, optimizer)
    data, fsdp = layout
    if optimizer == "vote":
        each = _ring(data) * sum(map(_size, shapes)) / 8
        return {"all-to-all": each, "all-gather": each}
    b = jnp.dtype(PRECISIONS[precision][1]).itemsize
    split, whole = entries(shapes, fsdp)
    if fsdp == 1:
        return {"all-reduce": 2 * _ring(data) * whole * b}
    sent = {"all-reduce": 2 * _ring(layout.devices) * whole * b}
    sent["all-reduce"] += 2 * _ring(data) * split / fsdp * b
    gathered = sum(
        _size(shape) * (2 if len(shape) == 4 else 1)
        for shape, s in zip(shapes, is_split(shapes, fsdp), strict=True)
        if s
    )
    sent["all-gather"] = _ring(fsdp) * gathered * b
    if reduce_scatter:
        sent["reduce-scatter"] = _ring(fsdp) * split * b
    else:
        sent["all-reduce"] += 2 * _ring(fsdp) * split * b
    return sent


def _check(layout: Layout, optimizer: str) -> None:
    if optimizer not in MOMENTS:
        raise ValueError(f"optimizer must be one of {', '.join(MOMENTS)}, got {optimizer!r}")
    if optimizer == "vote" and layout.fsdp > 1:
        raise ValueError(f"a vote needs whole parameters on every device, got fsdp={layout.fsdp}")


def _ring(devices: int) -> float:
    return (devices - 1) / devices


def _size(shape: Shape) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
