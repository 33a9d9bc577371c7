"""Group normalisation that fits its number of groups to the channels.

What: `group_count` (how many groups) and `group_norm` (flax's layer with that many).
Post: none of its own; a part of every convolutional network here.
Paper: Wu and He 2018, Group Normalization, arXiv:1803.08494.
Equations, over the positions and the channels of one group of one example:
  y = scale (x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) + bias
Differences from `flax.linen.GroupNorm`'s defaults: the variance is taken around the mean instead of
  as E[x^2] - E[x]^2, which loses all digits where the mean is large beside the spread. Inside a
  U-Net's training step on a CPU the two take the same time.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike


def group_count(channels: int, maximum: int = 32, smallest: int = 4) -> int:
    """Returns the largest divisor of `channels` that makes sensible groups.

    That is the largest `g <= maximum` dividing `channels` with at least `smallest` channels in each
    group, and 1 where there is none. From 128 channels upwards, multiples of 32 get the 32 groups
    of the DDPM paper. Fewer channels get fewer groups: a group of a single channel would erase that
    channel's mean, and with it how bright an example is.

    Args:
      channels: number of channels, at least 1.
      maximum: at most so many groups, at least 1.
      smallest: a group has at least so many channels, at least 1.

    Returns:
      The number of groups, a divisor of `channels`.

    Raises:
      ValueError: if an argument is less than 1.

    >>> [group_count(c) for c in (256, 128, 64, 32, 48, 2, 37)]
    [32, 32, 16, 8, 12, 1, 1]
    """
    if min(channels, maximum, smallest) < 1:
        raise ValueError(
            f"channels, maximum and smallest must be at least 1, not {channels}, {maximum}, "
            f"{smallest}"
        )
    divisors = [g for g in range(1, maximum + 1) if channels % g == 0]
    return max((g for g in divisors if channels // g >= smallest), default=1)


def group_norm(
    channels: int,
    *,
    groups: int | None = None,
    name: str | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
) -> nn.GroupNorm:
    """Returns flax's `GroupNorm` with exact statistics and a fitting number of groups.

    Statistics, scale and bias are applied in float32 or better also for bfloat16 input; only the
    result is cast to `dtype`. A constant group becomes the bias, with a finite gradient.

    Args:
      channels: C of the input `[B, ..., C]`.
      groups: number of groups, a divisor of C; None for `group_count(C)`.
      name: of the layer, for its parameters `scale` and `bias`, `[C]`.
      dtype: dtype of the result; None for what the input and the parameters promote to.
      param_dtype: dtype of the parameters.

    Returns:
      A linen module, `[B, ..., C] -> [B, ..., C]`.

    Raises:
      ValueError: if `groups` does not divide `channels`.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
    >>> y, _ = group_norm(4, groups=2).init_with_output(jax.random.key(0), x)
    >>> [round(float(v), 3) for v in y[0]]
    [-1.0, 1.0, -1.0, 1.0]
    """
    groups = group_count(channels) if groups is None else groups
    if groups < 1 or channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels")
    return nn.GroupNorm(
        groups, use_fast_variance=False, name=name, dtype=dtype, param_dtype=param_dtype
    )
