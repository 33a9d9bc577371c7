"""S05, S06: where combiners of two gradients lead, on the toy of the multi-task literature.

Posts: https://kexue.fm/archives/8896 (Pareto stationary points, min-norm), /8907 (primary and
  auxiliary tasks).
Claims: the shortest convex combination of the gradients, and for two tasks also the sum of the
  normalised ones, leads to a Pareto stationary point, where it is zero. With a primary task it has
  priority, and the auxiliary loss does not rise to first order. From the paper the toy is of (Liu
  et al. 2021, arXiv:2110.14048, CAGrad): the mean of the gradients does not reach the front from
  every start, MGDA and PCGrad do, at a place that depends on the start, CAGrad at the least mean.
How: Adam on two parameters (`multitask/two_losses.py`) after `aggregate(combiner)`, for eight
  combiners, from the five starts of Navon et al. 2022, arXiv:2202.01017, and for each seed from
  others drawn around them, in float32 as is usual. `fit` is not used: there are no data, and a path
  is one `lax.scan` over its steps. Apart from that the guarantee of a primary task is measured with
  plain steps, in float64, since it is about the combined vector and Adam does not step along it.
Seen in trials with other seeds (100, 101, 102), before the judged runs:
  - The mean is slow at the ditches rather than stuck there: with four times the steps, or five
    times the rate, it arrived from all five starts, at the least mean like CAGrad.
  - On the front, in float32, min-norm drifts along it as far as to its ends. The vector is zero
    there but for rounding, along the front some 4e-8, which Adam makes full size, as it is above
    its `eps` of 1e-8. In float64 that is below 1e-15, and nothing moves; so min-norm runs in both.
    The others but the mean and CAGrad drift too, mostly less; so places are told at arrival, not
    at the end.
  - After Adam the auxiliary loss rises tens of times as much as by plain steps.
Differences from the posts: they have no experiments.
"""

import functools
import math
import pathlib
from typing import Any

import jax
import numpy as np
import optax

from blogjax.multitask.min_norm import min_norm_weights
from blogjax.multitask.primary_auxiliary import primary_auxiliary_weights
from blogjax.multitask.task_gradients import task_gradients
from experiments.launch.configs import check_ranges, config_errors
from experiments.launch.result import Claim, Result, judge, measured_once
from experiments.multitask.two_losses import STARTS, distance_to_front, front, losses
from experiments.multitask.walks import combiners, first_only, walk
from experiments.optimisers.arms import ratio

POST, POST_2 = "https://kexue.fm/archives/8896", "https://kexue.fm/archives/8907"
PAPER = "https://arxiv.org/abs/2110.14048"
PICTURES = ("paths.png", "ends.png")
FLOAT64 = "min_norm_float64"
UPPER = (0, 2)  # of the usual starts, those in the upper half
REACHING = ("gradient_normalized", "min_norm", "pcgrad", "cagrad", "upgrad")


