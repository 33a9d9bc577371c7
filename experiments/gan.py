"""S02: images from a GAN whose critic is divided by its own slope.

Post: https://kexue.fm/archives/8757
Claims, on handwritten digits: the normalised critic's slope is at most 1, and that of the formula,
  at real and generated images; its outputs are in [-1, 1]; it is discontinuous all the same, which
  is the post's objection; and the generator it trains draws all ten digits, better than a
  Gaussian does, none of them a copy.
How: generator and critic are small convolutional networks; hinge loss, two updates of the critic
  per step. What is compared with held-out digits are samples of the generator's average. Sliced
  Wasserstein distances are of equally many samples, over random directions. The Gaussian has mean
  and covariance of the training digits; so the Frechet distance takes it for real ones.
Differences from the post: 8 x 8 digits. It shows results of the papers only; the variants
  `cifar10` and `cifar10_dcgan` are the settings of one of them, arXiv 2109.02235. Any other image
  dataset of TFDS is trained and sampled in the same way.
"""

import math
import pathlib
from typing import Any

import numpy as np

from blogjax.train.loop import fit
from experiments.adversarial import image_claims
from experiments.adversarial.image_model import Plan, batch_starts, build, sampler
from experiments.adversarial.image_slopes import POST, critic_claims, measure_critic
from experiments.images import dataset
from experiments.images.samples import draw_grid
from experiments.images.seeds import by_seed, copy_pictures
from experiments.launch.configs import config_errors
from experiments.launch.result import Claim, Result, judge

LEAST = 16  # samples, for the neighbours that precision looks for


def check(config: Any) -> None:
    """Refuses a config that the claims about digits cannot be judged by.

    Raises:
      ValueError: naming the field.
    """
    if config.judge and config.game.constraint != "gn":
        raise ValueError(
            f"game.constraint must be 'gn' where claims are judged, got {config.game.constraint!r}"
        )
    if config.sample.num < LEAST:
        raise ValueError(
            f"sample.num must be at least {LEAST} for the digits, got {config.sample.num}"
        )


def measure(
    plan: Plan, config: Any, state: Any, seed: int, data: dataset.Images, folder: pathlib.Path
) -> Any:
    """Everything the claims rest on, for one seed; draws the pictures beside it."""
    # Not before they are needed: scipy and scikit-learn would delay the first step.
    from sklearn.svm import SVC

    train, test = data.arrays("train"), data.arrays("test")["image"]
    draw = sampler(plan, state, seed)
    samples = np.concatenate([draw(first) for first in batch_starts(plan)])
    draw_grid(folder / "samples.png", samples / 2 + 0.5, test / 2 + 0.5, size=10, kind="digits")
    svm = SVC(C=10).fit(_rows(train["image"]), train["label"])
    sets = {
        "samples": samples,
        "train": train["image"][: len(samples)],
        "gaussian": gaussian(train["image"], len(samples)),
    }
    return {
        **{name: figures(x, train["image"], test, config, svm) for name, x in sets.items()},
        "nearest_test": nearest(test, train["image"]),
        "critic": measure_critic(plan, state, config.measure, test, samples, folder / "critic.png"),
    }


def figures(x: np.ndarray, train: np.ndarray, test: np.ndarray, config: Any, svm: Any) -> Any:
    """How a set of images compares with held-out ones.

    Returns:
      `frechet` and `sliced`: squared Frechet and sliced Wasserstein-2 distance to `test`;
      `precision` and `recall` against `test`; `nearest`: median distance to a training image;
      `classes`: share of the images that the SVM sees in each class.
    """
    from blogjax.metrics.frechet import frechet_distance_from_samples
    from blogjax.metrics.neighbours import precision_recall
    from blogjax.metrics.sliced_wasserstein import random_directions, sliced_wasserstein

    rows, held_out = _rows(x), _rows(test)
    quality = precision_recall(held_out, rows)
    directions = random_directions(config.measure.directions, rows.shape[1], seed=0)
    counts = np.bincount(svm.predict(rows), minlength=len(svm.classes_))
    return {
        "frechet": frechet_distance_from_samples(rows, held_out),
        "sliced": sliced_wasserstein(rows, held_out, directions),
        "precision": quality.precision,
        "recall": quality.recall,
        "nearest": nearest(x, train),
        "classes": (counts / len(rows)).tolist(),
    }


def gaussian(train: np.ndarray, num: int) -> np.ndarray:
    """Samples `[num, ...]` of the Gaussian with mean and covariance of `train`."""
    rows = _rows(train)
    covariance = np.cov(rows.T, dtype=np.float64)
    drawn = np.random.default_rng(0).multivariate_normal(rows.mean(axis=0), covariance, num)
    return drawn.reshape(num, *train.shape[1:])


