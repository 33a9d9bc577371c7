"""Generators and critics: for vectors, and for images from 8 x 8 digits to 48 x 48.

What: `MLPGenerator` and `MLPCritic`, here; `DCGANGenerator` and `DCGANCritic`, plain convolutions,
  from `models.dcgan`; `ResNetGenerator` and `ResNetCritic`, from `models.resnet_gan`. The defaults
  of the last four are the CIFAR-10 networks that gradient normalisation was published with.
Post: https://kexue.fm/archives/8757
Paper: Wu et al. 2021, arXiv:2109.02235, whose networks are those of Miyato et al. 2018,
  arXiv:1802.05957, tables 3 and 4, after Radford et al. 2015, arXiv:1511.06434.
Differences from the post: none, it has no networks.

Critics have no normalisation between examples, indeed no state at all: what a critic says of one
example does not depend on the others, as penalties and normalisation by its gradient need. How a
critic is constrained is not the network's affair; see `tasks.critics`.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from blogjax.models.dcgan import DCGANCritic, DCGANGenerator
from blogjax.models.gan_parts import HE, Network, Norm, check_latent, check_widths, wide
from blogjax.models.resnet_gan import ResNetCritic, ResNetGenerator

__all__ = [
    "DCGANCritic",
    "DCGANGenerator",
    "MLPCritic",
    "MLPGenerator",
    "Norm",
    "ResNetCritic",
    "ResNetGenerator",
]

_OUT = nn.initializers.lecun_normal()


class _MLP(Network):
    """The hidden layers of either."""

    def _hidden(
        self, h: jax.Array, widths: Sequence[int], activation: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        for i, width in enumerate(widths):
            h = activation(self._dense(h, width, HE, f"dense_{i}"))
        return h


class MLPGenerator(_MLP):
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

    @nn.compact
    def __call__(self, z: jax.Array, *, train: bool) -> jax.Array:
        """Generates; see the class."""
        del train
        check_latent(z)
        check_widths((self.features, *self.widths), 1)
        h = self._hidden(z, self.widths, self.activation)
        return self._dense(h, self.features, _OUT, "out", dtype=wide(z))


class MLPCritic(_MLP):
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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Judges `x`; see the class."""
        if x.ndim < 2:
            raise ValueError(f"expected examples [B, ...], not an array of shape {x.shape}")
        check_widths((1, *self.widths), 1)
        h = self._hidden(x.reshape(x.shape[0], -1), self.widths, self.activation)
        return self._dense(h, 1, _OUT, "out", dtype=wide(x))[:, 0]
