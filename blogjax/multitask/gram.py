"""The Gram matrix of task gradients, and the gradient that given weights make of them.

What: `gram`, all inner products of K gradients; `combine`, their weighted sum; `check_tasks`,
  `check_weights` and `which_shared`.
Post: https://kexue.fm/archives/8896
Paper: Sener & Koltun 2018, arXiv:1810.04650.
Equations: K_ij = <g_i, g_j> = sum over leaves and entries; |sum_i w_i g_i|^2 = w' K w.
Differences from the post: none. It notes that the inner products are needed once per step only;
  here every method is a function of this matrix and sees nothing of the gradients.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blogjax.core.labels import leaf_name

_PIECE = 2**14  # entries; 32 tasks of them fill a core's cache


def check_tasks(gradients: Any) -> int:
    """Returns the number of tasks, the length of the leading axis that all leaves share.

    Raises:
      ValueError: if a leaf has no leading axis or another length or is not of real numbers, if
        there is no leaf, or no task.
    """
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    if not leaves:
        raise ValueError("no gradients: the tree has no leaves")
    path, first = leaves[0]
    for at, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{leaf_name(at)} is {leaf.dtype}, but gradients are real numbers")
        if jnp.ndim(leaf) < 1:
            raise ValueError(f"{leaf_name(at)} is a scalar: it lacks the leading axis of tasks")
        if leaf.shape[0] != first.shape[0]:
            raise ValueError(
                f"{leaf_name(at)} has {leaf.shape[0]} tasks, but {leaf_name(path)} has "
                f"{first.shape[0]}"
            )
    if first.shape[0] < 1:
        raise ValueError(f"{leaf_name(path)} of shape {first.shape}: at least one task is needed")
    return first.shape[0]


def check_weights(weights: jax.Array, tasks: int) -> None:
    """Raises ValueError if there is not one weight for each task."""
    if weights.shape != (tasks,):
        raise ValueError(f"weights of shape {weights.shape} for {tasks} tasks")


def which_shared(shared: Any, tree: Any) -> Any:
    """A bool for every leaf of the tree.

    Args:
      shared: a pytree of bools, or a prefix of the tree.
      tree: pytree.

    Raises:
      ValueError: if it is no prefix, or holds something else than bools, which would count as true.

    >>> which_shared({"trunk": True, "head": False}, {"trunk": [1.0, 2.0], "head": 3.0})
    {'head': False, 'trunk': [True, True]}
    """
    for leaf in jax.tree.leaves(shared):
        if not isinstance(leaf, bool | np.bool_):
            raise ValueError(f"shared must be bools, got {leaf!r}")
    return jax.tree.broadcast(shared, tree)


def gram(
    gradients: Any, *, shared: Any = True, axis_name: str | Sequence[str] | None = None
) -> jax.Array:
    """Inner products of the gradients of K tasks.

    Args:
      gradients: pytree, leaves `[K, ...]` real, averaged over the data beforehand: the products of
        averages are not averages of products.
      shared: which leaves count: a pytree of bools, or a prefix of the tree.
        Those of a single task's head belong to nobody else, and are left out where it says False.
      axis_name: axes over which the leaves are cut up, entries of one gradient on several devices.
        The products are summed over them. Not the axes of data parallelism, and not needed under
        `jit`, whose arrays are whole.

    Returns:
      `[K, K]`, symmetric, float32 (float64 if a leaf is).

    Numerics: products are formed and summed in float32 or better, bfloat16 leaves included, also
    on devices that multiply matrices in less by default. Norms from 1e-19 to 1e+19 have a square
    in float32; below, a gradient counts as zero.

    Raises:
      ValueError: if leaves lack the axis of tasks or differ in its length, or `shared` does not
        fit; see `check_tasks` and `which_shared`.

    >>> gram({"a": jnp.array([[1.0, 2.0], [0.0, 1.0]]), "b": jnp.array([3.0, 1.0])}).tolist()
    [[14.0, 5.0], [5.0, 2.0]]
    """
    tasks = check_tasks(gradients)
    counted = which_shared(shared, gradients)
    total = jnp.zeros((tasks, tasks), jnp.float32)
    for leaf, counts in zip(jax.tree.leaves(gradients), jax.tree.leaves(counted), strict=True):
        if not counts:
            continue
        total = total + jax.lax.platform_dependent(leaf, cpu=_on_cpu, default=_products)
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    # Exactly symmetric, whatever order the products were summed in.
    return (total + total.T) / 2


def _products(leaf: jax.Array) -> jax.Array:
    """Over the axes as they are: a reshape would gather what is cut up over devices."""
    axes = tuple(range(1, leaf.ndim))
    return jax.lax.dot_general(
        leaf,
        leaf,
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(leaf.dtype, jnp.float32),
    )


def _on_cpu(leaf: jax.Array) -> jax.Array:
    """Of flat rows, a piece at a time: XLA's CPU would transpose the whole leaf into a copy."""
    rows = leaf.reshape(leaf.shape[0], -1)
    pieces = rows.shape[1] // _PIECE
    total = _products(rows[:, pieces * _PIECE :])
    if pieces == 0:
        return total

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + _products(jax.lax.dynamic_slice_in_dim(rows, i * _PIECE, _PIECE, axis=1))

    return jax.lax.fori_loop(0, pieces, add, total)


def combine(gradients: Any, weights: jax.Array, *, shared: Any = True) -> Any:
    """Weighted sum over the tasks.

    Args:
      gradients: pytree, leaves `[K, ...]`.
      weights: `[K]`.
      shared: as in `gram`. A leaf that is not shared is summed without weights: a head gets the
        gradient of its own task, those of the others being zero there.

    Returns:
      Pytree without the axis of tasks, in the gradients' dtypes; summed in float32 or better.

    Numerics: a task of weight 0 counts nothing only where its gradient is finite; 0 times NaN is
    NaN, so that nothing wrong goes unseen.

    Raises:
      ValueError: if there is not one weight for each task, or as `gram`.

    >>> combine({"a": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, jnp.array([1.0, 0.5]))["a"].tolist()
    [2.5, 4.0]
    """
    check_weights(weights, check_tasks(gradients))

    def one(leaf: jax.Array, counts: bool) -> jax.Array:
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        w = (weights if counts else jnp.ones_like(weights)).astype(wide)
        total = jax.lax.dot_general(
            w,
            leaf.astype(wide),
            (((0,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )
        return total.astype(leaf.dtype)

    return jax.tree.map(one, gradients, which_shared(shared, gradients))
