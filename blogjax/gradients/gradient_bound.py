"""An inequality between the gradients of an MLP by its input and by its parameters.

What: both sides of the inequality, `mlp_gradient_bound` for each example by itself and
  `batch_gradient_bound` for the mean loss of a batch; spectral norms, exact and by power iteration.
Post: https://kexue.fm/archives/8796
Paper: Dherin, Munn and Barrett 2021, https://arxiv.org/abs/2111.15090.
Equations: h_{t+1} = g_t(h_t W_t + b_t), h_1 = x, J_t = dh_t / dx, f any scalar function of the
  output; |W| and |J| are spectral norms. One example:
    |grad_x f|^2 sum_t (1 + |h_t|^2) / (|W_t| |J_t|)^2 <= |grad_theta f|^2,
  layer by layer, and apart for kernels (|h_t|^2) and biases (1).
  Batch, L = mean_i f_i, s_t the smallest singular value of the matrix of B rows [h_{t,i}, 1],
  0 where B > in_t + 1:
    sum_t s_t^2 / (B |W_t|^2) mean_i |grad_{x_i} f_i|^2 / |J_{t,i}|^2 <= |grad_theta L|^2.
Differences from the post: the batch form is not in it. The post's inequality holds for the gradient
  of one example, hence also for means of squared norms over examples, and not for the gradient of a
  mean: with W = .5, b = -.5, x = (1, 1) and squared error to y = (1, -1) the gradient of the batch
  is 0, those by the inputs are not. For B = 1 the batch form is the post's. Its right-hand side is
  at least s_t^2 / B^2 sum_i |delta_{t,i}|^2 in every layer, since the gradient by a layer's kernel
  and bias together is the product of that matrix and the deltas. Large batches have s_t = 0:
  there a small gradient says nothing about the gradients by the inputs.
  The proof goes over delta and needs no division by entries of h. A term 0/0 (ReLUs that are all
  off) is 0.

The post's objection to the paper stands: spectral norms are not near 0 at the start of training;
an orthogonal kernel has spectral norm 1.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blogjax.core.norms import at_least_float32, power_of_two
from blogjax.gradients.per_example import (
    Activation,
    Layer,
    LayerSignals,
    layer_activations,
    layer_signals,
    mlp_layers,
    squared_norms_by_layer,
)
from blogjax.gradients.perturbation import check_count

Norm = Callable[[jax.Array], jax.Array]


class LayerTerms(NamedTuple):
    """Both sides for each layer's kernel and bias alone, `[layers, B]`; 0 for a missing bias."""

    kernel_lhs: jax.Array
    kernel_rhs: jax.Array
    bias_lhs: jax.Array
    bias_rhs: jax.Array


class GradientBound(NamedTuple):
    """Both sides for each example, `[B]`, and the terms they are sums of."""

    lhs: jax.Array
    rhs: jax.Array
    per_layer: LayerTerms


class BatchGradientBound(NamedTuple):
    """Both sides for a batch, `[]`, and the terms they are sums of, `[layers]`."""

    lhs: jax.Array
    rhs: jax.Array
    layer_lhs: jax.Array
    layer_rhs: jax.Array


def _matrices(matrix: jax.Array) -> jax.Array:
    if matrix.ndim < 2:
        raise ValueError(f"a matrix must be [..., m, n], got shape {matrix.shape}")
    return at_least_float32(matrix)


def spectral_norm(matrix: jax.Array) -> jax.Array:
    """Largest singular value, by a singular value decomposition: `[..., m, n] -> [...]`.

    In float32 or better; 0 for a matrix without entries.

    Raises:
      ValueError: if there are fewer than two axes.

    >>> import jax.numpy as jnp
    >>> float(spectral_norm(jnp.array([[3.0, 0.0], [0.0, -4.0]])))
    4.0
    """
    matrix = _matrices(matrix)
    if 0 in matrix.shape[-2:]:
        return jnp.zeros(matrix.shape[:-2], matrix.dtype)
    return jnp.linalg.svd(matrix, compute_uv=False)[..., 0]


