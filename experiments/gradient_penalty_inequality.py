"""S03: gradients by the input are bounded by those by the parameters; but not those of a batch.

Post: https://kexue.fm/archives/8796
Claims: |grad_x f|^2 times a bracket of norms is at most |grad_theta f|^2, for any scalar function f
  of an MLP's output (from arXiv 2111.15090); spectral norms are not near 0 at the start of
  training, as the paper has it; the bracket hardly changes during training, so that a penalty on
  the gradient by the parameters is about one on the gradient by the input.
How: four networks on 8 x 8 digits, plain SGD. `relu` and `tanh` have two hidden layers and tell ten
  classes apart. `narrow` has two hidden layers of one unit (tanh), `affine` none; both have one
  output, which tells digits from 5 on from the others: there the two sides must be equal. Both
  sides are measured in float64 on the same training images after given numbers of steps.
Batches: the post goes on from SGD, whose implicit penalty is on the gradient of a batch's mean
  loss. For that one the inequality does not hold. `naive` is the mean of the left sides over a
  batch, divided by the squared norm of the batch's gradient: above 1 it is violated. `batch` is the
  form of `gradients.gradient_bound` that does hold, and says nothing about large batches.
Differences from the post: it has no experiment. Where an image's gradients are both 0, the ratio
  counts as 0. Weights start as He et al. have it, biases at 0, for tanh also.
"""

import itertools
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.data import digits
from blogjax.data.batches import Batches
from blogjax.gradients.gradient_bound import batch_gradient_bound, mlp_gradient_bound, spectral_norm
from blogjax.gradients.per_example import layer_signals
from blogjax.tasks.gradient import LossOutput, gradient_task
from blogjax.train import mesh as meshes
from blogjax.train.loop import fit
from blogjax.train.task import Batch, Task
from experiments.launch.configs import check_ranges, config_errors
from experiments.launch.result import Claim, Result, judge, measured_once
from experiments.optimisers.arms import check_train

POST = "https://kexue.fm/archives/8796"
WIDE, EQUAL = ("relu", "tanh"), ("narrow", "affine")
NAMES, COLOURS = {"relu": "ReLU", "tanh": "tanh"}, {"relu": "C0", "tanh": "C3"}
PICTURE = "inequality.png"


class Network(NamedTuple):
    """An MLP on 64 pixels and what it is trained for: `loss(outputs, label) -> [B]`, in nats."""

    widths: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]


def _large_digit(outputs: jax.Array, label: jax.Array) -> jax.Array:
    target = (label >= 5).astype(outputs.dtype)
    return optax.sigmoid_binary_cross_entropy(outputs[:, 0], target)


def networks(hidden: Any) -> dict[str, Network]:
    """The four networks; `hidden` is for the wide ones."""
    classes = optax.softmax_cross_entropy_with_integer_labels
    return {
        "relu": Network((64, *hidden, 10), jax.nn.relu, classes),
        "tanh": Network((64, *hidden, 10), jnp.tanh, classes),
        "narrow": Network((64, 1, 1, 1), jnp.tanh, _large_digit),
        "affine": Network((64, 1), jnp.tanh, _large_digit),
    }


def check(config: Any) -> None:
    """Refuses a config that cannot be run, before anything is.

    Raises:
      ValueError: naming the field.
    """
    measure, hidden = config.measure, list(config.model.hidden)
    if not hidden or min(hidden) < 1:
        raise ValueError(f"model.hidden needs widths of at least 1, got {hidden}")
    check_ranges(config.optim, learning_rate=(1e-9, 10))
    check_ranges(measure, images=(1, digits.SPLITS["train"] + 1))
    for name, values in (("steps", measure.steps), ("batch_sizes", measure.batch_sizes)):
        values = list(values)
        if len(values) < 2 or values[0] < 1 or values != sorted(set(values)):
            raise ValueError(f"measure.{name} must be two numbers or more, rising: {values}")
    uneven = [size for size in measure.batch_sizes if measure.images % size]
    if uneven:
        raise ValueError(f"measure.images, {measure.images}, cannot be cut in batches of {uneven}")
    check_train(config.train, {"the first of measure.steps": measure.steps[0]})
    meshes.check_batch_size(config.data.batch_size, meshes.make_mesh())


