"""S01: Lion against AdamW, learning rates and batch sizes.

Post: https://kexue.fm/archives/9473
Claims: Lion's learning rate is to be 3 to 10 times below AdamW's and its weight decay as much above
  (the paper, arXiv 2302.06675; the post has "more than 10" for the rate); Lion is at least as good
  as AdamW, but worse in batches of less than 64, and gains with the batch size.
How: networks with one hidden layer on 8 x 8 digits. For each batch size both optimisers try the
  same 7 learning rates with the same 6 weight decays, for the same number of epochs, with linear
  warm-up and a cosine. The pair with the least validation loss, mean over six replicas, is chosen;
  test loss and accuracy are those of that pair. Nothing is chosen on the test split.
Differences from the post: a multi-layer perceptron of 2400 weights on 1287 images instead of
  Transformers on millions. Lion is expected not to win on so small a network; the table says what
  was found. Where a chosen value lies at the end of what was tried (`at_the_end_of` in the result),
  its ratio is but a bound. Where the rule leads out of the grid, its end is taken.
"""

import pathlib
from typing import Any

import numpy as np

from blogjax.train import mesh as meshes
from experiments.launch.configs import check_ranges, config_errors
from experiments.launch.result import Claim, Result, judge
from experiments.optimisers import sweep
from experiments.optimisers.arms import check_train, run_arm

POST, PAPER = "https://kexue.fm/archives/9473", "https://arxiv.org/abs/2302.06675"
NAMES, COLOURS = {"adamw": "AdamW", "lion": "Lion"}, {"adamw": "C0", "lion": "C3"}


def check(config: Any, examples: int) -> None:
    """Refuses a config that cannot be run, before anything is.

    Raises:
      ValueError: naming the field.
    """
    sizes = list(config.data.batch_sizes)
    if len(sizes) < 2 or sizes != sorted(set(sizes)):
        raise ValueError(f"data.batch_sizes must be two numbers or more, rising: {sizes}")
    mesh = meshes.make_mesh()
    for size in sizes:
        meshes.check_batch_size(size, mesh)
    sweep.check(config)
    check_ranges(config.optim, ratio=(1e-3, 1e3))
    check_train(
        config.train,
        {
            f"the steps of batches of {size}": sweep.steps_of(config, size, examples)
            for size in sizes
        },
    )


def choose(config: Any, measured: dict[str, Any]) -> dict[str, Any]:
    """The candidate with the least validation loss, and its test figures."""
    loss = np.array(measured["validation"]["loss"])
    rate, decay = np.unravel_index(loss.argmin(), loss.shape)
    return _figures(config, measured, int(rate), int(decay))


def _figures(config: Any, measured: dict[str, Any], rate: int, decay: int) -> dict[str, Any]:
    ends = {"rate": (rate, config.optim.rates), "decay": (decay, config.optim.decays)}
    return {
        "rate": config.optim.rates[rate],
        "decay": config.optim.decays[decay],
        "at_the_end_of": [k for k, (i, tried) in ends.items() if i in (0, len(tried) - 1)],
        "validation_loss": measured["validation"]["loss"][rate][decay],
        "test_loss": measured["test"]["loss"][rate][decay],
        "test_accuracy": measured["test"]["accuracy"][rate][decay],
    }


def _nearest(values: Any, wanted: float) -> int:
    return int(np.abs(np.log(np.array(values)) - np.log(wanted)).argmin())


def compare(config: Any, measured: dict[str, Any]) -> dict[str, Any]:
    """Both optimisers at one batch size: what was chosen, and Lion at rates taken from AdamW."""
    adamw, lion = (choose(config, measured[name]) for name in ("adamw", "lion"))

    def lion_at(ratio: float) -> dict[str, Any]:
        rate = _nearest(config.optim.rates, adamw["rate"] / ratio)
        decay = _nearest(config.optim.decays, adamw["decay"] * ratio)
        return _figures(config, measured["lion"], rate, decay)

    return {
        "adamw": adamw,
        "lion": lion,
        "lion_at_adamw_rates": lion_at(1.0),
        "lion_by_rule": lion_at(config.optim.ratio),
    }


