"""The convolutional residual block of the DDPM paper, steered by an embedding.

What: `ResidualBlock`.
Post: https://kexue.fm/archives/9152, whose network is built of such blocks.
Paper: Ho, Jain and Abbeel 2020, arXiv:2006.11239, appendix B.
Equations: h = conv(swish(norm(x))) + dense(swish(e));
  y = shortcut(x) + conv0(dropout(swish(norm(h)))), conv0 starting at zero.
Differences from the paper: small networks get fewer groups per norm (`group_norm.group_count`); the
  embedding may be left out.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from blogjax.nn.group_norm import group_norm


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around an identity; at initialisation it is its own shortcut.

    Args of the call:
      x: `[B, H, W, C]` floating.
      embedding: `[B, E]`, what the block is to know beside `x` (time, class), or None for nothing.
      train: whether dropout is on; it then needs the rng stream 'dropout' if `dropout` > 0.

    Returns `[B, H, W, features]` in `dtype`. The shortcut is the identity where C equals `features`
    and a dense layer on the channels (a 1 x 1 convolution) otherwise. Norms compute in float32.

    Raises ValueError if `x` has not four axes, `embedding` is not one vector per example, or
    `dropout` is outside [0, 1).

    Attributes:
      features: channels of the result.
      dropout: probability of dropping, before the last convolution.
      dtype: dtype of the arithmetic; None for what `x` and the parameters promote to.
      param_dtype: dtype of the parameters.

    >>> import jax, jax.numpy as jnp
    >>> x, e = jnp.ones((2, 4, 4, 8)), jnp.ones((2, 16))
    >>> block = ResidualBlock(8)
    >>> variables = jax.jit(lambda k: block.init(k, x, e, train=False))(jax.random.key(0))
    >>> bool((block.apply(variables, x, e, train=False) == x).all())
    True
    """

    features: int
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array | None, *, train: bool) -> jax.Array:
        """Applies the block; see the class."""
        if x.ndim != 4:
            raise ValueError(f"expected images [B, H, W, C], not an array of shape {x.shape}")
        if embedding is not None and (embedding.ndim != 2 or embedding.shape[0] != x.shape[0]):
            raise ValueError(
                f"an embedding of shape {embedding.shape} is not one vector for each of the "
                f"{x.shape[0]} examples of an input of shape {x.shape}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        init = nn.initializers.glorot_uniform()
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        h = nn.swish(group_norm(x.shape[-1], name="norm_in", **dtypes)(x))
        h = nn.Conv(self.features, (3, 3), kernel_init=init, name="conv_in", **dtypes)(h)
        if embedding is not None:
            project = nn.Dense(self.features, kernel_init=init, name="embedding", **dtypes)
            h = h + project(nn.swish(embedding))[:, None, None, :]
        h = nn.swish(group_norm(self.features, name="norm_out", **dtypes)(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        zeros = nn.initializers.zeros
        h = nn.Conv(self.features, (3, 3), kernel_init=zeros, name="conv_out", **dtypes)(h)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, kernel_init=init, name="shortcut", **dtypes)(x)
        return x.astype(h.dtype) + h
