"""S06: a primary task with wrong labels, and an auxiliary one with a few right ones.

Post: https://kexue.fm/archives/8907
Claims: a step against the primary gradient, corrected so that its product with the auxiliary one is
  not negative, does not raise the auxiliary loss to first order, nor the primary one; of many
  examples with noisy labels and few with clean ones, the former are to be the primary task and the
  latter the auxiliary one; with the parameters' norm as auxiliary task it is weight decay without a
  coefficient.
How: ReLU networks with one hidden layer on 8 x 8 digits, plain gradient descent. Of the training
  images 50 or 200 keep their labels, of the rest 60% of the labels are random. Methods, see
  `multitask.noisy_labels`: noisy only, clean only, the sum of both losses, noisy with clean as
  auxiliary, the vector of least norm, noisy examples that agree with the clean gradient
  (arXiv:2102.13549), and noisy only with the norm held. A run is one seed: for each number of clean
  images and each learning rate six networks side by side, of the same first weights for every
  method. For each method and number the rate is the one with the best mean accuracy on the
  validation split. Accuracies are on the test split.
Guarantee: the cosine of every step's direction to the clean gradient of the same batch, for all
  networks; below -1e-6 it counts as negative. What remains is of second order: with the networks at
  the end, the change of the clean loss by the size of the step, see `first_order.rises`. `rose` in
  the result has the share of steps after which the clean loss of the batch was higher in truth.
Differences from the post: it proposes, and reports no experiment. The validation split has 150
  right labels, which is more than 50; only rates are chosen on it. The sum weighs both mean
  losses alike, and is so twice as long as a mean; its rate is chosen like the others'. Some chosen
  rates lie at an end of what was tried (`chosen`), where accuracies change little.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blogjax.train import mesh as meshes
from experiments.launch.configs import check_ranges, config_errors
from experiments.launch.result import Claim, Result, judge
from experiments.multitask import first_order
from experiments.multitask.noisy_labels import METHODS, NoisyAndClean, divide, means, networks_task
from experiments.optimisers.arms import check_train, run_arm
from experiments.optimisers.sweep import load
from experiments.regularisers.replicas import check_labelled, logits, points

POST = "https://kexue.fm/archives/8907"
PICTURE = "guarantee.png"
# The one in the middle has 0, and what float32 leaves of it, well inside.
BINS = np.linspace(-1.025, 1.025, 42)


def check(config: Any, label: np.ndarray) -> None:
    """Refuses a config that cannot be run, before anything is.

    Raises:
      ValueError: naming the field.
    """
    clean, rates, sizes = (
        list(v) for v in (config.data.clean, config.optim.rates, config.orders.sizes)
    )
    if len(clean) < 2 or clean != sorted(set(clean)):
        raise ValueError(f"data.clean must be two numbers or more, rising: {clean}")
    for number in clean:
        check_labelled(number, label)
    check_ranges(config.data, noise=(0, 1))
    meshes.check_batch_size(config.data.batch_size, meshes.make_mesh())
    if not config.model.hidden or min(config.model.hidden) < 1:
        raise ValueError(f"model.hidden needs widths of at least 1, got {config.model.hidden}")
    positive = [all(0 < v < np.inf for v in values) for values in (rates, sizes)]
    if not rates or not positive[0] or rates != sorted(set(rates)):
        raise ValueError(f"optim.rates must be positive numbers, rising: {rates}")
    if len(sizes) < 2 or not positive[1] or sizes != sorted(set(sizes), reverse=True):
        raise ValueError(f"orders.sizes must be two positive numbers or more, falling: {sizes}")
    check_ranges(config.orders, batches=(1, 2**16))
    check_ranges(config.train, replicas=(1, 2**16))
    check_train(config.train, {"train.steps": config.train.steps})


def shape(config: Any) -> tuple[int, int, int]:
    """Networks of a method: numbers of clean images, rates, replicas."""
    return len(config.data.clean), len(config.optim.rates), config.train.replicas


def measure(config: Any, state: Any, splits: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Accuracies of all networks, and what `first_order.watched` noted of their steps.

    Returns:
      `validation` and `test`, `[clean][rates][replicas]`; for each clean number and rate, over all
      steps and replicas: `negative`, numbers of steps whose cosines to the primary gradient, the
      auxiliary one and the parameters are below the tolerance or NaN, `[clean][rates][3]`;
      `lowest`, the least of them; `rose`, the share of steps after which the clean loss was
      higher or NaN, on the batch; `cosines`, shares of steps by the auxiliary one in the bins.
    """
    params, trace = jax.device_get((state.networks.params, state.trace))

    @jax.jit
    def accuracy(pixels: jax.Array, label: jax.Array) -> jax.Array:
        found = jax.vmap(logits, in_axes=(0, None))(params, pixels)
        return jnp.mean(found.argmax(-1) == label[None], axis=1)

    of_steps = trace.astype(np.float64).reshape(-1, *shape(config), 4)
    three, steps = of_steps[..., :3], of_steps.shape[0] * config.train.replicas
    auxiliary = of_steps[..., first_order.AUXILIARY]
    binned = np.where(np.isnan(auxiliary), -1, np.digitize(auxiliary, BINS[1:-1]))
    counts = np.stack([(binned == i).sum(axis=(0, 3)) for i in range(len(BINS) - 1)], axis=-1)
    return {
        **{
            name: np.asarray(accuracy(data["pixels"], data["label"]), np.float64)
            .round(6).reshape(shape(config)).tolist()
            for name, data in splits.items()
        },
        "negative": (~(three >= -first_order.TOLERANCE)).sum(axis=(0, 3)).tolist(),
        "lowest": three.min(axis=(0, 3)).tolist(),
        "rose": (~(of_steps[..., first_order.CHANGE] <= 0)).mean(axis=(0, 3)).tolist(),
        "cosines": (counts / steps).tolist(),
    }  # fmt: skip


