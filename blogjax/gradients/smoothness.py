"""What noise on the input amounts to: a Laplacian, or a penalty on the gradients of the outputs.

What: the Laplacian regulariser; the gradient penalty that equals the expected distance between a
  model's outputs with and without noise, exact or estimated by random signs; and that distance.
Post: https://kexue.fm/archives/7466
Papers: Bishop 1995, Training with noise is equivalent to Tikhonov regularization
Equations: noise e of mean 0 and covariance sigma^2 I, to second order in sigma:
    E l(f(x+e), y) - l(f(x), y) ~ sigma^2 / 2 Laplacian_x l(f(x), y);
    E l(f(x+e), f(x)) ~ sigma^2 / 2 sum_i lam_i |grad_x f_i|^2, lam_i = d^2 l / df_i^2 at y = f(x):
    2 for the squared distance |f - y|^2, 1 / f_i for KL(y || f);
    sum_i lam_i |grad f_i|^2 = E |grad sum_i eta_i sqrt(lam_i) f_i|^2, eta_i = +-1, the coefficients
    held constant under grad; Laplacian l = E v' H v, v_j = +-1.
Differences from the post: KL is taken of logits, as sum_i f_i |grad log f_i|^2, which is the same
  and finite where f_i underflows; the post needs f_i. The post leaves the Laplacian as
  impracticable; forward-mode differentiation makes it two forward passes per direction. Random
  signs for it are not in the post.

For a piecewise linear network the Laplacian is only that of the loss: curvature at the kinks, which
noise feels, is invisible to derivatives.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from blogjax.core import random
from blogjax.core.broadcasting import sum_except
from blogjax.core.norms import at_least_float32
from blogjax.gradients.input_gradient import (
    Critic,
    alone,
    check_rows,
    scalar_alone,
)
from blogjax.gradients.perturbation import check_count

Model = Callable[..., jax.Array]  # model(params, x, *args) -> [B, ...]
Distance = Literal["squared", "kl"]


def _check(distance: Distance, sigma: ArrayLike, **counts: int) -> None:
    if distance not in get_args(Distance):
        valid = ", ".join(repr(choice) for choice in get_args(Distance))
        raise ValueError(f"distance={distance!r} is unknown; valid: {valid}")
    if jnp.shape(sigma) != ():
        raise ValueError(f"sigma has shape {jnp.shape(sigma)}, but must be a scalar: ()")
    for name, count in counts.items():
        check_count(name, count, 1)


def _signs(keys: random.Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (2 * random.randint(keys, shape, 0, 2) - 1).astype(dtype)


def _outputs_alone(model: Model, params: Any, distance: Distance) -> Callable[..., jax.Array]:
    """The outputs of one example, flat `[K]`, such that lam is 2 or the output's own exp."""

    def one(*example: Any) -> jax.Array:
        out = at_least_float32(alone(model, params)(*example))
        if distance == "squared":
            return out.ravel()
        if out.ndim != 1 or out.shape[0] < 2:
            raise ValueError(
                f"the model's output for a batch of one has shape {(1, *out.shape)}, but "
                "distance='kl' needs one row of logits per example, of at least 2 classes: [B, K]; "
                "for one logit z of yes or no give [0, z]"
            )
        return jax.nn.log_softmax(out)

    return one


def _root_of_lambda(out: jax.Array, distance: Distance) -> jax.Array:
    """sqrt(lam_i / 2) for outputs; sqrt(lam_i) f_i = sqrt(f_i) for log-probabilities."""
    return jnp.ones_like(out) if distance == "squared" else jnp.exp(out / 2)


def _half_variance(sigma: ArrayLike, distance: Distance) -> jax.Array:
    """What is left of lam sigma^2 / 2: without the root of 2, integers stay exact."""
    return jnp.square(sigma) * (1.0 if distance == "squared" else 0.5)


