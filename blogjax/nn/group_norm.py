"""Group normalisation that fits its number of groups to the channels.

What: `group_count` (how many groups), `GroupNorm` (the layer), `group_norm` (the layer with that
  many groups).
Post: none of its own; a part of every convolutional network here.
Paper: Wu and He 2018, Group Normalization, arXiv:1803.08494.
Equations, over the positions and the channels of one group of one example:
  y = scale (x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) + bias
Differences from `flax.linen.GroupNorm`: the variance is always taken around the mean; E[x^2] -
  E[x]^2, flax's default, loses all digits where the mean is large beside the spread. Means run over
  the positions first and over a group's channels after, which is faster on a CPU.
"""

import math

import flax.linen as nn
import jax
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


class GroupNorm(nn.Module):
    """Group normalisation with exact statistics.

    Args of the call: `x`, `[B, ..., C]` floating. Returns the same shape in `dtype`. Statistics,
    scale and bias are applied in float32 or better also for bfloat16 input; only the result is
    cast. A constant group becomes the bias, with a finite gradient.

    Raises ValueError if `x` has fewer than two axes or `groups` does not divide C.

    Attributes:
      groups: number of groups of neighbouring channels.
      epsilon: added to the variance.
      dtype: dtype of the result; None for what the input and the parameters promote to.
      param_dtype: dtype of the parameters `scale` and `bias`, `[C]`.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
    >>> y, _ = GroupNorm(groups=2).init_with_output(jax.random.key(0), x)
    >>> [round(float(v), 3) for v in y[0]]
    [-1.0, 1.0, -1.0, 1.0]
    """

    groups: int
    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x`; see the class."""
        if x.ndim < 2:
            raise ValueError(f"expected [B, ..., C], not an array of shape {x.shape}")
        b, c = x.shape[0], x.shape[-1]
        if self.groups < 1 or c % self.groups:
            raise ValueError(f"{self.groups} groups do not divide {c} channels (input {x.shape})")
        scale = self.param("scale", nn.initializers.ones, (c,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (c,), self.param_dtype)
        dtype = jnp.result_type(x, scale, bias) if self.dtype is None else self.dtype

        # The long sum is over rows of C numbers. One sum over positions and channels of a group
        # has rows of C / groups, often four, and takes XLA's CPU kernels several times as long.
        def mean(h: jax.Array) -> jax.Array:
            of_group = h.mean(axis=1).reshape(b, self.groups, c // self.groups).mean(axis=-1)
            return jnp.repeat(of_group, c // self.groups, axis=-1)[:, None]

        h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        h = h.reshape(b, math.prod(x.shape[1:-1]), c)
        h = h - mean(h)
        h = h * (jax.lax.rsqrt(mean(jnp.square(h)) + self.epsilon) * scale[None, None])
        h = h + bias[None, None]
        return h.reshape(x.shape).astype(dtype)


def group_norm(
    channels: int,
    *,
    groups: int | None = None,
    name: str | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
) -> GroupNorm:
    """Returns `GroupNorm` with a number of groups that fits `channels`.

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
    return GroupNorm(groups, name=name, dtype=dtype, param_dtype=param_dtype)
