"""Residual networks against each other: the ResNet GAN of CIFAR-10 and STL-10.

What: `ResNetGenerator` and `ResNetCritic`; `models.gan` has them too.
Post: https://kexue.fm/archives/8757
Paper: Miyato et al. 2018, arXiv:1802.05957, table 4, as Wu et al. 2021, arXiv:2109.02235, have it.
Differences from the post: none, it has no networks. Differences from the papers: the generator may
  have group norm in place of batch norm; widths are arguments. The critic takes the mean over the
  positions, as the code of 2109.02235 does, where 1802.05957 takes the sum.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from blogjax.models.gan_parts import (
    HE,
    ImageGenerator,
    Network,
    check_images,
    check_widths,
    wide,
)


class ResNetGenerator(ImageGenerator):
    """Maps latent vectors to images: a dense layer, then residual blocks that double the size.

    A block is norm, ReLU, nearest-neighbour doubling, 3 x 3 convolution, norm, ReLU, 3 x 3
    convolution, beside doubling and a 1 x 1 convolution. Norm, ReLU, a 3 x 3 convolution and tanh
    follow the last. The defaults give 32 x 32.

    Args, results, errors and attributes as `DCGANGenerator`; one block for each entry of `widths`
    after the first. The one for 48 x 48 (STL-10) has `widths=(512, 256, 128, 64), base=6`, its
    critic `widths=(64, 128, 256, 512), halvings=4`.

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
        h = self._first(z, HE)
        for i, width in enumerate(self.widths[1:]):
            name = f"block_{i}"
            inner = _doubled(self._rectified(h, f"{name}_norm_0", train))
            inner = self._conv(inner, width, 3, HE, f"{name}_conv_0")
            inner = self._rectified(inner, f"{name}_norm_1", train)
            inner = self._conv(inner, width, 3, HE, f"{name}_conv_1")
            # The 1 x 1 convolution commutes with the doubling and is cheaper before it.
            h = inner + _doubled(self._conv(h, width, 1, HE, f"{name}_shortcut"))
        return self._last(self._rectified(h, "norm_out", train), wide(z), HE)


class ResNetCritic(Network):
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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Judges `x`; see the class."""
        check_widths(self.widths, 1)
        if not 0 <= self.halvings <= len(self.widths):
            raise ValueError(
                f"halvings must be between 0 and the {len(self.widths)} blocks, got {self.halvings}"
            )
        check_images(x, 2**self.halvings)

        h = x
        for i, width in enumerate(self.widths):
            halve = i < self.halvings
            inner = self._conv(nn.relu(h) if i else h, width, 3, HE, f"block_{i}_conv_0")
            inner = self._conv(nn.relu(inner), width, 3, HE, f"block_{i}_conv_1")
            # The mean commutes with the 1 x 1 convolution, which is cheaper after it.
            beside = _halved(h) if halve else h
            if halve or h.shape[-1] != width:
                beside = self._conv(beside, width, 1, HE, f"block_{i}_shortcut")
            h = beside + (_halved(inner) if halve else inner)
        h = jnp.mean(nn.relu(h), axis=(1, 2), dtype=wide(x))
        return self._dense(h, 1, HE, "out", dtype=wide(x))[:, 0]


def _doubled(x: jax.Array) -> jax.Array:
    """Every pixel repeated 2 x 2 times."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def _halved(x: jax.Array) -> jax.Array:
    """The mean over every 2 x 2 pixels, summed in float32 or better."""
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // 2, 2, w // 2, 2, c)
    return jnp.mean(blocks, axis=(2, 4), dtype=wide(x)).astype(x.dtype)
