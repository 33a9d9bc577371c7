"""What the networks of `models.gan`, `models.dcgan` and `models.resnet_gan` have in common.

What: `Network`, layers in the network's dtypes; `ImageGenerator`, both ends of a generator of
  images; checks of what a network is given.
Post: https://kexue.fm/archives/8757
Differences from the post: none, it has no networks.
"""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from blogjax.nn.group_norm import group_norm

Norm = Literal["batch", "group", "none"]
HE = nn.initializers.he_normal()
SMALL = nn.initializers.normal(0.02)


def wide(x: jax.Array) -> DTypeLike:
    """Returns the dtype of `x`, at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


def check_latent(z: jax.Array) -> None:
    """Raises ValueError unless `z` is `[B, Z]`."""
    if z.ndim != 2:
        raise ValueError(f"latent vectors must be [B, Z], got an array of shape {z.shape}")


def check_images(x: jax.Array, divisor: int) -> None:
    """Raises ValueError unless `x` is `[B, H, W, C]`, `divisor` divides H and W, and none is 0."""
    if x.ndim != 4:
        raise ValueError(f"expected images [B, H, W, C], not an array of shape {x.shape}")
    if x.shape[1] % divisor or x.shape[2] % divisor or 0 in x.shape:
        raise ValueError(
            f"height and width must be multiples of {divisor}, got images of shape {x.shape}"
        )


def check_widths(widths: Sequence[int], least: int) -> None:
    """Raises ValueError unless there are at least so many widths, all positive."""
    if len(widths) < least or min(widths) < 1:
        raise ValueError(f"widths must be at least {least} positive numbers, got {tuple(widths)}")


class Network(nn.Module, kw_only=True):
    """Dtypes, and layers that keep to them; to be used inside an `nn.compact` call.

    Attributes:
      dtype: dtype of the arithmetic; None for what the input and the parameters promote to.
      param_dtype: dtype of the parameters.
    """

    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def _dtypes(self, dtype: DTypeLike | None = None) -> dict[str, Any]:
        """The network's dtypes, or another one for the arithmetic."""
        return {"dtype": self.dtype if dtype is None else dtype, "param_dtype": self.param_dtype}

    def _conv(
        self,
        h: jax.Array,
        width: int,
        size: int,
        init: nn.initializers.Initializer,
        name: str,
        *,
        stride: int = 1,
        dtype: DTypeLike | None = None,
    ) -> jax.Array:
        return nn.Conv(
            width, (size, size), strides=stride, kernel_init=init, name=name, **self._dtypes(dtype)
        )(h)

    def _dense(
        self,
        h: jax.Array,
        width: int,
        init: nn.initializers.Initializer,
        name: str,
        *,
        dtype: DTypeLike | None = None,
    ) -> jax.Array:
        return nn.Dense(width, kernel_init=init, name=name, **self._dtypes(dtype))(h)


class ImageGenerator(Network):
    """Both ends of a generator of images, and the norm between; see `DCGANGenerator`."""

    channels: int = 3
    widths: Sequence[int] = ()
    base: int | tuple[int, int] = 4
    norm: Norm = "batch"
    axis_name: str | None = None

    def _first(self, z: jax.Array, init: nn.initializers.Initializer) -> jax.Array:
        check_latent(z)
        check_widths((*self.widths, self.channels), 2)
        if self.norm not in ("batch", "group", "none"):
            raise ValueError(f"norm must be 'batch', 'group' or 'none', got {self.norm!r}")
        h, w = (self.base, self.base) if isinstance(self.base, int) else self.base
        coarse = self._dense(z, h * w * self.widths[0], init, "dense")
        return coarse.reshape(z.shape[0], h, w, self.widths[0])

    def _rectified(self, h: jax.Array, name: str, train: bool) -> jax.Array:
        if self.norm == "batch":
            h = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                axis_name=self.axis_name,
                name=name,
                **self._dtypes(),
            )(h)
        elif self.norm == "group":
            h = group_norm(h.shape[-1], name=name, **self._dtypes())(h)
        return nn.relu(h)

    def _last(self, h: jax.Array, dtype: DTypeLike, init: nn.initializers.Initializer) -> jax.Array:
        return jnp.tanh(self._conv(h, self.channels, 3, init, "conv_out", dtype=dtype))
