"""Descents in the plane of `two_losses`, from many starts at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.core.random import Key
from blogjax.multitask.aggregate import aggregate
from blogjax.multitask.combiner import Combiner
from blogjax.multitask.mixed import mixed_weights
from blogjax.multitask.registry import named_combiner
from blogjax.multitask.task_gradients import task_gradients
from experiments.multitask.two_losses import losses

NAMES = {
    "mean": "mean",
    "gradient_normalized": "normalised",
    "min_norm": "min-norm (MGDA)",
    "primary_auxiliary": "L1 primary",
    "mixed": "L2 primary (mixed)",
    "pcgrad": "PCGrad",
    "cagrad": "CAGrad",
    "upgrad": "UPGrad",
}


def mean_weights(
    gram: jax.Array, *, key: Key | None = None, losses: jax.Array | None = None
) -> jax.Array:
    """Equal weights of sum 1: gradient descent on the mean loss."""
    del key, losses
    return jnp.full(gram.shape[0], 1 / gram.shape[0], gram.dtype)


def first_only(
    gram: jax.Array, *, key: Key | None = None, losses: jax.Array | None = None
) -> jax.Array:
    """All weight on the first loss, as if there were no other."""
    del key, losses
    return jnp.zeros(gram.shape[0], gram.dtype).at[0].set(1)


def combiners(c: float) -> dict[str, Combiner]:
    """All that are compared, by the keys of `NAMES`.

    With two tasks `mixed_weights` is either min-norm or has one primary task. So that it is not
    drawn twice, `primary_auxiliary` has L1 for it and `mixed` has L2.

    Args:
      c: CAGrad's.
    """
    own: dict[str, Combiner] = {
        "mean": mean_weights,
        "mixed": functools.partial(mixed_weights, is_primary=(False, True)),
        "cagrad": named_combiner("cagrad", c=c),
    }
    return {name: own[name] if name in own else named_combiner(name) for name in NAMES}


def walk(
    combiner: Combiner,
    optimiser: optax.GradientTransformation,
    starts: np.ndarray,
    steps: int,
    points: int,
) -> np.ndarray:
    """Paths of `optax.chain(aggregate(combiner), optimiser)`.

    Args:
      combiner: of the two gradients.
      optimiser: of what it makes of them.
      starts: `[n, 2]`, whose dtype all is computed in.
      steps: how many; a multiple of `points`.
      points: how many of each path are returned, besides the start.

    Returns:
      `[n, points + 1, 2]`, evenly spaced in steps, the first one the start.
    """
    tx = optax.chain(aggregate(combiner), optimiser)

    def step(carry: tuple[jax.Array, Any], _: None) -> tuple[tuple[jax.Array, Any], None]:
        x, state = carry
        updates, state = tx.update(task_gradients(losses, x).gradients, state, x)
        return (optax.apply_updates(x, updates), state), None  # pyright: ignore

    def to_next(carry: tuple[jax.Array, Any], _: None) -> tuple[tuple[jax.Array, Any], jax.Array]:
        carry, _ = jax.lax.scan(step, carry, None, length=steps // points)
        return carry, carry[0]

    def one(start: jax.Array) -> jax.Array:
        _, rest = jax.lax.scan(to_next, (start, tx.init(start)), None, length=points)
        return jnp.concatenate([start[None], rest])

    return np.asarray(jax.jit(jax.vmap(one))(jnp.asarray(starts)))
