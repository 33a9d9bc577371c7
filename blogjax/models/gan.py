"""Generators and critics: for vectors, and for images from 8 x 8 digits to 48 x 48.

What: `MLPGenerator` and `MLPCritic`; `DCGANGenerator` and `DCGANCritic`, plain convolutions;
  `ResNetGenerator` and `ResNetCritic`. The defaults of the last four are the CIFAR-10 networks
  that gradient normalisation was published with.
Post: https://kexue.fm/archives/8757
Paper: Wu et al. 2021, arXiv:2109.02235, whose networks are those of Miyato et al. 2018,
  arXiv:1802.05957, tables 3 and 4, after Radford et al. 2015, arXiv:1511.06434.
Differences from the post: none, it has no networks. Differences from the papers: a generator may
  have group norm in place of batch norm; widths are arguments. `DCGANCritic` has the widths of the
  code of 2109.02235, 64 128 128 256 256 512 512, where 1802.05957 has 64 64 128 128 256 256 512;
  `ResNetCritic` takes the mean over the positions, as that code does, where 1802.05957 takes the
  sum.

Critics have no normalisation between examples, indeed no state at all: what a critic says of one
example does not depend on the others, as penalties and normalisation by its gradient need. How a
critic is constrained is not the network's affair; see `tasks.critics`.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from blogjax.nn.group_norm import group_norm

Norm = Literal["batch", "group", "none"]
_HE = nn.initializers.he_normal()
_SMALL = nn.initializers.normal(0.02)


def _wide(x: jax.Array) -> DTypeLike:
    return jnp.promote_types(x.dtype, jnp.float32)


def _check_latent(z: jax.Array) -> None:
    if z.ndim != 2:
        raise ValueError(f"latent vectors must be [B, Z], got an array of shape {z.shape}")


def _check_images(x: jax.Array, divisor: int) -> None:
    if x.ndim != 4:
        raise ValueError(f"expected images [B, H, W, C], not an array of shape {x.shape}")
    if x.shape[1] % divisor or x.shape[2] % divisor or 0 in x.shape:
        raise ValueError(
            f"height and width must be multiples of {divisor}, got images of shape {x.shape}"
        )


def _check_widths(widths: Sequence[int], least: int) -> None:
    if len(widths) < least or min(widths) < 1:
        raise ValueError(f"widths must be at least {least} positive numbers, got {tuple(widths)}")


class MLPGenerator(nn.Module):
    """Maps latent vectors to vectors through dense layers.

    Args of the call:
      z: `[B, Z]` floating.
      train: no layer cares; it is there because other generators ask for it.

    Returns `[B, features]`, float32 or better; the last layer is computed in that dtype. It is
    affine, so the range is not bounded.

    Raises ValueError if `z` is no matrix or a width is not positive.

    Attributes:
      features: numbers of an example.
      widths: of the hidden layers.
      activation: after each hidden layer.
      dtype: dtype of the arithmetic; None for what `z` and the parameters promote to.
      param_dtype: dtype of the parameters.

    >>> import jax, jax.numpy as jnp
    >>> model = MLPGenerator(features=2)
    >>> out, _ = model.init_with_output(jax.random.key(0), jnp.ones((4, 8)), train=True)
    >>> out.shape
    (4, 2)
    """

    features: int
    widths: Sequence[int] = (128, 128)
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array, *, train: bool) -> jax.Array:
        """Generates; see the class."""
        del train
        _check_latent(z)
        _check_widths((self.features, *self.widths), 1)
        out = nn.Dense(self.features, dtype=_wide(z), param_dtype=self.param_dtype, name="out")
        return out(_hidden(self, z))


class MLPCritic(nn.Module):
    """Maps examples of any shape, taken as vectors, to one number each.

    Args of the call: `x`, `[B, ...]` floating. Returns `[B]`, float32 or better; the last layer is
    computed in that dtype.

    Raises ValueError if `x` has no axis but the first, or a width is not positive.

    Attributes:
      widths: of the hidden layers.
      activation: after each hidden layer; a piecewise linear one bounds the slope under gradient
        normalisation.
      dtype: dtype of the arithmetic; None for what `x` and the parameters promote to.
      param_dtype: dtype of the parameters.

    >>> import jax, jax.numpy as jnp
    >>> out, _ = MLPCritic().init_with_output(jax.random.key(0), jnp.ones((4, 2)))
    >>> out.shape
    (4,)
    """

    widths: Sequence[int] = (128, 128)
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Judges `x`; see the class."""
        if x.ndim < 2:
            raise ValueError(f"expected examples [B, ...], not an array of shape {x.shape}")
        _check_widths((1, *self.widths), 1)
        h = _hidden(self, x.reshape(x.shape[0], -1))
        out = nn.Dense(1, dtype=_wide(x), param_dtype=self.param_dtype, name="out")
        return out(h)[:, 0]


