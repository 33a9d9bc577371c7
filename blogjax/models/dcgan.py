"""Plain convolutions against each other: the DCGAN of CIFAR-10.

What: `DCGANGenerator` and `DCGANCritic`; `models.gan` has them too.
Post: https://kexue.fm/archives/8757
Paper: Radford et al. 2015, arXiv:1511.06434, as Miyato et al. 2018, arXiv:1802.05957, table 3, and
  Wu et al. 2021, arXiv:2109.02235, have it.
Differences from the post: none, it has no networks. Differences from the papers: the generator may
  have group norm in place of batch norm; widths are arguments. The critic's are those of the code
  of 2109.02235, 64 128 128 256 256 512 512, where 1802.05957 has 64 64 128 128 256 256 512.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from blogjax.models.gan_parts import (
    SMALL,
    ImageGenerator,
    Network,
    check_images,
    check_widths,
    wide,
)


class DCGANGenerator(ImageGenerator):
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
        h = self._rectified(self._first(z, SMALL), "norm_0", train)
        for i, width in enumerate(self.widths[1:]):
            up = nn.ConvTranspose(
                width, (4, 4), strides=(2, 2), kernel_init=SMALL, name=f"up_{i}", **self._dtypes()
            )
            h = self._rectified(up(h), f"norm_{i + 1}", train)
        return self._last(h, wide(z), SMALL)


class DCGANCritic(Network):
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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Judges `x`; see the class."""
        check_widths(self.widths, 1)
        check_images(x, 2 ** (len(self.widths) - 1))

        def conv(h: jax.Array, width: int, size: int, name: str) -> jax.Array:
            # For an even size and stride 2 this pads one row on each side, as the papers do.
            h = self._conv(h, width, size, SMALL, name, stride=2 - size % 2)
            return nn.leaky_relu(h, self.slope)

        h = conv(x, self.widths[0], 3, "conv_0")
        for i, width in enumerate(self.widths[1:]):
            h = conv(h, width, 4, f"down_{i}")
            h = conv(h, width, 3, f"conv_{i + 1}")
        return self._dense(h.reshape(x.shape[0], -1), 1, SMALL, "out", dtype=wide(x))[:, 0]
