"""A whole step on K tasks: forward, the K gradients, weights, one gradient, `theta - lr g`.

Two trunks with a linear head for each task and squared errors:

  MLP      984,960 parameters, a batch of 128
  encoder  the digits U-Net of configs/ddpm.py, its way down and its middle, told the time; features
           are means over the picture; a batch of 64

JAX's contenders: `combined_gradient` in both modes with `min_norm_weights`, and with
`upgrad_weights` for TorchJD's; one forward pass and K separate backward passes, each a call of one
compiled program; and the plain sum of the losses, which needs a single backward pass. PyTorch's are
in `peers.multitask_torch`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lion_update import spread
from benchmarks.peers.multitask_torch import MGDA, PLAIN, PREFIX, UPGRAD, UPGRAD_ONE
from blogjax.multitask.combiner import Combiner
from blogjax.multitask.gram import combine, gram
from blogjax.multitask.min_norm import min_norm_weights
from blogjax.multitask.task_gradients import combined_gradient
from blogjax.multitask.upgrad import upgrad_weights
from blogjax.nn.resampling import Downsample
from blogjax.nn.residual_block import ResidualBlock
from blogjax.nn.spatial_attention import SpatialAttention
from blogjax.nn.time_embedding import TimeEmbedding

TASKS = (2, 8, 32)
MLP, ENCODER = "MLP", "encoder"
MODELS = (MLP, ENCODER)
INPUTS, HIDDEN, DEPTH = 256, 640, 3
CHANNELS, MULTIPLIERS = 24, (1, 2)
BATCH = {MLP: 128, ENCODER: 64}
RATE = 1e-9  # so small that PyTorch, which writes in place, stays where it is
SHARED = {"trunk": True, "heads": False}

SUM, SEPARATE = "sum of the losses", "K backward passes"
JACREV, SCAN, OURS_UPGRAD = "min_norm, jacrev", "min_norm, scan", "upgrad, jacrev"
# Each of PyTorch's beside the one of ours that does the same.
SAME = {PLAIN: SUM, MGDA: JACREV, UPGRAD: OURS_UPGRAD, UPGRAD_ONE: OURS_UPGRAD}
LIMIT, FEWEST = 20.0, 3  # seconds after which no repeat beyond these is begun in one case
LONG = 0.15  # seconds of one measurement, about, if a step is not longer

Losses = Callable[[Any, Any], jax.Array]


class MLPTrunk(nn.Module):
    """Dense layers `HIDDEN` wide."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, INPUTS]` to features `[B, HIDDEN]`."""
        for i in range(DEPTH):
            x = nn.relu(nn.Dense(HIDDEN, name=f"layer_{i}")(x))
        return x


class Encoder(nn.Module):
    """The first half of `models.unet.UNet`, its parts named as there."""

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """Pictures `[B, 8, 8, 1]` and times `[B]` to features `[B, 48]`."""
        embedding = TimeEmbedding(4 * CHANNELS, CHANNELS, 1.0, name="time")(t)
        h = nn.Conv(CHANNELS, (3, 3), name="conv_in")(x)
        for level, multiplier in enumerate(MULTIPLIERS):
            block = ResidualBlock(CHANNELS * multiplier, name=f"down_{level}_block_0")
            h = block(h, embedding, train=False)
            if level < len(MULTIPLIERS) - 1:
                h = Downsample(None, "space_to_depth", name=f"down_{level}_resample")(h)
        for i in range(2):
            block = ResidualBlock(h.shape[-1], name=f"middle_block_{i}")
            h = block(h, embedding, train=False)
            if i == 0:
                h = SpatialAttention(1, name="middle_attention")(h)
        return h.mean((1, 2))


