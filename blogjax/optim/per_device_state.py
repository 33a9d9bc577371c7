"""Keeps the state of a transformation apart on every device.

What: a wrapper for any optax transformation that marks its state as each device's own, so that the
  training loop, checkpoints and meshes split it over devices instead of taking it for replicated.
Post: https://kexue.fm/archives/9473 (for the workers of distributed Lion, see `majority_vote`)
Paper: Liu et al. 2024 (arXiv 2404.00438)
Equations: none.
Differences from the post: the post trains on one worker.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from blogjax.core.per_device import PerDevice


def per_device_state(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner` so that its state may differ between devices.

    The state is `PerDevice(inner's state)`, every leaf with a leading axis. `init` makes one row;
    inside a mapped `update` there is one row, this device's. Outside there are as many as devices:

    * `train.loop.fit` with `view="shard_map"` or `"pmap"` sees to it.
    * Own `jax.shard_map`: take `core.per_device.spread(state, devices)` once, and
      `core.per_device.partition_specs(state, axis_name)` as `in_specs` and `out_specs`.
    * Own `jax.pmap`: replicate the state as usual.

    Without these a `shard_map` that is told the state is replicated believes it, and a checkpoint
    keeps the state of one device.

    What `inner` returns differs between devices too; something behind it in the chain must make it
    the same, such as `majority_vote`.

    Args:
      inner: any transformation; extra arguments of `update` are passed on.

    Raises:
      ValueError: if `update` does not see exactly one row.

    >>> import jax.numpy as jnp, optax
    >>> tx = per_device_state(optax.trace(0.9))
    >>> tx.init({"w": jnp.zeros(3)}).rows.trace["w"].shape
    (1, 3)
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> Any:
        return PerDevice(jax.tree.map(lambda x: jnp.asarray(x)[None], inner.init(params)))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        def own(x: jax.Array) -> jax.Array:
            if x.shape[0] != 1:
                raise ValueError(
                    f"per_device_state must see 1 row of its state, but sees {x.shape[0]}: call "
                    "update inside shard_map or pmap, with the PerDevice leaves split"
                )
            return x[0]

        updates, new = inner.update(updates, jax.tree.map(own, state.rows), params, **extra_args)
        return updates, PerDevice(jax.tree.map(lambda x: jnp.asarray(x)[None], new))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
