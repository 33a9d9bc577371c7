"""Halving and doubling the resolution of a feature map.

What: `space_to_depth` and `depth_to_space` (functions, inverse to each other), `Downsample` and
  `Upsample` (modules).
Post: none of its own; the two ways between the levels of a U-Net.
Paper: Ho, Jain and Abbeel 2020, arXiv:2006.11239 ('strided'); Shi et al. 2016, arXiv:1609.05158
  ('space_to_depth', there called sub-pixel convolution).
Differences from the paper: 'space_to_depth' looks at 2 x 2 pixels instead of 3 x 3. It is one
  matrix product, cheaper on a CPU than the convolution.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Method = Literal["space_to_depth", "strided"]
METHODS: tuple[Method, ...] = ("space_to_depth", "strided")


def space_to_depth(x: jax.Array, block: int = 2) -> jax.Array:
    """Moves each square of `block` x `block` pixels into the channels of one pixel.

    `out[b, i, j, (p * block + q) * C + c] = x[b, i * block + p, j * block + q, c]`.

    Args:
      x: `[B, H, W, C]`, any dtype.
      block: side of a square; divides H and W.

    Returns:
      `[B, H / block, W / block, block^2 C]`, the same numbers in the same dtype.

    Raises:
      ValueError: if `x` has not four axes, or `block` is less than 1 or does not divide H and W.

    >>> import jax.numpy as jnp
    >>> space_to_depth(jnp.arange(4).reshape(1, 2, 2, 1)).tolist()
    [[[[0, 1, 2, 3]]]]
    """
    if x.ndim != 4:
        raise ValueError(f"expected images [B, H, W, C], not an array of shape {x.shape}")
    b, h, w, c = x.shape
    if block < 1 or h % block or w % block:
        raise ValueError(
            f"a height and width of {h} and {w} cannot be divided into blocks of {block}"
        )
    x = x.reshape(b, h // block, block, w // block, block, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // block, w // block, block * block * c)


def depth_to_space(x: jax.Array, block: int = 2) -> jax.Array:
    """Spreads the channels of each pixel over a square of pixels; inverts `space_to_depth`.

    Args:
      x: `[B, H, W, block^2 C]`, any dtype.
      block: side of a square, at least 1.

    Returns:
      `[B, H block, W block, C]`, the same numbers in the same dtype.

    Raises:
      ValueError: if `x` has not four axes, or its channels are no multiple of `block^2`.

    >>> import jax.numpy as jnp
    >>> depth_to_space(jnp.arange(4).reshape(1, 1, 1, 4))[0, :, :, 0].tolist()
    [[0, 1], [2, 3]]
    """
    if x.ndim != 4:
        raise ValueError(f"expected images [B, H, W, C], not an array of shape {x.shape}")
    b, h, w, c = x.shape
    if block < 1 or c % (block * block):
        raise ValueError(f"{c} channels cannot be spread over blocks of {block} x {block} pixels")
    x = x.reshape(b, h, w, block, block, c // (block * block))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * block, w * block, c // (block * block))


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, not {method!r}")


class _Resampling(nn.Module):
    """What both directions are told; see `Downsample` and `Upsample`."""

    features: int | None = None
    method: Method = "space_to_depth"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32


class Downsample(_Resampling):
    """Halves height and width.

    'space_to_depth': 2 x 2 pixels become the input of a dense layer. 'strided': a 3 x 3 convolution
    of stride 2 that sees one column of zeros on the right and one row of zeros below, none on the
    other sides, as the DDPM paper's network does.

    Args of the call: `x`, `[B, H, W, C]`, H and W even. Returns `[B, H/2, W/2, features]`.

    Raises ValueError for another rank, an odd height or width, or an unknown method.

    Attributes:
      features: channels of the result; None for as many as `x` has.
      method: 'space_to_depth' or 'strided'.
      dtype: dtype of the arithmetic; None for what `x` and the parameters promote to.
      param_dtype: dtype of the parameters.

    >>> import jax, jax.numpy as jnp
    >>> out, _ = Downsample(6).init_with_output(jax.random.key(0), jnp.ones((2, 4, 8, 3)))
    >>> out.shape
    (2, 2, 4, 6)
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Halves the resolution of `x`; see the class."""
        _check_method(self.method)
        blocks = space_to_depth(x)
        features = x.shape[-1] if self.features is None else self.features
        init = nn.initializers.glorot_uniform()
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.method == "space_to_depth":
            return nn.Dense(features, kernel_init=init, name="dense", **dtypes)(blocks)
        return nn.Conv(
            features,
            (3, 3),
            strides=(2, 2),
            padding=((0, 1), (0, 1)),
            kernel_init=init,
            name="conv",
            **dtypes,
        )(x)


class Upsample(_Resampling):
    """Doubles height and width.

    'space_to_depth': a dense layer makes four pixels of one. 'strided': every pixel is repeated
    2 x 2 times (nearest neighbour) and a 3 x 3 convolution follows, as in the DDPM paper's network.

    Args of the call: `x`, `[B, H, W, C]`. Returns `[B, 2H, 2W, features]`.

    Raises ValueError for another rank or an unknown method.

    Attributes:
      features: channels of the result; None for as many as `x` has.
      method: 'space_to_depth' or 'strided'; each is the counterpart of `Downsample`'s.
      dtype: dtype of the arithmetic; None for what `x` and the parameters promote to.
      param_dtype: dtype of the parameters.

    >>> import jax, jax.numpy as jnp
    >>> out, _ = Upsample(6).init_with_output(jax.random.key(0), jnp.ones((2, 4, 8, 3)))
    >>> out.shape
    (2, 8, 16, 6)
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Doubles the resolution of `x`; see the class."""
        _check_method(self.method)
        if x.ndim != 4:
            raise ValueError(f"expected images [B, H, W, C], not an array of shape {x.shape}")
        b, h, w, c = x.shape
        features = c if self.features is None else self.features
        init = nn.initializers.glorot_uniform()
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.method == "space_to_depth":
            return depth_to_space(
                nn.Dense(4 * features, kernel_init=init, name="dense", **dtypes)(x)
            )
        nearest = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
        nearest = nearest.reshape(b, 2 * h, 2 * w, c)
        return nn.Conv(features, (3, 3), kernel_init=init, name="conv", **dtypes)(nearest)
