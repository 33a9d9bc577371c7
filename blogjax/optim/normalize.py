"""Gradients of norm one, and gradients of mean zero.

What: transformations that divide a gradient by its norm, over the whole tree, per leaf or per row,
  and one that takes its mean away.
Post: https://kexue.fm/archives/8896 (on gradients of several tasks, each divided by its norm)
Papers: Yong et al. 2020 (arXiv 2004.01461) for centralisation
Equations: u = g / (|g| + eps), u = 0 where g = 0; u = g - mean_inputs(g).
Differences from the post: none in the formula, with eps = 0. Differences from
  `optax.normalize_by_update_norm`: its eps is not 0, so a gradient of 1e-6 is halved and a smaller
  one stays small; without it a zero gradient is NaN; squares under- and overflow float32 (a
  gradient of 1e-30 gives 0, one of 1e20 too); bfloat16 leaves are squared in bfloat16.
  Difference from `optax.centralize`: that takes the mean over all axes but the first, which for a
  linen kernel `[..., in, out]` runs over the outputs; the paper's runs over the inputs.

The norm of a sum is not the sum of norms: average over devices, and accumulate, before.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from blogjax.core.norms import at_least_float32, power_of_two
from blogjax.optim.checks import check_at_least, check_floating, check_updates, leaf_name

Scope = Literal["global", "leaf", "row"]


def _normalize_together(leaves: list[jax.Array], eps: Any, by_row: bool) -> list[jax.Array]:
    """Divides by one norm for all leaves, or of one leaf by that of each row."""

    def over(reduce: Any, x: jax.Array) -> jax.Array:
        return reduce(x, axis=tuple(range(1, x.ndim)), keepdims=True) if by_row else reduce(x)

    wide = at_least_float32(leaves)
    largest = [over(jnp.max, jnp.abs(x)) for x in wide if x.size]
    if not largest:
        return leaves
    top = largest[0] if by_row else jnp.max(jnp.stack(jnp.broadcast_arrays(*largest)))
    # Division by a power of two is exact: no square under- or overflows, and a gradient times 2^k
    # gives the same bits.
    power = power_of_two(top)
    something = ~(top < jnp.finfo(top.dtype).tiny)  # NaN is something
    scaled = [x / power.astype(x.dtype) for x in wide]
    norm = jnp.sqrt(sum(over(jnp.sum, x * x).astype(top.dtype) for x in scaled))
    norm = norm + 0 * top  # NaN where there is an infinity, which alone would leave zeros
    # Where there is something, its largest entry is now in [1, 2) and so the norm at least 1.
    divisor = jnp.where(something, norm + eps / power, 1)
    return [
        jnp.where(something, x / divisor.astype(x.dtype), 0).astype(leaf.dtype)
        for x, leaf in zip(scaled, leaves, strict=True)
    ]


def normalize_gradients(
    scope: Scope = "global", *, eps: jax.typing.ArrayLike = 0.0
) -> optax.GradientTransformation:
    """Divides gradients by their Euclidean norm; zero stays zero.

    `u = g / (|g| + eps)`, where |g| is the norm of

    - "global": all entries of all leaves together;
    - "leaf": each leaf by itself;
    - "row": each index of a leaf's first axis by itself (a row of an embedding). Leaves with fewer
      than two axes count as one row: for a bias, "row" is "leaf".

    Numerics: statistics are in float32 or better, the result has the gradient's dtype. With eps = 0
    the result does not depend on the gradient's scale, to the last bit for powers of two: entries
    are divided by a power of two before they are squared, so 1e-30 and 1e+30 are as good as 1. What
    has no entry above 1.2e-38 (float32's smallest normal number) counts as zero and gives 0. NaN or
    infinity makes NaN of all that shares its norm. Not meant to be differentiated through.

    Args:
      scope: what shares one norm.
      eps: at least 0, a number or a traced scalar; with eps > 0 gradients far below it fade out.

    Returns:
      A stateless transformation.

    Raises:
      ValueError: if `scope` is unknown, eps is negative, or gradients and parameters differ.
      TypeError: at a gradient that is not real floating.

    >>> import jax.numpy as jnp
    >>> grads = {"w": jnp.array([[3.0, 4.0], [0.0, 0.0]]), "b": jnp.array([12.0])}
    >>> for scope in ("global", "leaf", "row"):
    ...     tx = normalize_gradients(scope)
    ...     u, _ = tx.update(grads, tx.init(grads))
    ...     print(scope, [f"{x:.3f}" for x in [*u["w"][0], *u["b"]]])
    global ['0.231', '0.308', '0.923']
    leaf ['0.600', '0.800', '1.000']
    row ['0.600', '0.800', '1.000']
    """
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r} is unknown; valid: {', '.join(get_args(Scope))}")
    check_at_least("eps", eps, 0)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        check_updates(updates, updates if params is None else params)
        leaves, structure = jax.tree.flatten(updates)
        if scope == "global":
            new = _normalize_together(leaves, eps, by_row=False)
        else:
            rows = scope == "row"
            new = [_normalize_together([x], eps, rows and x.ndim > 1)[0] for x in leaves]
        return jax.tree.unflatten(structure, new), state

    return optax.GradientTransformation(_init_fn, update_fn)


def centralize_gradients(output_axis: int = -1) -> optax.GradientTransformation:
    """Subtracts from each output's gradient its mean over the inputs.

    `u = g - mean(g)`, the mean over all axes but `output_axis`, one per output: the columns of a
    linen kernel `[in, out]` or `[height, width, in, out]` then have mean zero, and so the mean of
    every output's weights stays what it was. Leaves with fewer than two axes pass as they are. For
    an embedding `[V, d]` this ties all rows together; leave it out with `optax.masked`.

    Combine with `normalize_gradients` in `optax.chain`, this first.

    Numerics: means are in float32 or better, the result has the gradient's dtype. NaN stays in its
    output.

    Args:
      output_axis: the axis that is kept; -1 in linen, 0 in torch's layout.

    Returns:
      A stateless transformation.

    Raises:
      ValueError: if a leaf with two axes or more has no such axis, naming it, or gradients and
        parameters differ.
      TypeError: at a gradient that is not real floating.

    >>> import jax.numpy as jnp
    >>> tx = centralize_gradients()
    >>> grads = {"kernel": jnp.array([[1.0, 2.0], [3.0, 8.0]]), "bias": jnp.ones(2)}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> updates["kernel"].tolist(), updates["bias"].tolist()
    ([[-1.0, -3.0], [1.0, 3.0]], [1.0, 1.0])
    """

    def centralize(path: Any, g: jax.Array) -> jax.Array:
        if g.ndim < 2:
            return g
        if not -g.ndim <= output_axis < g.ndim:
            raise ValueError(
                f"gradient {leaf_name(path)} of shape {g.shape} has no axis {output_axis}"
            )
        others = tuple(i for i in range(g.ndim) if i != output_axis % g.ndim)
        wide = at_least_float32(g)
        return (wide - jnp.mean(wide, axis=others, keepdims=True)).astype(g.dtype)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        check_updates(updates, updates if params is None else params)
        return jax.tree_util.tree_map_with_path(centralize, updates), state

    return optax.GradientTransformation(_init_fn, update_fn)


def _init_fn(params: optax.Params) -> optax.EmptyState:
    check_floating(params)
    return optax.EmptyState()
