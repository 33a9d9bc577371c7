"""One interface for critics, however they are kept from growing steep.

What: `ConstrainedCritic`, what `adversarial_task` trains against, and what makes one of a plain
  critic: `clipped`, `spectrally_normalized`, `penalized`, `gradient_penalized`,
  `gradient_normalized`; `constrain` does it by name.
Post: https://kexue.fm/archives/8757
Paper: Arjovsky et al. 2017, arXiv:1701.07875 (clipping); Miyato et al. 2018, arXiv:1802.05957
  (spectral normalisation); Gulrajani et al. 2017, arXiv:1704.00028 (gradient penalty); Wu et al.
  2021, arXiv:2109.02235 (gradient normalisation); Bhaskara et al. 2022, arXiv:2111.03162 (GraN).
Equations, D the critic, theta its parameters:
  none  D                        clip  theta <- clip(theta, -c, c) after each update
  sn    D at W / sigma(W)        gp    + w (|grad_x D| - t)^2 between real and generated examples
  gn    D / (|grad_x D| + |D|)   gran  K D |grad_x D| / (|grad_x D|^2 + eps)
Differences from the post: none; clipping and spectral normalisation are from the papers it names.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from blogjax.core.random import Key
from blogjax.gradients.normalization import gradient_normalize
from blogjax.gradients.penalties import gradient_penalty, interpolate
from blogjax.nn.spectral_norm import spectral_normalize, spectral_vectors

# score(params, x, *args) -> [B]. Any: flax says of `apply` that it may return a tuple too.
Score = Callable[..., Any]
# penalty(score, params, keys, real, fake, *args) -> [B], with its weight
Penalty = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class ConstrainedCritic:
    """A critic and what constrains it: four pure functions, each of which may be left out.

    Attributes:
      score: `score(params, x, *args) -> [B]`, the output that the losses see, such as a normalised
        one. `args` are per-example arrays, as labels are.
      penalty: `penalty(params, keys, real, fake, *args) -> [B]`, added to the critic's loss example
        by example, its weight included; `keys` is one per example. None for no penalty.
      project: `project(params) -> params`, applied after every update of the critic.
      init_state: `init_state(key, params) -> state`, what `reparametrize` begins with: a pytree.
      reparametrize: `reparametrize(params, state) -> (params, state)`, the parameters that `score`
        and `penalty` are given; the loss is differentiated through it. The state is kept after the
        critic's updates and dropped where the critic is only read.
    """

    score: Score
    penalty: Callable[..., jax.Array] | None = None
    project: Callable[[Any], Any] | None = None
    init_state: Callable[[Key, Any], Any] | None = None
    reparametrize: Callable[[Any, Any], tuple[Any, Any]] | None = None

    def init(self, key: Key, params: Any) -> Any:
        """Returns the state of the constraint, `{}` where it has none."""
        return {} if self.init_state is None else self.init_state(key, params)

    def effective(self, params: Any, state: Any) -> tuple[Any, Any]:
        """Returns the parameters for `score`, and the state after making them."""
        return (params, state) if self.reparametrize is None else self.reparametrize(params, state)

    def __call__(self, params: Any, state: Any, x: jax.Array, *args: Any) -> jax.Array:
        """Returns the outputs `[B]`, for evaluation and pictures; the state stays as it is."""
        return self.score(self.effective(params, state)[0], x, *args)


def unconstrained(critic: Score | ConstrainedCritic) -> ConstrainedCritic:
    """Returns a `ConstrainedCritic` without constraints; one that has them as it is.

    >>> critic = unconstrained(lambda params, x: x @ params)
    >>> critic(jnp.array([2.0, 1.0]), {}, jnp.ones((3, 2))).tolist()
    [3.0, 3.0, 3.0]
    """
    return critic if isinstance(critic, ConstrainedCritic) else ConstrainedCritic(critic)


def clipped(critic: Score | ConstrainedCritic, bound: float = 0.01) -> ConstrainedCritic:
    """Weight clipping: after each update every parameter is put back into `[-bound, bound]`.

    The parameters that a network starts with are not clipped before the first update. NaN stays.

    Args:
      critic: a plain or a constrained critic.
      bound: positive; the default is the paper's.

    Raises:
      ValueError: if the bound is not positive.

    >>> clipped(lambda params, x: x @ params).project(jnp.array([1.0, -0.001])).tolist()
    [0.009999999776482582, -0.0010000000474974513]
    """
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}")
    critic = unconstrained(critic)

    def project(params: Any) -> Any:
        params = params if critic.project is None else critic.project(params)
        return jax.tree.map(lambda p: jnp.clip(p, -bound, bound), params)

    return dataclasses.replace(critic, project=project)


def spectrally_normalized(
    critic: Score | ConstrainedCritic, iterations: int = 1
) -> ConstrainedCritic:
    """Spectral normalisation of all kernels; see `nn.spectral_norm.spectral_normalize`.

    The singular vectors are the constraint's state. They go on by `iterations` power iterations per
    update of the critic; the generator's update and evaluation look at the critic with as many more
    and do not keep them.

    Args:
      critic: a plain or a constrained critic, without a reparametrisation of its own.
      iterations: power iterations per use, at least 1.

    Raises:
      ValueError: if the critic is reparametrised already, or `iterations` is less than 1.

    >>> critic = spectrally_normalized(lambda params, x: (x @ params["w"])[:, 0])
    >>> params = {"w": jnp.array([[3.0], [4.0]])}
    >>> state = critic.init(jax.random.key(0), params)
    >>> round(float(critic(params, state, jnp.array([[1.0, 0.0]]))[0]), 5)
    0.6
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    critic = unconstrained(critic)
    if critic.reparametrize is not None:
        raise ValueError("the critic is reparametrised already, it cannot be so a second time")
    return dataclasses.replace(
        critic,
        init_state=spectral_vectors,
        reparametrize=lambda params, vectors: spectral_normalize(
            params, vectors, iterations=iterations
        ),
    )


