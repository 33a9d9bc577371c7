"""Critics divided by their own slope: gradient normalisation for GANs.

What: wraps a critic such that its slope is at most 1 (GN, GraN) wherever the critic is piecewise
  linear, by construction and without a penalty.
Post: https://kexue.fm/archives/8757
Papers: Wu et al. 2021 (arXiv 2109.02235) for GN; Bhaskara et al. 2022 (arXiv 2111.03162) for GraN
Equations: with n = |grad_x D(x)|, GN D / (n + |D|), in [-1, 1]; GraN D n / (n^2 + eps); both times
  the Lipschitz constant K.
Differences from the post: 0 / 0 (a zero critic) is 0, with derivatives 0; the authors' code gives
  NaN. The gradient is each example's own, not that of the sum over the batch. GN takes an eps too,
  `D / (n + |D| + eps)`, by default 0. The generator's step can do without second derivatives where
  D is piecewise linear, an idea of the later Faster-GNGAN code of GN's authors.

Where D is piecewise linear, n is constant inside each piece and the slope of the result is
(n / (n + |D|))^2 <= 1 for GN and n^2 / (n^2 + eps) < 1 for GraN. That is all: across a kink n jumps
and the result with it (post 8757's objection), and for a smooth critic the slope has no bound of 1
(D = sin(k x) gives k^2 at its peaks). Both are tests.

GN does not change under D -> a D, a > 0. So the gradient by the last layer is orthogonal to that
layer, whose norm grows under SGD, and weight decay acts as a change of its learning rate.

Both the critic's and the generator's step differentiate through n, to second order: for an MLP 2.2
and 1.5 times the operations of the plain step, as far as it passes through the critic. A gradient
penalty costs the first alone, and so does `piecewise_linear=True`.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from blogjax.core.broadcasting import sum_except
from blogjax.core.norms import at_least_float32, per_example_norm, power_of_two
from blogjax.gradients.input_gradient import Critic, value_and_input_gradient
from blogjax.gradients.perturbation import check_size

Kind = Literal["gn", "gran"]

_EPS = {"gn": 0.0, "gran": 0.1}


def _quotient(top: jax.Array, bottom: jax.Array) -> jax.Array:
    """`top / bottom`, and 0 with derivatives 0 where bottom is 0; NaN passes."""
    something = bottom != 0
    return jnp.where(something, top / jnp.where(something, bottom, 1), 0)


def _gn(value: jax.Array, norm: jax.Array, eps: jax.Array) -> jax.Array:
    # In units in which the largest term is near 1 the derivative's square of the divisor exists,
    # however small the critic; division by a power of two changes no bit.
    unit = power_of_two(jnp.maximum(jnp.maximum(jnp.abs(value), norm), eps))
    value, norm = value / unit, norm / unit
    # Not jnp.abs, whose slope at 0 is 1: at D = 0 the second derivative is the mean of both sides.
    return _quotient(value, norm + value * jnp.sign(value) + eps / unit)


def _gran(value: jax.Array, norm: jax.Array, eps: jax.Array) -> jax.Array:
    unit = power_of_two(jnp.maximum(norm, jnp.sqrt(eps)))
    value, norm = value / unit, norm / unit
    return value * _quotient(norm, jnp.square(norm) + eps / unit / unit)


def _on_tangent_planes(
    critic: Critic, params: Any, x: jax.Array, *args: Any
) -> tuple[jax.Array, jax.Array]:
    """`value_and_input_gradient` of the critic's tangent plane at each example.

    The same numbers and derivatives by params; as a function of x the value is linear and the
    gradient constant.
    """
    here = jax.lax.stop_gradient(x)
    value, gradient = value_and_input_gradient(critic, params, here, *args)
    away = at_least_float32(x) - at_least_float32(here)  # 0, but for its derivative
    return value + sum_except(at_least_float32(gradient) * away), gradient


def gradient_normalize(
    critic: Critic,
    *,
    kind: Kind = "gn",
    eps: ArrayLike | None = None,
    lipschitz: ArrayLike = 1.0,
    piecewise_linear: bool = False,
) -> Critic:
    """Returns the critic divided by its slope; a function of the same signature.

    With `n = |grad_x D(x)|_2` of each example, over all non-batch axes:

    - "gn": `K D / (n + |D| + eps)`, eps 0 by default; between -K and K, and the same for `a D`.
    - "gran": `K D n / (n^2 + eps)`, eps 0.1 by default; not bounded, not indifferent to scale.

    Each example is differentiated in a batch of its own, so BatchNorm and the like would work on
    one example and silently give another function than the critic: `input_gradient.
    check_per_example` finds them.

    Numerics: n and the quotient are in float32 or better whatever the critic's dtype, and so is the
    result. Finite for finite D and n. Where D and n are 0 (a zero critic), value, first and second
    derivatives are 0: it cannot train, so do not start the last layer at zero. Where only n is 0 (a
    dead ReLU network, a constant), GN is `K sign(D)` and GraN 0, both flat. For GN with eps = 0,
    `a D` gives the same bits for every `a = 2^k` with which value and gradient stay normal numbers.

    Args:
      critic: `critic(params, x, *args) -> [B]`, one scalar per example; x `[B, ...]` floating;
        arrays in `args` (labels) have leading axis B.
      kind: which formula.
      eps: at least 0, a number or a traced scalar; None is the formula's own.
      lipschitz: K, above 0, a number or a traced scalar.
      piecewise_linear: says that D is so in x (ReLU, leaky ReLU, max pooling; no tanh, GELU or
        LayerNorm). Derivatives by x, of any order, then take n for constant and D for its tangent
        plane, which inside a piece they are: `K n / (n + |D|)^2 grad D` and
        `K n / (n^2 + eps) grad D`. That needs no second derivative of D: the generator's step
        through the critic costs what the plain one costs. Values and derivatives by params are the
        same as without, for any critic; derivatives by x are not, unless D is piecewise linear.

    Returns:
      The normalised critic, `(params, x, *args) -> [B]`, float32 or better, to be differentiated by
      params and x.

    Raises:
      ValueError: if `kind` is unknown, eps is negative, lipschitz not positive, or either has
        a shape. The returned critic raises if D's output is not one scalar per example.
      TypeError: from the returned critic, if x or D's output is not real and floating.

    >>> linear = lambda params, x: x @ params
    >>> w, x = jnp.array([3.0, 4.0]), jnp.array([[1.0, 3.0]])  # D = 15, n = 5
    >>> gradient_normalize(linear)(w, x).tolist()
    [0.75]
    >>> gradient_normalize(linear, kind="gran", eps=0.0)(w, x).tolist()
    [3.0]
    """
    if kind not in get_args(Kind):
        valid = ", ".join(repr(choice) for choice in get_args(Kind))
        raise ValueError(f"kind={kind!r} is unknown; valid: {valid}")
    divisor = _EPS[kind] if eps is None else eps
    check_size("eps", divisor)
    check_size("lipschitz", lipschitz, positive=True)
    formula = _gn if kind == "gn" else _gran
    measure = _on_tangent_planes if piecewise_linear else value_and_input_gradient

    def normalized(params: Any, x: jax.Array, *args: Any) -> jax.Array:
        value, gradient = measure(critic, params, x, *args)
        norm = per_example_norm(gradient)
        dtype = jnp.promote_types(value.dtype, norm.dtype)
        quotient = formula(value.astype(dtype), norm.astype(dtype), jnp.asarray(divisor, dtype))
        return jnp.asarray(lipschitz, dtype) * quotient

    return normalized
