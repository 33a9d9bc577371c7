"""The losses that a generator and a critic play against each other with.

What: `critic_loss` and `generator_loss`, for the games of `LOSSES`: 'wasserstein', 'hinge',
  'non_saturating' and 'least_squares'. A game of one's own is an `AdversarialLoss`.
Post: https://kexue.fm/archives/8757, which states the first.
Paper: Arjovsky et al. 2017, arXiv:1701.07875 (Wasserstein); Lim and Ye 2017, arXiv:1705.02894
  (hinge); Goodfellow et al. 2014, arXiv:1406.2661 (non-saturating); Mao et al. 2016,
  arXiv:1611.04076 (least squares).
Equations, with d the critic's output; the critic minimises real(d(x)) + fake(d(G(z))), the
  generator generator(d(G(z))):
                    real             fake             generator
  wasserstein       -d               d                -d
  hinge             max(0, 1 - d)    max(0, 1 + d)    -d
  non_saturating    log(1 + e^-d)    log(1 + e^d)     log(1 + e^-d)
  least_squares     (d - 1)^2 / 2    d^2 / 2          (d - 1)^2 / 2
Differences from the post: only the first game is in it. Signs are those of something to minimise,
  on both sides.

The code of gradient normalisation (arXiv:2109.02235) trains its residual networks by 'hinge', and
its DCGAN by `--loss=bce`: that is 'non_saturating', with the normalised output in [-1, 1] as logit.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp


class AdversarialLoss(NamedTuple):
    """A game: three functions of the critic's output, entry by entry.

    Attributes:
      real: what the critic minimises on examples of the data.
      fake: what the critic minimises on generated ones.
      generator: what the generator minimises on generated ones.

    Such as the logistic game of a critic in [-1, 1], taken for twice a probability less 1:

    >>> def code_length(d):
    ...     return -jnp.log((1 + d) / 2)
    >>> bounded = AdversarialLoss(code_length, lambda d: code_length(-d), code_length)
    >>> float(critic_loss(jnp.zeros(1), jnp.zeros(1), bounded)[0])  # log 4
    1.3862943649291992
    """

    real: Callable[[jax.Array], jax.Array]
    fake: Callable[[jax.Array], jax.Array]
    generator: Callable[[jax.Array], jax.Array]


LossName = Literal["wasserstein", "hinge", "non_saturating", "least_squares"]
LOSSES: dict[str, AdversarialLoss] = {
    "wasserstein": AdversarialLoss(lambda d: -d, lambda d: d, lambda d: -d),
    "hinge": AdversarialLoss(
        lambda d: jax.nn.relu(1 - d), lambda d: jax.nn.relu(1 + d), lambda d: -d
    ),
    "non_saturating": AdversarialLoss(
        lambda d: jax.nn.softplus(-d), jax.nn.softplus, lambda d: jax.nn.softplus(-d)
    ),
    "least_squares": AdversarialLoss(
        lambda d: jnp.square(d - 1) / 2,
        lambda d: jnp.square(d) / 2,
        lambda d: jnp.square(d - 1) / 2,
    ),
}


def game(loss: LossName | AdversarialLoss) -> AdversarialLoss:
    """Returns the game of a name, or the one given.

    Raises:
      ValueError: if the name is unknown, listing the valid ones.

    >>> float(game("wasserstein").generator(jnp.float32(2.0)))
    -2.0
    """
    if isinstance(loss, AdversarialLoss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is unknown; valid: {', '.join(map(repr, LOSSES))}")
    return LOSSES[loss]


def _each(loss: Callable[[jax.Array], jax.Array], outputs: jax.Array) -> jax.Array:
    """The loss of each output, in float32 or better."""
    losses = loss(outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32)))
    if losses.shape != outputs.shape:
        raise ValueError(
            f"a game must give one loss for each output, shape {outputs.shape}, got {losses.shape}"
        )
    return losses


def critic_loss(
    real: jax.Array, fake: jax.Array, loss: LossName | AdversarialLoss = "hinge"
) -> jax.Array:
    """Returns `real(d_i) + fake(d'_i)`, one number for each pair of outputs.

    The optimal critic of the logistic game is `log(p / q)`, that of least squares `p / (p + q)`;
    'wasserstein' has no minimum unless the critic is bounded. The hinge has gradient 0 on its
    corner, at 1 and -1.

    Args:
      real: `[B]`, the critic's outputs on examples of the data.
      fake: `[B]`, those on generated ones.
      loss: a name in `LOSSES`, or a game.

    Returns:
      `[B]`, float32 or better. NaN and infinity propagate; finite outputs of any size give a finite
      logistic loss.

    Raises:
      ValueError: if the shapes differ, the loss is unknown, or a game of one's own does not give
        one loss for each output.

    >>> critic_loss(jnp.array([0.0, 2.0]), jnp.array([0.0, -2.0])).tolist()
    [2.0, 0.0]
    """
    if real.shape != fake.shape:
        raise ValueError(
            f"there must be as many outputs on real as on generated examples, got shapes "
            f"{real.shape} and {fake.shape}"
        )
    played = game(loss)
    return _each(played.real, real) + _each(played.fake, fake)


def generator_loss(fake: jax.Array, loss: LossName | AdversarialLoss = "hinge") -> jax.Array:
    """Returns `generator(d'_i)`.

    Args:
      fake: `[B]`, the critic's outputs on generated examples.
      loss: as in `critic_loss`.

    Returns:
      `[B]`, float32 or better.

    Raises:
      ValueError: if the loss is unknown, or does not give one loss for each output.

    >>> generator_loss(jnp.array([0.5, -2.0])).tolist()
    [-0.5, 2.0]
    """
    return _each(game(loss).generator, fake)
