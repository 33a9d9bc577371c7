"""A real time as a vector of sines and cosines, and a small network on it.

What: `sinusoidal_embedding` (function) and `TimeEmbedding` (function and two dense layers).
Post: https://kexue.fm/archives/9152, the network that is told at which step it denoises.
Paper: Ho, Jain and Abbeel 2020, arXiv:2006.11239, after Vaswani et al. 2017, arXiv:1706.03762.
Equations: w_i = max_period^(-i / (dim/2 - 1)), i = 0 .. dim/2 - 1;
  embedding(t) = (sin(w_0 t), .., sin(w_last t), cos(w_0 t), .., cos(w_last t)).
Differences from the post: its code learns a table with one row per step, which knows whole steps
  only; here any real time has an embedding. The post finds no difference in quality.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


def sinusoidal_embedding(t: ArrayLike, dim: int, max_period: float = 10000.0) -> jax.Array:
    """Embeds real times with `dim / 2` frequencies from 1 down to `1 / max_period`.

    The first half of the result are sines, the second half cosines, of the same frequencies in
    falling order. Times that differ by much less than 1 look alike: scale `t` so that a step that
    matters is of the order of 1 (`TimeEmbedding.time_scale`).

    Args:
      t: `[B]`, integer or floating, any real number, also negative.
      dim: even, at least 2. With `dim=2` the only frequency is 1.
      max_period: the slowest wave has period `2 pi max_period`; greater than 1.

    Returns:
      `[B, dim]`, float32 (float64 for a float64 `t`). The phase `w t` is rounded to that dtype, so
      the error is about `6e-8 |t|` in float32. NaN and infinity give NaN rows.

    Raises:
      ValueError: if `t` is no vector of real numbers, `dim` is odd or less than 2, or `max_period`
        is not greater than 1.

    >>> import jax.numpy as jnp
    >>> sinusoidal_embedding(jnp.array([0, 5, 1000]), dim=8).shape
    (3, 8)
    >>> [float(v) for v in sinusoidal_embedding(jnp.array([0.0]), dim=4)[0]]
    [0.0, 0.0, 1.0, 1.0]
    """
    t = jnp.asarray(t)
    if t.ndim != 1:
        raise ValueError(f"t must be a vector [B], not of shape {t.shape}")
    if not (jnp.issubdtype(t.dtype, jnp.integer) or jnp.issubdtype(t.dtype, jnp.floating)):
        raise ValueError(f"t must be integer or floating, not {t.dtype}")
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and at least 2, half sines and half cosines, not {dim}")
    if not max_period > 1:
        raise ValueError(f"max_period must be greater than 1, not {max_period}")
    dtype = jnp.promote_types(t.dtype, jnp.float32)
    half = dim // 2
    frequencies = float(max_period) ** -(np.arange(half) / max(half - 1, 1))
    phase = t.astype(dtype)[:, None] * jnp.asarray(frequencies, dtype)[None, :]
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


class TimeEmbedding(nn.Module):
    """Sinusoid, dense layer, swish, dense layer.

    Args of the call: `t`, `[B]`, integer or floating. Returns `[B, features]` in `dtype`. The
    sinusoid is computed in float32 or better also when `dtype` is bfloat16.

    Raises ValueError as `sinusoidal_embedding` does.

    Attributes:
      features: width of the hidden and of the last layer.
      dim: width of the sinusoid, even.
      time_scale: what is embedded is `time_scale * t`: 1 for steps 0 .. 1000, and 1000, say, for
        times in [0, 1].
      max_period: see `sinusoidal_embedding`.
      dtype: dtype of the dense layers' arithmetic; None for what input and parameters promote to.
      param_dtype: dtype of the parameters.

    >>> import jax, jax.numpy as jnp
    >>> module = TimeEmbedding(features=16, dim=8, time_scale=1000.0)
    >>> out, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.array([0.1, 0.9]))
    >>> out.shape
    (2, 16)
    """

    features: int
    dim: int
    time_scale: float = 1.0
    max_period: float = 10000.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """Embeds `t`; see the class."""
        t = jnp.asarray(t)
        if jnp.issubdtype(t.dtype, jnp.integer) or jnp.issubdtype(t.dtype, jnp.floating):
            t = t.astype(jnp.promote_types(t.dtype, jnp.float32)) * self.time_scale
        init = nn.initializers.glorot_uniform()
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = sinusoidal_embedding(t, self.dim, self.max_period)
        h = nn.swish(nn.Dense(self.features, kernel_init=init, name="hidden", **dtypes)(h))
        return nn.Dense(self.features, kernel_init=init, name="out", **dtypes)(h)
