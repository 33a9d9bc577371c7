"""S05: forty attributes of a face from one network, by the gradient of least norm.

Post: https://kexue.fm/archives/8896
Claims: none of the post's own, which has no experiment. Its paper (Sener and Koltun 2018,
  arXiv:1810.04650) has 40 attributes of CelebA as 40 tasks; see `configs/multitask_images.py`.
How: a residual encoder shared by all tasks, one dense layer as a row of heads, a binary
  cross-entropy for each attribute. The gradients of the encoder are combined by `min_norm`, one
  task at a time (`mode="scan"`): forty of them are never held together. Any other combiner, or the
  mean of the losses, is taken by its name.
Measured: the error of every attribute on the test split, beside that of always giving the
  attribute's commoner value.
Differences from the post: by parameters, not by shared features. From the paper: the encoder is the
  way down of a U-Net instead of a ResNet-18, and images are cut to a square before they are made
  smaller.
"""

import pathlib
from typing import Any

import numpy as np

from blogjax.train.loop import fit
from experiments.images.seeds import by_seed, copy_pictures
from experiments.launch.configs import config_errors
from experiments.launch.pictures import save_figure
from experiments.launch.result import Claim, Result, judge
from experiments.multitask.attribute_model import Plan, build, measure
from experiments.multitask.attributes import Attributes, open_attributes

PAPER = "https://arxiv.org/abs/1810.04650"
PICTURE = "errors.png"
# Mean test errors on CelebA at 64 x 64, in percent, of the paper's tables.
PUBLISHED = {"min_norm": 8.33, "mean": 9.62}


def published(name: str, size: int, method: str) -> str:
    """What the paper has, for a claim's statement; nothing where it has nothing.

    >>> published("celeb_a", 64, "min_norm")
    ' (published for a ResNet-18: 8.33)'
    >>> published("celeb_a", 32, "min_norm")
    ''
    """
    known = (name, size) == ("celeb_a", 64) and method in PUBLISHED
    return f" (published for a ResNet-18: {PUBLISHED[method]:.2f})" if known else ""


def check(config: Any) -> None:
    """Refuses to judge: no interval was committed.

    Raises:
      ValueError: if `judge` is set.
    """
    if config.judge:
        raise ValueError("judge must be False: no claim about attributes has an edge")


def claims(config: Any, measured: list[Any]) -> list[Claim]:
    """What was measured, one entry of `measured` per seed; judges nothing."""
    beside = published(config.data.name, config.data.size, config.multitask.method)
    error, guess = (np.array([m[name] for m in measured]) for name in ("error", "guess"))
    return [
        judge(
            f"mean error of the attributes{beside}", PAPER,
            "percent of test images, mean over the attributes",
            (100 * error.mean(axis=1)).tolist(), near=0.0, judged=False,
        ),
        judge(
            "no attribute is left behind: errors at least as large as a guess's", PAPER,
            "share of the attributes that are told no better than by their commoner value",
            (error >= guess).mean(axis=1).tolist(), near=0.0, judged=False,
        ),
    ]  # fmt: skip


def draw(path: pathlib.Path, names: tuple[str, ...], measured: Any) -> None:
    """A row for each attribute, hardest on top: its error, and that of a guess."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    error, guess = (100 * np.array(measured[key]) for key in ("error", "guess"))
    order = np.argsort(-error)
    figure, axis = plt.subplots(figsize=(6.4, 1.2 + 0.2 * len(names)))
    rows = np.arange(len(names))
    axis.hlines(rows, error[order], guess[order], color="0.8", lw=1)
    axis.plot(guess[order], rows, "|", color="k", ms=8, label="always the commoner value")
    axis.plot(error[order], rows, "o", color="C0", ms=5, label="the network")
    axis.set_yticks(rows, [names[i].replace("_", " ") for i in order], fontsize=8)
    axis.set(
        title=f"errors of {len(names)} attributes, {measured['images']} test images",
        xlabel="% of the images", ylim=(len(names) - 0.5, -0.5), xlim=(0, None),
    )  # fmt: skip
    axis.grid(alpha=0.3, axis="x")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    figure.tight_layout()
    save_figure(figure, path, dpi=100)


def run(config: Any, workdir: pathlib.Path) -> Result:
    """Trains and measures one network per seed; finished seeds are read back."""
    with config_errors():
        check(config)
        data = open_attributes(config.data)
        plan = build(config, data)
    seeds = list(config.train.seeds)

    def one(seed: int, folder: pathlib.Path) -> Any:
        state = train(plan, config, seed, data, folder)
        found = measure(plan, state.averaged_params, data, "test", config.data.batch_size)
        draw(folder / PICTURE, data.names, found)
        return found

    folders, measured = by_seed(seeds, workdir, one)
    copy_pictures(workdir, folders, [PICTURE])
    from experiments.launch.pictures import curves

    curves(workdir / "curves.png", folders)
    return Result(
        claims=claims(config, measured),
        seeds=seeds,
        measured={"attributes": list(data.names), "by_seed": measured},
        pictures=[PICTURE, "curves.png"],
    )


def train(plan: Plan, config: Any, seed: int, data: Attributes, folder: pathlib.Path) -> Any:
    """One run of the loop."""
    return fit(
        plan.task,
        data.batches("train", config.data.batch_size, seed),
        config.train.steps,
        mesh=plan.mesh,
        view=config.mesh.view,
        seed=seed,
        workdir=folder,
        evaluation=data.evaluation("validation", config.data.batch_size),
        evaluate_every=config.train.evaluate_every,
        save_seconds=config.train.save_seconds,
        log_every=config.train.log_every,
        on_nonfinite=config.train.on_nonfinite,
        verbose=True,
    )


if __name__ == "__main__":
    from experiments.launch.main import main

    main(run)
