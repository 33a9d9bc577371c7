"""S30, S31: a class-conditional diffusion model of handwritten digits, sampled as DDPM and DDIM.

Posts: https://kexue.fm/archives/9152, https://kexue.fm/archives/9164, https://kexue.fm/archives/9181
Claims: the samples are digits of the class asked for and none of them is a copy; with few steps the
  deterministic sampler (DDIM, eta = 0) is better than the ancestral one (DDPM, eta = 1); fewer
  steps give smoother, less diverse samples.
Differences from the posts: 8 x 8 digits instead of faces, v-prediction and a cosine schedule (both
  train in a minute), class labels.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from blogjax.core.random import fold_in_rows
from blogjax.data import digits
from blogjax.data.batches import Batches, EvaluationBatches
from blogjax.diffusion import schedules
from blogjax.diffusion.sampling import sample
from blogjax.diffusion.schedules import NoiseSchedule
from blogjax.models.unet import UNet
from blogjax.tasks.denoising import Apply, denoising_task
from blogjax.train import mesh as meshes
from blogjax.train.checkpoint import Best
from blogjax.train.loop import fit
from blogjax.train.state import abstract_state
from blogjax.train.task import Task
from experiments.launch.configs import check_loop, check_ranges, config_errors
from experiments.launch.result import Claim, Result, judge, write_json

SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {
    "linear": schedules.linear_beta_schedule,
    "post": schedules.post_schedule,
    "cosine": schedules.cosine_schedule,
}
DDPM, DDIM = "https://kexue.fm/archives/9164", "https://kexue.fm/archives/9181"
Denoiser = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config put to use."""

    mesh: Mesh
    apply: Apply
    schedule: NoiseSchedule
    prediction: Any
    task: Task
    samples: Any


def build(config: Any, image_shape: tuple[int, ...], num_classes: int) -> Plan:
    """Makes everything that can be wrong with a config, before any work is done."""
    check_loop(config.train)
    mesh = meshes.make_mesh(fsdp=config.mesh.fsdp)
    meshes.check_batch_size(config.data.batch_size, mesh)
    model = UNet(num_classes=num_classes, **config.model)
    if config.diffusion.schedule not in SCHEDULES:
        raise ValueError(
            f"diffusion.schedule must be one of {', '.join(SCHEDULES)}, "
            f"got {config.diffusion.schedule!r}"
        )
    schedule = SCHEDULES[config.diffusion.schedule](config.diffusion.num_steps)
    check_ranges(
        config.optim, learning_rate=(0, 10), warmup_fraction=(0, 1), b1=(0, 1), b2=(0, 1),
        clip_norm=(1e-9, float("inf")),
    )  # fmt: skip
    if len(config.sample.steps) < 2 or (config.judge and not {5, 10} <= set(config.sample.steps)):
        raise ValueError(
            "sample.steps needs two numbers, and 5 and 10 among them where claims are judged, "
            f"got {config.sample.steps}"
        )
    too_long = [s for s in config.sample.steps if not 0 < s <= schedule.num_steps]
    if too_long or sorted(config.sample.steps) != list(config.sample.steps):
        raise ValueError(
            f"sample.steps must ascend within 1..{schedule.num_steps}, got {config.sample.steps}"
        )
    if config.sample.num % num_classes or config.sample.num < 3 * num_classes:
        raise ValueError(
            f"sample.num must be a multiple of the {num_classes} classes and at least "
            f"{3 * num_classes}, got {config.sample.num}"
        )
    if config.sample.batch_size < 1:
        raise ValueError(f"sample.batch_size must be at least 1, got {config.sample.batch_size}")
    plan = Plan(
        mesh=mesh,
        apply=make_apply(model),
        schedule=schedule,
        prediction=config.diffusion.prediction,
        task=denoising_task(
            make_init(model, image_shape),
            make_apply(model),
            schedule,
            make_optimizer(config.optim, config.train.steps),
            prediction=config.diffusion.prediction,
            weighting=config.diffusion.weighting,
            ema_decay=config.optim.ema_decay,
        ),
        samples=config.sample,
    )
    abstract_state(plan.task, mesh)  # shapes are enough to find what the network refuses
    return plan


def make_optimizer(optim: Any, steps: int) -> optax.GradientTransformation:
    """Adam on clipped gradients; the rate rises linearly, then falls like a cosine to 0."""
    learning_rate = optax.warmup_cosine_decay_schedule(
        0.0,
        optim.learning_rate,
        warmup_steps=int(optim.warmup_fraction * steps),
        decay_steps=steps,
    )
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.adam(learning_rate, b1=optim.b1, b2=optim.b2),
    )


def make_init(model: UNet, image_shape: tuple[int, ...]) -> Callable[[jax.Array], Any]:
    """The network's first parameters."""

    def init(key: jax.Array) -> Any:
        x = jnp.zeros((1, *image_shape))
        return model.init(key, x, jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32), train=False)

    return init