def _hidden(net: MLPGenerator | MLPCritic, h: jax.Array) -> jax.Array:
    """The hidden layers of either, inside its `nn.compact` call."""
    dtypes = {"dtype": net.dtype, "param_dtype": net.param_dtype}
    for i, width in enumerate(net.widths):
        h = net.activation(nn.Dense(width, kernel_init=_HE, name=f"dense_{i}", **dtypes)(h))
    return h


class _ImageGenerator(nn.Module):
    """What both generators of images are told; see `DCGANGenerator` and `ResNetGenerator`."""

    channels: int = 3
    widths: Sequence[int] = ()
    base: int | tuple[int, int] = 4
    norm: Norm = "batch"
    axis_name: str | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def _first(self, z: jax.Array, init: nn.initializers.Initializer) -> jax.Array:
        _check_latent(z)
        _check_widths((*self.widths, self.channels), 2)
        if self.norm not in ("batch", "group", "none"):
            raise ValueError(f"norm must be 'batch', 'group' or 'none', got {self.norm!r}")
        h, w = (self.base, self.base) if isinstance(self.base, int) else self.base
        dense = nn.Dense(
            h * w * self.widths[0], kernel_init=init, name="dense",
            dtype=self.dtype, param_dtype=self.param_dtype,
        )  # fmt: skip
        return dense(z).reshape(z.shape[0], h, w, self.widths[0])

    def _rectified(self, h: jax.Array, name: str, train: bool) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.norm == "batch":
            h = nn.BatchNorm(
                use_running_average=not train, momentum=0.9, axis_name=self.axis_name, name=name,
                **dtypes,
            )(h)  # fmt: skip
        elif self.norm == "group":
            h = group_norm(h.shape[-1], name=name, **dtypes)(h)
        return nn.relu(h)

    def _last(self, h: jax.Array, wide: DTypeLike, init: nn.initializers.Initializer) -> jax.Array:
        conv = nn.Conv(
            self.channels, (3, 3), kernel_init=init, name="conv_out",
            dtype=wide, param_dtype=self.param_dtype,
        )  # fmt: skip
        return jnp.tanh(conv(h))


class DCGANGenerator(_ImageGenerator):
    """Maps latent vectors to images: a dense layer, then 4 x 4 transposed convolutions.

    Each entry of `widths` after the first doubles height and width: the defaults give 32 x 32.
    Norm and ReLU follow every layer but the last, a 3 x 3 convolution and tanh.

    Args of the call:
      z: `[B, Z]` floating.
      train: batch norm takes the batch's statistics and moves its averages if set, else uses them.

    Returns `[B, H, W, channels]` in (-1, 1), float32 or better; the last convolution is computed in
    that dtype. With `norm="batch"` examples see each other while training.

    Raises ValueError if `z` is no matrix, a width is not positive or the norm is unknown.

    Attributes:
      channels: of the images.
      widths: channels from the coarsest level to the finest.
      base: height and width of the coarsest level, one number for both or a pair.
      norm: "batch", "group" or "none".
      axis_name: mapped axis over which batch norm takes its statistics, under pmap or shard_map.
      dtype: dtype of the arithmetic; None for what `z` and the parameters promote to.
      param_dtype: dtype of the parameters.

    >>> import jax, jax.numpy as jnp
    >>> model = DCGANGenerator(channels=1, widths=(64, 32), norm="group")
    >>> init = lambda key: model.init_with_output(key, jnp.ones((2, 16)), train=True)
    >>> jax.eval_shape(init, jax.random.key(0))[0].shape
    (2, 8, 8, 1)
    """

    widths: Sequence[int] = (512, 256, 128, 64)

    @nn.compact
    def __call__(self, z: jax.Array, *, train: bool) -> jax.Array:
        """Generates; see the class."""
        h = self._rectified(self._first(z, _SMALL), "norm_0", train)
        for i, width in enumerate(self.widths[1:]):
            up = nn.ConvTranspose(
                width, (4, 4), strides=(2, 2), kernel_init=_SMALL, name=f"up_{i}",
                dtype=self.dtype, param_dtype=self.param_dtype,
            )  # fmt: skip
            h = self._rectified(up(h), f"norm_{i + 1}", train)
        return self._last(h, _wide(z), _SMALL)


