"""Virtual adversarial training: smoothness of the prediction where it is least smooth, unlabelled.

What: `virtual_adversarial_perturbation`, the change of the input that changes the prediction most,
  and `vat_loss`, how much it changes it.
Post: https://kexue.fm/archives/7466
Paper: Miyato et al. (arXiv 1704.03976)
Equations: l(r) = KL(p(x) || p(x + r)) = 1/2 r' H r + O(|r|^3), H = J' (diag(p) - p p') J,
  J = d logits / dx; u ~ N(0, I), u <- H u / |H u| repeated; loss KL(p(x) || p(x + eps u)).
Differences from the post:
- H u is exact; the post takes the gradient at x + 10 u for it, a secant over a long way. In float32
  that points elsewhere where both predictions are sure to 1e-7, and so does jax's own second
  derivative of the divergence (`test_sure_predictions_still_have_a_direction`).
- Where H u = 0 the direction stays what it was, the noise; the post's u / |u| is 0/0 there.
- Without iterations the noise has the length eps; the post calls that Gaussian noise, whose length
  varies by a share of 1/sqrt(2 d).
- One direction per example; the post's code perturbs the embedding matrix as a whole, which is
  `per_example=False`.
- The clean prediction is held fixed in training, as in the post's code, not in its text: see
  `vat_loss`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from blogjax.core.norms import at_least_float32
from blogjax.core.random import Key
from blogjax.gradients.perturbation import (
    arrays,
    check_count,
    check_size,
    constant,
    examples,
    finished,
    largest_entry,
    random_direction,
    scale,
    scale_to_one,
    steepest_ascent,
)


def _kl(logits: jax.Array, other: jax.Array) -> jax.Array:
    """`[B]`: KL(softmax(logits) || softmax(other)); classes of probability 0 count nothing."""
    log_p, log_q = (jax.nn.log_softmax(z) for z in at_least_float32((logits, other)))
    p = jnp.exp(log_p)
    some = p != 0  # NaN counts
    terms = jnp.where(some, p * (jnp.where(some, log_p, 0) - jnp.where(some, log_q, 0)), 0)
    return jnp.sum(terms, axis=tuple(range(1, terms.ndim)))


def virtual_adversarial_perturbation(
    predict: Callable[..., jax.Array],
    params: Any,
    x: Any,
    keys: Key,
    *args: Any,
    epsilon: ArrayLike,
    iterations: int = 1,
    per_example: bool = True,
) -> Any:
    """VAT's perturbation of the input: where the prediction changes most, whatever the label.

    `r = eps u`, u the direction of largest KL(p(x) || p(x + r)) for small r: the top eigenvector of
    its Hessian `H = J' F J` at r = 0 (J: logits by input; F = diag(p) - p p'), by power iterations
    from normal noise. Nothing is linear in r there: the gradient is 0. The sign is the noise's.

    Numerics: H u is exact, a `jvp` and a `vjp` per iteration that share one forward pass. F is
    applied in float32 or better to differences from the likeliest class and scaled, so a prediction
    sure to 1e-30 still has its direction. Where H u = 0 (a model that ignores x) u stays as it was.

    Args:
      predict: `predict(params, x, *args) -> [B, K]` logits, or `[B, ..., K]`, whose divergences are
        added. Anything random in it, as dropout, must be the same at every call. It must have a
        forward derivative (no `jax.custom_vjp`).
      params: anything that `predict` takes.
      x: array `[B, ...]` of real floats, or a pytree of them.
      keys: for the noise: typed keys `[B]`, as from `fold_in_rows`, or one.
      args: what else `predict` takes.
      epsilon: length of r, at least 0; a number or a traced scalar.
      iterations: power iterations; 0 gives noise of length epsilon.
      per_example: False takes x, of any shape (an embedding matrix), as a whole, and adds the
        divergences of the batch.

    Returns:
      r like x, a constant to differentiation; `|r| = epsilon`.

    Raises:
      ValueError: if iterations or epsilon is below 0, shapes do not fit, or there is one class.
      TypeError: if x or the logits are not real floating, or iterations is not an integer known
        when the function is traced.

    >>> import jax, jax.numpy as jnp
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> r = virtual_adversarial_perturbation(lambda w, x: x @ w, jnp.array([[3.0, 0], [4.0, 0]]),
    ...                                      jnp.zeros((2, 2)), keys, epsilon=0.5)
    >>> print(jnp.abs(r).round(3))
    [[0.3 0.4]
     [0.3 0.4]]
    """
    check_size("epsilon", epsilon)
    check_count("iterations", iterations, 0)
    x = arrays(x)
    rows = examples(x, per_example)
    params, given, args = constant((params, x, args))
    u = random_direction(keys, at_least_float32(given), per_example)
    if iterations == 0:
        return finished(u, x, epsilon)

    def checked(x: Any) -> jax.Array:
        logits = predict(params, x, *args)
        _check_logits(logits, rows)
        return logits

    logits, push = jax.linearize(checked, given)
    pull = jax.linear_transpose(push, given)
    p = jax.nn.softmax(at_least_float32(logits))
    likeliest = jnp.argmax(logits, axis=-1, keepdims=True)

    def one_step(_: Any, u: Any) -> Any:
        moved = at_least_float32(push(jax.tree.map(lambda a, like: a.astype(like.dtype), u, given)))
        # Only differences between logits matter. Taken from the likeliest class, whose own is then
        # 0, the mean has no rounding error as large as it is where all other p are tiny.
        moved = moved - jnp.take_along_axis(moved, likeliest, axis=-1)
        moved = p * (moved - jnp.sum(p * moved, axis=-1, keepdims=True))
        (product,) = pull(scale_to_one(moved, per_example).astype(logits.dtype))
        product = at_least_float32(product)
        flat = largest_entry(product, per_example) == 0
        new = steepest_ascent(product, per_example=per_example)
        return jax.tree.map(lambda a, b: a + b, scale(u, flat), scale(new, ~flat))

    return finished(jax.lax.fori_loop(0, iterations, one_step, u), x, epsilon)


def _check_logits(logits: Any, rows: tuple[int, ...]) -> None:
    if not isinstance(logits, jax.Array) or not jnp.issubdtype(logits.dtype, jnp.floating):
        found = logits.dtype if isinstance(logits, jax.Array) else type(logits)
        raise TypeError(f"predict must return one real and floating array of logits, got {found}")
    if logits.ndim < 2 or (rows and logits.shape[:1] != rows):
        first = rows[0] if rows else "B"
        raise ValueError(
            f"predict must return logits of shape ({first}, ..., classes), got {logits.shape}"
        )
    if logits.shape[-1] < 2:
        raise ValueError(
            f"predict must return logits of at least 2 classes, got shape {logits.shape}: beside a "
            "single class nothing can change. For one logit z of yes or no give [0, z]"
        )


def vat_loss(
    predict: Callable[..., jax.Array],
    params: Any,
    x: Any,
    keys: Key,
    *args: Any,
    epsilon: ArrayLike,
    iterations: int = 1,
    per_example: bool = True,
    stop_target: bool = True,
) -> jax.Array:
    """VAT's loss, which needs no label: `KL(p(x) || p(x + r))`, r the virtual adversarial one.

    Add its mean over labelled and unlabelled inputs to the loss of the labelled ones.

    Numerics: softmax and sums in float32 or better; a class of probability 0 (logit -inf) counts
    nothing; NaN stays in its example. 0 at epsilon = 0, with gradient 0; rounding can leave -1e-7.

    Args:
      predict, params, x, keys, args, epsilon, iterations, per_example: as in
        `virtual_adversarial_perturbation`.
      stop_target: holds p(x) fixed, as the authors' code and the post's code do, though the post's
        text would differentiate it: what the labels taught at x is then not drawn towards the
        worse prediction at x + r, only the latter towards the former. False differentiates both.

    Returns:
      `[B]`, differentiable by `params` and x; r is a constant.

    Raises:
      ValueError, TypeError: as `virtual_adversarial_perturbation`.

    >>> import jax, jax.numpy as jnp
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> w = jnp.array([[3.0, 0], [4.0, 0]])
    >>> print(vat_loss(lambda w, x: x @ w, w, jnp.zeros((2, 2)), keys, epsilon=0.1).round(3))
    [0.031 0.031]
    """
    x = arrays(x)
    r = virtual_adversarial_perturbation(
        predict, params, x, keys, *args,
        epsilon=epsilon, iterations=iterations, per_example=per_example,
    )  # fmt: skip
    clean = predict(params, x, *args)
    _check_logits(clean, examples(x, per_example))
    if stop_target:
        clean = jax.lax.stop_gradient(clean)
    return _kl(clean, predict(params, jax.tree.map(jnp.add, x, r), *args))