def power_iteration_norm(matrix: jax.Array, iterations: int = 20) -> jax.Array:
    """Estimate of the largest singular value from below: `[..., m, n] -> [...]`.

    v <- M^T M v, normalised, from a Gaussian v that is the same in every call; then |M v|. Cheap
    for large matrices, but never above the true value (rounding aside), and a few percent below
    where the second singular value is close to the first. In an inequality that divides by it, the
    side it divides becomes too large, so a small violation proves nothing: certify with
    `spectral_norm`.

    Numerics: in float32 or better. Entries are divided by a power of two first, so that no square
    of a norm over- or underflows.

    Args:
      matrix: `[..., m, n]`, real floating.
      iterations: at least 1.

    Raises:
      ValueError: if there are fewer than two axes, or no iterations.
      TypeError: if iterations is not an integer known when the function is traced.

    >>> import jax.numpy as jnp
    >>> round(float(power_iteration_norm(jnp.array([[3.0, 0.0], [0.0, -4.0]]))), 4)
    4.0
    """
    matrix = _matrices(matrix)
    check_count("iterations", iterations, 1)
    scale = power_of_two(jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True, initial=0))
    matrix = matrix / scale
    # Zeros like a row, so that under shard_map v varies over the devices that the matrix varies on.
    start = jax.random.normal(jax.random.key(0), matrix.shape[-1:], matrix.dtype)
    zeros = jnp.sum(jnp.zeros_like(matrix), axis=-2)
    start = zeros + jnp.broadcast_to(start, zeros.shape)

    def unit(v: jax.Array) -> jax.Array:
        length = jnp.sqrt(jnp.sum(v * v, axis=-1, keepdims=True))
        return v / jnp.where(length == 0, 1, length)

    def step(_: int, v: jax.Array) -> jax.Array:
        u = unit(jnp.einsum("...mn,...n->...m", matrix, v))
        return unit(jnp.einsum("...mn,...m->...n", matrix, u))

    v = jax.lax.fori_loop(0, iterations, step, unit(start))
    image = jnp.einsum("...mn,...n->...m", matrix, v)
    return jnp.sqrt(jnp.sum(image * image, axis=-1)) * scale[..., 0, 0]


class _Measured(NamedTuple):
    """What both forms are made of, in float32 or better.

    Attributes:
      layers: upcast.
      signals: see `LayerSignals`.
      pulled: `|grad_x f| / (|W_t| |J_t|)`, a lower bound of |delta_t|: `[layers, B]`.
    """

    layers: tuple[Layer, ...]
    signals: LayerSignals
    pulled: jax.Array


def _measure(
    params: Any,
    x: jax.Array,
    loss: Callable[..., jax.Array],
    args: tuple[Any, ...],
    activation: Activation | Sequence[Activation],
    norm: Norm,
) -> _Measured:
    layers = at_least_float32(mlp_layers(params))
    as_params = [layer._asdict() for layer in layers]
    x = at_least_float32(x)
    signals = layer_signals(as_params, x, loss, *args, activation=activation)
    functions = layer_activations(activation, len(layers))

    def hidden(row: jax.Array) -> list[jax.Array]:
        """Inputs of all layers but the first."""
        inputs = []
        for layer, function in zip(layers[:-1], functions[:-1], strict=True):
            row = row @ layer.kernel
            row = function(row if layer.bias is None else row + layer.bias)
            inputs.append(row)
        return inputs

    input_norm = jnp.sqrt(jnp.sum(jnp.square(signals.input_gradient), axis=-1))
    jacobian_norms = [jnp.ones_like(input_norm)]  # of x by x
    jacobian_norms += [norm(jacobian) for jacobian in jax.vmap(jax.jacfwd(hidden))(x)]
    pulled = []
    for layer, jacobian_norm in zip(layers, jacobian_norms, strict=True):
        below = norm(layer.kernel) * jacobian_norm
        # Where this is 0, the gradient by the input is 0, too.
        pulled.append(jnp.where(below == 0, 0, input_norm / jnp.where(below == 0, 1, below)))
    return _Measured(layers, signals, jnp.stack(pulled))