def orders(config: Any, state: Any, chosen: list[int], batches: NoisyAndClean) -> dict[str, Any]:
    """Changes of the clean loss by the size of the step, of the networks at the chosen rates.

    Returns:
      `disagree`, on what share of batches after the last of training the two gradients do;
      `primary` and `projected`, mean absolute changes there, one for each size, None without any.
    """
    clean, rates, replicas = shape(config)
    at = np.array([(c * rates + chosen[c]) * replicas + np.arange(replicas) for c in range(clean)])
    params = jax.tree.map(lambda x: x[at.ravel()], jax.device_get(state.networks.params))
    count = config.orders.batches
    seen = [batches(config.train.steps + i) for i in range(count)]
    own = {
        name: np.moveaxis(np.stack([batch[name] for batch in seen]), 2, 0)
        for name in seen[0] if name not in ("row", "weight")
    }  # fmt: skip
    found = first_order.rises(means, params, own, config.orders.sizes)
    share = len(found["primary"]) / (at.size * count)
    return {
        "disagree": share,
        **{k: np.abs(v).mean(axis=0).tolist() if share else None for k, v in found.items()},
    }


def choose(measured: dict[str, Any]) -> list[int]:
    """For each number of clean images the rate with the best mean validation accuracy."""
    return np.mean(measured["validation"], axis=2).argmax(axis=1).tolist()


def at_chosen(measured: dict[str, Any], name: str) -> np.ndarray:
    """What was measured at the chosen rates: `[clean, ...]`."""
    return np.array([measured[name][c][i] for c, i in enumerate(choose(measured))])


def claims(config: Any, measured: list[dict[str, Any]]) -> list[Claim]:
    """What the post says.

    The intervals were committed before the judged runs. Of a guarantee no step may be an exception.
    Without it, at least one step in twenty is to go wrong, or it is of no use. Slopes: 1 and 2, as
    far as the kinks of ReLU let them. Accuracies: the post has only the direction, so the edge is
    0; holding the norm may cost a point.

    Args:
      config: the experiment's.
      measured: for each seed `{method: see `measure`}`, and `orders` for `primary_auxiliary`.
    """
    judged, numbers = config.judge, list(config.data.clean)
    steps = config.train.steps * config.train.replicas

    def wrong(name: str, column: int) -> list[float]:
        """Steps of all networks."""
        return [float(np.sum(np.array(seed[name]["negative"])[..., column])) for seed in measured]

    def share(name: str, column: int) -> list[float]:
        """Of the steps at the chosen rates, mean over the numbers of clean images."""
        found = [at_chosen(seed[name], "negative")[:, column] / steps for seed in measured]
        return [float(of_seed.mean()) for of_seed in found]

    def order(name: str) -> list[float]:
        changes = [seed["primary_auxiliary"]["orders"][name] for seed in measured]
        sizes = config.orders.sizes
        return [float("nan") if c is None else first_order.slope(sizes, c) for c in changes]

    def gain(name: str, other: str) -> np.ndarray:
        """`[seeds, clean]`."""
        first, second = (
            np.array([points(at_chosen(seed[n], "test")).mean(axis=1) for seed in measured])
            for n in (name, other)
        )
        return first - second

    count = "number of steps, of all networks, with a cosine below -1e-6"
    of_steps = "share of steps with a cosine below -1e-6, at the rate chosen on validation"
    power = "slope of log mean |change| of the clean loss of the batch over log step size, float64"
    test = "percentage points of test accuracy, mean over the replicas, rates by validation"
    ours = "primary_auxiliary"
    return [
        judge(
            "noisy first, clean auxiliary: no step goes against the clean gradient", POST, count,
            wrong(ours, first_order.AUXILIARY), high=0.0, near=0.0, judged=judged,
        ),
        judge(
            "nor against the noisy one", POST, count,
            wrong(ours, first_order.PRIMARY), high=0.0, near=0.0, judged=judged,
        ),
        judge(
            "noisy only: a share of the steps does go against the clean gradient", POST, of_steps,
            share("noisy", first_order.AUXILIARY), low=0.05, near=0.05, judged=judged,
        ),
        judge(
            "where the two disagree, the noisy gradient changes the clean loss to first order",
            POST, power, order("primary"), low=0.9, high=1.2, near=0.05, judged=judged,
        ),
        judge(
            "and corrected only to second order",
            POST, power, order("projected"), low=1.8, high=2.2, near=0.05, judged=judged,
        ),
        *(
            judge(
                f"{clean} clean labels: noisy first, clean auxiliary, is better than {than}",
                POST, test, gain(ours, other)[:, i].tolist(), low=0.0, near=2.0, judged=judged,
            )
            for other, than in (
                ("noisy", "noisy only"), ("sum", "the sum"), ("clean", "clean only")
            )
            for i, clean in enumerate(numbers)
        ),
        judge(
            "weight decay without a coefficient: no step makes the norm grow to first order",
            POST, count, wrong("held", first_order.PARAMETERS), high=0.0, near=0.0, judged=judged,
        ),
        judge(
            "where a share of the steps would", POST, of_steps,
            share("noisy", first_order.PARAMETERS), low=0.05, near=0.05, judged=judged,
        ),
        judge(
            "and it costs no accuracy, mean over the numbers of clean labels",
            POST, test, gain("held", "noisy").mean(axis=1).tolist(), low=-1.0, near=1.0,
            judged=judged,
        ),
    ]  # fmt: skip


