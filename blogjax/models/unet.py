"""The U-Net that the DDPM paper denoises with, from 32 x 32 pictures down to 8 x 8 digits.

What: `UNet` and `ddpm_cifar10`, the paper's own configuration.
Post: https://kexue.fm/archives/9152 (the network of DDPM) and https://kexue.fm/archives/9257 (the
  same network told a class).
Paper: Ho, Jain and Abbeel 2020, arXiv:2006.11239, appendix B.
Differences from the post: the network is the paper's, with a sinusoid for the time, where the
  post's code learns one row per step. Differences from the paper: the default way between levels is
  one matrix product instead of a 3 x 3 convolution (`resample`), small networks have fewer groups
  per norm (`nn.group_norm.group_count`), and there may be classes and several attention heads.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from blogjax.nn.class_embedding import ClassEmbedding
from blogjax.nn.group_norm import group_norm
from blogjax.nn.resampling import METHODS, Downsample, Method, Upsample
from blogjax.nn.residual_block import ResidualBlock
from blogjax.nn.spatial_attention import SpatialAttention
from blogjax.nn.time_embedding import TimeEmbedding


class UNet(nn.Module):
    """Maps a noisy image, its time and perhaps its class to an image.

    One level per entry of `multipliers`, each at half the resolution of the one before. Way down:
    `num_blocks` residual blocks per level. Middle: block, attention, block. Way up: one residual
    block more per level, and each sees (concatenated) what one stage on the way down put out. Time
    and class are embedded, added, and enter every residual block. No example ever sees another
    one. The last convolution starts at zero, so at initialisation the output is exactly 0.

    Args of the call:
      x: `[B, H, W, C]` floating; H and W may differ, each a multiple of `2^(levels - 1)`.
      t: `[B]`, integer or floating, in whatever unit the caller likes: the embedding is that of
        `time_scale * t`. NaN gives a NaN example.
      labels: `[B]`, integer in `0 .. num_classes - 1`, exactly if `num_classes > 0`. A label out of
        that range gives an example of NaN; it is never clamped.
      train: whether dropout is on; it then needs the rng stream 'dropout' if `dropout` > 0.

    Returns `[B, H, W, out_channels]`, float32 (float64 for a float64 `x`), whatever `dtype` is. The
    last norm and convolution are computed in that dtype, as are the statistics of all norms and all
    softmaxes.

    Raises ValueError if a shape or dtype is not as above, labels are missing or not wanted, an
    attention resolution is not that of any level, or an attribute is out of its range.

    Attributes:
      channels: width of the first level, even (it is the width of the time's sinusoid as well).
      multipliers: width of each level in units of `channels`.
      num_blocks: residual blocks per level on the way down.
      attention_resolutions: attention follows every residual block of a level whose height is among
        these. The middle always has attention.
      num_classes: 0 for an unconditional network. Classifier-free guidance needs one class more
        than the data have, for "no label".
      out_channels: channels of the output; None for as many as `x` has.
      dropout: probability of dropping inside each residual block.
      num_heads: heads of each attention; divides the channels of every level that has one.
      resample: 'space_to_depth' or 'strided' (the paper's); see `blogjax.nn.resampling`.
      time_scale: unit of `t`: 1 for steps 0 .. 1000, 1000 for times in [0, 1].
      dtype: dtype of the arithmetic; None for what `x` and the parameters promote to.
      param_dtype: dtype of the parameters.
      remat: whether the way back computes each block anew instead of keeping what is inside it, at
        the price of one more forward pass through the blocks. Parameters and results are the same.
        On a CPU it saves memory only without XLA's default scheduler, which is after concurrency
        (`xla_cpu_enable_concurrency_optimized_scheduler=false`).

    >>> import jax, jax.numpy as jnp
    >>> model = UNet(channels=32, multipliers=(1, 2), num_blocks=1, num_classes=11, time_scale=1e3)
    >>> x, t, y = jnp.zeros((4, 8, 8, 1)), jnp.full(4, 0.5), jnp.arange(4)
    >>> out, variables = jax.eval_shape(
    ...     lambda key: model.init_with_output(key, x, t, y, train=False), jax.random.key(0)
    ... )
    >>> out.shape, sum(leaf.size for leaf in jax.tree.leaves(variables))
    ((4, 8, 8, 1), 608417)
    """

    channels: int
    multipliers: Sequence[int]
    num_blocks: int
    attention_resolutions: Sequence[int] = ()
    num_classes: int = 0
    out_channels: int | None = None
    dropout: float = 0.0
    num_heads: int = 1
    resample: Method = "space_to_depth"
    time_scale: float = 1.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, labels: jax.Array | None = None, *, train: bool
    ) -> jax.Array:
        """Applies the network; see the class."""
        self._check(x, t, labels)
        init = nn.initializers.glorot_uniform()
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        wide = {"dtype": jnp.promote_types(x.dtype, jnp.float32), "param_dtype": self.param_dtype}
        levels = len(self.multipliers)

        embedding = TimeEmbedding(
            4 * self.channels, self.channels, self.time_scale, name="time", **dtypes
        )(t)
        if labels is not None:
            table = ClassEmbedding(self.num_classes, 4 * self.channels, name="class", **dtypes)
            embedding = embedding + table(labels)

        def residual(h: jax.Array, features: int, name: str) -> jax.Array:
            module = ResidualBlock(features, self.dropout, name=name, **dtypes)
            # `train` is closed over: as an argument it would be traced.
            apply = lambda own, h, embedding: own(h, embedding, train=train)  # noqa: E731
            return (nn.remat(apply) if self.remat else apply)(module, h, embedding)

        def attention(h: jax.Array, name: str) -> jax.Array:
            module = SpatialAttention(self.num_heads, name=name, **dtypes)
            apply = lambda own, h: own(h)  # noqa: E731
            return (nn.remat(apply) if self.remat else apply)(module, h)

        def block(h: jax.Array, level: int, name: str) -> jax.Array:
            h = residual(h, self.channels * self.multipliers[level], name)
            if h.shape[1] in self.attention_resolutions:
                h = attention(h, f"{name}_attention")
            return h

        h = nn.Conv(self.channels, (3, 3), kernel_init=init, name="conv_in", **dtypes)(x)
        skips = [h]
        for level in range(levels):
            for i in range(self.num_blocks):
                h = block(h, level, f"down_{level}_block_{i}")
                skips.append(h)
            if level < levels - 1:
                h = Downsample(None, self.resample, name=f"down_{level}_resample", **dtypes)(h)
                skips.append(h)

        features = self.channels * self.multipliers[-1]
        for i in range(2):
            h = residual(h, features, f"middle_block_{i}")
            if i == 0:
                h = attention(h, "middle_attention")

        for level in reversed(range(levels)):
            for i in range(self.num_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, level, f"up_{level}_block_{i}")
            if level > 0:
                # The paper's convolution keeps the channels. The matrix product gives the width of
                # the finer level at once: the first block there is the dearest of the network.
                finer = self.channels * self.multipliers[level - 1]
                features = None if self.resample == "strided" else finer
                name = f"up_{level}_resample"
                h = Upsample(features, self.resample, name=name, **dtypes)(h)

        h = nn.swish(group_norm(h.shape[-1], name="norm_out", **wide)(h))
        out_channels = x.shape[-1] if self.out_channels is None else self.out_channels
        zeros = nn.initializers.zeros
        return nn.Conv(out_channels, (3, 3), kernel_init=zeros, name="conv_out", **wide)(h)

    def _check(self, x: jax.Array, t: jax.Array, labels: jax.Array | None) -> None:
        levels = len(self.multipliers)
        if self.channels < 2 or self.channels % 2:
            raise ValueError(f"channels must be even and at least 2, not {self.channels}")
        if levels == 0 or min(self.multipliers) < 1 or self.num_blocks < 1:
            raise ValueError(
                "a U-Net needs at least one level, multiplier and block of at least 1, not "
                f"multipliers {tuple(self.multipliers)} and {self.num_blocks} blocks"
            )
        if self.resample not in METHODS:
            raise ValueError(f"resample must be one of {METHODS}, not {self.resample!r}")
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x must be floating [B, H, W, C], not {x.dtype} of shape {x.shape}")
        divisor = 2 ** (levels - 1)
        if x.shape[1] % divisor or x.shape[2] % divisor:
            raise ValueError(
                f"{levels} levels halve the image {levels - 1} times, but a height and width of "
                f"{x.shape[1]} and {x.shape[2]} are not both multiples of {divisor}"
            )
        heights = tuple(x.shape[1] >> level for level in range(levels))
        if not set(self.attention_resolutions) <= set(heights):
            raise ValueError(
                f"attention_resolutions {tuple(self.attention_resolutions)} are not all among the "
                f"heights {heights} of the levels"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(f"t of shape {t.shape} is not one time per example of x {x.shape}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, not {self.num_classes}")
        if (labels is not None) != (self.num_classes > 0):
            given = "no labels were given" if labels is None else "labels were given"
            raise ValueError(f"num_classes is {self.num_classes}, but {given}")
        if labels is not None and labels.shape != x.shape[:1]:
            raise ValueError(
                f"labels of shape {labels.shape} are not one per example of x {x.shape}"
            )


def ddpm_cifar10(**changes) -> UNet:
    """Returns the network of the DDPM paper for CIFAR-10: 35,746,307 parameters on 32 x 32 x 3.

    Args:
      **changes: attributes of `UNet` that are to differ from the paper's, `dtype` for instance.

    Returns:
      A `UNet` with 128 channels, multipliers 1, 2, 2, 2, two blocks per level, attention at 16 x 16
      and in the middle, dropout 0.1 and strided resampling, to be called with `[B, 32, 32, 3]`.

    >>> ddpm_cifar10(num_classes=11).num_classes
    11
    """
    paper = UNet(
        channels=128,
        multipliers=(1, 2, 2, 2),
        num_blocks=2,
        attention_resolutions=(16,),
        dropout=0.1,
        resample="strided",
    )
    return paper.clone(**changes)
