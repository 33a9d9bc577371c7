"""S30, S31: diffusion models of images, sampled as DDPM and DDIM.

Posts: https://kexue.fm/archives/9152, https://kexue.fm/archives/9164, https://kexue.fm/archives/9181
Claims, on handwritten digits: the samples are digits of the class asked for and none of them is a
  copy; with few steps the deterministic sampler (DDIM, eta = 0) is better than the ancestral one
  (DDPM, eta = 1); fewer steps give smoother, less diverse samples.
Differences from the posts: 8 x 8 digits instead of faces, v-prediction and a cosine schedule (both
  train in a minute), class labels. The variant `cifar10` is the DDPM paper's own setting; any other
  image dataset of TFDS is trained and sampled in the same way.
"""

import pathlib
from typing import Any

import numpy as np

from blogjax.diffusion import schedules
from blogjax.train.checkpoint import Best
from blogjax.train.loop import fit
from experiments.diffusion import image_claims
from experiments.diffusion.model import Plan, batch_starts, build, sampler
from experiments.images import dataset
from experiments.images.seeds import by_seed, copy_pictures
from experiments.launch.configs import config_errors
from experiments.launch.result import Claim, Result, judge

DDPM, DDIM = "https://kexue.fm/archives/9164", "https://kexue.fm/archives/9181"
ETAS = {"0": "ddim", "1": "ddpm"}


def check(config: Any) -> None:
    """Refuses a config that the claims about digits cannot be judged by."""
    steps = config.sample.steps
    if len(steps) < 2 or (config.judge and not {5, 10} <= set(steps)):
        raise ValueError(
            "sample.steps needs two numbers, and 5 and 10 among them where claims are judged, "
            f"got {steps}"
        )
    if set(config.sample.samplers) != set(ETAS.values()):
        raise ValueError(
            f"sample.samplers must be {tuple(ETAS.values())} for the digits, "
            f"got {config.sample.samplers}"
        )
    if not config.model.conditional:
        raise ValueError("model.conditional must be True for the digits: a claim asks for classes")


def measure(plan: Plan, params: Any, seed: int, data: dataset.Images, folder: pathlib.Path) -> Any:
    """Everything the claims rest on, for one seed; draws the pictures beside it."""
    # Not before they are needed: scipy and scikit-learn would delay the first step.
    from sklearn.svm import SVC

    from blogjax.metrics.frechet import frechet_distance_from_samples
    from blogjax.metrics.neighbours import nearest_distances, precision_recall

    train, test = data.arrays("train"), data.arrays("test")
    num_classes = plan.num_classes
    generate = sampler(plan, data.shape)
    labels = np.arange(plan.samples.num) % num_classes
    steps = list(plan.samples.steps)
    samples: dict[tuple[int, str], np.ndarray] = {}
    states = np.empty(0)
    for kind in ("ddpm", "ddim"):
        for s in steps:
            print(f"sampling: {s} steps, {kind}", flush=True)
            parts = [
                generate(params, seed, s, kind, first, trajectory=True)
                for first in batch_starts(plan)
            ]
            states = np.concatenate(parts, axis=1)
            samples[s, kind] = states[-1]
    distance = {
        eta: [frechet_distance_from_samples(samples[s, kind], test["image"]) for s in steps]
        for eta, kind in ETAS.items()
    }
    deviation = {
        eta: [float(samples[s, kind].std(axis=0).mean()) for s in steps]
        for eta, kind in ETAS.items()
    }
    best = samples[steps[-1], "ddim"]
    svm = SVC(C=10).fit(_rows(train["image"]), train["label"])
    to_train = nearest_distances(_rows(best), _rows(train["image"]))
    held_out = nearest_distances(_rows(test["image"]), _rows(train["image"]))
    quality = precision_recall(_rows(test["image"]), _rows(best))
    _draw_samples(folder, best, test, num_classes)
    _draw_denoising(folder, plan, states, num_classes)
    return {
        "steps": steps,
        "frechet": distance,
        "frechet_floor": frechet_distance_from_samples(train["image"], test["image"]),
        "deviation": deviation,
        "deviation_real": float(test["image"].std(axis=0).mean()),
        "accuracy": float(np.mean(svm.predict(_rows(best)) == labels)),
        "accuracy_real": float(np.mean(svm.predict(_rows(test["image"])) == test["label"])),
        "nearest": float(np.median(to_train)),
        "nearest_real": float(np.median(held_out)),
        "precision": quality.precision,
        "recall": quality.recall,
    }


def _rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def _draw_samples(folder: pathlib.Path, images: np.ndarray, real: Any, num_classes: int) -> None:
    from experiments.launch.pictures import class_columns, image_panels

    labels = np.arange(len(images)) % num_classes
    samples = class_columns(images / 2 + 0.5, labels, num_classes, rows=8)
    beside = class_columns(real["image"] / 2 + 0.5, real["label"], num_classes, rows=len(samples))
    image_panels(
        folder / "samples.png",
        {"samples of the model": samples, "real digits, held out": beside},
        columns=[str(c) for c in range(num_classes)],
    )