def penalized(critic: Score | ConstrainedCritic, penalty: Penalty) -> ConstrainedCritic:
    """Adds any per-example penalty to the critic's loss, beside those it has.

    Args:
      critic: a plain or a constrained critic.
      penalty: `penalty(score, params, keys, real, fake, *args) -> [B]`, its weight included.
        `score` is the critic's as given here: later wrappers change it no more.

    >>> from blogjax.gradients.penalties import r1_penalty
    >>> critic = penalized(
    ...     lambda params, x: x @ params,
    ...     lambda score, params, keys, real, fake: 10 * r1_penalty(score, params, real),
    ... )
    >>> x, keys = jnp.ones((2, 2)), jax.random.split(jax.random.key(0), 2)
    >>> critic.penalty(jnp.array([3.0, 4.0]), keys, x, x).tolist()
    [125.0, 125.0]
    """
    critic = unconstrained(critic)

    def together(params: Any, keys: Key, real: jax.Array, fake: jax.Array, *args: Any) -> jax.Array:
        added = penalty(critic.score, params, keys, real, fake, *args)
        if critic.penalty is None:
            return added
        # The other one draws from the same keys; folding in parts them.
        others = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        return added + critic.penalty(params, others, real, fake, *args)

    return dataclasses.replace(critic, penalty=together)


def gradient_penalized(
    critic: Score | ConstrainedCritic,
    weight: float = 10.0,
    target: float = 1.0,
    one_sided: bool = False,
) -> ConstrainedCritic:
    """The gradient penalty of WGAN-GP at random points between real and generated examples.

    Args:
      critic: a plain or a constrained critic.
      weight: not negative; the default is the paper's.
      target: the slope that costs nothing.
      one_sided: whether only steeper slopes cost; see `gradients.penalties.gradient_penalty`.

    Raises:
      ValueError: if the weight is negative.

    >>> critic = gradient_penalized(lambda params, x: x @ params)
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> critic.penalty(jnp.array([3.0, 4.0]), keys, jnp.ones((2, 2)), jnp.zeros((2, 2))).tolist()
    [160.0, 160.0]
    """
    if not weight >= 0:
        raise ValueError(f"weight must not be negative, got {weight}")

    def penalty(
        score: Score, params: Any, keys: Key, real: jax.Array, fake: jax.Array, *args: Any
    ) -> jax.Array:
        points = interpolate(keys, real, fake)
        return weight * gradient_penalty(
            score, params, points, *args, target=target, one_sided=one_sided
        )

    return penalized(critic, penalty)


