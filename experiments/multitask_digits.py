"""S04: weights of losses, when one of three is rescaled by 1000.

Post: https://kexue.fm/archives/8870, https://kexue.fm/archives/8896
Claims: losses of different units cannot be added as they are. Divided by what each is for a guess
  from the prior, by its own present value, or by the norm of its gradient, they are indifferent to
  the units. The last is called ideal, for it is indifferent to added constants, too. For min-norm
  (MGDA) nothing of the kind is claimed; it is compared all the same.
How: an MLP on 8 x 8 digits with three heads: the class and the parity by cross-entropy, and the
  ink, the mean pixel in standard deviations, by squared error. The ink's loss is taken as it is,
  and times 1000; nothing else changes, not even first weights and batches. All parameters are
  shared, heads included. SGD with momentum, a cosine and gradients clipped to norm 1: a method may
  fail by its direction, not by the length of a step. Accuracies and the error of the ink, as a
  share of its variance, are of the test split.
Beside it: the sum under Adam, without a claim. Adam rescales each parameter's step, so the heads
  do not feel the factor; the trunk does.
Chosen on the validation split of seeds 100 and 101, by the accuracy of the class without a factor:
  the learning rate, of 0.03, 0.1 and 0.3, one for all methods by their mean; Adam's, of 1e-3, 3e-3
  and 1e-2.
Differences from the post: it has no experiment. The inverse has a floor, 1e-8 of the prior's loss.
"""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.data.batches import Batches
from blogjax.multitask.loss_weighting import WeightedLoss, inverse_loss, reference_weighted
from blogjax.tasks.multitask import MultitaskOutput, multitask_task
from blogjax.train import mesh as meshes
from blogjax.train.task import Batch, Task
from experiments.launch.configs import check_ranges, config_errors
from experiments.launch.result import Claim, Result, judge
from experiments.multitask import trunk
from experiments.optimisers.arms import check_train, run_arm

POST, GRADIENTS = "https://kexue.fm/archives/8870", "https://kexue.fm/archives/8896"
PICTURE = "accuracy.png"
METHODS = {
    "sum": "sum",
    "sum_adam": "sum, Adam",
    "prior": "prior",
    "inverse": "inverse",
    "gradient_normalized": "normalised gradients",
    "min_norm": "min-norm",
}
WEIGHTED = ("prior", "inverse", "gradient_normalized", "min_norm")


def check(config: Any) -> None:
    """Refuses a config that cannot be run, before anything is.

    Raises:
      ValueError: naming the field.
    """
    meshes.check_batch_size(config.data.batch_size, meshes.make_mesh())
    if not config.model.hidden or min(config.model.hidden) < 1:
        raise ValueError(f"model.hidden needs widths of at least 1, got {config.model.hidden}")
    check_ranges(
        config.optim,
        learning_rate=(1e-9, 10),
        adam_rate=(1e-9, 10),
        momentum=(0, 1),
        clip=(1e-9, float("inf")),
    )
    if not 1 < config.scale < 1e9:
        raise ValueError(f"scale must be above 1 and below 1e9, got {config.scale:g}")
    check_train(config.train, {"train.steps": config.train.steps})


def scales(config: Any) -> dict[str, float]:
    """The factors of the ink's loss, by the names of their folders."""
    return {"1x": 1.0, f"{config.scale:g}x": config.scale}


def weighting_of(method: str, reference: list[float]) -> Callable[[jax.Array], WeightedLoss]:
    """The function of the losses that a method minimises.

    Args:
      method: of `METHODS`, one that is not a combiner of gradients.
      reference: `[3]`, see `trunk.reference`.
    """
    if method == "prior":
        return lambda losses: reference_weighted(losses, jnp.array(reference))
    if method == "inverse":
        return lambda losses: inverse_loss(losses, 1e-8 * jnp.array(reference))
    return lambda losses: reference_weighted(losses, jnp.ones_like(losses))


