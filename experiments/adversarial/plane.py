"""GANs in the plane: networks, the critics compared, and one run of each."""

import functools
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.core.norms import per_example_norm
from blogjax.core.random import Key, fold_in_rows, normal
from blogjax.data.batches import Batches, EvaluationBatches
from blogjax.data.toy2d import Toy2D
from blogjax.gradients.input_gradient import value_and_input_gradient
from blogjax.models.gan import MLPCritic, MLPGenerator
from blogjax.tasks.adversarial import AdversarialState, Generated, adversarial_task
from blogjax.tasks.critics import CONSTRAINTS, ConstrainedCritic, Score, constrain
from blogjax.train.loop import fit
from blogjax.train.task import Batch, Task

ARMS = (*CONSTRAINTS, "direction")
NORMALIZED = ("gn", "gran", "direction")  # flat pieces with jumps between them
STREAMS = ("train", "evaluate", "fresh", "floor")  # points that have nothing to do with each other


def points(data: Toy2D, n: int, seed: int, stream: str) -> np.ndarray:
    """Points `[n, 2]` for one purpose of one seed."""
    return data.sample(n, len(STREAMS) * seed + STREAMS.index(stream))


def by_direction(critic: Score) -> ConstrainedCritic:
    """The critic `<grad D / |grad D|, x>`, 0 where the gradient is.

    Where D is linear it differs from `D / |grad D|` by a constant; post 8757 tried it, for if
    normalisation worked because D is piecewise linear, this should work, too.

    >>> score = by_direction(lambda params, x: x @ params).score
    >>> score(jnp.array([3.0, 4.0]), jnp.array([[1.0, 0.5]])).tolist()
    [1.0]
    """

    def score(params: Any, x: jax.Array, *args: Any) -> jax.Array:
        _, gradient = value_and_input_gradient(critic, params, x, *args)
        norm = per_example_norm(gradient)
        along = jnp.sum(gradient * x, axis=tuple(range(1, x.ndim)))
        return jnp.where(norm > 0, along / jnp.where(norm > 0, norm, 1), 0)

    return ConstrainedCritic(score)


def bound_of(name: str, options: dict[str, Any]) -> float | None:
    """What the slope of a normalised critic cannot exceed inside a piece; None for the others."""
    return float(options.get("lipschitz", 1.0)) if name in NORMALIZED else None


class Plane(NamedTuple):
    """What all arms share.

    Attributes:
      data: the distribution.
      generator: network of the generator.
      network: network of the critic.
      latent: numbers that the generator is given.
    """

    data: Toy2D
    generator: MLPGenerator
    network: MLPCritic
    latent: int

    def plain(self, params: Any, x: jax.Array) -> jax.Array:
        """The unconstrained critic."""
        return self.network.apply({"params": params}, x)  # pyright: ignore[reportReturnType]

    def generate(self, params: Any, keys: Key) -> jax.Array:
        """One point for each key."""
        z = normal(keys, (len(keys), self.latent))
        return self.generator.apply({"params": params}, z, train=True)  # pyright: ignore

    def critic(self, name: str, options: dict[str, Any]) -> ConstrainedCritic:
        """The critic of an arm.

        Raises:
          ValueError: if there is no such arm, or it has no such option.
        """
        if name != "direction":
            return constrain(self.plain, name, **options)  # pyright: ignore[reportArgumentType]
        if options:
            raise ValueError(f"'direction' has no options {', '.join(sorted(options))}")
        return by_direction(self.plain)


def make_plane(model: Any, data: Toy2D) -> Plane:
    """From the config's group: `latent`, `hidden` and the `slope` of the leaky ReLU."""
    hidden = tuple(model.hidden)
    activation = functools.partial(nn.leaky_relu, negative_slope=model.slope)
    return Plane(data, MLPGenerator(2, hidden), MLPCritic(hidden, activation), model.latent)


def make_task(
    plane: Plane, critic: ConstrainedCritic, optim: Any, learning_rate: float, steps: int,
    *, near: float,
) -> Task:  # fmt: skip
    """The adversarial task of one arm: Adam twice, linearly falling to 0.

    Args:
      plane: networks and data.
      critic: the arm's.
      optim: with `loss`, `critic_steps`, `b1` and `b2`.
      learning_rate: of both players at the start.
      steps: of the run.
      near: distance from a mode up to which `evaluate` counts a sample, as `near_0`, `near_1` ...
    """
    modes = jnp.asarray(plane.data.modes, jnp.float32)

    def init(key: Key) -> dict[str, Any]:
        keys = jax.random.split(key)
        return {
            "generator": plane.generator.init(keys[0], jnp.zeros((1, plane.latent)), train=True),
            "critic": plane.network.init(keys[1], jnp.zeros((1, 2))),
        }

    def generate(params: Any, model_state: Any, keys: Key, batch: Batch, train: bool) -> Generated:
        del model_state, batch, train
        return Generated(plane.generate(params, keys))

    def evaluate(state: AdversarialState, batch: Batch, key: Key) -> dict[str, jax.Array]:
        samples = plane.generate(state.params["generator"], fold_in_rows(key, batch["row"]))
        squares = jnp.sum(jnp.square(samples[:, None] - modes[None]), axis=-1)
        within = (squares <= near**2).astype(jnp.float32)
        return {f"near_{i}": within[:, i] for i in range(len(modes))}

    def adam(updates: int) -> optax.GradientTransformation:
        schedule = optax.linear_schedule(learning_rate, 0.0, updates)
        return optax.adam(schedule, b1=optim.b1, b2=optim.b2)

    return adversarial_task(
        init, generate, critic, adam(steps), adam(steps * optim.critic_steps),
        loss=optim.loss, critic_steps=optim.critic_steps, real=lambda batch, keys: batch["x"],
        evaluate=evaluate,
    )  # fmt: skip


def train_arm(
    folder: pathlib.Path, plane: Plane, task: Task, config: Any, seed: int
) -> AdversarialState:
    """One run of the loop."""
    train, data = config.train, config.data
    rows = data.batch_size * config.optim.critic_steps
    place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return fit(
        task,
        Batches({"x": points(plane.data, data.points, seed, "train")}, rows, seed=seed, **place),
        train.steps,
        seed=seed,
        workdir=folder,
        evaluation=EvaluationBatches(
            {"x": points(plane.data, data.evaluation, seed, "evaluate")}, data.evaluation, **place
        ),
        evaluate_every=train.evaluate_every,
        log_every=train.log_every,
        save_seconds=train.save_seconds,
        on_nonfinite=train.on_nonfinite,
        verbose=True,
    )
