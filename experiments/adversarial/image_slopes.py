"""How steep a critic is at images, and what it does between them.

A piecewise linear critic D divided as gradient normalisation has it, Dhat = D / (n + |D|), has the
slope `(n / (n + |D|))^2 = (1 - |Dhat|)^2` in every linear piece, n the slope of D. From piece to
piece n jumps and Dhat with it, so the bound on slopes is none on differences.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blogjax.core.norms import per_example_norm
from blogjax.gradients.input_gradient import value_and_input_gradient
from blogjax.tasks.critics import ConstraintName, constrain
from experiments.launch.pictures import save_figure
from experiments.launch.result import Claim, judge

POST = "https://kexue.fm/archives/8757"
MOST_IMAGES = 300  # of either kind, at which slopes are measured
AT_ONCE = 100  # of them; in float64, large networks need memory
ROUNDING = 1e-9  # of float64 through a network
FINER = 4  # a second look at the lines has so many times the points

Score = Callable[[Any, jax.Array], jax.Array]


def as_score(network: nn.Module) -> Score:
    """A critic's network as a function of parameters and images."""

    def score(params: Any, x: jax.Array) -> jax.Array:
        return network.apply({"params": params}, x)  # type: ignore

    return score


def score_at(network: nn.Module, constraint: ConstraintName, dtype: Any) -> Score:
    """What the losses see of a critic, computed in `dtype`.

    Args:
      network: a critic with the fields `dtype` and `param_dtype`.
      constraint: as in `constrain`; parameters are those that `ConstrainedCritic.effective` gives.
      dtype: of the arithmetic.
    """
    other = network.clone(dtype=dtype, param_dtype=dtype)  # type: ignore
    return constrain(as_score(other), constraint).score


