"""What operations on gradients cost: a step with each, over the plain step.

    python -m benchmarks.gradient_ops [--repeats=15] [--steps=5] [--width=512] [--batch=256]

A step is a loss and its gradient by parameters, compiled by itself, without an optimiser; on a CPU
everyone has two cores. Networks are MLPs with two hidden layers of `width`. Groups:

  critic step       `tasks.critics`: no constraint, SN, GP, GN and GraN; hinge loss, given real and
                    generated examples. No constraint and GN in PyTorch as well, in a process of its
                    own (README.md: bench environment; left out where it is not installed, and where
                    JAX has a GPU)
  generator step    the same through the critic, by the generator's parameters
  slope of a generator's loss
                    the critic's part of that: by the generated examples
  critic step, images
                    critics as above but convolutional, an eighth of the examples, 16 x 16 x 3
  classifier step   `gradients.adversarial`, `virtual_adversarial`, `penalties` and `sharpness`;
                    `optax.contrib.sam`
  norms of per-example gradients
                    `gradients.per_example` and `vmap(grad)`, beside the batch's plain gradient

Before anything is timed, PyTorch, optax.contrib.sam and vmap(grad) must agree with ours. Then a
repeat measures everybody in a group, one after the other, in turning order. Ratios are medians and
quartiles over the repeats; `work` is that of the seconds of all processors, which other programs on
the machine change less. `operations` are the multiplications in the matrix products and
convolutions of the compiled program, over those of the plain step: where the time's ratio is above
theirs, it goes elsewhere. `products` is how many of them there are. PyTorch's ratio is over its own
plain step.
Writes benchmarks/results/gradient_ops.json, one entry for each kind of device.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.compiled_step import CompiledStep
from benchmarks.lion_update import spread
from benchmarks.machine import CORES, RESULTS, settle, surroundings, write
from benchmarks.peers.torch_critics import PACKAGES, PREFIX, peers
from blogjax.gradients.adversarial import fast_gradient, projected_gradient
from blogjax.gradients.penalties import input_gradient_penalty, parameter_gradient_penalty
from blogjax.gradients.per_example import per_example_gradient_norms
from blogjax.gradients.sharpness import (
    gradient_norm_penalty,
    implicit_gradient_regularization,
    sam_gradient,
)
from blogjax.gradients.virtual_adversarial import vat_loss
from blogjax.losses.adversarial import critic_loss, generator_loss
from blogjax.models.gan import DCGANCritic, MLPCritic, MLPGenerator
from blogjax.tasks.critics import ConstraintName, constrain

WIDTH, BATCH, CLASSES = 512, 256, 10
LIMIT = 40.0  # seconds after which no further repeat of one group is begun
PLAIN = "plain"
CRITIC, GENERATOR, SLOPE = "critic step", "generator step", "slope of a generator's loss"
IMAGES, IMAGE = "critic step, images", (16, 16, 3)
CLASSIFIER, NORMS = "classifier step", "norms of per-example gradients"
KINDS: dict[str, ConstraintName] = {
    PLAIN: "none",
    "sn": "sn",
    "gp": "gp",
    "gn": "gn",
    "gran": "gran",
}
KEY = jax.random.key(0)
SAM, OPTAX_SAM = "sam", "optax.contrib.sam"
GHOST, VMAP = "per_example_gradient_norms", "vmap(grad)"
FASTER = 5.0  # target, times vmap(grad)
# What may differ between two of the same, relative to the norm of an array: rounding, mostly 1e-6,
# and single units of single examples whose ReLU rounding has turned over, 4e-3 each.
APART = 1e-2

Step = Callable[..., Any]


def critics(network: Any, params: Any) -> dict[str, tuple[Any, Any]]:
    """The constrained critics and their states, by name."""
    score: Step = lambda p, x: network.apply({"params": p}, x)  # noqa: E731
    made = {name: constrain(score, kind) for name, kind in KINDS.items()}
    return {name: (critic, critic.init(KEY, params)) for name, critic in made.items()}


def critic_steps(network: Any, params: Any, real: Any, fake: Any) -> dict[str, CompiledStep]:
    """The critic's step with each constraint."""

    def step(critic: Any) -> Step:
        def mean(p: Any, state: Any, keys: Any, real: Any, fake: Any) -> Any:
            used, state = critic.effective(p, state)
            loss = critic_loss(critic.score(used, real), critic.score(used, fake))
            if critic.penalty is not None:
                loss = loss + critic.penalty(used, keys, real, fake)
            return jnp.mean(loss), state

        return jax.value_and_grad(mean, has_aux=True)

    keys = jax.random.split(KEY, len(real))
    return {
        name: CompiledStep(step(critic), params, state, keys, real, fake)
        for name, (critic, state) in critics(network, params).items()
    }