def claims(config: Any, compared: list[dict[int, Any]]) -> list[Claim]:
    """What the post and the paper say, one entry of `compared`, by batch size, for each seed.

    The intervals are those of the paper and the post, committed before the judged runs.
    """
    small, large = config.data.batch_sizes[0], config.data.batch_sizes[-1]
    judged, ratio = config.judge, config.optim.ratio

    def mean_ratio(above: tuple[str, str], below: tuple[str, str]) -> list[float]:
        """Geometric mean over the batch sizes, per seed."""
        logs = [
            np.mean([np.log(c[above[0]][above[1]] / c[below[0]][below[1]]) for c in sizes.values()])
            for sizes in compared
        ]
        # Rounding keeps a ratio of candidates, 10 say, on the edge where it belongs.
        return [round(float(np.exp(x)), 6) for x in logs]

    losses = [
        {size: c["lion"]["test_loss"] / c["adamw"]["test_loss"] for size, c in by_size.items()}
        for by_size in compared
    ]
    accuracies = [
        100 * (c[large]["lion"]["test_accuracy"] - c[large]["adamw"]["test_accuracy"])
        for c in compared
    ]
    return [
        judge(
            "AdamW's best learning rate over Lion's, geometric mean over the batch sizes",
            PAPER, "ratio of the learning rates with the least validation loss",
            mean_ratio(("adamw", "rate"), ("lion", "rate")), low=3.0, high=10.0, near=2.0,
            judged=judged,
        ),
        judge(
            "Lion's best weight decay over AdamW's, geometric mean over the batch sizes",
            PAPER, "ratio of the weight decays with the least validation loss",
            mean_ratio(("lion", "decay"), ("adamw", "decay")), low=3.0, high=10.0, near=2.0,
            judged=judged,
        ),
        judge(
            f"at AdamW's best rates Lion is worse than with a rate {ratio:g} times lower and a "
            f"decay {ratio:g} times higher: ratio of test losses, geometric mean",
            PAPER, "ratio of Lion's test losses, at AdamW's rates to at those of the rule",
            mean_ratio(("lion_at_adamw_rates", "test_loss"), ("lion_by_rule", "test_loss")),
            low=1.0, near=0.5, judged=judged,
        ),
        judge(
            f"in batches of {small} Lion is worse: ratio of test losses, Lion to AdamW",
            POST, "ratio of test cross-entropies at the pairs chosen on validation",
            [loss[small] for loss in losses], low=1.0, near=0.3, judged=judged,
        ),
        judge(
            f"in batches of {large} it is at least as good: ratio of test losses, Lion to AdamW",
            PAPER, "ratio of test cross-entropies at the pairs chosen on validation",
            [loss[large] for loss in losses], high=1.0, near=0.3, judged=judged,
        ),
        judge(
            f"in batches of {large} it is at least as accurate: test accuracy, Lion minus AdamW",
            PAPER, "percentage points, mean over the replicas",
            accuracies, low=0.0, near=0.5, judged=judged,
        ),
        judge(
            f"it gains with the batch: its ratio of test losses at {small}, over that at {large}",
            PAPER, "ratio of the ratios of test cross-entropies",
            [loss[small] / loss[large] for loss in losses], low=1.0, near=0.3, judged=judged,
        ),
    ]  # fmt: skip


def draw(path: pathlib.Path, config: Any, arms: list[Any], compared: list[Any]) -> None:
    """Validation loss by learning rate, one panel per batch size; test loss by batch size."""
    from experiments.optimisers.pictures import Line, Panel, draw_panels

    rates, sizes = np.array(config.optim.rates), np.array(config.data.batch_sizes)

    def by_rate(size: int, name: str) -> Line:
        # Of the mean over the seeds; the best decay at each rate.
        loss = np.mean([m[size][name]["validation"]["loss"] for m in arms], axis=0).min(axis=1)
        return Line(NAMES[name], rates, loss, COLOURS[name], mark=[int(loss.argmin())])

    def by_size(name: str) -> Line:
        loss = np.mean([[c[s][name]["test_loss"] for s in sizes] for c in compared], axis=0)
        return Line(NAMES[name], sizes, loss, COLOURS[name])

    panels = [
        Panel(
            f"batches of {size}: validation loss", "learning rate", "nats, at the best decay",
            [by_rate(size, name) for name in NAMES], log_y=True,
        )
        for size in sizes.tolist()
    ]  # fmt: skip
    tested = Panel(
        "test loss at the chosen rate and decay", "batch size", "nats",
        [by_size(name) for name in NAMES], ticks=sizes.tolist(),
    )  # fmt: skip
    draw_panels(path, [*panels, tested])


def run(config: Any, workdir: pathlib.Path) -> Result:
    """Sweeps both optimisers at every batch size, for every seed; finished sweeps are read back."""
    with config_errors():
        data = {split: sweep.load(split) for split in ("train", "validation", "test")}
        examples = len(data["train"]["label"])
        check(config, examples)
    held_out = {split: data[split] for split in ("validation", "test")}
    seeds, sizes = list(config.train.seeds), list(config.data.batch_sizes)
    arms: list[Any] = []
    for seed in seeds:
        folder = workdir / f"seed{seed}" if len(seeds) > 1 else workdir
        arms.append({size: {} for size in sizes})
        for size in sizes:
            steps = sweep.steps_of(config, size, examples)
            for name in NAMES:
                arms[-1][size][name] = run_arm(
                    folder / f"batch{size}" / name,
                    sweep.make_task(config, name, steps),
                    sweep.make_batches(data["train"], size, seed),
                    steps,
                    config.train,
                    seed,
                    lambda state: sweep.measure(config, state, held_out),
                )
    compared = [{s: compare(config, by_size[s]) for s in sizes} for by_size in arms]
    draw(workdir / "rates.png", config, arms, compared)
    return Result(
        claims=claims(config, compared),
        seeds=seeds,
        measured={"by_seed": [{f"batch {s}": c[s] for s in sizes} for c in compared]},
        pictures=["rates.png"],
    )


if __name__ == "__main__":
    from experiments.launch.main import main

    main(run)
