"""What the tests of several transformations do with them."""

import jax
import optax


def run_steps(tx, params, sequence):
    """One jitted step per gradient, compiled once; the last parameters and state."""
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grads in sequence:
        params, state = step(params, state, grads)
    assert step._cache_size() == 1
    return params, state