def adversaries(
    width: int, batch: int
) -> tuple[dict[str, dict[str, CompiledStep]], tuple[Any, ...]]:
    """The steps of critic and generator by group, and what a peer must be given to do the same."""
    rng = np.random.default_rng(3)
    real, fake = (rng.standard_normal((batch, width), np.float32) for _ in range(2))
    latent = rng.standard_normal((batch, width // 4), np.float32)
    judge, maker = MLPCritic((width, width)), MLPGenerator(width, (width, width))
    params = judge.init(KEY, real)["params"]
    own = maker.init(KEY, latent, train=True)["params"]
    groups: dict[str, dict[str, CompiledStep]] = {
        CRITIC: critic_steps(judge, params, real, fake), GENERATOR: {}, SLOPE: {}
    }  # fmt: skip

    def by_examples(critic: Any) -> Step:
        return lambda x, p, state: jnp.mean(
            generator_loss(critic.score(critic.effective(p, state)[0], x))
        )

    def by_generator(critic: Any) -> Step:
        loss = by_examples(critic)
        return lambda own, z, p, state: loss(maker.apply({"params": own}, z, train=True), p, state)

    for name, (critic, state) in critics(judge, params).items():
        step = jax.value_and_grad(by_generator(critic))
        groups[GENERATOR][name] = CompiledStep(step, own, latent, params, state)
        step = jax.value_and_grad(by_examples(critic))
        groups[SLOPE][name] = CompiledStep(step, fake, params, state)

    images = DCGANCritic((width // 8, width // 4))
    pictures = rng.standard_normal((2, batch // 8, *IMAGE), np.float32)
    weights = images.init(KEY, pictures[0])["params"]
    groups[IMAGES] = critic_steps(images, weights, *pictures)
    leaves = ([np.array(p) for p in jax.tree.leaves(tree)] for tree in (params, own))
    return groups, (*leaves, real, fake, latent)


def classifiers(width: int, batch: int) -> dict[str, dict[str, CompiledStep]]:
    """The steps of a classifier, and norms of its gradients."""
    rng = np.random.default_rng(1)
    sizes = (width, width, width, CLASSES)
    params = [
        {
            "kernel": rng.standard_normal((m, n), np.float32) * np.float32((2 / m) ** 0.5),
            "bias": np.zeros(n, np.float32),
        }
        for m, n in itertools.pairwise(sizes)
    ]
    x = rng.standard_normal((batch, width), np.float32)
    y = rng.integers(0, CLASSES, batch, dtype=np.int32)
    keys = jax.random.split(KEY, batch)
    entropy = optax.softmax_cross_entropy_with_integer_labels

    def logits(params: Any, x: Any) -> Any:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ params[-1]["kernel"] + params[-1]["bias"]

    def each(params: Any, x: Any, y: Any) -> Any:
        return entropy(logits(params, x), y)

    def mean(params: Any, x: Any, y: Any) -> Any:
        return jnp.mean(each(params, x, y))

    def moved(perturb: Step, **how: Any) -> Step:
        return lambda p, x, y, keys: plain(p, x + perturb(each, p, x, y, epsilon=0.5, **how), y)

    def penalised(penalty: Callable[..., Any], weight: float) -> Step:
        return jax.value_and_grad(
            lambda p, x, y, keys: mean(p, x, y) + weight * jnp.mean(penalty(p, x, y, keys))
        )

    def by_optax(p: Any, x: Any, y: Any, keys: Any) -> Any:
        up = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
        tx = optax.contrib.sam(optax.sgd(-1.0), up, opaque_mode=True)  # the gradient itself
        value, grads = plain(p, x, y)
        return value, tx.update(grads, tx.init(p), p, grad_fn=lambda p, _: plain(p, x, y)[1])[0]

    def materialised(p: Any, x: Any, y: Any, keys: Any) -> Any:
        one = jax.grad(lambda p, x, y: each(p, x[None], y[None])[0])
        return jax.vmap(lambda x, y: optax.tree.norm(one(p, x, y)))(x, y)

    plain = jax.value_and_grad(mean)
    beside: dict[str, Step] = {
        "fast_gradient": moved(fast_gradient),
        "projected_gradient, 3 steps": moved(projected_gradient, steps=3, step_size=0.2),
        "vat_loss, 1 iteration": penalised(
            lambda p, x, y, keys: vat_loss(logits, p, x, keys, epsilon=1.0), 1.0
        ),
        "input_gradient_penalty": penalised(
            lambda p, x, y, keys: input_gradient_penalty(each, p, x, y), 0.1
        ),
        "parameter_gradient_penalty, exact": penalised(
            lambda p, x, y, keys: parameter_gradient_penalty(mean, p, x, y), 0.1
        ),
        "parameter_gradient_penalty, difference": penalised(
            lambda p, x, y, keys: parameter_gradient_penalty(mean, p, x, y, method="difference"),
            0.1,
        ),
        SAM: lambda p, x, y, keys: sam_gradient(mean, p, x, y, rho=0.05),
        OPTAX_SAM: by_optax,
        "gradient_norm_penalty": lambda p, x, y, keys: gradient_norm_penalty(
            mean, p, x, y, rho=0.05, alpha=0.5
        ),
        "implicit_gradient_regularization": lambda p, x, y, keys: implicit_gradient_regularization(
            mean, p, x, y, learning_rate=0.1
        ),
    }
    norms: dict[str, Step] = {
        GHOST: lambda p, x, y, keys: per_example_gradient_norms(p, x, entropy, y),
        VMAP: materialised,
    }
    first = {PLAIN: CompiledStep(lambda p, x, y, keys: plain(p, x, y), params, x, y, keys)}
    return {
        group: first
        | {name: CompiledStep(step, params, x, y, keys) for name, step in steps.items()}
        for group, steps in {CLASSIFIER: beside, NORMS: norms}.items()
    }


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference over the norm; infinite for another shape."""
    if ours.shape != theirs.shape:
        return math.inf
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30))


def check(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How far those are apart that must be the same: the largest relative norm of an array.

    Raises:
      SystemExit: if they are not the same function.
    """
    pairs = [(CLASSIFIER, SAM, OPTAX_SAM), (NORMS, GHOST, VMAP)]
    for group in (CRITIC, GENERATOR):
        pairs += [(group, n.removeprefix(PREFIX), n) for n in groups[group] if PREFIX in n]
    found = {}
    for group, ours, other in pairs:
        results = (groups[group][name].outcome() for name in (ours, other))
        gap = max(apart(a, b) for a, b in zip(*results, strict=True))
        found[f"{group}: {other}"] = gap
        if not gap <= APART:
            sys.exit(f"error: '{other}' is not our {ours} ({group}): {gap} of its norm")
    return found


def measure(
    contenders: Mapping[str, Any], repeats: int, steps: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds per step, by contender, one pair per repeat; the order turns."""
    began, names = time.perf_counter(), list(contenders)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for i in range(repeats):
        if i and time.perf_counter() - began > LIMIT:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(contenders[name].seconds(steps))
    return seconds


def row(
    name: str, contenders: Mapping[str, Any], seconds: Mapping[str, Sequence[tuple[float, float]]]
) -> dict[str, Any]:
    """What was found about one contender; PyTorch's are beside PyTorch's own plain step."""
    plain = PREFIX + PLAIN if name.startswith(PREFIX) else PLAIN
    clock, work = (
        [a[i] / b[i] for a, b in zip(seconds[name], seconds[plain], strict=True)] for i in (0, 1)
    )
    found = {
        "ms": spread([1e3 * s for s, _ in seconds[name]], 3),
        "ratio": spread(clock, 3),
        "work": spread(work, 3),
    }
    if name.startswith(PREFIX):
        ours = seconds[name.removeprefix(PREFIX)]
        times = [a / b for (a, _), (b, _) in zip(seconds[name], ours, strict=True)]
        found["times ours"] = spread(times, 3)
    facts, base = dict(contenders[name].facts), contenders[plain].facts
    if "multiplications" in facts and "multiplications" in base:
        facts["operations"] = round(facts["multiplications"] / base["multiplications"], 3)
    return {**found, **facts, "all_ms": [round(1e3 * s, 3) for s, _ in seconds[name]]}


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "ms": lambda r: f"{r['ms'][0]:.2f}",
    "ratio": lambda r: "{:.2f} [{:.2f} {:.2f}]".format(*r["ratio"]),
    "work": lambda r: f"{r['work'][0]:.2f}",
    "operations": lambda r: f"{r['operations']:.2f}",
    "products": lambda r: str(r["products"]),
    "times ours": lambda r: f"{r['times ours'][0]:.2f}",
    "temp MB": lambda r: f"{r['temporary_bytes'] / 1e6:.1f}",
}


def show(group: str, rows: Mapping[str, dict[str, Any]]) -> None:
    """Prints a table."""
    print(f"{group:42}" + "".join(f"{c:>12}" if c != "ratio" else f"{c:>24}" for c in COLUMNS))
    for name, found in rows.items():
        cells = []
        for column, text in COLUMNS.items():
            try:
                cells.append(text(found).rjust(24 if column == "ratio" else 12))
            except KeyError:
                cells.append("-".rjust(12))
        print(f"  {name:40}" + "".join(cells), flush=True)


def main() -> None:
    """Checks, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--batch", type=int, default=BATCH)
    options = parser.parse_args()
    load = settle()
    there = all(importlib.util.find_spec(name) for name in PACKAGES)
    with_torch = there and jax.default_backend() == "cpu"
    players, given = adversaries(options.width, options.batch)
    groups: dict[str, dict[str, Any]] = {
        **players,
        **classifiers(options.width, options.batch),
    }
    print("compiled", flush=True)
    with peers(CORES, *given) if with_torch else contextlib.nullcontext({}) as others:
        for player, steps in others.items():
            groups[f"{player} step"] |= steps
        found = check(groups)
        print(f"greatest differences: {found}", flush=True)
        rows: dict[str, dict[str, Any]] = {}
        for group, contenders in groups.items():
            seconds = measure(contenders, options.repeats, options.steps)
            rows[group] = {name: row(name, contenders, seconds) for name in contenders}
            show(group, rows[group])
    around = surroundings()
    if with_torch:
        around["versions"] |= {name: importlib.metadata.version(name) for name in PACKAGES}
    pairs = zip(rows[NORMS][VMAP]["all_ms"], rows[NORMS][GHOST]["all_ms"], strict=True)
    faster = spread([a / b for a, b in pairs], 2)
    target = {"target": FASTER, "found": faster, "met": faster[0] >= FASTER}
    print(f"{GHOST}: {faster[0]:g} times as fast as {VMAP}, target {FASTER:g}")
    record = {
        "benchmark": "loss and gradient with an operation, over the plain ones: medians and "
        "quartiles of the repeats",
        "command": f"python -m benchmarks.gradient_ops --repeats={options.repeats} "
        f"--steps={options.steps}",
        "batch": options.batch,
        "width": options.width,
        "PyTorch": "measured" if with_torch else "left out",
        "greatest differences": found,
        f"{GHOST}, times as fast as {VMAP}, at least": target,
        **rows,
        "load before": load,
        **around,
    }
    if (options.width, options.batch) != (WIDTH, BATCH):
        print("another size than the published one: nothing is written")
        return
    path = RESULTS / "gradient_ops.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    write("gradient_ops", records | {around["devices"]: record})


if __name__ == "__main__":
    main()
