"""Tiger: the sign of the momentum, scaled by the size of each parameter.

What: `tiger`, and its rates relative to the parameters, which compose with any transformation. The
  momentum that accumulates microbatches is `hidden_accumulation`'s; powers between the sign and the
  plain momentum, which the post proposes at its end, are in `sign_power`.
Post: https://kexue.fm/archives/9512
Code: https://github.com/bojone/tiger
Equations: m_t = b m_{t-1} + (1 - b) g_t; theta_t = theta_{t-1} - e_t (sign(m_t) + wd theta_{t-1});
  e_t = lr_t RMS(theta_{t-1}), for biases and gains lr_t / 2 and no decay.
  A leaf whose gradient is not finite: m_t = m_{t-1}, theta_t = c + s (theta_{t-1} - c).
Differences from the post: infinities count like NaN; the RMS has a floor, without which a matrix of
  zeros never trains; a leaf is told by its label, not by the name of a Keras variable.
"""

import dataclasses
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from blogjax.core.labels import Labels, leaf_name, resolve_labels
from blogjax.optim import checks
from blogjax.optim.hidden_accumulation import emit_every, hidden_momentum
from blogjax.optim.skip_nonfinite import has_nonfinite


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the leaves with one label are treated.

    Attributes:
      scale: `"rms"` of the whole leaf, `"row_rms"` over its last axis, or a constant.
      decay: whether they decay.
      center: what they shrink towards after a gradient that is not finite.
    """

    scale: Literal["rms", "row_rms"] | float
    decay: bool = True
    center: float = 0.0


RULES = {
    "weight": Rule("rms"),
    "embedding": Rule("row_rms"),
    "bias": Rule(0.5, decay=False),
    "gain": Rule(0.5, decay=False, center=1.0),
    "plain": Rule(1.0),
}
"""The labels: the post's four, and `plain`, which makes Tiger Signum with decay."""

_NAMES = {
    **dict.fromkeys(("bias", "beta"), "bias"),
    **dict.fromkeys(("scale", "gamma"), "gain"),
    **dict.fromkeys(("embedding", "embeddings"), "embedding"),
}


