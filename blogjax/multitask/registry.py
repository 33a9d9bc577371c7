"""The combiners by name, for configs and for tables of all of them.

What: `COMBINERS` and `named_combiner`.
Post: https://kexue.fm/archives/8896
Paper: see each combiner's file.
Equations: none of its own.
Differences from the post: none.
"""

import functools
from typing import Any

from blogjax.multitask.cagrad import cagrad_weights
from blogjax.multitask.combiner import Combiner
from blogjax.multitask.gradient_normalized import gradient_normalized_weights
from blogjax.multitask.min_norm import min_norm_weights
from blogjax.multitask.pcgrad import pcgrad_weights
from blogjax.multitask.primary_auxiliary import primary_auxiliary_weights
from blogjax.multitask.upgrad import upgrad_weights

# Those that need nothing but a Gram matrix, and a key if they draw. `mixed_weights` must be told
# which tasks are primary, and is bound with `functools.partial`.
COMBINERS: dict[str, Combiner] = {
    "min_norm": min_norm_weights,
    "gradient_normalized": gradient_normalized_weights,
    "primary_auxiliary": primary_auxiliary_weights,
    "pcgrad": pcgrad_weights,
    "cagrad": cagrad_weights,
    "upgrad": upgrad_weights,
}


def named_combiner(name: str, **options: Any) -> Combiner:
    """Returns the combiner of that name, with options bound.

    Args:
      name: a key of `COMBINERS`.
      **options: keyword arguments of the combiner, such as `c` of `cagrad_weights`.

    Raises:
      ValueError: if there is no such combiner, listing those there are.

    >>> import jax.numpy as jnp
    >>> named_combiner("min_norm", normalize="l2")(jnp.diag(jnp.array([1.0, 4.0]))).tolist()
    [0.5, 0.25]
    >>> named_combiner("max_norm")
    Traceback (most recent call last):
        ...
    ValueError: combiner 'max_norm' is unknown; valid: min_norm, gradient_normalized, \
primary_auxiliary, pcgrad, cagrad, upgrad
    """
    if name not in COMBINERS:
        raise ValueError(f"combiner {name!r} is unknown; valid: {', '.join(COMBINERS)}")
    return functools.partial(COMBINERS[name], **options) if options else COMBINERS[name]
