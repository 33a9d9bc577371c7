"""Self-attention between all positions of a feature map.

What: `SpatialAttention`.
Post: https://kexue.fm/archives/9152, whose network may look at the whole image at once.
Paper: Ho, Jain and Abbeel 2020, arXiv:2006.11239, appendix B, after Vaswani et al. 2017,
  arXiv:1706.03762.
Equations, with n = H W positions and d channels per head:
  y = x + dense0(concat_heads(softmax(q k^T / sqrt(d)) v)), (q, k, v) = dense(norm(x)), dense0
  starting at zero.
Differences from the paper: several heads are possible; the paper has one.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from blogjax.nn.group_norm import group_norm


class SpatialAttention(nn.Module):
    """Every position attends to every other one; at initialisation the block is the identity.

    Knows nothing of where a position is: permuting the positions of the input permutes the output.

    Args of the call: `x`, `[B, H, W, C]` floating. Returns the same shape in `dtype`. The norm, the
    products of queries and keys and the softmax are float32 also when `dtype` is bfloat16. Memory
    is `B num_heads (H W)^2` numbers.

    Raises ValueError if `x` has not four axes or `num_heads` does not divide C.

    Attributes:
      num_heads: heads, each over C / num_heads channels.
      dtype: dtype of the arithmetic; None for what `x` and the parameters promote to.
      param_dtype: dtype of the parameters.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    >>> block = SpatialAttention(num_heads=2)
    >>> variables = jax.jit(block.init)(jax.random.key(1), x)
    >>> bool((block.apply(variables, x) == x).all())
    True
    """

    num_heads: int = 1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block; see the class."""
        if x.ndim != 4:
            raise ValueError(f"expected images [B, H, W, C], not an array of shape {x.shape}")
        b, height, width, c = x.shape
        if self.num_heads < 1 or c % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide {c} channels (input {x.shape})")
        init = nn.initializers.glorot_uniform()
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        h = group_norm(c, name="norm", **dtypes)(x).reshape(b, height * width, c)
        query, key, value = (
            nn.Dense(c, kernel_init=init, name=name, **dtypes)(h).reshape(
                b, height * width, self.num_heads, c // self.num_heads
            )
            for name in ("query", "key", "value")
        )
        wide = jnp.promote_types(query.dtype, jnp.float32)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide)
        weights = nn.softmax(logits * (c // self.num_heads) ** -0.5, axis=-1).astype(value.dtype)
        h = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        zeros = nn.initializers.zeros
        h = nn.Dense(c, kernel_init=zeros, name="out", **dtypes)(h)
        return x.astype(h.dtype) + h