def default_labels(params: optax.Params) -> Any:
    """Labels leaves by the last part of their path, with the names of Flax and of the post.

    >>> default_labels({"Dense_0": {"kernel": 1.0, "bias": 1.0}})
    {'Dense_0': {'bias': 'bias', 'kernel': 'weight'}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _NAMES.get(leaf_name(path[-1:]), "weight"), params
    )


def _rules(labels: Labels, tree: Any) -> Any:
    labels = default_labels if labels is None else labels
    return jax.tree.map(RULES.__getitem__, resolve_labels(labels, tree, RULES))


def scale_by_param_rms(
    labels: Labels = None, floor: ArrayLike = 0.0
) -> optax.GradientTransformation:
    """Multiplies each update by the size of its parameter: `u * max(RMS(theta), floor)`.

    RMS(theta) = sqrt(mean(theta^2)) of the leaf, or of each row for the label `embedding`; a
    constant 1/2 for `bias` and `gain`. Computed in float32 or better; the update keeps its dtype.

    A matrix (or row) of zeros has RMS 0 and would never train. With `floor=0` as in the post,
    `init` warns of a leaf of zeros, where it can see the values: not under `jit` or `eval_shape`.

    Args:
      labels: as `param_labels` in `tiger`.
      floor: least RMS; about the size that a trained entry is to have, as in `1e-2`.

    Raises:
      ValueError: as `tiger`, and for a negative floor.

    >>> import jax, jax.numpy as jnp
    >>> tx = scale_by_param_rms()
    >>> params = {"kernel": jnp.array([3.0, 3.0]), "bias": jnp.zeros(1)}
    >>> ones = jax.tree.map(jnp.ones_like, params)
    >>> updates, _ = tx.update(ones, tx.init(params), params)
    >>> updates["kernel"].tolist(), updates["bias"].tolist()
    ([3.0, 3.0], [0.5])
    """
    checks.check_at_least("floor", floor, 0)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        rules = jax.tree.leaves(_rules(labels, params))
        for rule, (path, p) in zip(rules, jax.tree_util.tree_leaves_with_path(params), strict=True):
            visible = isinstance(floor, (int, float)) and not isinstance(p, Tracer)
            if isinstance(rule.scale, str) and visible and floor == 0 and p.size and not p.any():
                text = f"{leaf_name(path)} is all zeros and will never train: give a floor"
                warnings.warn(text, stacklevel=2)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        params = checks.require_params(params, "scale_by_param_rms")
        checks.check_same(updates, params)

        def scale(rule: Rule, u: jax.Array, p: jax.Array) -> jax.Array:
            dtype = jnp.result_type(u.dtype, p.dtype, jnp.float32)
            factor = rule.scale
            if isinstance(factor, str):
                axis = -1 if factor == "row_rms" and p.ndim else None
                square = jnp.mean(jnp.square(p.astype(dtype)), axis=axis, keepdims=True)
                factor = jnp.maximum(jnp.sqrt(square), jnp.asarray(floor, dtype))
            return (factor * u.astype(dtype)).astype(u.dtype)

        scaled = jax.tree.map(scale, _rules(labels, params), updates, params)
        return scaled, state

    return optax.GradientTransformation(init_fn, update_fn)


def tiger(
    learning_rate: optax.ScalarOrSchedule,
    b: ArrayLike = 0.965,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    *,
    accumulate_steps: ArrayLike = 1,
    param_labels: Labels = None,
    shrink: ArrayLike | None = 0.99,
    floor: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Tiger: `theta <- theta - lr_t scale (sign(m_t) + wd theta)`, with one buffer in all.

    `scale` is the parameter's RMS, or 1/2 for biases and gains, which do not decay. The decay is
    decoupled, and multiplied by the learning rate and by the scale.

    A gradient leaf that holds NaN or infinity leaves its momentum as it was, bit for bit, and
    moves its parameters towards their centre, 1 for gains and 0 for the rest, at the k-th
    microbatch as at any other. Other leaves go on as always.

    Numerics: momentum and RMS are computed in float32 or better, the rest in the dtype to which
    gradient and momentum promote. Parameters and momentum are updated in place where they are
    donated. All-float16 or bfloat16 training is in range, as the post says, but not in resolution:
    a step below half a unit in the last place is lost. See `stochastic_rounding`.

    Args:
      learning_rate: relative change per step, 1e-3 to 2e-3 at its peak in the post; a number, or a
        function of the count of updates (not of microbatches). The piecewise linear one of the
        post's code is `lambda t: jnp.interp(t, counts, rates)`; of optax's, `join_schedules` can
        rise from 0, `piecewise_interpolate_schedule`, whose values are factors, cannot.
      b: decay of the momentum, in `[0, 1)`: .965 for language, .945 for images.
      weight_decay: a number, or a function of the count of updates; not negative.
      accumulate_steps: k, microbatches per update, accumulated in the momentum.
      param_labels: tree of labels (see `RULES`), or a function of the parameters that returns one;
        None is `default_labels`. `optax.inject_hyperparams` must be told that a function is static.
      shrink: s of the rule for non-finite gradients, in `[0, 1]`; None lets them through.
      floor: least RMS, see `scale_by_param_rms`.
      mu_dtype: dtype of the momentum; None takes each parameter's own.

    Raises:
      ValueError: for rates out of range, unknown labels, trees or shapes that differ, and an
        `update` without parameters.
      TypeError: for integer or complex leaves.

    >>> import jax.numpy as jnp
    >>> rate = lambda t: jnp.interp(t, jnp.array([0, 100, 400]), jnp.array([0.5, 0.1, 0.0]))
    >>> tx = tiger(rate, weight_decay=0.0)
    >>> params = {"kernel": jnp.array([4.0, 4.0]), "bias": jnp.zeros(1)}
    >>> grads = {"kernel": jnp.array([7.0, -1.0]), "bias": jnp.ones(1)}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> updates["kernel"].tolist(), updates["bias"].tolist()
    ([-2.0, 2.0], [-0.25])
    """
    checks.check_at_least("weight_decay", weight_decay, 0)
    checks.check_fraction("shrink", shrink)

    def decays(tree: Any) -> Any:
        return jax.tree.map(lambda rule: rule.decay, _rules(param_labels, tree))

    tail = optax.chain(
        optax.stateless(lambda m, _: jax.tree.map(jnp.sign, m)),
        optax.add_decayed_weights(weight_decay, decays),
        scale_by_param_rms(param_labels, floor),
        optax.scale_by_learning_rate(learning_rate),
    )
    inner = optax.chain(
        hidden_momentum(b, accumulate_steps, mu_dtype, keep_on_nonfinite=shrink is not None),
        emit_every(accumulate_steps, tail),
    )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        params = checks.require_params(params, "tiger")
        new, state = inner.update(updates, state, params, **extra_args)
        if shrink is None:
            return new, state
        rate = 1 - jnp.asarray(shrink)

        def replace(rule: Rule, g: jax.Array, u: jax.Array, p: jax.Array) -> jax.Array:
            towards = rate.astype(u.dtype) * (rule.center - p.astype(u.dtype))
            return jnp.where(has_nonfinite(g), towards, u)

        rules = _rules(param_labels, params)
        return jax.tree.map(replace, rules, updates, new, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
