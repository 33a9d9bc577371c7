"""What each method minimises: one number for one network and one batch.

An objective is `objective(params, pixels, label) -> []`, in nats. Those that replace the gradient
and not the loss (SAM and its like) carry theirs, see `carrying`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blogjax.gradients.adversarial import fast_gradient, projected_gradient
from blogjax.gradients.penalties import input_gradient_penalty, parameter_gradient_penalty
from blogjax.gradients.sharpness import flooding, gradient_norm_penalty, sam_gradient
from experiments.regularisers.replicas import Activation, make_loss

Objective = Callable[[Any, jax.Array, jax.Array], jax.Array]


class Method(NamedTuple):
    """A way to train.

    Attributes:
      label: for pictures.
      objective: what is minimised.
      activation: of the hidden layers.
    """

    label: str
    objective: Objective
    activation: Activation = jax.nn.relu


def carrying(value: jax.Array, gradient: Any, params: Any) -> jax.Array:
    """The number `value`, whose gradient by `params` is said to be `gradient`.

    So a method that gives gradients can stand where a loss is asked for.

    >>> def objective(w):
    ...     return carrying(w**2, 7.0, w)
    >>> [float(v) for v in jax.value_and_grad(objective)(jnp.array(3.0))]
    [9.0, 7.0]
    """
    value, gradient = jax.lax.stop_gradient((value, gradient))
    zeros = jax.tree.map(lambda g, p: jnp.sum(g * (p - jax.lax.stop_gradient(p))), gradient, params)
    return value + sum(jax.tree.leaves(zeros))


def penalty_name(weight: float) -> str:
    """Name of the method with that weight.

    >>> penalty_name(10.0)
    'penalty_10'
    """
    return f"penalty_{weight:g}"


def methods(settings: Any) -> dict[str, Method]:
    """All methods by name.

    Args:
      settings: the config's group: `epsilon`, length of FGM's and PGD's perturbations, in pixels
        that go from -1 to 1; `pgd_steps`, and `pgd_step` as a share of epsilon;
        `penalty_weights`, rising; `parameter_weight`; `rho`; `alpha`; `flood_level`.
    """
    loss = make_loss(jax.nn.relu)

    def mean(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(loss(params, x, y))

    def fgm(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return mean(params, x + fast_gradient(loss, params, x, y, epsilon=settings.epsilon), y)

    def pgd(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        r = projected_gradient(
            loss, params, x, y, epsilon=settings.epsilon, steps=settings.pgd_steps,
            step_size=settings.pgd_step * settings.epsilon,
        )  # fmt: skip
        return mean(params, x + r, y)

    def penalty(weight: float, activation: Activation = jax.nn.relu) -> Objective:
        own = make_loss(activation)
        return lambda params, x, y: jnp.mean(
            own(params, x, y) + weight * input_gradient_penalty(own, params, x, y)
        )

    def parameter(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        square = parameter_gradient_penalty(mean, params, x, y)
        return mean(params, x, y) + settings.parameter_weight * square

    def sam(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        value, gradient = sam_gradient(mean, params, x, y, rho=settings.rho)
        return carrying(value, gradient, params)

    def norm(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        value, gradient = gradient_norm_penalty(
            mean, params, x, y, rho=settings.rho, alpha=settings.alpha
        )
        return carrying(value, gradient, params)

    largest = settings.penalty_weights[-1]
    return {
        "plain": Method("none", mean),
        "fgm": Method("FGM", fgm),
        "pgd": Method(f"PGD, {settings.pgd_steps} steps", pgd),
        **{
            penalty_name(w): Method(f"input penalty {w:g}", penalty(w))
            for w in settings.penalty_weights
        },
        "penalty_tanh": Method(f"input penalty {largest:g}, tanh", penalty(largest, jnp.tanh),
                               jnp.tanh),
        "parameter": Method("parameter penalty", parameter),
        "sam": Method("SAM", sam),
        "norm": Method("gradient norm", norm),
        "flooding": Method(
            "flooding", lambda params, x, y: flooding(mean(params, x, y), settings.flood_level)
        ),
    }  # fmt: skip
