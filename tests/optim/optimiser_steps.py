"""What the tests of several transformations do with them."""

import functools

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
    state, step = tx.init(params), _jitted(tx)
    before, path = step._cache_size(), []
    for grads in sequence:
        params, state = step(params, state, grads)
        path.append(params)
    assert step._cache_size() <= before + 1
    return path, state


@functools.cache
def _jitted(tx):
    """One per transformation, so that a property test which keeps its own compiles it once."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step