class DCGANCritic(nn.Module):
    """Maps images to one number each by plain convolutions, leaky ReLU after each.

    A 3 x 3 convolution at the first width; then for each further one a 4 x 4 convolution of stride
    2 and a 3 x 3 convolution; then a dense layer over all positions, so the image's size is fixed.

    Args of the call: `x`, `[B, H, W, C]`, H and W multiples of `2^(len(widths) - 1)`. Returns
    `[B]`, float32 or better; the dense layer is computed in that dtype.

    Raises ValueError if the image has another rank or size, or a width is not positive.

    Attributes:
      widths: channels from the finest level to the coarsest.
      slope: of the leaky ReLU below 0.
      dtype: dtype of the arithmetic; None for what `x` and the parameters promote to.
      param_dtype: dtype of the parameters.

    >>> import jax, jax.numpy as jnp
    >>> init = lambda key: DCGANCritic((32, 64)).init_with_output(key, jnp.ones((2, 8, 8, 1)))
    >>> jax.eval_shape(init, jax.random.key(0))[0].shape
    (2,)
    """

    widths: Sequence[int] = (64, 128, 256, 512)
    slope: float = 0.1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Judges `x`; see the class."""
        _check_widths(self.widths, 1)
        _check_images(x, 2 ** (len(self.widths) - 1))
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def conv(h: jax.Array, width: int, size: int, name: str) -> jax.Array:
            # For an even size and stride 2 this pads one row on each side, as the papers do.
            layer = nn.Conv(
                width, (size, size), strides=2 - size % 2, kernel_init=_SMALL, name=name, **dtypes
            )
            return nn.leaky_relu(layer(h), self.slope)

        h = conv(x, self.widths[0], 3, "conv_0")
        for i, width in enumerate(self.widths[1:]):
            h = conv(h, width, 4, f"down_{i}")
            h = conv(h, width, 3, f"conv_{i + 1}")
        out = nn.Dense(
            1, kernel_init=_SMALL, dtype=_wide(x), param_dtype=self.param_dtype, name="out"
        )
        return out(h.reshape(x.shape[0], -1))[:, 0]


class ResNetGenerator(_ImageGenerator):
    """Maps latent vectors to images: a dense layer, then residual blocks that double the size.

    A block is norm, ReLU, nearest-neighbour doubling, 3 x 3 convolution, norm, ReLU, 3 x 3
    convolution, beside doubling and a 1 x 1 convolution. Norm, ReLU, a 3 x 3 convolution and tanh
    follow the last. The defaults give 32 x 32.

    Args, results, errors and attributes as `DCGANGenerator`; one block for each entry of `widths`
    after the first.

    >>> import jax, jax.numpy as jnp
    >>> model = ResNetGenerator(channels=1, widths=(32, 32))
    >>> init = lambda key: model.init_with_output(key, jnp.ones((2, 16)), train=True)
    >>> out, variables = jax.eval_shape(init, jax.random.key(0))
    >>> out.shape, sorted(variables)
    ((2, 8, 8, 1), ['batch_stats', 'params'])
    """

    widths: Sequence[int] = (256, 256, 256, 256)

    @nn.compact
    def __call__(self, z: jax.Array, *, train: bool) -> jax.Array:
        """Generates; see the class."""
        h = self._first(z, _HE)
        for i, width in enumerate(self.widths[1:]):
            name = f"block_{i}"
            inner = _doubled(self._rectified(h, f"{name}_norm_0", train))
            inner = self._conv(inner, width, 3, f"{name}_conv_0")
            inner = self._rectified(inner, f"{name}_norm_1", train)
            inner = self._conv(inner, width, 3, f"{name}_conv_1")
            # The 1 x 1 convolution commutes with the doubling and is cheaper before it.
            h = inner + _doubled(self._conv(h, width, 1, f"{name}_shortcut"))
        return self._last(self._rectified(h, "norm_out", train), _wide(z), _HE)

    def _conv(self, h: jax.Array, width: int, size: int, name: str) -> jax.Array:
        return nn.Conv(
            width, (size, size), kernel_init=_HE, name=name,
            dtype=self.dtype, param_dtype=self.param_dtype,
        )(h)  # fmt: skip


class ResNetCritic(nn.Module):
    """Maps images to one number each by residual blocks without any norm.

    A block is ReLU, 3 x 3 convolution, ReLU, 3 x 3 convolution, and in the first `halvings` blocks
    the mean over 2 x 2 pixels; the first block leaves out its first ReLU. Beside it the identity,
    or a 1 x 1 convolution and the same mean where the shape changes. After the last block ReLU,
    the mean over the positions and a dense layer.

    Args of the call: `x`, `[B, H, W, C]`, H and W multiples of `2^halvings`. Returns `[B]`, float32
    or better; mean and dense layer are computed in that dtype.

    Raises ValueError if the image has another rank or size, a width is not positive, or there are
    more halvings than blocks.

    Attributes:
      widths: channels of the blocks.
      halvings: how many of them halve height and width.
      dtype: dtype of the arithmetic; None for what `x` and the parameters promote to.
      param_dtype: dtype of the parameters.

    >>> import jax, jax.numpy as jnp
    >>> model = ResNetCritic((32, 32), halvings=1)
    >>> init = lambda key: model.init_with_output(key, jnp.ones((2, 8, 8, 1)))
    >>> jax.eval_shape(init, jax.random.key(0))[0].shape
    (2,)
    """

    widths: Sequence[int] = (128, 128, 128, 128)
    halvings: int = 2
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Judges `x`; see the class."""
        _check_widths(self.widths, 1)
        if not 0 <= self.halvings <= len(self.widths):
            raise ValueError(
                f"halvings must be between 0 and the {len(self.widths)} blocks, got {self.halvings}"
            )
        _check_images(x, 2**self.halvings)

        def conv(h: jax.Array, width: int, size: int, name: str) -> jax.Array:
            return nn.Conv(
                width, (size, size), kernel_init=_HE, name=name,
                dtype=self.dtype, param_dtype=self.param_dtype,
            )(h)  # fmt: skip

        h = x
        for i, width in enumerate(self.widths):
            halve = i < self.halvings
            inner = conv(nn.relu(h) if i else h, width, 3, f"block_{i}_conv_0")
            inner = conv(nn.relu(inner), width, 3, f"block_{i}_conv_1")
            # The mean commutes with the 1 x 1 convolution, which is cheaper after it.
            beside = _halved(h) if halve else h
            if halve or h.shape[-1] != width:
                beside = conv(beside, width, 1, f"block_{i}_shortcut")
            h = beside + (_halved(inner) if halve else inner)
        wide = _wide(x)
        h = jnp.mean(nn.relu(h), axis=(1, 2), dtype=wide)
        out = nn.Dense(1, kernel_init=_HE, dtype=wide, param_dtype=self.param_dtype, name="out")
        return out(h)[:, 0]


def _doubled(x: jax.Array) -> jax.Array:
    """Every pixel repeated 2 x 2 times."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def _halved(x: jax.Array) -> jax.Array:
    """The mean over every 2 x 2 pixels, summed in float32 or better."""
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // 2, 2, w // 2, 2, c)
    return jnp.mean(blocks, axis=(2, 4), dtype=_wide(x)).astype(x.dtype)