def nearest(x: np.ndarray, train: np.ndarray) -> float:
    """The median distance of an image to the nearest training image."""
    from blogjax.metrics.neighbours import nearest_distances

    return float(np.median(nearest_distances(_rows(x), _rows(train))))


def _rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def claims(measured: list[Any], judged: bool) -> list[Claim]:
    """The statements about what was measured, one entry of `measured` per seed.

    The post has no figures of its own. The edges of the Frechet distance and of the copies are
    those that the diffusion model of the same digits was judged by; precision has to be nearer to
    that of real digits than to the Gaussian's; a class counts as found with a fifth of its due.
    They and `near`, about twice the spread, were set before the first judged run, after trials with
    other seeds, most of them on the validation digits.
    """
    first = measured[0]
    floor, normal = first["train"], first["gaussian"]
    return [
        *critic_claims([m["critic"] for m in measured], judged),
        judge(
            "samples are distributed like held-out digits: Frechet distance "
            f"({floor['frechet']:.2f} for real training digits)",
            POST, "squared Frechet distance of pixels in [-1, 1] to the test digits",
            [m["samples"]["frechet"] for m in measured], high=1.0, near=0.1, judged=judged,
        ),
        judge(
            "samples are closer to held-out digits than those of a Gaussian: ratio of sliced "
            f"Wasserstein distances ({floor['sliced'] / normal['sliced']:.2f} for real training "
            "digits)",
            POST, "ratio of sliced Wasserstein-2 distances of pixels to the test digits",
            [m["samples"]["sliced"] / m["gaussian"]["sliced"] for m in measured],
            high=1.0, near=0.05, judged=judged,
        ),
        judge(
            "samples look like digits: share of the way from a Gaussian's precision "
            f"({normal['precision']:.2f}) to that of real training digits "
            f"({floor['precision']:.2f})",
            POST, "share of the difference in precision against the test digits, 3 neighbours",
            [_way(m, "precision") for m in measured], low=0.5, near=0.1, judged=judged,
        ),
        judge(
            "all ten digits are drawn: smallest share of a class, as an SVM sees the samples "
            f"({min(floor['classes']):.3f} of real training digits)",
            POST, "smallest share of a class among the samples",
            [min(m["samples"]["classes"]) for m in measured], low=0.02, near=0.02, judged=judged,
        ),
        judge(
            "nothing is copied: distance to the nearest training digit, against real test digits",
            POST, "ratio of median nearest-neighbour distances, samples to held-out digits",
            [m["samples"]["nearest"] / m["nearest_test"] for m in measured], low=0.9, near=0.03,
            judged=judged,
        ),
    ]  # fmt: skip


def _way(measured: Any, name: str) -> float:
    """How far the samples are on the way from the Gaussian, 0, to real digits, 1."""
    begin, end = measured["gaussian"][name], measured["train"][name]
    return (measured["samples"][name] - begin) / (end - begin) if end != begin else math.nan


def report(
    workdir: pathlib.Path, folders: dict[str, pathlib.Path], measured: list[Any], judged: bool
) -> list[Claim]:
    """Draws what all seeds did, and judges what they found."""
    from experiments.launch.pictures import curves

    curves(workdir / "curves.png", folders)
    return claims(measured, judged)


def run(config: Any, workdir: pathlib.Path) -> Result:
    """Trains and judges one model per seed; finished seeds are read back."""
    with config_errors():
        data = dataset.open_images(config.data)
        plan = build(config, data.shape)
        of_digits = data.name == "digits"
        (check if of_digits else image_claims.check)(config)
    measure_one = measure if of_digits else image_claims.measure
    report_all = report if of_digits else image_claims.report
    seeds = list(config.train.seeds)

    def one(seed: int, folder: pathlib.Path) -> Any:
        state = train(plan, config, seed, data, folder)
        return measure_one(plan, config, state, seed, data, folder)

    folders, measured = by_seed(seeds, workdir, one)
    found = report_all(workdir, folders, measured, config.judge)
    pictures = ["samples.png", "critic.png"]
    copy_pictures(workdir, folders, pictures)
    return Result(
        claims=found,
        seeds=seeds,
        measured={"by_seed": measured},
        pictures=[*pictures, "curves.png"],
    )


def train(plan: Plan, config: Any, seed: int, data: dataset.Images, folder: pathlib.Path) -> Any:
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
        render_every=config.train.render_every,
        save_seconds=config.train.save_seconds,
        log_every=config.train.log_every,
        on_nonfinite=config.train.on_nonfinite,
        verbose=True,
    )


if __name__ == "__main__":
    from experiments.launch.main import main

    main(run)