def draw(path: pathlib.Path, config: Any, measured: list[dict[str, Any]]) -> None:
    """Cosines of all steps, changes by the size of the step, and the accuracy of every network."""
    from experiments.multitask.noisy_label_pictures import accuracies, histogram
    from experiments.regularisers.pictures import figure, powers

    shown = {"noisy": "noisy only", "primary_auxiliary": "noisy first, clean auxiliary"}
    found = [seed["primary_auxiliary"]["orders"] for seed in measured]
    with figure(path, 3) as (first, second, third):
        shares = {
            label: np.mean([at_chosen(seed[name], "cosines").mean(axis=0) for seed in measured], 0)
            for name, label in shown.items()
        }
        histogram(
            first, BINS, shares, "steps against the clean gradient (grey)",
            "cosine of the step's direction and the clean gradient",
        )  # fmt: skip
        changes = {
            label: np.mean([f[key] for f in found], axis=0)
            for key, label in (("primary", "noisy gradient"), ("projected", "corrected"))
            if all(f[key] is not None for f in found)
        }
        sizes = np.array(config.orders.sizes)
        powers(
            second, sizes, changes, dict(zip(changes, (1.0, 2.0), strict=True)),
            "clean loss after one step, at a conflict", "size of the step",
            "mean |change|, nats",
        )  # fmt: skip
        of_networks = {
            method.label: [
                np.concatenate([points(at_chosen(seed[name], "test"))[c] for seed in measured])
                for c in range(len(config.data.clean))
            ]
            for name, method in METHODS.items()
        }
        accuracies(
            third, of_networks, [f"{n} clean labels" for n in config.data.clean],
            "test accuracy", "%: networks, mean, two errors",
        )  # fmt: skip


def run(config: Any, workdir: pathlib.Path) -> Result:
    """Trains and measures every method, for every seed; finished ones are read back."""
    with config_errors():
        data, splits = load("train"), {name: load(name) for name in ("validation", "test")}
        check(config, data["label"])
    seeds, steps = list(config.train.seeds), config.train.steps
    clean, _, replicas = shape(config)
    widths = (64, *config.model.hidden, 10)
    measured: list[dict[str, Any]] = []
    for seed in seeds:
        folder = workdir / f"seed{seed}" if len(seeds) > 1 else workdir
        divisions = [
            divide(data, number, config.data.noise, replicas, seed) for number in config.data.clean
        ]
        batches = NoisyAndClean(divisions, config.data.batch_size, seed)

        def figures(state: Any, name: str, batches: NoisyAndClean = batches) -> dict[str, Any]:
            found = measure(config, state, splits)
            if name == "primary_auxiliary":
                found["orders"] = orders(config, state, choose(found), batches)
            return found

        measured.append(
            {
                name: run_arm(
                    folder / name,
                    networks_task(method, widths, config.optim.rates, clean, replicas, steps),
                    batches, steps, config.train, seed,
                    lambda state, name=name, figures=figures: figures(state, name),
                )
                for name, method in METHODS.items()
            }
        )  # fmt: skip
    draw(workdir / PICTURE, config, measured)
    rates = list(config.optim.rates)
    return Result(
        claims=claims(config, measured),
        seeds=seeds,
        measured={
            "clean": list(config.data.clean),
            "rates": rates,
            "chosen": [
                {name: [rates[i] for i in choose(m)] for name, m in seed.items()}
                for seed in measured
            ],
            "by_seed": measured,
        },
        pictures=[PICTURE],
    )


if __name__ == "__main__":
    from experiments.launch.main import main

    main(run)
