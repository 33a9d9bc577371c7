"""A plain Flax loop as a user of optax writes it, for an environment that has only the wheel.

    python -I -W error train.py PARAMETERS.npz

Trains a small classifier with Lion in five compositions of optax, each under jit, pmap and a mesh
that splits batch and parameters; under jit once more with optax's own Lion. Writes the parameters
at the end, and prints what `test_wheel.py` looks at as one line of JSON.
"""

import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import jax_utils
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import blogjax
from blogjax.optim.lion import from_adamw, lion

STEPS, BATCH = 40, 64
RATES = from_adamw(0.03, weight_decay=0.01)


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.tanh(nn.Dense(32)(x)))


def points():
    """Points of the plane, labelled by their quadrant."""
    x = np.random.default_rng(0).normal(size=(STEPS * BATCH, 2)).astype(np.float32)
    return x, (x > 0) @ np.array([1, 2])


def compositions(lion):
    """Every one of optax's ways to wrap a transformation, around this Lion."""

    def kernels(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    def biases(params):
        return jax.tree.map(lambda p: p.ndim == 1, params)

    def labels(params):
        return jax.tree.map(lambda p: "lion" if p.ndim > 1 else "sgd", params)

    clipped = optax.chain(optax.clip_by_global_norm(0.1), lion(**RATES))
    schedule = optax.cosine_decay_schedule(0.006, STEPS)
    return {
        "chain": clipped,
        "inject_hyperparams": optax.inject_hyperparams(lion)(schedule, weight_decay=0.1),
        "multi_transform": optax.multi_transform(
            {"lion": lion(**RATES), "sgd": optax.sgd(0.1)}, labels
        ),
        "masked": optax.chain(
            optax.masked(lion(**RATES), kernels), optax.masked(optax.sgd(0.1), biases)
        ),
        "MultiSteps": optax.MultiSteps(clipped, 2),
    }


def loss(params, x, y):
    logits = Classifier().apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()  # pyright: ignore


def step(state, x, y, axis=None):
    grads = jax.grad(loss)(state.params, x, y)
    if axis is not None:
        grads = jax.lax.pmean(grads, axis)
    return state.apply_gradients(grads=grads)


def under_jit(state, batches):
    train = jax.jit(step, donate_argnums=0)
    for x, y in batches:
        state = train(state, x, y)
    return state


def under_pmap(state, batches):
    train = jax.pmap(lambda *args: step(*args, axis="batch"), axis_name="batch", donate_argnums=0)
    state = jax_utils.replicate(state)
    for x, y in batches:
        state = train(state, x.reshape(8, -1, 2), y.reshape(8, -1))
        # With more devices than cores, steps that queue up can lock XLA's CPU collectives.
        jax.block_until_ready(state)
    return jax_utils.unreplicate(state)


def on_a_mesh(state, batches):
    """The batch over four devices, the last axis of every parameter over two."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

    def split(p):
        spec = PartitionSpec(*[None] * (p.ndim - 1), "model")
        return jax.device_put(p, NamedSharding(mesh, spec))

    params = jax.tree.map(split, state.params)
    state = TrainState.create(apply_fn=None, params=params, tx=state.tx)
    assert is_split(state)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    train = jax.jit(step, donate_argnums=0)
    for batch in batches:
        state = train(state, *jax.device_put(batch, rows))
        jax.block_until_ready(state)
    assert is_split(state)
    return state


def is_split(state):
    large = [p for p in jax.tree.leaves((state.params, state.opt_state)) if p.ndim]
    return all("model" in getattr(p.sharding, "spec", ()) for p in large)


def main(path):
    x, y = points()
    batches = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)]
    params = jax.jit(Classifier().init)(jax.random.key(0), x[:1])["params"]
    views = {"jit": under_jit, "pmap": under_pmap, "mesh": on_a_mesh}
    runs = [("blogjax", name, view) for name in compositions(lion) for view in views]
    runs += [("optax", name, "jit") for name in compositions(optax.lion)]
    evaluate, losses, trained = jax.jit(loss), {}, {}
    for whose, name, view in runs:
        tx = compositions(lion if whose == "blogjax" else optax.lion)[name]
        own = jax.tree.map(jnp.copy, params)  # the step takes its parameters' memory
        state = views[view](TrainState.create(apply_fn=None, params=own, tx=tx), batches)
        after = jax.device_get(state.params)
        losses[f"{whose} {name} {view}"] = float(evaluate(after, x, y))
        trained[f"{whose} {name} {view}"] = np.concatenate(
            [p.ravel() for p in jax.tree.leaves(after)]
        )
    np.savez(path, **trained)
    print(
        json.dumps(
            {
                "blogjax": blogjax.__file__,
                "devices": jax.device_count(),
                "before": float(evaluate(params, x, y)),
                "after": losses,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