def noise_penalty(
    model: Model,
    params: Any,
    x: jax.Array,
    *args: Any,
    distance: Distance = "squared",
    sigma: ArrayLike = 1.0,
) -> jax.Array:
    """`sigma^2 / 2 sum_i lam_i |grad_x f_i(x)|^2`: what noise does to the outputs, without noise.

    The mean of `noise_distance` up to order sigma^4; for a linear model and the squared distance
    equal to it. Labels are not needed, so unlabelled data counts too.

    - "squared": `l = |f - y|^2`, lam_i = 2; the result is `sigma^2` times the squared Frobenius
      norm of the Jacobian, the density of the Dirichlet energy.
    - "kl": the model's outputs are logits, f their softmax, `l = KL(f(x) || f(x+e))`,
      lam_i = 1 / f_i.

    One backward pass per output, all at once: for many outputs take `noise_penalty_estimate`.

    Numerics: outputs are taken to float32 or better. Squares only, so smooth at zero; KL is finite
    for any finite logits.

    Args:
      model: `model(params, x, *args) -> [B, ...]`; for "kl" `[B, K]`.
      params: its parameters.
      x: `[B, ...]` floating.
      args: arrays with leading axis B.
      distance: which l.
      sigma: standard deviation of each entry of the noise, a scalar.

    Returns:
      `[B]`, float32 or better.

    Raises:
      ValueError: if `distance` is unknown, sigma no scalar, the model's output or an array in args
        does not lead with B, or "kl" is given fewer than 2 classes.
      TypeError: if x or the output is not real and floating.

    >>> linear = lambda params, x: x @ params
    >>> w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> noise_penalty(linear, w, jnp.ones((1, 2)), sigma=0.5).tolist()  # 0.25 (1 + 4 + 9 + 16)
    [7.5]
    """
    _check(distance, sigma)
    check_rows(x, args)
    outputs = _outputs_alone(model, params, distance)

    def one(x: jax.Array, *args: Any) -> jax.Array:
        out, pull = jax.vjp(lambda x: outputs(x, *args), x)
        # Row i is sqrt(lam_i) grad f_i, but for the factor 2 of the squared distance.
        rows = jax.vmap(pull)(jnp.diag(_root_of_lambda(out, distance)))[0]
        return jnp.sum(jnp.square(at_least_float32(rows)))

    return _half_variance(sigma, distance) * jax.vmap(one)(x, *args)


def noise_penalty_estimate(
    keys: random.Key,
    model: Model,
    params: Any,
    x: jax.Array,
    *args: Any,
    distance: Distance = "squared",
    sigma: ArrayLike = 1.0,
    probes: int = 1,
) -> jax.Array:
    """`noise_penalty` by random signs: one backward pass per probe, however many the outputs.

    `sigma^2 / 2` times the mean over probes of `|grad_x sum_i eta_i sqrt(lam_i) f_i|^2`, where the
    eta are +-1 with equal chance. Unbiased, and so are its derivatives; exact if the gradients of
    the outputs are orthogonal, or there is one output.

    Args:
      keys: typed keys `[B]`, from `core.random.fold_in_rows`, or a scalar one.
      probes: how many draws per example.
      others: as in `noise_penalty`.

    Returns:
      `[B]`, float32 or better.

    Raises:
      ValueError: as `noise_penalty`, and if probes is below 1.
      TypeError: as there, if the keys are not typed, or probes is not an integer known when the
        function is traced.

    >>> linear = lambda params, x: x @ params
    >>> w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> many = noise_penalty_estimate(
    ...     jax.random.key(0), linear, w, jnp.ones((1, 2)), sigma=0.5, probes=10_000
    ... )
    >>> round(float(many[0]), 1)
    7.5
    """
    _check(distance, sigma, probes=probes)
    check_rows(x, args)
    outputs = _outputs_alone(model, params, distance)
    shape = jax.eval_shape(jax.vmap(outputs), x, *args)
    signs = _signs(keys, (x.shape[0], probes, shape.shape[1]), shape.dtype)

    def one(signs: jax.Array, x: jax.Array, *args: Any) -> jax.Array:
        out, pull = jax.vjp(lambda x: outputs(x, *args), x)
        probe = jax.vmap(pull)(signs * _root_of_lambda(out, distance)[None])[0]
        return jnp.mean(sum_except(jnp.square(at_least_float32(probe))))

    return _half_variance(sigma, distance) * jax.vmap(one)(signs, x, *args)


def noise_distance(
    keys: random.Key,
    model: Model,
    params: Any,
    x: jax.Array,
    *args: Any,
    distance: Distance = "squared",
    sigma: ArrayLike = 1.0,
    draws: int = 1,
) -> jax.Array:
    """`l(f(x + e), f(x))` with Gaussian noise e, averaged over draws: what `noise_penalty` expands.

    Both f are differentiated, as in the post's integral.

    Numerics: as in `noise_penalty`, but that noise is added in float32 or better and the sum gets
    the dtype of x, which swallows what is below its resolution.

    Args:
      keys: typed keys `[B]`, from `core.random.fold_in_rows`, or a scalar one.
      draws: how many noises per example.
      others: as in `noise_penalty`.

    Returns:
      `[B]`, float32 or better.

    Raises:
      ValueError: as `noise_penalty`, and if draws is below 1.
      TypeError: as `noise_penalty_estimate`, of draws.

    >>> linear = lambda params, x: x @ params
    >>> noise_distance(jax.random.key(0), linear, jnp.ones((2, 1)), jnp.ones((3, 2))).shape
    (3,)
    """
    _check(distance, sigma, draws=draws)
    check_rows(x, args)
    outputs = _outputs_alone(model, params, distance)
    wide = at_least_float32(x)
    noise = random.normal(keys, (x.shape[0], draws, *x.shape[1:]), wide.dtype)

    def one(noise: jax.Array, x: jax.Array, *args: Any) -> jax.Array:
        clean = outputs(x, *args)

        def apart(e: jax.Array) -> jax.Array:
            noisy = outputs((at_least_float32(x) + sigma * e).astype(x.dtype), *args)
            if distance == "squared":
                return jnp.sum(jnp.square(noisy - clean))
            return jnp.sum(jnp.exp(clean) * (clean - noisy))

        return jnp.mean(jax.vmap(apart)(noise))

    return jax.vmap(one)(noise, x, *args)


