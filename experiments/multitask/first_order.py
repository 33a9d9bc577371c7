"""What a step does to each loss to first order, measured in every step of every network.

A step from theta against u changes L_i by -eta <g_i, u> + O(eta^2). So the sign of the cosine of u
and g_i tells whether L_i falls to first order, and how fast the change of L_i vanishes with eta
tells whether there is a first order at all.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.multitask.primary_auxiliary import primary_auxiliary_weights
from blogjax.multitask.task_gradients import combined_gradient, task_gradients
from blogjax.train.task import Batch, Metrics, NonfiniteLeaves, Task

# means(params, batch) -> [2]: losses of the primary and of the auxiliary task.
Means = Callable[[Any, Any], jax.Array]
DIRECTION = "direction"
# Columns of `WatchedState.trace`: cosines of the step's u to three vectors, and a change of loss.
PRIMARY, AUXILIARY, PARAMETERS, CHANGE = range(4)
# A cosine counts as negative from here on; above it is what float32 leaves of zero.
TOLERANCE = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WatchedState:
    """Networks side by side.

    Attributes:
      step: int32 `[]`.
      networks: the state of one network's task, leaves `[N, ...]`.
      trace: float32 `[steps, N, 4]`, see `watched`.
    """

    step: jax.Array
    networks: Any
    trace: jax.Array


def noted() -> optax.GradientTransformation:
    """Passes what comes, and keeps it for `watched`: stands right before the learning rate."""
    return optax.snapshot(DIRECTION, lambda updates: updates)


def cosine(a: Any, b: Any) -> jax.Array:
    """Of two trees; 0 where one of them is zero.

    >>> float(cosine({"x": jnp.array([3.0, 4.0])}, {"x": jnp.array([2.0, 0.0])}))
    0.6000000238418579
    """
    lengths = optax.tree.norm(a) * optax.tree.norm(b)
    zero = lengths == 0  # NaN must pass
    return jnp.where(zero, 0, optax.tree.vdot(a, b) / jnp.where(zero, 1, lengths))


def watched(
    make: Callable[[jax.Array], Task],
    own: Callable[[Batch, jax.Array], Batch],
    means: Means,
    *,
    networks: int,
    replicas: int,
    steps: int,
) -> Task:
    """One task of many, whose state notes what every step did to first order.

    Args:
      make: `make(number) -> Task`, that of one network; the number is traced. Its optimiser has
        `noted()` where the direction is. Its state has `params` and `opt_state`.
      own: `own(batch, number) -> batch`, what that network sees.
      means: `means(params, own batch) -> [2]`.
      networks: how many.
      replicas: networks of equal `number % replicas` begin alike.
      steps: the length of the trace.

    Returns:
      A `Task` with a `WatchedState`. The trace's columns, each on the batch of its step: cosines of
      u to the gradients of the primary and of the auxiliary loss and to the parameters, and the
      true change of the auxiliary loss. Metrics are means over the networks, or sums of counts.
    """
    numbers = jnp.arange(networks)

    def init(key: jax.Array) -> WatchedState:
        drawn = jax.vmap(lambda n: make(n).init(jax.random.fold_in(key, n % replicas)))(numbers)
        return WatchedState(
            jnp.zeros((), jnp.int32), drawn, jnp.zeros((steps, networks, 4), jnp.float32)
        )

    def step(state: WatchedState, batch: Batch, key: jax.Array) -> tuple[WatchedState, Metrics]:
        def one(network: Any, number: jax.Array) -> tuple[Any, Metrics, jax.Array]:
            seen = own(batch, number)
            new, metrics = make(number).step(network, seen, jax.random.fold_in(key, number))
            u = optax.tree.get(new.opt_state, DIRECTION)
            before, gradients, _ = task_gradients(lambda p: means(p, seen), network.params)
            primary, auxiliary = (
                jax.tree.map(lambda leaf, i=i: leaf[i], gradients) for i in (PRIMARY, AUXILIARY)
            )
            row = [
                *(cosine(u, v) for v in (primary, auxiliary, network.params)),
                (means(new.params, seen) - before)[AUXILIARY],
            ]
            return new, metrics, jnp.stack(row).astype(jnp.float32)

        new, metrics, rows = jax.vmap(one)(state.networks, numbers)
        bad: NonfiniteLeaves = metrics.pop("nonfinite")
        over: Metrics = {
            name: jnp.mean(x) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.sum(x)
            for name, x in metrics.items()
        }
        over["nonfinite"] = NonfiniteLeaves(
            jnp.any(bad.flags, axis=0), jnp.all(bad.recoverable), bad.paths
        )
        trace = state.trace.at[state.step].set(rows)
        return WatchedState(state.step + 1, new, trace), over

    return Task(init=init, step=step)


def rises(means: Means, params: Any, batches: Any, sizes: Sequence[float]) -> dict[str, np.ndarray]:
    """How the auxiliary loss changes with the size of a step, where the two tasks disagree.

    Args:
      means: as in `watched`.
      params: of N networks, leaves `[N, ...]`.
      batches: leaves `[N, n, ...]`, n batches for each of them.
      sizes: step sizes eta, `[m]`.

    Returns:
      `primary` and `projected`, float64 `[k, m]`: changes of the auxiliary loss after a step of eta
      against the primary gradient, and against its projection, on those k of the `N n` batches
      where the primary gradient has a negative product with the auxiliary one.
    """
    with jax.enable_x64(True):
        start, seen = (
            jax.tree.map(
                lambda x: jnp.asarray(x, jnp.float64 if x.dtype.kind == "f" else x.dtype), tree
            )
            for tree in (params, batches)
        )
        etas = jnp.asarray(np.array(sizes, np.float64))

        def of(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            def changes(direction: Any) -> jax.Array:
                def at(eta: jax.Array) -> jax.Array:
                    moved = jax.tree.map(lambda p, d: p - eta * d, params, direction)
                    return (means(moved, batch) - means(params, batch))[AUXILIARY]

                return jax.vmap(at)(etas)

            found = combined_gradient(lambda p: means(p, batch), params, primary_auxiliary_weights)
            primary = jax.grad(lambda p: means(p, batch)[PRIMARY])(params)
            return found.gram[PRIMARY, AUXILIARY], changes(primary), changes(found.gradient)

        # Batch after batch: all at once their activations would fill the cache many times over.
        each = jax.jit(jax.vmap(lambda p, b: jax.lax.map(lambda one: of(p, one), b)))
        product, primary, projected = jax.device_get(each(start, seen))
    disagree = product < 0
    return {"primary": primary[disagree], "projected": projected[disagree]}


def slope(sizes: Sequence[float], changes: Any) -> float:
    """Of the logarithm of changes `[m]` over that of step sizes `[m]`, by least squares.

    >>> round(slope([1.0, 0.5, 0.25], [3.0, 1.5, 0.75]), 6)
    1.0
    """
    x, y = (np.log(np.array(values, np.float64)) for values in (sizes, changes))
    return float(np.polyfit(x, y, 1)[0])