def _draw_denoising(folder: pathlib.Path, plan: Plan, states: np.ndarray, num_classes: int) -> None:
    from experiments.launch.pictures import image_panels

    times = schedules.timesteps(plan.schedule, len(states) - 1)
    shown = np.unique(np.linspace(0, len(states) - 1, 11).round().astype(int))
    image_panels(
        folder / "denoising.png",
        {"from noise to digit": states[shown][:, :num_classes].swapaxes(0, 1) / 2 + 0.5},
        columns=["t = " + str(times[i]) if i == shown[0] else str(times[i]) for i in shown],
        rows=[str(c) for c in range(num_classes)],
    )


def draw_curves(path: pathlib.Path, folders: dict[str, pathlib.Path], measured: list[Any]) -> None:
    """Losses, and what the number of sampling steps does."""
    from experiments.launch.pictures import curves

    steps, first = measured[0]["steps"], measured[0]

    def mean(name: str, eta: str) -> np.ndarray:
        return np.mean([m[name][eta] for m in measured], axis=0)

    names = {"0": "DDIM, eta = 0", "1": "DDPM, eta = 1"}
    curves(
        path,
        folders,
        [
            {
                "title": "Frechet distance to held-out digits",
                "xlabel": "sampling steps",
                "lines": {names[e]: (steps, mean("frechet", e)) for e in names},
                "levels": {"real training digits": first["frechet_floor"]},
            },
            {
                "title": "standard deviation of the samples",
                "xlabel": "sampling steps",
                "lines": {names[e]: (steps, mean("deviation", e)) for e in names},
                "levels": {"real digits": first["deviation_real"]},
            },
        ],
    )


def claims(measured: list[Any], judged: bool) -> list[Claim]:
    """The posts' statements about what was measured, one entry of `measured` per seed.

    The intervals and `near` were set before the first run, `near` as a guess of twice the spread.
    """
    first = measured[0]
    compared = (5, 10) if judged else first["steps"][:2]
    few = [first["steps"].index(s) for s in compared]
    counts = " and ".join(str(s) for s in compared)
    advantage = [min(m["frechet"]["1"][i] / m["frechet"]["0"][i] for i in few) for m in measured]
    growth = [min(np.diff(m["deviation"]["0"])).item() for m in measured]
    return [
        judge(
            "samples are distributed like held-out digits: Frechet distance "
            f"({first['frechet_floor']:.2f} for real training digits)",
            DDPM, "squared Frechet distance of pixels in [-1, 1] to the test digits",
            [m["frechet"]["0"][-1] for m in measured], high=1.0, near=0.1, judged=judged,
        ),
        judge(
            "samples show the digit asked for: share so classified by an SVM "
            f"({first['accuracy_real']:.3f} of real test digits)",
            DDPM, "share of samples whose intended class the SVM sees",
            [m["accuracy"] for m in measured], low=0.95, near=0.01, judged=judged,
        ),
        judge(
            f"with {counts} steps eta = 0 beats eta = 1: ratio of Frechet distances",
            DDIM, f"smallest ratio of Frechet distances, eta = 1 to eta = 0, at {counts} steps",
            advantage, low=1.0, near=0.05, judged=judged,
        ),
        judge(
            "fewer steps are smoother: least gain in standard deviation when steps are added",
            DDIM, "smallest gain in mean pixel deviation between successive numbers of steps",
            growth, low=0.0, near=0.001, judged=judged,
        ),
        judge(
            "nothing is copied: distance to the nearest training digit, against real test digits",
            DDPM, "ratio of median nearest-neighbour distances, samples to held-out digits",
            [m["nearest"] / m["nearest_real"] for m in measured], low=0.9, near=0.03,
            judged=judged,
        ),
    ]  # fmt: skip


def report(
    workdir: pathlib.Path, folders: dict[str, pathlib.Path], measured: list[Any], judged: bool
) -> list[Claim]:
    """Draws what all seeds found, and judges it."""
    draw_curves(workdir / "curves.png", folders, measured)
    return claims(measured, judged)


def run(config: Any, workdir: pathlib.Path) -> Result:
    """Trains and judges one model per seed; finished seeds are read back."""
    with config_errors():
        data = dataset.open_images(config.data)
        plan = build(config, data.shape, data.num_classes)
        if data.name == "digits":
            check(config)
            measure_one, report_all, pictures = measure, report, ["samples.png", "denoising.png"]
        else:
            image_claims.check(config)
            measure_one, report_all = image_claims.measure, image_claims.report
            pictures = ["samples.png"]
    seeds = list(config.train.seeds)

    def one(seed: int, folder: pathlib.Path) -> Any:
        state = train(plan, config, seed, data, folder)
        return measure_one(plan, state.averaged_params, seed, data, folder)

    folders, measured = by_seed(seeds, workdir, one)
    found = report_all(workdir, folders, measured, config.judge)
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
        best=Best("loss"),
        on_nonfinite=config.train.on_nonfinite,
        verbose=True,
    )


if __name__ == "__main__":
    from experiments.launch.main import main

    main(run)
