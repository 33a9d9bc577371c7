"""Combiners as an optax transformation.

What: `aggregate`, which eats a leading axis of tasks, so that
  `optax.chain(aggregate(min_norm_weights), lion(1e-4))` is an optimiser for Jacobians.
Post: https://kexue.fm/archives/8896
Paper: Sener & Koltun 2018, arXiv:1810.04650.
Equations: u = sum_i w_i g_i, w = combiner(gram(g)).
Differences from the post: none.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blogjax.core.labels import leaf_name
from blogjax.core.random import Key, split_keys
from blogjax.multitask.combiner import Combiner
from blogjax.multitask.gram import combine, gram


class AggregateState(NamedTuple):
    """The key that the next call draws from; None for combiners that do not draw."""

    key: Key | None


def aggregate(
    combiner: Combiner,
    *,
    shared: Any = True,
    axis_name: str | Sequence[str] | None = None,
    seed: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Reduces gradients `[K, ...]` of K tasks to one, the first link of a chain.

    Args:
      combiner: see `multitask.combiner`; options are bound with `functools.partial`.
      shared: as in `multitask.gram`: leaves that count and are weighted. The others are summed.
      axis_name: axes of data parallelism; the gradients are averaged over them before anything is
        multiplied. None where they are averaged already, and under `jit`.
      seed: for combiners that draw; the state then has a key, a new one in every step.

    Returns:
      A transformation. `update(gradients, state, params=None, *, losses=None)` takes leaves
      `[K, ...]`, and the losses `[K]` for combiners that look at them, and returns leaves `[...]`.
      `init` takes the parameters, without the axis.

    Raises:
      ValueError: by `update`, if the axis of tasks is missing or of different lengths, or a leaf
        without it has another shape than its parameter.

    >>> from blogjax.multitask.min_norm import min_norm_weights
    >>> tx = optax.chain(aggregate(min_norm_weights), optax.sgd(1.0))
    >>> params = jnp.zeros(2)
    >>> gradients = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> tx.update(gradients, tx.init(params), params)[0].tolist()
    [-0.5, -0.5]
    """

    def init(params: Any) -> Any:
        del params
        return AggregateState(None if seed is None else jax.random.key(seed))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        losses: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        del extra
        if params is not None:
            _check_shapes(updates, params)
        key, following = None, None
        if state.key is not None:
            following, key = split_keys(state.key)
        if axis_name is not None:
            updates, losses = jax.lax.pmean((updates, losses), axis_name)
        weights = combiner(gram(updates, shared=shared), key=key, losses=losses)
        return combine(updates, weights, shared=shared), AggregateState(following)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_shapes(updates: Any, params: Any) -> None:
    def one(path: Any, update: jax.Array, param: jax.Array) -> None:
        if jnp.shape(update)[1:] != jnp.shape(param):
            raise ValueError(
                f"{leaf_name(path)} has updates of shape {jnp.shape(update)} for a "
                f"parameter of shape {jnp.shape(param)}; a leading axis of tasks is needed"
            )

    jax.tree_util.tree_map_with_path(one, updates, params)