def mlp_gradient_bound(
    params: Any,
    x: jax.Array,
    loss: Callable[..., jax.Array],
    *args: Any,
    activation: Activation | Sequence[Activation] = jax.nn.relu,
    norm: Norm = spectral_norm,
) -> GradientBound:
    """Both sides of the post's inequality, for each example by itself.

    `|grad_x f|^2 sum_t (1 + |h_t|^2) / (|W_t| |J_t|)^2 <= |grad_theta f|^2`, without the 1 for
    layers that have no bias. The two sides are equal where every layer has one output and no
    activation is flat; so also for any function of one affine map to a number. The gradient of a
    batch is not bounded by this: see `batch_gradient_bound`.

    Numerics: everything in float32 or better, also for a network of bfloat16, since the inequality
    is one of exact arithmetic; in float32 equal sides differ by about 1e-6. Where the gradient by
    the input is 0 the left side is 0. Memory: the Jacobians, `B in_1 in_t` numbers a layer.

    Args:
      params, x, loss, *args, activation: see `per_example.layer_signals`.
      norm: `[..., m, n] -> [...]`, the norm of kernels and Jacobians. The Frobenius norm is valid,
        too, and looser; `power_iteration_norm` makes the left side too large by its own error.

    Returns:
      `GradientBound`.

    Raises:
      ValueError, TypeError: as `per_example.layer_signals`.

    >>> import jax.numpy as jnp
    >>> params = [{"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.zeros(1)}]
    >>> bound = mlp_gradient_bound(params, jnp.array([[2.0, 2.0]]), lambda y: 2 * y[:, 0])
    >>> bound.lhs.round(3).tolist(), bound.rhs.tolist()  # 2^2 (1 + |x|^2), both
    ([36.0], [36.0])
    """
    layers, signals, pulled = _measure(params, x, loss, args, activation, norm)
    kernel_rhs, bias_rhs = squared_norms_by_layer([v._asdict() for v in layers], signals)
    bias_lhs = jnp.square(pulled)
    kernel_lhs = bias_lhs * jnp.stack([jnp.sum(jnp.square(h), axis=-1) for h in signals.inputs])
    biased = jnp.array([layer.bias is not None for layer in layers])
    bias_lhs = jnp.where(biased[:, None], bias_lhs, 0)
    return GradientBound(
        lhs=jnp.sum(kernel_lhs + bias_lhs, axis=0),
        rhs=jnp.sum(kernel_rhs + bias_rhs, axis=0),
        per_layer=LayerTerms(kernel_lhs, kernel_rhs, bias_lhs, bias_rhs),
    )


def batch_gradient_bound(
    params: Any,
    x: jax.Array,
    loss: Callable[..., jax.Array],
    *args: Any,
    activation: Activation | Sequence[Activation] = jax.nn.relu,
    norm: Norm = spectral_norm,
) -> BatchGradientBound:
    """Both sides of an inequality for the gradient of a batch's mean loss, `L = mean_i f_i`.

    `sum_t s_t^2 / (B |W_t|^2) mean_i |grad_{x_i} f_i|^2 / |J_{t,i}|^2 <= |grad_theta L|^2`, where
    s_t is the smallest singular value of the matrix whose row i is layer t's input in example i,
    followed by a 1 if the layer has a bias. A layer contributes 0 as soon as B exceeds its inputs
    plus 1: deltas can then cancel without leaving a trace. (Taking the largest |J_{t,i}| of the
    batch for all of them gives a weaker form.)

    Numerics: as `mlp_gradient_bound`; s_t in float32 is off by about 1e-7 times the largest
    singular value, so of a batch with nearly equal inputs it is noise.

    Args and errors: see `mlp_gradient_bound`; B is at least 1.

    >>> import jax.numpy as jnp
    >>> params = [{"kernel": jnp.array([[0.5]]), "bias": jnp.array([-0.5])}]
    >>> loss = lambda outputs, y: jnp.square(outputs[:, 0] - y)
    >>> x, y = jnp.array([[1.0], [1.0]]), jnp.array([1.0, -1.0])
    >>> alone = mlp_gradient_bound(params, x, loss, y)
    >>> batch = batch_gradient_bound(params, x, loss, y)
    >>> alone.lhs.tolist(), float(batch.rhs)  # two that pull apart
    ([8.0, 8.0], 0.0)
    >>> round(float(batch.lhs), 6)
    0.0
    """
    layers, signals, pulled = _measure(params, x, loss, args, activation, norm)
    size = len(x)
    if size < 1:
        raise ValueError(f"a batch needs at least one example, got x of shape {x.shape}")
    lhs, rhs = [], []
    for layer, h, delta, least in zip(layers, signals.inputs, signals.deltas, pulled, strict=True):
        if layer.bias is not None:
            h = jnp.concatenate([h, jnp.ones_like(h[:, :1])], axis=1)
        gradient = h.T @ delta / size
        rhs.append(jnp.sum(jnp.square(gradient)))
        if size > h.shape[1]:
            lhs.append(jnp.zeros_like(rhs[-1]))
        else:
            smallest = jnp.linalg.svd(h, compute_uv=False)[-1]
            lhs.append(jnp.square(smallest) / size * jnp.mean(jnp.square(least)))
    layer_lhs, layer_rhs = jnp.stack(lhs), jnp.stack(rhs)
    return BatchGradientBound(jnp.sum(layer_lhs), jnp.sum(layer_rhs), layer_lhs, layer_rhs)
