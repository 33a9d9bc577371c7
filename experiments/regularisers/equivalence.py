"""FGM against the input penalty as epsilon goes to 0: how far apart the same training leads.

Post 7234: a step on x + eps g, g = grad_x L, is a step on L + eps/2 |g|^2, up to O(eps^2). So two
networks that begin alike and see the same batches end O(eps^2) apart, and O(eps) from the one that
is trained without either. tanh, for which the expansion holds everywhere; plain SGD, which does not
rescale gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.gradients.adversarial import fast_gradient
from blogjax.gradients.penalties import input_gradient_penalty
from blogjax.tasks.gradient import LossOutput, gradient_task
from blogjax.train.task import Batch, Task
from experiments.launch.configs import check_ranges
from experiments.regularisers.replicas import init_replicas, make_loss


def check(settings: Any) -> None:
    """Refuses a group `equivalence` that cannot be run.

    Raises:
      ValueError: naming the field.
    """
    epsilons = list(settings.epsilons)
    if len(epsilons) < 2 or epsilons[0] <= 0 or epsilons != sorted(set(epsilons)):
        raise ValueError(
            f"equivalence.epsilons must be two positive numbers or more, rising: {epsilons}"
        )
    check_ranges(settings, learning_rate=(1e-9, 10))


def make_task(settings: Any, hidden: Any) -> Task:
    """Networks of one start: for epsilon 0 and each of the settings', by FGM and by the penalty.

    Parameters are `{"fgm": leaves [1 + epsilons, ...], "penalty": likewise}`. Of the batch's
    replicas the first is taken.
    """
    loss = make_loss(jnp.tanh)
    epsilons = jnp.array([0.0, *settings.epsilons], jnp.float32)
    widths, count = (64, *hidden, 10), len(epsilons)

    def init(key: jax.Array) -> dict[str, Any]:
        one = init_replicas(key, widths, 1)
        alike = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), one)
        return {"params": {"fgm": alike, "penalty": jax.tree.map(jnp.copy, alike)}}

    def by_fgm(params: Any, epsilon: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        r = fast_gradient(loss, params, x, y, epsilon=epsilon, norm="none")
        return loss(params, x + r, y)

    def by_penalty(params: Any, epsilon: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return loss(params, x, y) + epsilon / 2 * input_gradient_penalty(loss, params, x, y)

    def total(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> LossOutput:
        del model_state, key
        x, y = batch["pixels"][:, 0], batch["label"][:, 0]
        over = (0, 0, None, None)
        fgm = jax.vmap(by_fgm, in_axes=over)(params["fgm"], epsilons, x, y)
        penalty = jax.vmap(by_penalty, in_axes=over)(params["penalty"], epsilons, x, y)
        # The sum over the networks: the gradient of each is that of its own loss.
        return LossOutput(jnp.sum(fgm + penalty, axis=0))

    return gradient_task(init, total, optax.sgd(settings.learning_rate))


def measure(settings: Any, params: Any) -> dict[str, Any]:
    """Distances in parameter space and the slopes of their logarithms over that of epsilon.

    Args:
      settings: the config's group, of which `epsilons` is read.
      params: of a state of `make_task`.

    Returns:
      `apart` and `effect`, one per epsilon: from FGM's network to the penalty's, and from the
      penalty's to that with epsilon 0; `slope` and `effect_slope`.
    """

    def flat(name: str) -> np.ndarray:
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params[name])]
        return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)

    fgm, penalty = flat("fgm"), flat("penalty")
    apart = np.linalg.norm(fgm - penalty, axis=1)[1:]
    effect = np.linalg.norm(penalty - penalty[:1], axis=1)[1:]
    return {
        "apart": apart.tolist(),
        "effect": effect.tolist(),
        "slope": slope(settings.epsilons, apart),
        "effect_slope": slope(settings.epsilons, effect),
    }


def slope(x: Any, y: np.ndarray) -> float:
    """Of the straight line through the logarithms; NaN if one of them is not positive.

    >>> round(slope((0.1, 0.2, 0.4), np.array([3.0, 12.0, 48.0])), 6)
    2.0
    """
    if not (np.asarray(y) > 0).all():
        return float("nan")
    return float(np.polyfit(np.log(np.array(x)), np.log(y), 1)[0])
