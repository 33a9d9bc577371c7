"""What is said of a diffusion model of images other than the digits.

Every sampler draws all its samples, in files from which any tool can compute an FID; a run that is
stopped goes on with the next file. The distance measured here is that of the pixels' first two
moments: it orders models, and is not an FID, which takes its features from one Inception network.
"""

import pathlib
from typing import Any

import numpy as np

from experiments.diffusion.model import SAMPLERS, Plan, batch_starts, sampler
from experiments.images.dataset import Images
from experiments.images.samples import MOST_REAL, draw_grid, in_files, unit
from experiments.launch.result import Claim, judge

PAPER = "https://arxiv.org/abs/2006.11239"
# CIFAR-10, 50000 samples: Song et al. 2021, arXiv:2010.02502, table 1, whose times are spaced
# quadratically where fewer than all are taken; here they are spaced evenly. The last is Ho's.
PUBLISHED_FID = {
    ("ddim", 50): 4.67, ("ddim", 100): 4.16, ("ddim", 1000): 4.04,
    ("ddpm", 50): 8.01, ("ddpm", 100): 5.78, ("ddpm", 1000): 4.73,
    ("ddpm_large", 50): 32.72, ("ddpm_large", 100): 9.99, ("ddpm_large", 1000): 3.17,
}  # fmt: skip


def check(config: Any) -> None:
    """Refuses to judge: no interval was committed, the published number is of another measure.

    Raises:
      ValueError: if `judge` is set.
    """
    if config.judge:
        raise ValueError(
            "judge must be False for images other than the digits: no claim has an edge"
        )


def measure(plan: Plan, params: Any, seed: int, data: Images, folder: pathlib.Path) -> Any:
    """Draws every sampler's samples and compares them with held-out images, for one seed."""
    from blogjax.metrics.frechet import frechet_distance_from_samples

    test = data.first("test", MOST_REAL)
    train = data.first("train", len(test))
    real = unit(test)
    generate = sampler(plan, data.shape)
    found, samples = [], np.empty(0)
    for kind in plan.samples.samplers:
        for steps in plan.samples.steps:
            print(f"sampling: {steps} steps, {kind}", flush=True)
            samples = in_files(
                folder / "samples" / f"{kind}_{steps}",
                plan.samples.num,
                batch_starts(plan),
                lambda first, kind=kind, steps=steps: generate(params, seed, steps, kind, first),
            )
            found.append(
                {
                    "sampler": kind,
                    "steps": steps,
                    "frechet": frechet_distance_from_samples(unit(samples), real),
                    "published_fid": published_fid(data.name, plan.optimizer, kind, steps),
                }
            )
    draw_grid(folder / "samples.png", samples[:64] / 255, test[:64] / 255)
    return {
        "samples": plan.samples.num,
        "by_sampler": found,
        "frechet_floor": frechet_distance_from_samples(unit(train), real),
    }


def published_fid(dataset: str, optimizer: str, sampler: str, steps: int) -> float | None:
    """What was published for this sampler, of a model of CIFAR-10 trained by Adam."""
    if (dataset, optimizer) != ("cifar10", "adam"):
        return None
    return PUBLISHED_FID.get((sampler, steps))


def report(
    workdir: pathlib.Path, folders: dict[str, pathlib.Path], measured: list[Any], judged: bool
) -> list[Claim]:
    """Draws the losses, and puts what was measured beside what was published; judges nothing."""
    del judged
    from experiments.launch.pictures import curves

    kinds = [k for k in SAMPLERS if any(k == f["sampler"] for f in measured[0]["by_sampler"])]

    def line(kind: str) -> tuple[list[int], np.ndarray]:
        of_kind = [[f for f in m["by_sampler"] if f["sampler"] == kind] for m in measured]
        return [f["steps"] for f in of_kind[0]], np.mean(
            [[f["frechet"] for f in seed] for seed in of_kind], axis=0
        )

    curves(
        workdir / "curves.png",
        folders,
        [
            {
                "title": "Frechet distance of pixels to held-out images",
                "xlabel": "sampling steps",
                "lines": {kind: line(kind) for kind in kinds},
                "levels": {"real training images": measured[0]["frechet_floor"]},
            }
        ],
    )
    claims = []
    for i, found in enumerate(measured[0]["by_sampler"]):
        fid = found["published_fid"]
        published = "" if fid is None else f"; published FID {fid:g}"
        claims.append(
            judge(
                f"{found['sampler']} with {found['steps']} steps draws images like held-out ones: "
                f"Frechet distance of pixels ({measured[0]['frechet_floor']:.3g} for real training "
                f"images{published})",
                PAPER, "squared Frechet distance of pixels in [-1, 1]; this is no FID",
                [m["by_sampler"][i]["frechet"] for m in measured], near=0.0, judged=False,
            )
        )  # fmt: skip
    return claims