def slopes(score: Score, params: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and slopes, float64 `[n]`, at images `[n, H, W, C]`; for a score at float64."""

    @jax.jit
    def measure(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, gradient = value_and_input_gradient(score, params, x)
        return value, per_example_norm(gradient)

    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, params)
        starts = range(0, len(images), AT_ONCE)
        parts = [measure(params, np.float64(images[i : i + AT_ONCE])) for i in starts]
    value, slope = (np.concatenate(both) for both in zip(*parts, strict=True))
    return value, slope


def along_lines(
    score: Score, params: Any, begin: np.ndarray, end: np.ndarray, parts: int
) -> np.ndarray:
    """Outputs `[n, parts + 1]` at equal distances on the lines from `begin` to `end`, float64."""
    at = np.linspace(0, 1, parts + 1, dtype=np.float32)[:, None, None, None]
    measure = jax.jit(score)
    lines = [measure(params, (1 - at) * a + at * b) for a, b in zip(begin, end, strict=True)]
    return np.stack([np.asarray(line, np.float64) for line in lines])


def summary(
    value: np.ndarray, slope: np.ndarray, lines: np.ndarray, distances: np.ndarray
) -> dict[str, float]:
    """The figures of one critic.

    Args:
      value, slope: as `slopes` returns them.
      lines: as `along_lines` returns it, `[n, parts + 1]`, parts a multiple of `FINER`.
      distances: `[n]`, the lengths of the lines.

    Returns:
      `largest`: slope at an image; `steep`: share of the images where it is above 1; `off`: largest
      distance of a slope from `(1 - |output|)^2`; `bound`: largest output, in size; `outside`:
      share of outputs above 1 in size; `jump`: median over the lines of the largest difference of
      neighbours; `finer`: that over the same of every `FINER`-th point; `chord`: the largest
      difference of neighbours over their distance.

    >>> figures = summary(
    ...     np.array([0.5, -0.9]), np.array([0.25, 1.5]),
    ...     np.array([[0.0, 0.1, 0.5, 0.5, 0.4]]), np.array([0.5]))
    >>> [round(figures[k], 6) for k in ("largest", "steep", "off", "jump", "finer", "chord")]
    [1.5, 0.5, 1.49, 0.4, 1.0, 3.2]
    """
    fine, coarse = (abs(np.diff(x, axis=1)) for x in (lines, lines[:, ::FINER]))
    outputs = abs(np.concatenate([value, lines.ravel()]))
    jumps, before = np.median(fine.max(axis=1)), np.median(coarse.max(axis=1))
    return {
        "largest": float(slope.max()),
        "steep": float(np.mean(slope > 1 + ROUNDING)),
        "off": float(abs(slope - (1 - abs(value)) ** 2).max()),
        "bound": float(outputs.max()),
        "outside": float(np.mean(outputs > 1)),
        "jump": float(jumps),
        "finer": float(jumps / before) if before > 0 else 0.0,  # a constant critic does not jump
        "chord": float((fine.max(axis=1) * fine.shape[1] / distances).max()),
    }


def check_measure(options: Any) -> None:
    """Refuses a config's `measure` group that nothing can be measured by.

    Raises:
      ValueError: naming the field.
    """
    for name in ("lines", "parts", "directions"):
        if options[name] < 1:
            raise ValueError(f"measure.{name} must be at least 1, got {options[name]}")
    if options.parts % FINER:
        raise ValueError(f"measure.parts must be a multiple of {FINER}, got {options.parts}")


def measure_critic(
    plan: Any, state: Any, options: Any, real: np.ndarray, fake: np.ndarray, picture: pathlib.Path
) -> dict[str, float]:
    """Slopes at images in float64, lines from real to generated ones in float32, and a picture.

    Args:
      plan: an `image_model.Plan`.
      state: the `AdversarialState` after training.
      options: a config's `measure` group: `lines` and `parts` of each.
      real, fake: `[n, H, W, C]` in [-1, 1].
      picture: the PNG to draw.
    """
    critic = state.params["critic"], state.model_state["critic"]
    params = jax.device_get(plan.critic.effective(*critic)[0])
    real, fake = real[:MOST_IMAGES], fake[:MOST_IMAGES]
    exact = score_at(plan.network, plan.constraint, jnp.float64)
    found = [slopes(exact, params, images) for images in (real, fake)]
    count = min(options.lines, len(real), len(fake))
    begin, end = real[:count], fake[:count]
    quick = score_at(plan.network, plan.constraint, jnp.float32)
    lines = along_lines(quick, params, begin, end, options.parts)
    distances = np.linalg.norm((end - begin).reshape(count, -1), axis=1)
    _draw(picture, found, lines)
    value, slope = (np.concatenate(both) for both in zip(*found, strict=True))
    return summary(value, slope, lines, distances)


def critic_claims(measured: list[dict[str, float]], judged: bool) -> list[Claim]:
    """What the post says of gradient normalisation; one entry of `measured` per seed.

    Shares and bounds are the formula's. On a finer look the jumps of a continuous function with
    bounded slopes shrink as the distances do, those of a discontinuous one stay: the edge is
    halfway, in logarithms.
    """
    largest, bound = (max(m[name] for m in measured) for name in ("largest", "bound"))
    return [
        judge(
            f"the slope is at most 1 (largest: {largest:.4f}): share of images where it is not",
            POST, "share of held-out and generated images with a slope above 1, in float64",
            [m["steep"] for m in measured], high=0.0, near=0.0, judged=judged,
        ),
        judge(
            "the slope is that of the formula, (1 - |Dhat|)^2: largest distance from it",
            POST, "largest |slope - (1 - |Dhat|)^2| over held-out and generated images, in float64",
            [m["off"] for m in measured], high=ROUNDING, near=ROUNDING / 10, judged=judged,
        ),
        judge(
            f"outputs are in [-1, 1] (largest in size: {bound:.4f}): share of those that are not",
            POST, "share of |Dhat| above 1 at held-out and generated images and on lines between",
            [m["outside"] for m in measured], high=0.0, near=0.0, judged=judged,
        ),
        judge(
            "the normalised critic is discontinuous: largest differences of neighbours on a line, "
            f"of points {FINER} times closer over before (continuous: {1 / FINER:g}, jumps: 1)",
            POST, "ratio of medians over lines from held-out to generated images",
            [m["finer"] for m in measured], low=FINER**-0.5, near=0.05, judged=judged,
        ),
    ]  # fmt: skip


def _draw(
    path: pathlib.Path, found: list[tuple[np.ndarray, np.ndarray]], lines: np.ndarray
) -> None:
    """Slopes over outputs; lines; and of the first line the surroundings of its largest jump."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13.8, 3.8))
    for (value, slope), name in zip(found, ("held out", "generated"), strict=True):
        axes[0].plot(value, slope, ".", ms=3, alpha=0.5, label=name)
    outputs = np.linspace(-1, 1, 201)
    axes[0].plot(outputs, (1 - abs(outputs)) ** 2, "k:", lw=1, label="$(1 - |\\hat D|)^2$")
    axes[0].set(title="slope at images", xlabel="$\\hat D$", ylabel="slope", xlim=(-1, 1))
    axes[0].set_xticks([-1, -0.5, 0, 0.5, 1])
    axes[0].legend(fontsize=8, frameon=False)
    at = np.linspace(0, 1, lines.shape[1])
    for line in lines[:3]:
        axes[1].plot(at, line, lw=0.9)
    axes[1].set(
        title="from held-out images to generated ones", xlabel="share of the way",
        ylabel="$\\hat D$",
    )  # fmt: skip
    largest = int(abs(np.diff(lines[0])).argmax())
    near = slice(max(largest - 24, 0), largest + 26)
    axes[2].plot(at[near], lines[0][near], ".", ms=4)
    axes[2].set(title="the largest jump of the blue line", xlabel="share of the way")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_figure(figure, path, dpi=110)
