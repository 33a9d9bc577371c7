"""What is said of a GAN of images other than the digits.

All samples are drawn into files from which any tool can compute an FID; a run that is stopped goes
on with the next file. The distance measured here is that of the pixels' first two moments: it
orders models, and is not an FID, which takes its features from one Inception network.
"""

import pathlib
from typing import Any

import numpy as np

from experiments.adversarial.image_model import Plan, batch_starts, sampler
from experiments.adversarial.image_slopes import critic_claims, measure_critic
from experiments.images.dataset import Images
from experiments.images.samples import MOST_REAL, draw_grid, in_files, unit
from experiments.launch.result import Claim, judge

PAPER = "https://arxiv.org/abs/2109.02235"


def check(config: Any) -> None:
    """Refuses to judge: no interval was committed, what is published is of another measure.

    Raises:
      ValueError: if `judge` is set.
    """
    if config.judge:
        raise ValueError(
            "judge must be False for images other than the digits: no claim has an edge"
        )


def measure(
    plan: Plan, config: Any, state: Any, seed: int, data: Images, folder: pathlib.Path
) -> Any:
    """Draws all samples and compares them with held-out images; measures the critic."""
    from blogjax.metrics.frechet import frechet_distance_from_samples
    from blogjax.metrics.sliced_wasserstein import random_directions, sliced_wasserstein

    test = data.first("test", MOST_REAL)
    train = data.first("train", len(test))
    draw = sampler(plan, state, seed)
    print("sampling", flush=True)
    samples = in_files(folder / "samples", plan.samples.num, batch_starts(plan), draw)
    draw_grid(folder / "samples.png", samples[:64] / 255, test[:64] / 255)
    directions = random_directions(config.measure.directions, int(np.prod(data.shape)), seed=0)
    figures: dict[str, Any] = {}
    for name, images in (("samples", samples), ("train", train)):
        figures[name] = {
            "frechet": frechet_distance_from_samples(unit(images), unit(test)),
            "sliced": sliced_wasserstein(unit(images[: len(test)]), unit(test), directions),
        }
    critic = measure_critic(
        plan, state, config.measure, unit(test), unit(samples), folder / "critic.png"
    )
    return {"num": plan.samples.num, **figures, "critic": critic}


def report(
    workdir: pathlib.Path, folders: dict[str, pathlib.Path], measured: list[Any], judged: bool
) -> list[Claim]:
    """Draws the losses, and says what was measured; judges nothing."""
    del judged
    from experiments.launch.pictures import curves

    curves(workdir / "curves.png", folders)
    floor = measured[0]["train"]
    return [
        judge(
            "samples are distributed like held-out images: Frechet distance of pixels "
            f"({floor['frechet']:.3g} for real training images)",
            PAPER, "squared Frechet distance of pixels in [-1, 1]; this is no FID",
            [m["samples"]["frechet"] for m in measured], near=0.0, judged=False,
        ),
        judge(
            "samples are distributed like held-out images: sliced Wasserstein distance of pixels "
            f"({floor['sliced']:.3g} for real training images)",
            PAPER, "sliced Wasserstein-2 distance of pixels in [-1, 1]",
            [m["samples"]["sliced"] for m in measured], near=0.0, judged=False,
        ),
        *critic_claims([m["critic"] for m in measured], judged=False),
    ]  # fmt: skip
