"""What the tests of several transformations do with them."""

import jax
import numpy as np
import optax


def normal(seed, *shape):
    """Normal numbers in float64."""
    return np.random.default_rng(seed).normal(size=shape)


def run_steps(tx, params, sequence):
    """One jitted step per gradient, compiled once; the last parameters and state."""
    path, state = path_of_steps(tx, params, sequence)
    return path[-1] if path else params, state


def path_of_steps(tx, params, sequence):
    """One jitted step per gradient, compiled once; the parameters after each, the last state."""
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    path = []
    for grads in sequence:
        params, state = step(params, state, grads)
        path.append(params)
    assert step._cache_size() == 1
    return path, state
