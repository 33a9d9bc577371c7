"""Splits of a labelled set in which every class keeps its share."""

from collections.abc import Mapping

import numpy as np


def stratified_split(
    labels: np.ndarray, sizes: Mapping[str, int], *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Cuts a set into disjoint splits of given sizes, each with every class in proportion.

    The splits are filled in the order of `sizes`. With `r_c` examples of class `c` left out of
    `r`, a split of size `s` is due `s r_c / r` of them; it gets the whole part, and what is then
    missing to `s` goes one by one to the classes with the largest remainders (Hamilton's method of
    apportionment; of equal remainders the smaller class id first). Members are drawn by chance and
    each split is shuffled, both with `numpy.random.default_rng(seed)`.

    Args:
      labels: `[n]` integers, the classes.
      sizes: name of a split -> its number of examples; together exactly `n`.
      seed: an integer of at least 0.

    Returns:
      Name -> `[size]` int64 indices into `labels`. Together they hold every index once.

    Raises:
      ValueError: if `labels` has another rank than 1, a size is negative, or the sizes do not add
        up to `n`.

    >>> labels = np.array([0] * 6 + [1] * 3)
    >>> {k: np.bincount(labels[v]).tolist() for k, v in
    ...  stratified_split(labels, {"train": 6, "test": 3}).items()}
    {'train': [4, 2], 'test': [2, 1]}
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels have shape {labels.shape}, but one class per example is [n]")
    if min(sizes.values(), default=0) < 0 or sum(sizes.values()) != len(labels):
        raise ValueError(f"sizes {dict(sizes)} do not cut up {len(labels)} examples")
    rng = np.random.default_rng(seed)
    members = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    splits = {}
    for name, size in sizes.items():
        taken = _apportion(size, np.array([len(m) for m in members], np.int64))
        chosen = [m[:k] for m, k in zip(members, taken, strict=True)]
        members = [m[k:] for m, k in zip(members, taken, strict=True)]
        splits[name] = rng.permutation(np.concatenate([np.empty(0, np.int64), *chosen]))
    return splits


def _apportion(size: int, available: np.ndarray) -> np.ndarray:
    """How many of `size` places each class gets; in whole numbers, so that no rounding decides."""
    total = int(available.sum())
    if total == 0:
        return available
    whole, remainder = np.divmod(size * available, total)
    order = np.argsort(-remainder, kind="stable")
    whole[order[: size - whole.sum()]] += 1
    return whole
