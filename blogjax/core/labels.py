"""Labels for the leaves of a tree, by which optimisers treat them differently."""

from collections.abc import Callable, Collection
from typing import Any

import jax

Labels = Any | Callable[[Any], Any]


def leaf_name(path: Any) -> str:
    """The path of a leaf in words, as in `block/kernel`; `(root)` where the tree is one array.

    >>> import jax
    >>> [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path({"a": [1, 2]})]
    ['a/0', 'a/1']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"


def resolve_labels(labels: Labels, tree: Any, known: Collection[str]) -> Any:
    """The tree of labels that belongs to `tree`.

    Args:
      labels: a tree of strings with the structure of `tree`, or a function that makes one from it.
      tree: pytree, of parameters say.
      known: the labels that exist.

    Returns:
      A tree of strings.

    Raises:
      ValueError: if the structures differ, or at a label that is not known, naming its leaf.

    >>> resolve_labels({"w": "weigth"}, {"w": 1.0}, ["weight"])
    Traceback (most recent call last):
        ...
    ValueError: w is labelled 'weigth', but must be one of ['weight']
    """
    named = labels(tree) if callable(labels) else labels
    structures = jax.tree.structure(named), jax.tree.structure(tree)
    if structures[0] != structures[1]:
        raise ValueError(f"labels {structures[0]} for a tree of structure {structures[1]}")
    for path, label in jax.tree_util.tree_leaves_with_path(named):
        if label not in known:
            raise ValueError(
                f"{leaf_name(path)} is labelled {label!r}, but must be one of {list(known)}"
            )
    return named
