"""Weight decay without a coefficient: the parameters' norm as an auxiliary task.

What: `coefficient_free_weight_decay`, an optax transformation.
Post: https://kexue.fm/archives/8907
Paper: none.
Equations: g <- g + relu(-<g, theta>) / |theta|^2 theta, so that <g, theta> >= 0: a step against g
  does not make |theta| grow, to first order. For updates d = -eta u of an optimiser:
  d <- d - relu(<d, theta>) / |theta|^2 theta.
Differences from the post: its formula lacks the last factor theta.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax


def coefficient_free_weight_decay(
    of: Literal["gradient", "update"] = "gradient",
    *,
    mask: Any | Callable[[Any], Any] = None,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformation:
    """Takes out of a step the part that would make the parameters grow.

    Args:
      of: `"gradient"` stands before the optimiser, `"update"` after it (decoupled, as the decay of
        AdamW is). The two differ in sign.
      mask: pytree of bools like the parameters, or a function of them that gives one, as in
        `optax.add_decayed_weights`: which leaves make up theta. The others pass unchanged.
      axis_name: axes over which the parameters are cut up, if they are.

    Returns:
      A transformation without state; `update` needs `params`.

    Numerics: products are summed in float32 or better. Nothing happens where theta is zero, or
    where the step makes it shorter anyway: then the step passes to the bit. NaN propagates.

    Raises:
      ValueError: if `of` is unknown, or `update` is called without `params`.

    >>> tx = coefficient_free_weight_decay()
    >>> params, gradient = jnp.array([2.0, 0.0]), jnp.array([-1.0, 1.0])
    >>> tx.update(gradient, tx.init(params), params)[0].tolist()
    [0.0, 1.0]
    """
    if of not in ("gradient", "update"):
        raise ValueError(f"of is {of!r}, but must be 'gradient' or 'update'")
    sign = -1 if of == "gradient" else 1

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("coefficient_free_weight_decay needs params: update(g, state, params)")
        product, square = _products(updates, params)
        if axis_name is not None:
            product, square = jax.lax.psum((product, square), axis_name)
        # Not maximum(..., 0): NaN must pass.
        against = jnp.where(sign * product <= 0, 0, product)
        factor = jnp.where(square != 0, against / jnp.where(square != 0, square, 1), 0)

        def one(u: jax.Array, p: jax.Array) -> jax.Array:
            taken = u.astype(factor.dtype) - factor * p.astype(factor.dtype)
            return jnp.where(factor == 0, u, taken.astype(u.dtype))

        return jax.tree.map(one, updates, params), state

    tx = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return tx if mask is None else optax.masked(tx, mask)


def _products(updates: Any, params: Any) -> tuple[jax.Array, jax.Array]:
    product = square = jnp.zeros((), jnp.float32)
    for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        if u.shape != p.shape:
            raise ValueError(f"an update of shape {u.shape} for a parameter of shape {p.shape}")
        wide = jnp.promote_types(jnp.promote_types(u.dtype, p.dtype), jnp.float32)
        p = p.astype(wide)
        product = product + jnp.sum(u.astype(wide) * p)
        square = square + jnp.sum(p * p)
    return product, square