def problem(model: str, tasks: int) -> tuple[Losses, Any, dict[str, np.ndarray]]:
    """`losses(params, batch) -> [K]`, parameters on the host, and the batch."""
    rng, size = np.random.default_rng(tasks), BATCH[model]
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    if model == MLP:
        network, batch = MLPTrunk(), {"x": normal(size, INPUTS)}
    else:
        times = rng.integers(1, 1001, size).astype(np.float32)
        network, batch = Encoder(), {"x": normal(size, 8, 8, 1), "t": times}
    made, seen = jax.jit(network.init_with_output)(jax.random.key(0), *batch.values())[::-1]
    trunk, features = jax.device_get(made["params"]), seen.shape[1]
    # What starts at zero would let no gradient through.
    trunk = jax.tree.map(lambda p: np.asarray(p + 0.02 * normal(*p.shape)), trunk)
    heads = {"kernel": normal(features, tasks) / np.float32(features**0.5), "bias": normal(tasks)}
    scale = np.geomspace(0.5, 2, tasks, dtype=np.float32)  # gradients of different lengths

    def losses(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        given = (batch[name] for name in ("x", "t") if name in batch)
        h = network.apply({"params": params["trunk"]}, *given)
        out = h @ params["heads"]["kernel"] + params["heads"]["bias"]  # type: ignore
        return jnp.mean(jnp.square(out - batch["y"]), axis=0)

    return losses, {"trunk": trunk, "heads": heads}, {**batch, "y": scale * normal(size, tasks)}


def descend(params: Any, gradient: Any) -> Any:
    """One step of gradient descent."""
    return jax.tree.map(lambda p, g: p - RATE * g, params, gradient)


def _bytes(program: Any) -> tuple[int, int]:
    found = program.memory_analysis()
    return found.temp_size_in_bytes, found.output_size_in_bytes


class Step:
    """One program for the whole step; with a combiner it tells Gram matrix and weights too."""

    def __init__(
        self, losses: Losses, params: Any, batch: Any, combiner: Combiner | None, mode: Any
    ):
        def step(params: Any, batch: Any) -> Any:
            if combiner is None:
                values, pull = jax.vjp(lambda p: losses(p, batch), params)
                return descend(params, pull(jnp.ones_like(values))[0]), values
            out = combined_gradient(
                lambda p: losses(p, batch), params, combiner, mode=mode, shared=SHARED
            )
            return descend(params, out.gradient), out.losses, out.gram, out.weights

        self._arguments = jax.device_put((params, batch))
        began = time.perf_counter()
        self._program: Any = jax.jit(step).lower(*self._arguments).compile()
        temporary, output = _bytes(self._program)
        self.facts = {
            "peak_bytes": temporary + output,
            "temporary_bytes": temporary,
            "compile_seconds": round(time.perf_counter() - began, 2),
        }

    def _step(self) -> Any:
        return self._program(*self._arguments)

    def outcome(self) -> list[np.ndarray]:
        """Losses, and with a combiner Gram matrix and weights."""
        return [np.asarray(x) for x in self._step()[1:]]

    def seconds(self, steps: int) -> tuple[float, float]:
        """Seconds per step, by the clock and of processors."""
        jax.block_until_ready(self._step())
        began, worked = time.perf_counter(), time.process_time()
        for _ in range(steps):
            jax.block_until_ready(self._step())  # a step needs the parameters of the one before
        return (time.perf_counter() - began) / steps, (time.process_time() - worked) / steps


class Separate(Step):
    """One forward pass, K calls of one backward pass, and what makes one gradient of them."""

    def __init__(self, losses: Losses, params: Any, batch: Any, combiner: Combiner):
        def forward(params: Any, batch: Any) -> Any:
            return jax.vjp(lambda p: losses(p, batch), params)

        def finish(params: Any, values: Any, gradients: Sequence[Any]) -> Any:
            stacked = jax.tree.map(lambda *g: jnp.stack(g), *gradients)
            matrix = gram(stacked, shared=SHARED)
            weights = combiner(matrix, losses=values)
            gradient = combine(stacked, weights, shared=SHARED)
            return descend(params, gradient), values, matrix, weights

        self._arguments = jax.device_put((params, batch))
        began = time.perf_counter()
        self._forward: Any = jax.jit(forward).lower(*self._arguments).compile()
        values, pull = self._forward(*self._arguments)
        eye = np.eye(len(values), dtype=values.dtype)
        self._one_hots = [jax.device_put(row) for row in eye]
        backward = jax.jit(lambda pull, cotangent: pull(cotangent)[0])
        self._backward: Any = backward.lower(pull, self._one_hots[0]).compile()
        gradients = [self._backward(pull, self._one_hots[0])] * len(values)
        self._finish: Any = jax.jit(finish).lower(self._arguments[0], values, gradients).compile()
        # Residuals and gradients lie beside what each program needs; residuals are not held to the
        # end.
        kept = _bytes(self._forward)[1]
        temporary, one = _bytes(self._backward)
        peaks = (
            sum(_bytes(self._forward)),
            kept + temporary + len(values) * one,
            len(values) * one + sum(_bytes(self._finish)),
        )
        self.facts = {
            "peak_bytes": max(peaks),
            "compile_seconds": round(time.perf_counter() - began, 2),
        }

    def _step(self) -> Any:
        values, pull = self._forward(*self._arguments)
        gradients = [self._backward(pull, one_hot) for one_hot in self._one_hots]
        del pull
        return self._finish(self._arguments[0], values, gradients)


def contenders(losses: Losses, params: Any, batch: Any) -> dict[str, Step]:
    """JAX's, compiled."""
    given = (losses, params, batch)
    return {
        SUM: Step(*given, None, None),
        JACREV: Step(*given, min_norm_weights, "jacrev"),
        SCAN: Step(*given, min_norm_weights, "scan"),
        SEPARATE: Separate(*given, min_norm_weights),
        OURS_UPGRAD: Step(*given, upgrad_weights, "jacrev"),
    }


def differences(players: Mapping[str, Any]) -> dict[str, float]:
    """How far losses and Gram matrices are from those of jacrev, relative to their norms."""
    ours = players[JACREV].outcome()
    found = {}
    for name, player in players.items():
        pairs = list(zip(player.outcome()[:2], ours, strict=False))
        found[name] = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
    return found


def measure(
    players: Mapping[str, Any], repeats: int, limit: float = LIMIT
) -> dict[str, list[tuple[float, float]]]:
    """Seconds per step, by contender, a pair for each repeat; the order turns."""
    names = list(players)
    steps = {n: int(np.clip(LONG / players[n].seconds(1)[0], 1, 10)) for n in names}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    began = time.perf_counter()
    for i in range(repeats):
        if i >= FEWEST and time.perf_counter() - began > limit:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(players[name].seconds(steps[name]))
    return seconds


def rows(
    players: Mapping[str, Any], seconds: Mapping[str, Sequence[tuple[float, float]]]
) -> dict[str, dict[str, Any]]:
    """The table of one case; ratios repeat for repeat."""

    def over(name: str, base: str) -> list[float]:
        return spread([a / b for (a, _), (b, _) in zip(seconds[name], seconds[base], strict=True)],
                      3)  # fmt: skip

    table: dict[str, dict[str, Any]] = {}
    for name, pairs in seconds.items():
        table[name] = {
            "ms": spread([1e3 * clock for clock, _ in pairs], 3),
            "work ms": spread([1e3 * work for _, work in pairs], 3),
            "over the sum": over(name, PLAIN if name.startswith(PREFIX) else SUM),
        }
        if name in SAME:
            table[name]["times ours"] = over(name, SAME[name])
        elif name == SEPARATE:
            table[name]["times ours"] = over(name, JACREV)
        table[name] |= players[name].facts
        table[name]["all_ms"] = [round(1e3 * clock, 3) for clock, _ in pairs]
    return table


def show(title: str, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints a table."""
    print(f"{title:34}" + "".join(
        f"{c:>16}" for c in ("ms", "over the sum", "times ours", "peak MB", "compile s")
    ))  # fmt: skip
    for name, found in table.items():
        cells = [found[c][0] if c in found else "-" for c in ("ms", "over the sum", "times ours")]
        cells += [round(found["peak_bytes"] / 1e6, 2), found.get("compile_seconds", "-")]
        print(f"  {name:32}" + "".join(f"{c:>16}" for c in cells), flush=True)