def make_task(network: Network, learning_rate: float) -> Task:
    """Plain SGD on the network's loss."""
    he = jax.nn.initializers.he_normal()
    shapes = list(itertools.pairwise(network.widths))

    def init(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, len(shapes))
        return {
            "params": [
                {"kernel": he(k, shape), "bias": jnp.zeros(shape[1])}
                for k, shape in zip(keys, shapes, strict=True)
            ]
        }

    def loss(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> LossOutput:
        del model_state, key
        h = batch["pixels"]
        for i, layer in enumerate(params):
            h = network.activation(h) if i else h
            h = h @ layer["kernel"] + layer["bias"][None]
        return LossOutput(network.loss(h, batch["label"]))

    return gradient_task(init, loss, optax.sgd(learning_rate))


def make_measure(
    config: Any, network: Network, data: dict[str, np.ndarray]
) -> Callable[[Any], dict[str, Any]]:
    """A function of a state: both sides of the inequalities, in float64, on the first images."""
    count, sizes = config.measure.images, list(config.measure.batch_sizes)
    x, label = data["pixels"][:count].astype(np.float64), data["label"][:count]
    options = {"activation": network.activation}

    @jax.jit
    def sides(params: Any, x: jax.Array, label: jax.Array) -> dict[str, Any]:
        alone = mlp_gradient_bound(params, x, network.loss, label, **options)
        signals = layer_signals(params, x, network.loss, label, **options)

        def batch(size: int) -> tuple[jax.Array, jax.Array]:
            one = lambda x, label: batch_gradient_bound(  # noqa: E731
                params, x, network.loss, label, **options
            )
            bound = jax.vmap(one)(x.reshape(-1, size, x.shape[1]), label.reshape(-1, size))
            return bound.lhs, bound.rhs

        return {
            "alone": (alone.lhs, alone.rhs),
            "batch": [batch(size) for size in sizes],
            "input": jnp.sum(jnp.square(signals.input_gradient), axis=1),
            "loss": signals.losses,
            "spectral": [spectral_norm(layer["kernel"]) for layer in params],
        }

    def measure(state: Any) -> dict[str, Any]:
        params = jax.tree.map(np.float64, jax.device_get(state.params))
        with jax.enable_x64(True):
            return summary(sizes, jax.device_get(sides(params, x, label)))

    return measure


def summary(sizes: list[int], found: dict[str, Any]) -> dict[str, Any]:
    """The figures of one network at one time, from `make_measure`'s sides.

    Returns:
      `ratio`: left over right for single images (median, largest, and `off`, the largest distance
      from 1); `bracket`: median of left over |grad_x f|^2; `correlation`: Spearman's, of
      |grad_x f|^2 and |grad_theta f|^2; `input`, `parameter`: their means; `loss`, in nats;
      `spectral`: of each kernel; `batches`: for each size the median of `naive`, the share of
      batches in which it is above 1, and the median and the largest `batch` ratio.
    """
    lhs, rhs = found["alone"]
    ratio = quotient(lhs, rhs)
    moving = found["input"] > 0
    bracket = lhs[moving] / found["input"][moving]
    batches = {}
    for size, (batch_lhs, batch_rhs) in zip(sizes, found["batch"], strict=True):
        naive = quotient(lhs.reshape(-1, size).mean(axis=1), batch_rhs)
        holding = quotient(batch_lhs, batch_rhs)
        batches[str(size)] = {
            "naive": float(np.median(naive)),
            "violated": float((naive > 1).mean()),
            "batch": float(np.median(holding)),
            "batch_largest": float(holding.max()),
        }
    return {
        "ratio": {
            "median": float(np.median(ratio)),
            "largest": float(ratio.max()),
            "off": float(abs(ratio - 1).max()),
        },
        "bracket": float(np.median(bracket)) if moving.any() else math.nan,
        "correlation": rank_correlation(found["input"], rhs),
        "input": float(found["input"].mean()),
        "parameter": float(rhs.mean()),
        "loss": float(found["loss"].mean()),
        "spectral": [float(v) for v in found["spectral"]],
        "batches": batches,
    }


def quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """0 where both are 0, infinite where only the divisor is.

    >>> quotient(np.array([0.0, 1.0, 1.0]), np.array([0.0, 0.0, 2.0])).tolist()
    [0.0, inf, 0.5]
    """
    where = np.where(above == 0, 0.0, np.inf)
    return np.divide(above, below, out=where, where=below != 0)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's; NaN where one of the two is constant.

    >>> round(rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 9.0, 4.0])), 3)
    0.5
    """
    from scipy.stats import rankdata

    if x.min() == x.max() or y.min() == y.max():
        return math.nan
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def run_network(
    config: Any, folder: pathlib.Path, network: Network, data: dict[str, np.ndarray], seed: int
) -> list[dict[str, Any]]:
    """Trains one network from one time of measurement to the next; finished parts are read back."""
    task = make_task(network, config.optim.learning_rate)
    batches = Batches(
        data, config.data.batch_size, seed=seed,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    measure = make_measure(config, network, data)
    found = []
    for steps in config.measure.steps:

        def train_and_measure(steps: int = steps) -> dict[str, Any]:
            print(f"\n{folder}, {steps} steps", flush=True)
            state = fit(
                task, batches, steps, seed=seed, workdir=folder,
                log_every=config.train.log_every, save_seconds=config.train.save_seconds,
                on_nonfinite=config.train.on_nonfinite, verbose=True,
            )  # fmt: skip
            return measure(state)

        found.append(measured_once(folder / f"measured_{steps}.json", train_and_measure))
    return found


def claims(config: Any, measured: list[dict[str, list[dict[str, Any]]]]) -> list[Claim]:
    """What the post says, and what its step to batches needs.

    The intervals were committed before the judged runs. The inequalities are theorems, with edge 1,
    equality up to rounding. Where the post has words only ("hardly changes", "about"), a factor of
    2 and a rank correlation of .9 were chosen; for "not near 0" its own figure, 1.

    Args:
      config: the experiment's.
      measured: for each seed `{network: [at each time]}`, see `summary`.
    """
    judged, largest = config.judge, str(config.measure.batch_sizes[-1])

    def over(which: tuple[str, ...], figure: Callable[[dict[str, Any]], float]) -> np.ndarray:
        """`[seeds, networks, times]`; None, as JSON has infinity and NaN, becomes NaN."""
        values = [[[figure(at) for at in m[name]] for name in which] for m in measured]
        return np.array(values, np.float64)

    def worst(which: tuple[str, ...], figure: Callable[[dict[str, Any]], float]) -> list[float]:
        return over(which, figure).max(axis=(1, 2)).tolist()

    bracket = over(WIDE, lambda at: at["bracket"])
    correlation = over(WIDE, lambda at: at["correlation"])[:, :, -1].min(axis=1)
    spectral = over(WIDE, lambda at: min(at["spectral"]))[:, :, 0].min(axis=1)
    violated = over(WIDE, lambda at: at["batches"][largest]["violated"])[:, :, -1].min(axis=1)
    alone = over(WIDE, lambda at: at["ratio"]["median"])[:, :, -1]
    holding = over(WIDE, lambda at: at["batches"][largest]["batch"])[:, :, -1]
    with np.errstate(divide="ignore", invalid="ignore"):  # a dead network: NaN, which fails
        drift = (bracket.max(axis=2) / bracket.min(axis=2)).max(axis=1)
        left = (holding / alone).max(axis=1)
    return [
        judge(
            "the left side is never above the right: largest ratio",
            POST, "left over right, largest over images, times and both wide networks",
            worst(WIDE, lambda at: at["ratio"]["largest"]), high=1.0, near=0.02, judged=judged,
        ),
        judge(
            "with one output in every layer the sides are equal: largest distance of the ratio "
            "from 1",
            POST, "|left over right - 1|, largest over images, times and both narrow networks",
            worst(EQUAL, lambda at: at["ratio"]["off"]), high=1e-6, near=1e-7, judged=judged,
        ),
        judge(
            "spectral norms are not near 0 at the start: smallest of a kernel",
            POST, "spectral norm after the first measured step, smaller of both wide networks",
            spectral.tolist(), low=1.0, near=0.1, judged=judged,
        ),
        judge(
            "the bracket hardly changes during training: largest over smallest",
            POST, "ratio of the medians over the images, over all times, larger of both wide "
            "networks",
            drift.tolist(), high=2.0, near=0.3, judged=judged,
        ),
        judge(
            "so one penalty is about the other: rank correlation over the images, after training",
            POST, "Spearman's correlation of both squared gradients, smaller of both wide networks",
            correlation.tolist(), low=0.9, near=0.03, judged=judged,
        ),
        judge(
            f"the gradient of a batch bounds nothing: share of batches of {largest} in which it "
            "is too small",
            POST, "share of batches after training in which the mean left side is above the "
            "squared norm of the batch's gradient, smaller of both wide networks",
            violated.tolist(), low=0.5, near=0.2, judged=judged,
        ),
        judge(
            "the form for batches holds: largest ratio",
            POST, "left over right, largest over batches, sizes, times and both wide networks",
            worst(WIDE, lambda at: max(b["batch_largest"] for b in at["batches"].values())),
            high=1.0, near=0.02, judged=judged,
        ),
        judge(
            f"but of batches of {largest} it says nothing: its ratio over that of single images",
            POST, "ratio of the median ratios after training, larger of both wide networks",
            left.tolist(), high=0.01, near=0.003, judged=judged,
        ),
    ]  # fmt: skip


def draw(path: pathlib.Path, config: Any, measured: list[dict[str, Any]]) -> None:
    """Ratios and brackets along training; after it, ratios by batch size. Means over the seeds."""
    from experiments.optimisers.pictures import Line, Panel, draw_panels

    steps, sizes = np.array(config.measure.steps), [1, *config.measure.batch_sizes]

    def along(name: str, figure: Callable[[dict[str, Any]], float]) -> Line:
        values = np.array([[figure(at) for at in m[name]] for m in measured], np.float64)
        return Line(NAMES[name], steps, values.mean(axis=0), COLOURS[name])

    def by_size(name: str, key: str) -> Line:
        values = [
            [m[name][-1]["ratio"]["median"], *(b[key] for b in m[name][-1]["batches"].values())]
            for m in measured
        ]
        means = np.array(values, np.float64).mean(axis=0)
        return Line(NAMES[name], np.array(sizes), means, COLOURS[name])

    draw_panels(path, [
        Panel(
            "single images: left over right", "step", "median, and largest",
            [along(name, lambda at, k=k: at["ratio"][k]) for k in ("median", "largest")
             for name in WIDE], levels={"bound": 1.0},
        ),
        Panel(
            "bracket of norms", "step", "median over the images",
            [along(name, lambda at: at["bracket"]) for name in WIDE],
        ),
        Panel(
            "mean left side over the batch's gradient (naive)", "images in the batch",
            "median, after training", [by_size(name, "naive") for name in WIDE], log_y=True,
            levels={"above: violated": 1.0}, ticks=sizes,
        ),
        Panel(
            "form for batches: left over right", "images in the batch", "median, after training",
            [by_size(name, "batch") for name in WIDE], levels={"bound": 1.0}, ticks=sizes,
        ),
    ])  # fmt: skip


def run(config: Any, workdir: pathlib.Path) -> Result:
    """Trains and measures all networks, for every seed."""
    with config_errors():
        check(config)
        arrays = digits.load("train")
    data = {"pixels": arrays["image"].reshape(len(arrays["label"]), -1), "label": arrays["label"]}
    seeds = list(config.train.seeds)
    measured: list[dict[str, Any]] = []
    for seed in seeds:
        folder = workdir / f"seed{seed}" if len(seeds) > 1 else workdir
        measured.append(
            {
                name: run_network(config, folder / name, network, data, seed)
                for name, network in networks(config.model.hidden).items()
            }
        )
    draw(workdir / PICTURE, config, measured)
    return Result(
        claims=claims(config, measured),
        seeds=seeds,
        measured={"steps": list(config.measure.steps), "by_seed": measured},
        pictures=[PICTURE],
    )


if __name__ == "__main__":
    from experiments.launch.main import main

    main(run)
