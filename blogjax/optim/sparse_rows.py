"""Lazy rows: an embedding row without a gradient is left alone by any optimiser.

What: a wrapper for any optax transformation. In the leaves it is told of, a row (an index of the
  first axis) whose gradient is exactly zero keeps its parameters and its state, bit for bit.
Post: https://kexue.fm/archives/9736
Equations: t_i = any_j(g_ij != 0); (u, s') = inner(g, s); row i becomes (u_i, s'_i) if t_i, else
  (0, s_i).
Differences from the post: the post leaves out the rows in Lion and Tiger only; here the rule is
  made of the incoming gradient and the state's shapes, so it serves every transformation. The
  state is the wrapped transformation's own: a checkpoint written without the wrapper loads with it.

Why: a sign does not die out with the momentum below it. Between two visits of a rare token, Lion
and Tiger move its row by the learning rate in every step, always the same way, until weight decay
holds it at +-1/weight_decay. Momentum and weight decay of any other optimiser act on such rows too,
only less.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.core.per_device import holds_per_device
from blogjax.optim.checks import check_floating, check_updates, leaf_name

Path = tuple[Any, ...]


def _flags_by_path(is_row_sparse: Any, tree: Any) -> dict[Path, bool]:
    """One flag per leaf of `tree`, from a tree of flags that may end above the leaves."""
    flags = is_row_sparse(tree) if callable(is_row_sparse) else is_row_sparse
    try:
        full = jax.tree.map(lambda flag, below: jax.tree.map(lambda _: flag, below), flags, tree)
    except ValueError as error:
        raise ValueError(
            f"is_row_sparse is no prefix of the tree of parameters: {jax.tree.structure(flags)} "
            f"against {jax.tree.structure(tree)}"
        ) from error
    found = {}
    for (path, x), flag in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(full), strict=True
    ):
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"is_row_sparse at {leaf_name(path)} must be a bool, got {flag!r}")
        if flag and jnp.ndim(x) == 0:
            raise ValueError(f"{leaf_name(path)} is marked as row-sparse, but a scalar has no rows")
        found[path] = bool(flag)
    return found


def _touched(grad: jax.Array) -> jax.Array:
    """Tells `[V]` which rows hold anything but zeros; NaN is something."""
    return jnp.any(grad != 0, axis=tuple(range(1, grad.ndim)))


def _select_rows(rows: jax.Array, new: jax.Array, old: Any) -> jax.Array:
    """Rows of `new` where `rows` is set, those of `old` elsewhere."""
    return jnp.where(rows.reshape(rows.shape + (1,) * (new.ndim - 1)), new, old)


def _is_row_shaped(path: Path, shape: tuple[int, ...], param: tuple[int, ...]) -> bool:
    """Whether a state leaf that belongs to a parameter has one entry, or row, per row of it."""
    if shape == param:
        return True
    if shape == param[:1] and param[0] in param[1:]:
        raise ValueError(
            f"state {leaf_name(path)} of shape {shape}: rows or columns of a parameter of shape "
            f"{param}? Factored statistics of a square leaf cannot be kept by row"
        )
    return len(shape) > 0 and shape[0] == param[0] and all(n == 1 for n in shape[1:])


def lazy_rows(
    inner: optax.GradientTransformation,
    is_row_sparse: optax.Params | Callable[[optax.Params], Any],
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner` so that rows without a gradient keep parameters and state untouched.

    `inner` sees everything. Then, in every leaf marked by `is_row_sparse`, the rows whose incoming
    gradient is exactly zero get the update -0.0 (which leaves every float as it was when added,
    -0.0 itself included) and the state they had. Rows that have a gradient, and leaves not marked,
    get just what `inner` gives them. A row with NaN has a gradient.

    What must be inside and what outside: the rows are told by the gradient that comes in, so weight
    decay, momentum and the like belong inside `inner`; anything before the wrapper in a chain must
    keep zeros zero (clipping does, added decay or noise do not). Accumulation belongs outside,
    `accumulate(lazy_rows(tx, ...), k)`: inside, a row is lost that was touched by an earlier
    microbatch of the window but not by the last. Gradients must be averaged over devices before.

    Which state is kept by row: a state leaf belongs to the parameter whose path is the end of its
    own (the longest, if several fit), which is so for moments and accumulators in optax, also
    within `chain`, `masked`, `partition` and `inject_hyperparams`. It is kept by row if it has the
    parameter's shape, or `[V]` or `[V, 1, ..., 1]` with the parameter's V. Everything else goes on
    with every step: step counts (so bias correction and schedules count steps, not visits), column
    statistics of factored optimisers, and all state of `optax.flatten`, whose single vector has no
    rows: do not use it inside.

    Rows that never lack a gradient gain nothing: an embedding tied to a softmax is dense.

    Numerics: nothing is computed but the test for zero; kept state has the dtype it came with.

    Args:
      inner: any transformation; extra arguments of `update` are passed on.
      is_row_sparse: tree of bools like the parameters', or ending above their leaves, or a function
        that makes one from a tree with the parameters' structure and shapes. Marked leaves are
        `[V, ...]`; each index of the first axis is a row.

    Returns:
      A transformation whose state is `inner`'s.

    Raises:
      ValueError: if `is_row_sparse` does not fit the tree, marks a scalar, or marks a leaf with
        state of which rows and columns cannot be told apart; if gradients and parameters differ; if
        `inner` holds a `per_device_state`.
      TypeError: if a flag is not a bool or a gradient is not real floating.

    >>> import jax.numpy as jnp, optax
    >>> tx = lazy_rows(optax.lion(0.1), {"embedding": True, "kernel": False})
    >>> params = {"embedding": jnp.ones((2, 1)), "kernel": jnp.ones((2, 1))}
    >>> grads = {k: jnp.array([[0.0], [1.0]]) for k in params}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> params["embedding"].ravel().tolist()  # without a gradient there is no decay either
    [1.0, 0.8999000191688538]
    >>> params["kernel"].ravel().tolist()
    [0.9998999834060669, 0.8999000191688538]
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> Any:
        check_floating(params)
        if jax.tree.leaves(params):  # `optax.tree.map_params` calls with a stand-in that has none
            _flags_by_path(is_row_sparse, params)
        state = inner.init(params)
        if holds_per_device(state):
            raise ValueError(
                "lazy_rows must stand inside per_device_state, not around it: devices have "
                "gradients for different rows, and would move their parameters apart"
            )
        return state

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        check_updates(updates, updates if params is None else params)
        flags = _flags_by_path(is_row_sparse, updates)
        grads = dict(jax.tree_util.tree_leaves_with_path(updates))
        rows = {path: _touched(grads[path]) for path, flag in flags.items() if flag}

        def keep_update(path: Path, update: jax.Array) -> jax.Array:
            if path not in rows:
                return update
            return _select_rows(rows[path], update, jnp.asarray(-0.0, update.dtype))

        def keep_state(path: Path, new: Any, old: Any) -> Any:
            ends = (path[i:] for i in range(len(path) + 1))
            owner = next((end for end in ends if end in grads), None)
            if owner not in rows or not _is_row_shaped(path, jnp.shape(old), grads[owner].shape):
                return new
            return _select_rows(rows[owner], new.astype(old.dtype), old)

        new_updates, new_state = inner.update(updates, state, params, **extra_args)
        return (
            jax.tree_util.tree_map_with_path(keep_update, new_updates),
            jax.tree_util.tree_map_with_path(keep_state, new_state, state),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