def gradient_normalized(
    critic: Score | ConstrainedCritic,
    kind: Literal["gn", "gran"] = "gn",
    eps: float | None = None,
    lipschitz: float = 1.0,
    piecewise_linear: bool = False,
) -> ConstrainedCritic:
    """The output divided by its own slope; see `gradients.normalization.gradient_normalize`.

    Both losses then see the normalised output, and are differentiated twice.

    Args:
      critic: a plain or a constrained critic.
      kind: `"gn"` or `"gran"`.
      eps: the default is that of the kind.
      lipschitz: factor on the output.
      piecewise_linear: whether the critic is so in x, as with ReLU and leaky ReLU; the generator's
        update then needs no second derivative.

    Raises:
      ValueError: as `gradient_normalize`.

    >>> critic = gradient_normalized(lambda params, x: x @ params)
    >>> [round(float(d), 4) for d in critic(jnp.array([3.0, 4.0]), {}, jnp.array([[1.0, 0.5]]))]
    [0.5]
    """
    critic = unconstrained(critic)
    score = gradient_normalize(
        critic.score, kind=kind, eps=eps, lipschitz=lipschitz, piecewise_linear=piecewise_linear
    )
    return dataclasses.replace(critic, score=score)


ConstraintName = Literal["none", "clip", "sn", "gp", "gn", "gran"]
CONSTRAINTS: dict[str, Callable[..., ConstrainedCritic]] = {
    "none": unconstrained,
    "clip": clipped,
    "sn": spectrally_normalized,
    "gp": gradient_penalized,
    "gn": lambda critic, **options: gradient_normalized(critic, "gn", **options),
    "gran": lambda critic, **options: gradient_normalized(critic, "gran", **options),
}
_OPTIONS = {
    "none": (),
    "clip": ("bound",),
    "sn": ("iterations",),
    "gp": ("weight", "target", "one_sided"),
    "gn": ("eps", "lipschitz", "piecewise_linear"),
    "gran": ("eps", "lipschitz", "piecewise_linear"),
}


def constrain(
    critic: Score | ConstrainedCritic, kind: ConstraintName, **options: Any
) -> ConstrainedCritic:
    """Constrains a critic by the name of the constraint.

    Constraints add up, and a later one sees what the earlier ones made: "gp" after "gn" penalises
    the normalised output, "gn" after "gp" normalises a critic whose own slope is penalised. "sn"
    and "clip" work on the parameters, whatever their place.

    Args:
      critic: `critic(params, x, *args) -> [B]`, or one constrained already.
      kind: `"none"`; `"clip"` with the option `bound`; `"sn"` with `iterations`; `"gp"` with
        `weight`, `target` and `one_sided`; `"gn"` and `"gran"` with `eps`, `lipschitz` and
        `piecewise_linear`.
      **options: those of the kind; the functions of this module say what they mean.

    Returns:
      A `ConstrainedCritic`.

    Raises:
      ValueError: if the kind is unknown, listing the valid ones, or an option is not one of the
        kind's.

    >>> constrain(lambda params, x: x @ params, "clip", bound=0.5).project(jnp.ones(2)).tolist()
    [0.5, 0.5]
    """
    if kind not in tuple(CONSTRAINTS):
        raise ValueError(
            f"constraint {kind!r} is unknown; valid: {', '.join(map(repr, CONSTRAINTS))}"
        )
    unknown = sorted(set(options) - set(_OPTIONS[kind]))
    if unknown:
        valid = ", ".join(_OPTIONS[kind]) or "none"
        raise ValueError(f"{kind!r} has no options {', '.join(unknown)}; it has: {valid}")
    return CONSTRAINTS[kind](critic, **options)