def check(config: Any) -> None:
    """Refuses a config that cannot be run, before anything is.

    Raises:
      ValueError: naming the field.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"there is nothing to share here: run it in one process, not in {jax.process_count()}"
        )
    huge, train, measure = 2**31, config.train, config.measure
    check_ranges(config.starts, around=(1, huge), deviation=(0, 10))
    check_ranges(config.optim, learning_rate=(1e-9, 10), eps=(0, 1), cagrad_c=(0, 1))
    check_ranges(config.plain, starts=(1, huge), learning_rate=(1e-9, 10), steps=(1, huge))
    check_ranges(train, steps=(1, huge))
    check_ranges(measure, points=(1, huge), near=(1e-9, 100))
    if train.steps % measure.points:
        raise ValueError(
            f"measure.points, {measure.points}, must divide train.steps, {train.steps}"
        )
    seeds = list(train.seeds)
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= s < 2**32 for s in seeds):
        raise ValueError(f"train.seeds must be different numbers in [0, 2^32), got {seeds}")


def make_starts(config: Any, seed: int) -> np.ndarray:
    """The usual starts, then those drawn around them: `[5 * (1 + around), 2]`, five by five."""
    usual = np.array(STARTS)
    rng = np.random.default_rng([seed, 0])
    drawn = rng.normal(usual, config.starts.deviation, (config.starts.around, *usual.shape))
    return np.concatenate([usual[None], drawn]).reshape(-1, 2)


def measure_paths(config: Any, paths: np.ndarray) -> dict[str, list[Any]]:
    """Figures of the paths of one combiner.

    Returns:
      One entry per path of: `end` and `losses`, where it ends; `distance`, from there to the front;
      `stationary`, the length of the shortest convex combination of the gradients there, over that
      of the longer of both; `arrived`, the first step among the kept ones within `measure.near` of
      the front; `place`, the first coordinate there; `way`, the range of the first coordinate from
      then on. The last three are None for paths that do not arrive.
    """
    distances = distance_to_front(paths)
    near = distances <= config.measure.near
    first = [int(np.argmax(row)) if row.any() else None for row in near]
    with jax.enable_x64(True):
        at_end = jax.jit(jax.vmap(lambda x: task_gradients(losses, x)))(np.float64(paths[:, -1]))
        values, g = np.asarray(at_end.losses), np.asarray(at_end.gradients)
        gram = np.einsum("nid,njd->nij", g, g)
        weights = np.asarray(jax.jit(jax.vmap(min_norm_weights))(gram))
    shortest = np.linalg.norm(np.einsum("ni,nid->nd", weights, g), axis=1)
    longest = np.linalg.norm(g, axis=2).max(axis=1)
    each = config.train.steps // config.measure.points
    along = [None if k is None else paths[i, k:, 0].astype(float) for i, k in enumerate(first)]
    return {
        "end": paths[:, -1].tolist(),
        "losses": values.tolist(),
        "distance": distances[:, -1].tolist(),
        "stationary": (shortest / longest).tolist(),
        "arrived": [None if k is None else k * each for k in first],
        "place": [None if a is None else float(a[0]) for a in along],
        "way": [None if a is None else float(np.ptp(a)) for a in along],
    }


def run_arms(config: Any, folder: pathlib.Path, seed: int) -> dict[str, Any]:
    """Walks with every combiner, min-norm once more in float64; finished arms are read back.

    Returns:
      `{arm: figures}`, see `measure_paths`. The paths are left in the folder.
    """
    starts = make_starts(config, seed)
    every = combiners(config.optim.cagrad_c)
    adam = optax.adam(config.optim.learning_rate, eps=config.optim.eps)
    measured = {}
    for name, combiner in {**every, FLOAT64: every["min_norm"]}.items():
        stored = folder / f"{name}.npz"
        if not stored.exists():
            print(f"{stored.with_suffix('')}", flush=True)
            wide = name == FLOAT64
            with jax.enable_x64(wide):
                paths = walk(
                    combiner, adam, starts.astype(np.float64 if wide else np.float32),
                    config.train.steps, config.measure.points,
                )  # fmt: skip
            folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(stored.with_suffix(".part.npz"), paths=paths)
            stored.with_suffix(".part.npz").rename(stored)
        measured[name] = measure_paths(config, np.load(stored)["paths"])
    return measured


def auxiliary_rise(config: Any, seed: int) -> dict[str, float]:
    """How much L2 rises in all along paths that put L1 first, summed over steps and starts.

    Starts are uniform in [-8, 8] x [-8, -1].

    Returns:
      `primary_auxiliary` by plain steps; `half`, with half the rate and twice the steps; `alone`,
      plain steps on L1 as if there were no L2; `adam`, as `primary_auxiliary`, after Adam with
      the rate of the other paths and as many steps.
    """
    plain = config.plain
    starts = np.random.default_rng([seed, 1]).uniform((-8, -8), (8, -1), (plain.starts, 2))

    def rise(combiner: Any, optimiser: optax.GradientTransformation, steps: int) -> float:
        paths = walk(combiner, optimiser, starts, steps, steps)
        auxiliary = np.asarray(jax.jit(jax.vmap(jax.vmap(losses)))(paths))[..., 1]
        return float(np.maximum(np.diff(auxiliary, axis=1), 0).sum())

    rate, steps = plain.learning_rate, plain.steps
    adam = optax.adam(config.optim.learning_rate, eps=config.optim.eps)
    with jax.enable_x64(True):
        return {
            "primary_auxiliary": rise(primary_auxiliary_weights, optax.sgd(rate), steps),
            "half": rise(primary_auxiliary_weights, optax.sgd(rate / 2), 2 * steps),
            "alone": rise(first_only, optax.sgd(rate), steps),
            "adam": rise(primary_auxiliary_weights, adam, config.train.steps),
        }


def claims(config: Any, measured: list[dict[str, Any]]) -> list[Claim]:
    """What the posts and the paper say.

    The intervals were committed before the judged runs. The front is 14 long: to reach it is to end
    within 0.05 of it, not to reach it to end farther than 1; a place depends on the start if those
    from the usual starts are a quarter of the front apart. The mean loss falls by 4.9 from an end
    of the front to its middle: 1% of that is the least mean. Of a rise "to second order" the total
    over a given time is proportional to the rate, so half as much by half the rate.

    Args:
      config: the experiment's.
      measured: for each seed `{"arms": {arm: figures}, "rise": figures}`.
    """
    judged, usual = config.judge, len(STARTS)
    arms, rises = [m["arms"] for m in measured], [m["rise"] for m in measured]

    # numpy's extremes throughout: Python's pass over a NaN, and a path that is lost is to fail.
    def largest(figure: str, *names: str) -> list[float]:
        """NaN, which fails, where a path did not arrive."""
        values = [[v for name in names for v in arm[name][figure]] for arm in arms]
        return [math.nan if None in row else float(np.max(row)) for row in values]

    def spread(arm: dict[str, Any], name: str) -> float:
        places = arm[name]["place"][:usual]
        return math.nan if None in places else float(np.ptp(places))

    def excess(arm: dict[str, Any]) -> float:
        return float(np.max(np.mean(arm["cagrad"]["losses"], axis=1))) - least_mean()

    def gap(arm: dict[str, Any]) -> float:
        places = arm["primary_auxiliary"]["place"], arm["mixed"]["place"]
        if None in places[0] + places[1]:
            return math.nan
        return float(np.min(np.subtract(*places)))

    def far(arm: dict[str, Any]) -> float:
        return float(np.min(np.reshape(arm["mean"]["distance"], (-1, usual))[:, UPPER]))

    from_front = "distance to the front after the last step, largest over all starts"
    return [
        judge(
            "the mean does not reach the front from the starts in the upper half: smallest "
            "distance",
            PAPER, "distance to the front after the last step, smallest over starts near "
            "(-8.5, 7.5) and (9, 9)",
            [far(arm) for arm in arms], low=1.0, near=0.5, judged=judged,
        ),
        judge(
            "min-norm reaches it from every start: largest distance",
            POST, from_front, largest("distance", "min_norm"),
            high=0.05, near=0.02, judged=judged,
        ),
        judge(
            "so do normalised gradients, of two tasks: largest distance",
            POST, from_front, largest("distance", "gradient_normalized"),
            high=0.05, near=0.02, judged=judged,
        ),
        judge(
            "and PCGrad, CAGrad and UPGrad: largest distance",
            PAPER, from_front + " and the three", largest("distance", "pcgrad", "cagrad", "upgrad"),
            high=0.05, near=0.02, judged=judged,
        ),
        judge(
            "where these five end, a convex combination of the gradients is zero: its length",
            POST, "length of the shortest convex combination over that of the longer gradient, "
            "largest over starts and combiners",
            largest("stationary", *REACHING), high=1e-3, near=2e-4, judged=judged,
        ),
        judge(
            "where min-norm and PCGrad arrive depends on the start: range along the front",
            PAPER, "range of the first coordinate at arrival over the five usual starts, smaller "
            "of both",
            [float(np.min([spread(arm, n) for n in ("min_norm", "pcgrad")])) for arm in arms],
            low=3.5, near=1.0, judged=judged,
        ),
        judge(
            "CAGrad ends at the least mean loss: largest excess",
            PAPER, "mean loss after the last step less the least one, largest over starts",
            [excess(arm) for arm in arms], high=0.05, near=0.02, judged=judged,
        ),
        judge(
            "on the front min-norm stops, in float64: longest way from there",
            POST, "range of the first coordinate from arrival on, largest over starts",
            largest("way", FLOAT64), high=0.05, near=0.02, judged=judged,
        ),
        judge(
            "the primary loss has priority: with L1 primary paths arrive nearer to its minimum "
            "than with L2: smallest difference",
            POST_2, "difference of the first coordinates at arrival, smallest over starts",
            [gap(arm) for arm in arms], low=0.0, near=1.0, judged=judged,
        ),
        judge(
            "the auxiliary loss hardly rises by plain steps: rise over that by steps on L1 alone",
            POST_2, "ratio of all that L2 rises along the paths",
            [ratio(rise["primary_auxiliary"], rise["alone"]) for rise in rises],
            high=0.05, near=0.01, judged=judged,
        ),
        judge(
            "and to second order only: rise by half the rate over that by the whole",
            POST_2, "ratio of all that L2 rises in the same time",
            [ratio(rise["half"], rise["primary_auxiliary"]) for rise in rises],
            low=0.4, high=0.6, near=0.03, judged=judged,
        ),
    ]  # fmt: skip


def least_mean() -> float:
    """The least mean of both losses, which lies on the front, half-way.

    >>> round(least_mean(), 3)
    -15.092
    """
    with jax.enable_x64(True):
        return float(np.mean(losses(jax.numpy.asarray(front(3)[1]))))


def run(config: Any, workdir: pathlib.Path) -> Result:
    """Walks and measures for every seed."""
    from experiments.multitask.paths_picture import draw_ends, draw_paths

    with config_errors():
        check(config)
    seeds = list(config.train.seeds)
    folders = [workdir / f"seed{seed}" if len(seeds) > 1 else workdir for seed in seeds]
    measured: list[dict[str, Any]] = []
    for seed, folder in zip(seeds, folders, strict=True):
        arms = run_arms(config, folder, seed)
        rise = measured_once(folder / "rise.json", functools.partial(auxiliary_rise, config, seed))
        measured.append({"arms": arms, "rise": rise})
    shown = {name: np.load(folders[0] / f"{name}.npz")["paths"] for name in measured[0]["arms"]}
    float64 = shown.pop(FLOAT64)
    usual = len(STARTS)
    draw_paths(
        workdir / PICTURES[0], {name: paths[:usual] for name, paths in shown.items()},
        config.train.steps,
    )  # fmt: skip
    draw_ends(workdir / PICTURES[1], measured[0]["arms"], float64[:usual, -1, 0])
    return Result(
        claims=claims(config, measured),
        seeds=seeds,
        measured={"by_seed": measured},
        pictures=list(PICTURES),
    )


if __name__ == "__main__":
    from experiments.launch.main import main

    main(run)