def _second_derivative(loss: Callable[[jax.Array], jax.Array], x: jax.Array, v: jax.Array):
    """The form v' H v, forward over forward: nothing is stored for a backward pass."""
    return jax.jvp(lambda x: jax.jvp(loss, (x,), (v,))[1], (x,), (v,))[1]


def laplacian_penalty(
    loss: Critic, params: Any, x: jax.Array, *args: Any, sigma: ArrayLike = 1.0
) -> jax.Array:
    """`sigma^2 / 2 Laplacian_x l(f(x), y)` per example: the post's regulariser.

    To order sigma^4 what noise on the input adds to the loss, `E l(f(x+e), y) - l(f(x), y)`; equal
    to it for a loss quadratic in x. It can be negative. Exact, with one directional second
    derivative per entry of x, all at once, whose activations lie in memory together: for many
    entries take `laplacian_penalty_estimate`.

    Args:
      loss: `loss(params, x, *args) -> [B]`, one per example.
      params: its parameters.
      x: `[B, ...]` floating.
      args: arrays with leading axis B, as labels are.
      sigma: standard deviation of each entry of the noise, a scalar.

    Returns:
      `[B]`, float32 or better.

    Raises:
      ValueError: if sigma is no scalar, the loss is not one scalar per example, or an array in args
        has not B rows.
      TypeError: if x or the loss is not real and floating.

    >>> loss = lambda params, x, y: (x @ params - y) ** 2  # Laplacian 2 |w|^2
    >>> w, x, y = jnp.array([1.0, 2.0]), jnp.zeros((1, 2)), jnp.ones(1)
    >>> laplacian_penalty(loss, w, x, y, sigma=0.5).tolist()
    [1.25]
    """
    _check("squared", sigma)
    check_rows(x, args)
    size = math.prod(x.shape[1:])
    basis = jnp.eye(size, dtype=x.dtype).reshape(size, *x.shape[1:])
    scalar = scalar_alone(loss, params)

    def one(x: jax.Array, *args: Any) -> jax.Array:
        return jnp.sum(
            jax.vmap(lambda v: _second_derivative(lambda x: scalar(x, *args), x, v))(basis)
        )

    return jnp.square(sigma) / 2 * jax.vmap(one)(x, *args)


def laplacian_penalty_estimate(
    keys: random.Key,
    loss: Critic,
    params: Any,
    x: jax.Array,
    *args: Any,
    sigma: ArrayLike = 1.0,
    probes: int = 1,
) -> jax.Array:
    """`laplacian_penalty` by random signs: the mean of `v' H v` over v with entries +-1.

    Unbiased; exact where the Hessian by x is diagonal.

    Args:
      keys: typed keys `[B]`, from `core.random.fold_in_rows`, or a scalar one.
      probes: how many directions per example.
      others: as in `laplacian_penalty`.

    Returns:
      `[B]`, float32 or better.

    Raises:
      ValueError: as `laplacian_penalty`, and if probes is below 1.
      TypeError: as `noise_penalty_estimate`.

    >>> loss = lambda params, x: jnp.sum(params * x**2, -1)
    >>> w, x = jnp.array([1.0, 2.0]), jnp.zeros((1, 2))
    >>> laplacian_penalty_estimate(jax.random.key(0), loss, w[None], x).tolist()
    [3.0]
    """
    _check("squared", sigma, probes=probes)
    check_rows(x, args)
    scalar = scalar_alone(loss, params)
    signs = _signs(keys, (x.shape[0], probes, *x.shape[1:]), x.dtype)

    def one(signs: jax.Array, x: jax.Array, *args: Any) -> jax.Array:
        return jnp.mean(
            jax.vmap(lambda v: _second_derivative(lambda x: scalar(x, *args), x, v))(signs)
        )

    return jnp.square(sigma) / 2 * jax.vmap(one)(signs, x, *args)
