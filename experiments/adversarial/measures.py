"""What is measured of a GAN in the plane: its samples, its critic's surface, the time of a step."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blogjax.core.norms import per_example_norm
from blogjax.gradients.input_gradient import value_and_input_gradient
from blogjax.metrics.sliced_wasserstein import even_directions, sliced_wasserstein
from blogjax.tasks.critics import ConstrainedCritic


def mode_shares(samples: np.ndarray, modes: np.ndarray, near: float) -> np.ndarray:
    """Share of the samples within the distance `near` of each mode; what is not finite is far.

    >>> mode_shares(np.array([[0.0, 0.1], [5.0, 0.0], [9.0, 9.0], [0.2, 0.0]]),
    ...             np.array([[0.0, 0.0], [5.0, 0.0]]), 0.15).tolist()
    [0.25, 0.25]
    """
    apart = samples[:, None].astype(np.float64) - modes
    return (np.hypot(apart[..., 0], apart[..., 1]) <= near).mean(axis=0)


def modes_found(shares: np.ndarray, least: float) -> int:
    """How many modes have at least the share `least` of the samples.

    >>> modes_found(np.array([0.5, 0.02, 0.01]), 0.02)
    2
    """
    return int((shares >= least).sum())


def along_training(records: Mapping[str, np.ndarray], least: float) -> dict[str, list[float]]:
    """What was evaluated during training.

    Args:
      records: `step` and `near_0`, `near_1` ..., shares near the modes, each `[records]`.
      least: as in `modes_found`.

    Returns:
      `step`; `near`, share of samples near any mode; `modes`, modes found.

    >>> records = {"step": [5, 9], "near_0": [0.5, 0.25], "near_1": [0.01, 0.25]}
    >>> along_training({name: np.array(column) for name, column in records.items()}, 0.02)
    {'step': [5, 9], 'near': [0.51, 0.5], 'modes': [1, 2]}
    """
    shares = np.stack([column for name, column in records.items() if name.startswith("near_")])
    return {
        "step": records["step"].tolist(),
        "near": shares.sum(axis=0).tolist(),
        "modes": (shares >= least).sum(axis=0).tolist(),
    }


def distance(samples: np.ndarray, fresh: np.ndarray, directions: int) -> float:
    """Sliced W2 in the plane; NaN where a generator has left the numbers."""
    if not np.isfinite(samples).all():
        return math.nan
    return sliced_wasserstein(samples, fresh, even_directions(directions))


class Surface(NamedTuple):
    """A critic on a square around 0, in float64.

    Attributes:
      values: `[side, side]`, the outputs; rows go up with y.
      slope: largest norm of the gradient by the input, over the same points.
      lines: `[lines, fine]`, the outputs along level lines, evenly spaced in y.
      spacing: distance of neighbours on a line.
    """

    values: np.ndarray
    slope: float
    lines: np.ndarray
    spacing: float


def critic_surface(
    critic: ConstrainedCritic, params: Any, state: Any, extent: float,
    *, side: int, lines: int, fine: int,
) -> Surface:  # fmt: skip
    """Evaluates a critic on `[-extent, extent]^2`.

    Args:
      critic: a critic of points of the plane.
      params: its parameters, of any floating dtype.
      state: that of its constraint.
      extent: half the side of the square.
      side: points of the grid in each direction.
      lines: number of level lines.
      fine: points of each line.
    """
    params, state = jax.tree.map(np.float64, jax.device_get((params, state)))

    @jax.jit
    def look(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        used, _ = critic.effective(params, state)
        value, gradient = value_and_input_gradient(critic.score, used, x)
        return value, per_example_norm(gradient)

    def grid(across: int, up: int) -> np.ndarray:
        x, y = (np.linspace(-extent, extent, n) for n in (across, up))
        return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)

    with jax.enable_x64(True):
        values, slopes = jax.device_get(look(jnp.asarray(grid(side, side))))
        along, _ = jax.device_get(look(jnp.asarray(grid(fine, lines))))
    spacing = 2 * extent / (fine - 1)
    return Surface(
        values.reshape(side, side), float(slopes.max()), along.reshape(lines, fine), spacing
    )


def jumps(lines: np.ndarray, spacing: float, bound: float) -> dict[str, float]:
    """Discontinuities of a function whose slope is at most `bound` inside its pieces.

    Two neighbours farther apart than the slope allows have a jump between them.

    Args:
      lines: `[lines, fine]`, values at even distances.
      spacing: that distance.
      bound: positive.

    Returns:
      `per_length`, jumps per unit of length; `largest`, in the function's units; `share`, how much
      of the function's total variation along the lines they are. Smaller jumps than `bound *
      spacing` are not seen.

    >>> found = jumps(np.array([[0.0, 0.1, 0.5, 0.4]]), 0.1, bound=1.0)
    >>> {name: round(value, 6) for name, value in found.items()}
    {'per_length': 3.333333, 'largest': 0.4, 'share': 0.666667}
    """
    steps = np.abs(np.diff(lines, axis=1))
    # Rounding in the difference of two values must not make a jump of a piece of full slope.
    rounding = 8 * np.finfo(np.float64).eps * np.abs(lines).max(initial=0.0)
    found = steps > bound * spacing * (1 + 1e-6) + rounding
    variation = steps.sum()
    return {
        "per_length": float(found.mean() / spacing),
        "largest": float(steps[found].max(initial=0.0)),
        "share": float(steps[found].sum() / variation) if variation > 0 else 0.0,
    }
