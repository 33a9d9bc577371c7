"""Norms of per-example parameter gradients of an MLP, without forming the gradients.

What: `per_example_gradient_norms`, the norm of every example's own gradient at less than the cost
  of one gradient of the batch ("ghost norms"); `squared_norms_by_layer` has them layer by layer,
  `layer_signals` what they are made of.
Post: https://kexue.fm/archives/8796, whose right-hand side they are; see `gradient_bound`.
Paper: Goodfellow 2015, https://arxiv.org/abs/1510.01799.
Equations: z_t = h_t W_t + b_t, h_{t+1} = g_t(z_t), h_1 = x, f = loss(h_{l+1}), delta_t = df / dz_t.
  The gradients by W_t and b_t are h_t^T delta_t and delta_t, so
  |grad_theta f|^2 = sum_t |delta_t|^2 (1 + |h_t|^2), without the 1 where a layer has no bias.
Differences from the post: it has this identity only inside of a proof. Kernels are `[in, out]` as
  in flax, the transpose of the post's.

Every example meets every weight once here. Where a weight is used at several positions of an
example (convolutions, sequences), the gradients of the positions add up before the norm is taken,
and the identity does not hold.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blogjax.core.norms import at_least_float32

Activation = Callable[[jax.Array], jax.Array]


class Layer(NamedTuple):
    """An affine map `h @ kernel + bias`: `[in, out]`, and `[out]` or None."""

    kernel: jax.Array
    bias: jax.Array | None


class LayerSignals(NamedTuple):
    """What a forward and a backward pass leave at the layers, one entry of the tuples for each.

    Attributes:
      inputs: h_t, `[B, in_t]`.
      deltas: gradient of each example's loss by the layer's `h_t W_t + b_t`, `[B, out_t]`.
      input_gradient: gradient of each example's loss by its x, `[B, in_1]`.
      losses: `[B]`.
    """

    inputs: tuple[jax.Array, ...]
    deltas: tuple[jax.Array, ...]
    input_gradient: jax.Array
    losses: jax.Array


def mlp_layers(params: Any) -> tuple[Layer, ...]:
    """The layers of an MLP in order, from any of the layouts that are accepted.

    These are a sequence of `{"kernel": [in, out], "bias": [out]}`, or a mapping of such as linen
    gives it, with names that differ only in the number at their end, which is the order: `Dense_0`,
    `Dense_1` of a compact module, `layers_0`, `layers_2` of a Sequential. The whole may be under
    "params"; `bias` may be missing or None.

    Raises:
      ValueError: if the layout is another one, or a layer's shapes do not fit together or to the
        layer before.
      TypeError: if an array is not real and floating.

    >>> import jax.numpy as jnp
    >>> kernels = {f"Dense_{i}": {"kernel": jnp.ones((i + 1, i + 2))} for i in range(11)}
    >>> [layer.kernel.shape for layer in mlp_layers({"params": kernels})][-2:]  # 10 after 9
    [(10, 11), (11, 12)]
    """
    if isinstance(params, Mapping) and set(params) == {"params"}:
        params = params["params"]
    if isinstance(params, Mapping):
        names = _in_order(list(params))
        params = [params[name] for name in names]
    elif isinstance(params, Sequence) and not isinstance(params, str):
        names = [f"layer {i}" for i in range(len(params))]
    else:
        raise ValueError(f"params must be a sequence or a mapping of layers, got {type(params)}")
    if not params:
        raise ValueError("params must hold at least one layer, got none")
    layers: list[Layer] = []
    for name, fields in zip(names, params, strict=True):
        if not isinstance(fields, Mapping) or not {"kernel"} <= set(fields) <= {"kernel", "bias"}:
            found = sorted(fields) if isinstance(fields, Mapping) else type(fields)
            raise ValueError(f"{name} must be a mapping of kernel and bias, got {found}")
        layer = Layer(fields["kernel"], fields.get("bias"))
        _check_layer(name, layer, layers[-1] if layers else None)
        layers.append(layer)
    return tuple(layers)


def _in_order(names: list[Any]) -> list[str]:
    """By number: as text, Dense_10 would come before Dense_2."""
    matches = [re.fullmatch(r"(.*_)(\d+)", str(name)) for name in names]
    prefixes = {m.group(1) if m else None for m in matches}
    numbers = {int(m.group(2)) for m in matches if m}
    if len(prefixes) > 1 or None in prefixes or len(numbers) < len(names):
        raise ValueError(
            f"names of layers must be one name with different numbers, such as Dense_0, Dense_1; "
            f"got {sorted(map(str, names))}"
        )
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


def _check_layer(name: str, layer: Layer, before: Layer | None) -> None:
    kernel, bias = layer
    for what, array in {"kernel": kernel, "bias": bias}.items():
        if array is not None:
            _check_floating(f"the {what} of {name}", array)
    if kernel.ndim != 2:
        raise ValueError(f"the kernel of {name} must be [in, out], got shape {kernel.shape}")
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise ValueError(
            f"the bias of {name} has shape {bias.shape}, but its kernel of shape {kernel.shape} "
            f"needs {kernel.shape[1:]}"
        )
    if before is not None and before.kernel.shape[1] != kernel.shape[0]:
        raise ValueError(
            f"the kernel of {name} has {kernel.shape[0]} inputs, but the layer before it has "
            f"{before.kernel.shape[1]} outputs"
        )


def _check_floating(what: str, array: jax.Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{what} must be real and floating, got {array.dtype}")


def layer_activations(
    activation: Activation | Sequence[Activation], layers: int
) -> tuple[Activation, ...]:
    """One function after each layer: a single one stands for all layers but the last.

    Args:
      activation: maps `[width]` to `[width]`; or a sequence of such, one per layer.
      layers: how many there are.

    Raises:
      ValueError: if a sequence has another length.
      TypeError: if it is neither a function nor a sequence of functions.

    >>> import jax.numpy as jnp
    >>> [float(g(jnp.float32(-1.0))) for g in layer_activations(jnp.abs, 2)]
    [1.0, -1.0]
    """
    if callable(activation):
        return (*[activation] * (layers - 1), lambda z: z)
    if not isinstance(activation, Sequence) or not all(map(callable, activation)):
        raise TypeError(
            f"activation must be a function or a sequence of functions, got {activation!r}"
        )
    if len(activation) != layers:
        raise ValueError(f"{len(activation)} activations for {layers} layers")
    return tuple(activation)


def layer_signals(
    params: Any,
    x: jax.Array,
    loss: Callable[..., jax.Array],
    *args: Any,
    activation: Activation | Sequence[Activation] = jax.nn.relu,
) -> LayerSignals:
    """Runs the MLP forwards and backwards, every example for itself.

    The losses are summed nowhere, so each delta is of that example's own loss. Activations are
    applied to one row, and `loss` to a batch of one: no example sees another.

    Args:
      params: see `mlp_layers`; any floating dtypes.
      x: `[B, in]`.
      loss: `loss(outputs [B, out], *args) -> [B]`, any function of the outputs.
      *args: what else `loss` takes, trees of arrays with leading axis B, such as labels.
      activation: see `layer_activations`.

    Returns:
      `LayerSignals`, in the dtypes that the same network has under `jax.grad`.

    Raises:
      ValueError: if shapes do not fit, or an activation changes the shape, or `loss` does not give
        one number per example.
      TypeError: if an array is not real and floating.

    >>> import jax.numpy as jnp
    >>> params = [{"kernel": jnp.array([[2.0]])}, {"kernel": jnp.array([[3.0]])}]
    >>> signals = layer_signals(params, jnp.array([[1.0], [-1.0]]), lambda y: y[:, 0])
    >>> signals.input_gradient.ravel().tolist()  # the second example is cut off by the ReLU
    [6.0, 0.0]
    """
    layers = mlp_layers(params)
    functions = layer_activations(activation, len(layers))
    _check_floating("x", x)
    if x.ndim != 2 or x.shape[1] != layers[0].kernel.shape[0]:
        raise ValueError(
            f"x must be [B, {layers[0].kernel.shape[0]}] for a first kernel of shape "
            f"{layers[0].kernel.shape}, got shape {x.shape}"
        )
    for leaf in jax.tree.leaves(args):
        if jnp.shape(leaf)[:1] != x.shape[:1]:
            raise ValueError(
                f"arguments of the loss need one row per example, {x.shape[0]} of them, got an "
                f"array of shape {jnp.shape(leaf)}"
            )

    def value(row: jax.Array, own: Any) -> jax.Array:
        out = loss(row[None], *jax.tree.map(lambda leaf: leaf[None], own))
        if jnp.shape(out) != (1,):
            raise ValueError(
                f"the loss must return one number per example, shape (1,) for a batch of one, got "
                f"{jnp.shape(out)}"
            )
        _check_floating("the loss", out)
        return out[0]

    h, inputs, pulls = x, [], []
    for layer, function in zip(layers, functions, strict=True):
        inputs.append(h)
        z = h @ layer.kernel
        z = z if layer.bias is None else z + layer.bias[None]
        h, pull = jax.vjp(jax.vmap(function), z)
        if h.shape != z.shape:
            raise ValueError(
                f"an activation must keep the shape {z.shape[1:]} of its row, got {h.shape[1:]}"
            )
        pulls.append(pull)
    losses, pull = jax.vjp(lambda outputs: jax.vmap(value)(outputs, args), h)
    (back,) = pull(jnp.ones_like(losses))
    deltas: list[jax.Array] = []
    for layer, h, pull in zip(layers[::-1], inputs[::-1], pulls[::-1], strict=True):
        deltas.append(pull(back)[0])
        back = (deltas[-1] @ layer.kernel.T).astype(h.dtype)
    return LayerSignals(tuple(inputs), tuple(deltas[::-1]), back, losses)


def squared_norms_by_layer(params: Any, signals: LayerSignals) -> tuple[jax.Array, jax.Array]:
    """Squared norms of the gradients by each kernel and each bias, example by example.

    Numerics: squares are summed in float32 or better.

    Args:
      params: see `mlp_layers`; only asked which layers have a bias.
      signals: of `layer_signals`.

    Returns:
      `|delta_t|^2 |h_t|^2` and `|delta_t|^2`, each `[layers, B]`; the second is 0 for layers
      without a bias.

    >>> import jax.numpy as jnp
    >>> params = [{"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}]
    >>> signals = layer_signals(params, jnp.array([[3.0, 4.0]]), lambda y: 2 * y[:, 0])
    >>> kernel, bias = squared_norms_by_layer(params, signals)
    >>> kernel.tolist(), bias.tolist()
    ([[100.0]], [[4.0]])
    """
    kernels, biases = [], []
    for layer, h, delta in zip(mlp_layers(params), signals.inputs, signals.deltas, strict=True):
        own = _row_squares(delta)
        kernels.append(own * _row_squares(h))
        biases.append(jnp.zeros_like(own) if layer.bias is None else own)
    return jnp.stack(kernels), jnp.stack(biases)


def _row_squares(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(at_least_float32(x)), axis=-1)


def per_example_gradient_norms(
    params: Any,
    x: jax.Array,
    loss: Callable[..., jax.Array],
    *args: Any,
    activation: Activation | Sequence[Activation] = jax.nn.relu,
) -> jax.Array:
    """Norm of the gradient of each example's loss by all parameters together.

    `|grad_theta f_i|`, `f_i = loss(mlp(x_i))`, for all i at once. Memory is that of the
    activations; `vmap(grad)` computes B gradients of the size of the parameters.

    Numerics: the network runs in its own dtypes, squares are summed in float32 or better and must
    exist there: deltas below 1e-19 count as 0. An example whose gradient is 0 has norm 0, and the
    norm's own derivatives, of any order, are then 0, not NaN. As in all losses, a derivative of a
    ReLU at its kink is 0.

    Args:
      params, x, loss, *args, activation: see `layer_signals`.

    Returns:
      `[B]`, float32 or better.

    Raises:
      ValueError, TypeError: as `layer_signals`.

    >>> import jax.numpy as jnp
    >>> params = [{"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}]
    >>> x = jnp.array([[2.0, 2.0], [0.0, 0.0]])  # |(x, 1)| is 3 and 1
    >>> per_example_gradient_norms(params, x, lambda y: y[:, 0]).tolist()
    [3.0, 1.0]
    """
    signals = layer_signals(params, x, loss, *args, activation=activation)
    kernels, biases = squared_norms_by_layer(params, signals)
    squared = jnp.sum(kernels + biases, axis=0)
    zero = squared == 0
    # The root is taken of 1 where the norm is 0: else its infinite derivative would meet the mask.
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))