def make_apply(model: UNet) -> Apply:
    """The network as `denoising_task` calls it."""

    def apply(params: Any, x: Any, t: Any, label: Any, keys: Any) -> Any:
        if keys is None or model.dropout == 0:
            return model.apply({"params": params}, x, t, label, train=False)

        def one(x: jax.Array, t: jax.Array, label: jax.Array, key: jax.Array) -> Any:
            inputs = (x[None], t[None], label[None])
            rngs = {"dropout": key}
            return model.apply({"params": params}, *inputs, train=True, rngs=rngs)[0]  # type: ignore

        return jax.vmap(one)(x, t, label, keys)  # each example drops by its own key

    return apply


def sampler(plan: Plan, image_shape: tuple[int, ...], num_classes: int) -> Callable[..., Any]:
    """Returns `generate(params, seed, steps, eta) -> [steps + 1, sample.num, ...]`.

    The states from noise to images, of all classes in turn.
    """
    num, size = plan.samples.num, plan.samples.batch_size
    devices = plan.mesh.size
    size = -(-size // devices) * devices
    split, whole = meshes.batch_sharding(plan.mesh), meshes.replicated(plan.mesh)

    @functools.partial(jax.jit, static_argnames="steps")
    def generate_batch(
        params: Any, key: jax.Array, rows: jax.Array, eta: Any, *, steps: int
    ) -> jax.Array:
        rows = jax.lax.with_sharding_constraint(rows, split)
        return sample(
            fold_in_rows(key, rows),
            lambda x_t, t: plan.apply(params, x_t, t, rows % num_classes, None),
            plan.schedule,
            (size, *image_shape),
            steps=steps,
            eta=eta,
            prediction=plan.prediction,
            clip_x0=1.0 if plan.samples.clip else None,
            trajectory=True,
        )

    def generate(params: Any, seed: int, steps: int, eta: float) -> np.ndarray:
        # The same noise for every sampler: what differs between them is not chance.
        key = jax.device_put(jax.random.key(seed), whole)
        parts = []
        for first in range(0, num, size):
            rows = jax.device_put(np.arange(first, first + size, dtype=np.int32), split)
            parts.append(jax.device_get(generate_batch(params, key, rows, eta, steps=steps)))
        return np.concatenate(parts, axis=1)[:, :num]

    return generate


def measure(plan: Plan, params: Any, seed: int, data: dict[str, Any], folder: pathlib.Path) -> Any:
    """Everything the claims rest on, for one seed; draws the pictures beside it."""
    # Not before they are needed: scipy and scikit-learn would delay the first step.
    from sklearn.svm import SVC

    from blogjax.metrics.frechet import frechet_distance_from_samples
    from blogjax.metrics.neighbours import nearest_distances, precision_recall

    train, test = data["train"], data["test"]
    num_classes, shape = len(np.unique(train["label"])), train["image"].shape[1:]
    generate = sampler(plan, shape, num_classes)
    labels = np.arange(plan.samples.num) % num_classes
    steps = list(plan.samples.steps)
    images: dict[tuple[int, float], np.ndarray] = {}
    states = np.empty(0)
    for eta in (1.0, 0.0):
        for s in steps:
            print(f"sampling: {s} steps, eta {eta:g}", flush=True)
            states = generate(params, seed, s, eta)
            images[s, eta] = states[-1]
    distance = {
        f"{eta:g}": [frechet_distance_from_samples(images[s, eta], test["image"]) for s in steps]
        for eta in (0.0, 1.0)
    }
    deviation = {
        f"{eta:g}": [float(images[s, eta].std(axis=0).mean()) for s in steps] for eta in (0.0, 1.0)
    }
    best = images[steps[-1], 0.0]
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


def run(config: Any, workdir: pathlib.Path) -> Result:
    """Trains and judges one model per seed; finished seeds are read back."""
    data = {split: digits.load(split) for split in ("train", "validation", "test")}
    shape = data["train"]["image"].shape[1:]
    with config_errors():
        plan = build(config, shape, num_classes=10)
    seeds = list(config.train.seeds)
    folders = {f"seed {s}": workdir / f"seed{s}" if len(seeds) > 1 else workdir for s in seeds}
    measured = []
    for seed, folder in zip(seeds, folders.values(), strict=True):
        stored = folder / "measured.json"
        if not stored.exists():
            state = train(plan, config, seed, data, folder)
            write_json(stored, measure(plan, state.averaged_params, seed, data, folder))
        measured.append(json.loads(stored.read_text()))
    draw_curves(workdir / "curves.png", folders, measured)
    if len(seeds) > 1:
        for name in ("samples.png", "denoising.png"):
            shutil.copy(folders[f"seed {seeds[0]}"] / name, workdir / name)
    return Result(
        claims=claims(measured, config.judge),
        seeds=seeds,
        measured={"by_seed": measured},
        pictures=["samples.png", "denoising.png", "curves.png"],
    )


def train(plan: Plan, config: Any, seed: int, data: dict[str, Any], folder: pathlib.Path) -> Any:
    """One run of the loop."""
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    size = config.data.batch_size
    return fit(
        plan.task,
        Batches(data["train"], size, seed=seed, **processes),
        config.train.steps,
        mesh=plan.mesh,
        seed=seed,
        workdir=folder,
        evaluation=EvaluationBatches(data["validation"], size, **processes),
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