def make_task(config: Any, method: str, scale: float, reference: list[float]) -> Task:
    """One method at one scale of the ink's loss."""
    optim = config.optim
    if method == "sum_adam":
        tx = optax.adam(optax.cosine_decay_schedule(optim.adam_rate, config.train.steps))
    else:
        rate = optax.cosine_decay_schedule(optim.learning_rate, config.train.steps)
        tx = optax.chain(optax.clip_by_global_norm(optim.clip), optax.sgd(rate, optim.momentum))

    def losses(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> MultitaskOutput:
        del model_state, key
        return trunk.losses(params, batch, scale)

    gradients = method in ("gradient_normalized", "min_norm")
    return multitask_task(
        lambda key: trunk.init(key, tuple(config.model.hidden)),
        losses,
        tx,
        names=trunk.NAMES,
        combiner=method if gradients else None,
        weighting=None if gradients else weighting_of(method, reference),
    )


def on_test(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures on the test split: `{method: {scale: {task: figure}}}` for each seed.

    NaN where JSON has null.
    """

    def figures(found: dict[str, Any]) -> dict[str, float]:
        return {t: math.nan if v is None else v for t, v in found["test"].items()}

    return [
        {m: {s: figures(found) for s, found in by_scale.items()} for m, by_scale in seed.items()}
        for seed in measured
    ]


def claims(config: Any, measured: list[dict[str, Any]]) -> list[Claim]:
    """What the posts say.

    The intervals were committed before the judged runs. Ruined: at most half of the digits are
    right. Unmoved: by at most one point of accuracy, which is four of the 360 images; in exact
    arithmetic it would be none. Learnt: parity for nine images of ten (half are right by chance),
    and at least half of the variance of the ink explained, at both scales. A pilot and a first
    version of this experiment, with other settings, had been seen: there the sum was ruined,
    normalised gradients were best and min-norm did not learn the ink.

    Args:
      config: the experiment's.
      measured: see `on_test`.
    """
    near, judged = 0.01, config.judge
    one, many = scales(config)
    digit = "share of test images whose class is right"
    moved = f"{digit}, {many} minus {one}"

    def of(method: str, scale: str, task: str = "class") -> list[float]:
        return [seed[method][scale][task] for seed in measured]

    # numpy's extremes: Python's pass over a NaN.
    def worst(of_all: Callable[..., Any], methods: tuple[str, ...], task: str) -> list[float]:
        return [
            float(of_all([seed[m][s][task] for m in methods for s in (one, many)]))
            for seed in measured
        ]

    def difference(method: str) -> list[float]:
        pairs = zip(of(method, many), of(method, one), strict=True)
        return [scaled - plain for scaled, plain in pairs]

    others = ["sum", *(m for m in WEIGHTED if m != "gradient_normalized")]
    ahead = [
        seed["gradient_normalized"][one]["class"]
        - float(np.max([seed[m][one]["class"] for m in others]))
        for seed in measured
    ]
    return [
        judge(
            f"the sum of losses is ruined where one is multiplied by {config.scale:g}",
            POST, digit, of("sum", many), high=0.5, near=0.1, judged=judged,
        ),
        *(
            judge(
                f"{METHODS[method]}: the factor {config.scale:g} changes nothing for the class",
                GRADIENTS if method == "min_norm" else POST, moved, difference(method),
                low=-0.01, high=0.01, near=0.006, judged=judged,
            )
            for method in WEIGHTED
        ),
        judge(
            "without a factor normalised gradients are at least as good as any of the others",
            POST, f"{digit}, minus that of the best other method", ahead,
            low=0.0, near=near, judged=judged,
        ),
        judge(
            "every weighted method learns the parity, at both scales", POST,
            "share of test images whose parity is right, the least",
            worst(np.min, WEIGHTED, "parity"), low=0.9, near=near, judged=judged,
        ),
        *(
            judge(
                f"{METHODS[method]}: the ink is learnt at both scales",
                GRADIENTS if method == "min_norm" else POST,
                "squared error as a share of the ink's variance, test split, the larger of the two",
                worst(np.max, (method,), "ink"), high=0.5, near=0.1, judged=judged,
            )
            for method in WEIGHTED
        ),
    ]  # fmt: skip


def run(config: Any, workdir: pathlib.Path) -> Result:
    """Trains and measures every method at both scales, for every seed; finished ones are kept."""
    with config_errors():
        check(config)
    splits = trunk.load("train", "validation", "test")
    seeds = list(config.train.seeds)
    measured: list[dict[str, Any]] = []
    for seed in seeds:
        folder = workdir / f"seed{seed}" if len(seeds) > 1 else workdir
        batches = Batches(
            splits["train"], config.data.batch_size, seed=seed,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip
        measured.append(
            {
                method: {
                    name: run_arm(
                        folder / f"{method}_{name}",
                        make_task(config, method, scale, trunk.reference(splits["train"], scale)),
                        batches, config.train.steps, config.train, seed,
                        lambda state: {
                            split: trunk.measure(state.params, splits[split])
                            for split in ("validation", "test")
                        },
                    )
                    for name, scale in scales(config).items()
                }
                for method in METHODS
            }
        )  # fmt: skip
    tested = on_test(measured)
    from experiments.multitask.dots import draw

    draw(workdir / PICTURE, METHODS, tested)
    return Result(
        claims=claims(config, tested),
        seeds=seeds,
        measured={"by_seed": measured},
        pictures=[PICTURE],
    )


if __name__ == "__main__":
    from experiments.launch.main import main

    main(run)
