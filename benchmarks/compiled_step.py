"""A step compiled by itself: its seconds, and what it multiplies, read from the HLO."""

import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class CompiledStep:
    """A step as a program of its own.

    Args:
      step: pure function of the arguments.
      arguments: pytrees of arrays, moved to the device.

    Attributes:
      facts: its `Operations`, temporary bytes and seconds of compilation.
    """

    def __init__(self, step: Callable[..., Any], *arguments: Any):
        self._arguments = jax.device_put(arguments)
        began = time.perf_counter()
        self._program: Any = jax.jit(step).lower(*self._arguments).compile()
        seconds = time.perf_counter() - began
        counted = operations(self._program.as_text())
        self.facts = {
            **(counted._asdict() if counted.products else {}),
            "temporary_bytes": self._program.memory_analysis().temp_size_in_bytes,
            "compile_seconds": round(seconds, 2),
        }

    def outcome(self) -> list[np.ndarray]:
        """Loss and gradients, or what else the step gives."""
        return [np.array(x) for x in jax.tree.leaves(self._program(*self._arguments))]

    def seconds(self, steps: int) -> tuple[float, float]:
        """Seconds per step, by the clock and of processors."""
        jax.block_until_ready(self._program(*self._arguments))
        began, worked = time.perf_counter(), time.process_time()
        result = None
        for _ in range(steps):
            result = self._program(*self._arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / steps, (time.process_time() - worked) / steps


class Operations(NamedTuple):
    """Counts of a program.

    Attributes:
      products: matrix products and convolutions, without products of a matrix and a vector.
      multiplications: in all of them; those with padding and with the holes of a dilation are none.
    """

    products: int
    multiplications: int


_RESULT = r"= \w+\[([\d,]*)\]\S* "
_OPERAND = r"(?:[^%\s]\S* )?%([\w.-]+)"
_DOT = re.compile(_RESULT + rf"dot\({_OPERAND},.*?lhs_contracting_dims=\{{([\d,]*)\}}")
_CONVOLUTION = re.compile(
    _RESULT + rf"convolution\({_OPERAND}, {_OPERAND}\).*?window=\{{(.*?)\}}"
    r".*?dim_labels=(\w+)_(\w+)->(\w+)"
)


def operations(hlo: str) -> Operations:
    """Counts a compiled program's multiplications; a loop's as often as it runs.

    Args:
      hlo: `compiled.as_text()`. GPUs call libraries for most products: there it is none of them.
    """
    shapes = {n: _numbers(s) for n, s in re.findall(r"%([\w.-]+) = \w+\[([\d,]*)\]", hlo)}
    parts = re.split(r"^(?=(?:ENTRY )?%[\w.-]+ \()", hlo, flags=re.M)
    bodies = {m[1]: part for part in parts if (m := re.match(r"(?:ENTRY )?%([\w.-]+) ", part))}

    @functools.cache
    def inside(name: str) -> Operations:
        products = multiplications = 0
        for line in bodies[name].splitlines():
            if found := _DOT.search(line):
                result, left = _numbers(found[1]), shapes[found[2]]
                products += min(result, default=1) > 1
                multiplications += math.prod(result + [left[i] for i in _numbers(found[3])])
            elif found := _CONVOLUTION.search(line):
                products += 1
                multiplications += _convolution(found, shapes)
            runs = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for callee in re.findall(r"\b(?:calls|body|to_apply)=%([\w.-]+)", line):
                inner = inside(callee)
                products += inner.products * (int(runs[1]) if runs else 1)
                multiplications += inner.multiplications * (int(runs[1]) if runs else 1)
        return Operations(products, multiplications)

    entry = re.search(r"^ENTRY %([\w.-]+)", hlo, flags=re.M)
    return inside(entry[1]) if entry else Operations(0, 0)


def _numbers(text: str, separator: str = ",") -> list[int]:
    return [int(d) for d in text.split(separator) if d]


def _convolution(found: re.Match[str], shapes: dict[str, list[int]]) -> int:
    result, left, kernel = _numbers(found[1]), shapes[found[2]], shapes[found[3]]
    of_left, of_kernel, of_result = found[5], found[6], found[7]
    window = dict(field.split("=") for field in found[4].split())
    total = kernel[of_kernel.index("i")]
    total *= result[of_result.index("b")] * result[of_result.index("f")]
    axes = [label for label in of_result if label.isdigit()]
    pads = window.get("pad", "x".join(["0_0"] * len(axes))).split("x")

    def of(name: str, axis: int) -> int:
        return _numbers(window[name], "x")[axis] if name in window else 1

    for label in axes:
        axis = int(label)
        low = int(pads[axis].split("_")[0])
        holes = of("lhs_dilate", axis)
        end = (left[of_left.index(label)] - 1) * holes + 1
        places = (
            out * of("stride", axis) + tap * of("rhs_dilate", axis) - low
            for out in range(result[of_result.index(label)])
            for tap in range(of("size", axis))
        )
        total *= sum(0 <= place < end and place % holes == 0 for place in places)
    return total
