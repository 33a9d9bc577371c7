"""How near power iterations come to the direction in which a prediction changes most.

The direction is the top eigenvector of H = J' (diag(p) - p p') J, J = d logits / d pixels, the
Hessian of KL(p(x) || p(x + r)) at r = 0. Here H is written out and decomposed, in float64.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blogjax.core.random import Key
from blogjax.gradients.virtual_adversarial import virtual_adversarial_perturbation
from experiments.regularisers.replicas import Params, logits


@jax.jit
def _hessians(params: Params, pixels: jax.Array) -> jax.Array:
    def one(x: jax.Array) -> jax.Array:
        def of_one(x: jax.Array) -> jax.Array:
            return logits(params, x[None])[0]

        p, jacobian = jax.nn.softmax(of_one(x)), jax.jacrev(of_one)(x)
        return jacobian.T @ (jnp.diag(p) - jnp.outer(p, p)) @ jacobian

    return jax.vmap(one)(pixels)


def top_eigenvectors(params: Params, pixels: Any) -> np.ndarray:
    """`[n, 64]`, float64 under x64; the sign is arbitrary."""
    return np.linalg.eigh(np.asarray(_hessians(params, pixels)))[1][..., -1]


@functools.partial(jax.jit, static_argnames="iterations")
def by_difference(
    params: Params, pixels: jax.Array, start: jax.Array, *, iterations: int, xi: float
) -> jax.Array:
    """Power iterations as the post has them: `u <- grad_x KL(p(x) || p(x + xi u)) / |.|`.

    Args:
      params: of one network.
      pixels: `[n, 64]`.
      start: directions to begin with, `[n, 64]` of length 1.
      iterations: how many.
      xi: length of the step of which the gradient is taken.

    Returns:
      `[n, 64]`, of length 1, or 0 where a gradient was.
    """
    log_p = jax.nn.log_softmax(logits(params, pixels))

    def divergence(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(logits(params, x))))

    u = start
    for _ in range(iterations):
        g = jax.grad(divergence)(pixels + xi * u)
        length = jnp.linalg.norm(g, axis=1, keepdims=True)
        u = g / jnp.where(length == 0, 1, length)
    return u


@functools.partial(jax.jit, static_argnames="iterations")
def _exact(params: Params, pixels: jax.Array, key: Key, *, iterations: int) -> jax.Array:
    return virtual_adversarial_perturbation(
        logits, params, pixels, jax.random.split(key, len(pixels)), epsilon=1.0,
        iterations=iterations,
    )  # fmt: skip


def alignment(
    params: Params, pixels: np.ndarray, key: Key, iterations: Sequence[int], xi: float
) -> dict[str, list[float]]:
    """Mean squared cosine to the top eigenvector, over the images, after so many iterations.

    For comparison, a random direction in 64 dimensions has 1/64. All is computed in float64.

    Args:
      params: of one network.
      pixels: `[n, 64]`.
      key: for the noise to begin with, typed.
      iterations: how many to measure, each from the same noise.
      xi: see `by_difference`.

    Returns:
      `{"exact": [...], "difference": [...]}`, one for each of `iterations`.
    """
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        x = jnp.asarray(pixels, jnp.float64)
        wanted = top_eigenvectors(params, x)

        def exact(count: int) -> jax.Array:
            return _exact(params, x, jax.random.clone(key), iterations=count)

        def share(found: jax.Array) -> float:
            return float(np.mean(np.sum(np.asarray(found) * wanted, axis=1) ** 2))

        start = exact(0)
        return {
            "exact": [share(exact(count)) for count in iterations],
            "difference": [
                share(by_difference(params, x, start, iterations=count, xi=xi))
                for count in iterations
            ],
        }
