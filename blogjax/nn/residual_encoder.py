"""The way down of the DDPM paper's U-Net as a network of its own: from an image to a vector.

What: `ResidualEncoder`.
Post: none of its own; the trunk that the tasks of https://kexue.fm/archives/8896 share.
Paper: Ho, Jain and Abbeel 2020, arXiv:2006.11239, appendix B.
Equations: h = conv(x); per level `num_blocks` residual blocks, then half the resolution;
  y = mean over the pixels of swish(norm(h)).
Differences from the paper: no time, no attention, no middle and no way up.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from blogjax.nn.group_norm import group_norm
from blogjax.nn.resampling import Downsample, Method
from blogjax.nn.residual_block import ResidualBlock


class ResidualEncoder(nn.Module):
    """Maps images to features. No example ever sees another one.

    Args of the call: `x`, `[B, H, W, C]` floating, H and W multiples of `2^(levels - 1)`.

    Returns `[B, channels * multipliers[-1]]`, float32 (float64 for a float64 `x`), whatever `dtype`
    is: the last norm and the mean over the pixels are computed in that dtype.

    Raises ValueError if a shape or dtype is not as above, or an attribute is out of its range.

    Attributes:
      channels: width of the first level.
      multipliers: width of each level in units of `channels`.
      num_blocks: residual blocks per level.
      resample: 'space_to_depth' or 'strided'; see `blogjax.nn.resampling`.
      dtype: dtype of the arithmetic; None for what `x` and the parameters promote to.
      param_dtype: dtype of the parameters.

    >>> import jax, jax.numpy as jnp
    >>> encoder = ResidualEncoder(channels=4, multipliers=(1, 2, 4))
    >>> x = jnp.zeros((2, 16, 8, 3))
    >>> jax.eval_shape(lambda key: encoder.init_with_output(key, x)[0], jax.random.key(0)).shape
    (2, 16)
    """

    channels: int
    multipliers: Sequence[int]
    num_blocks: int = 1
    resample: Method = "space_to_depth"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the network; see the class."""
        self._check(x)
        init = nn.initializers.glorot_uniform()
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        wide = {"dtype": jnp.promote_types(x.dtype, jnp.float32), "param_dtype": self.param_dtype}
        h = nn.Conv(self.channels, (3, 3), kernel_init=init, name="conv_in", **dtypes)(x)
        for level, multiplier in enumerate(self.multipliers):
            if level:
                h = Downsample(None, self.resample, name=f"resample_{level}", **dtypes)(h)
            for i in range(self.num_blocks):
                name = f"level_{level}_block_{i}"
                block = ResidualBlock(self.channels * multiplier, name=name, **dtypes)
                h = block(h, None, train=False)
        h = nn.swish(group_norm(h.shape[-1], name="norm_out", **wide)(h))
        return jnp.mean(h, axis=(1, 2))

    def _check(self, x: jax.Array) -> None:
        levels = len(self.multipliers)
        if self.channels < 1 or self.num_blocks < 1 or not levels or min(self.multipliers) < 1:
            raise ValueError(
                "an encoder needs at least one channel, level, multiplier and block, not "
                f"{self.channels} channels, multipliers {tuple(self.multipliers)} and "
                f"{self.num_blocks} blocks"
            )
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x must be floating [B, H, W, C], not {x.dtype} of shape {x.shape}")
        divisor = 2 ** (levels - 1)
        if x.shape[1] % divisor or x.shape[2] % divisor:
            raise ValueError(
                f"{levels} levels halve the image {levels - 1} times, but a height and width of "
                f"{x.shape[1]} and {x.shape[2]} are not both multiples of {divisor}"
            )
