"""A learned vector for each class, which refuses to guess at a label that does not exist.

What: `ClassEmbedding`, a table of vectors.
Post: https://kexue.fm/archives/9257, generation under the condition of a class.
Paper: Ho and Salimans 2022, Classifier-Free Diffusion Guidance, arXiv:2207.12598, which asks for
  one class more than the data have, standing for "no label".
Differences from `flax.linen.Embed`: that one lets -1 mean the last class, and a table of a single
  row answers every label. Here every label outside `0 .. num_classes - 1` gives NaN.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike


class ClassEmbedding(nn.Module):
    """Looks up one row of the table `embedding`, `[num_classes, features]`, per label.

    Args of the call: `labels`, `[B]`, integer. Returns `[B, features]` in `dtype`. A label below 0
    or from `num_classes` on gives a row of NaN, which is seen in the loss, where a clamped label
    would train the wrong class in silence; other rows are not touched by it.

    Raises ValueError if `labels` is not an integer vector or `num_classes` is less than 1.

    Attributes:
      num_classes: rows of the table.
      features: width of a row.
      dtype: dtype of the result; None for `param_dtype`.
      param_dtype: dtype of the table. Its rows start normal, of length about 1.

    >>> import jax, jax.numpy as jnp
    >>> module = ClassEmbedding(num_classes=10, features=4)
    >>> out, _ = module.init_with_output(jax.random.key(0), jnp.array([0, 9, 10, -1]))
    >>> [bool(b) for b in jnp.isnan(out).all(axis=1)]
    [False, False, True, True]
    """

    num_classes: int
    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, labels: ArrayLike) -> jax.Array:
        """Embeds `labels`; see the class."""
        labels = jnp.asarray(labels)
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {self.num_classes}")
        if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"labels must be an integer vector [B], not {labels.dtype} of shape {labels.shape}"
            )
        table = self.param(
            "embedding",
            nn.initializers.normal(self.features**-0.5),
            (self.num_classes, self.features),
            self.param_dtype,
        )
        rows = table.at[labels].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return rows if self.dtype is None else rows.astype(self.dtype)
