"""Spectral normalisation: every weight matrix divided by its largest singular value.

What: `spectral_normalize`, a pure function from parameters and singular vectors to parameters of
  spectral norm 1 and better vectors; `spectral_vectors`, the vectors to begin with.
Post: https://kexue.fm/archives/8757, where it is one of the constraints compared.
Paper: Miyato et al. 2018, Spectral Normalization for Generative Adversarial Networks,
  arXiv:1802.05957.
Equations, with W [n, out] the kernel as a matrix: v = W u / |W u|, u' = W^T v / |W^T v|,
  s = v^T W u', W / s; u and v are constants to the gradient.
Differences from the post: none. Differences from the usual code: the vectors are an argument and a
  result, so whoever only reads the network (the generator's turn, evaluation) changes nothing; it
  works on the parameters of any network instead of wrapping its layers.
"""

from typing import Any

import jax
import jax.numpy as jnp

_PRECISE = jax.lax.Precision.HIGHEST


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def spectral_vectors(key: jax.Array, params: Any) -> Any:
    """Draws a random unit vector for every leaf that `spectral_normalize` will divide.

    Args:
      key: a scalar typed key.
      params: pytree of parameters. Leaves of two or more axes, `[..., out]`, are kernels, tables of
        embeddings among them; kernels of several layers stacked in one leaf would count as one.

    Returns:
      The tree of `params` with `[out]`, float32 or better, in place of a kernel and None in place
      of any other leaf.

    >>> import jax, jax.numpy as jnp
    >>> vectors = spectral_vectors(jax.random.key(0), {"w": jnp.ones((3, 2)), "b": jnp.ones(2)})
    >>> vectors["w"].shape, vectors["b"]
    ((2,), None)
    """
    leaves, tree = jax.tree.flatten(params)

    def unit(key: jax.Array, leaf: jax.Array) -> jax.Array | None:
        if leaf.ndim < 2:
            return None
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        u = jax.random.normal(key, leaf.shape[-1:], dtype)
        return u / jnp.linalg.norm(u)

    keys = jax.random.split(key, max(len(leaves), 1))
    return tree.unflatten([unit(k, leaf) for k, leaf in zip(keys, leaves, strict=False)])


def spectral_normalize(params: Any, vectors: Any, *, iterations: int = 1) -> tuple[Any, Any]:
    """Divides every kernel by an estimate of its largest singular value.

    A kernel `[..., out]` is taken as the matrix `[n, out]` of its last axis against all others, as
    the paper does for convolutions; this is not the norm of the convolution as a linear map, which
    may be larger, up to the root of the number of taps. The estimate is never above the true value,
    so the result's norm is never below 1, and approaches 1 over calls with the vectors handed on.

    Args:
      params: pytree; leaves with fewer than two axes are left as they are.
      vectors: from `spectral_vectors` or from the last call.
      iterations: power iterations in this call, at least 1.

    Returns:
      The parameters, in their own dtypes, and the new vectors. The gradient runs through the
      division and the singular value, not through the vectors. A kernel of zeros stays zeros, with
      a gradient as if it were not divided, and keeps its vector. Products are in float32 or better
      at full precision.

    Raises:
      ValueError: if `iterations` is less than 1 or the vectors are not those of these parameters.

    >>> import jax, jax.numpy as jnp
    >>> params = {"w": jnp.diag(jnp.array([4.0, 1.0]))}
    >>> vectors = spectral_vectors(jax.random.key(0), params)
    >>> normalized, vectors = spectral_normalize(params, vectors, iterations=20)
    >>> jnp.diag(normalized["w"]).tolist()
    [1.0, 0.25]
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")

    def divide(leaf: jax.Array, u: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        wanted = leaf.shape[-1:] if leaf.ndim >= 2 else None
        given = None if u is None else u.shape
        if wanted != given:
            raise ValueError(f"a parameter {leaf.shape} needs a vector {wanted}, got {given}")
        if u is None:
            return leaf, None
        w = _wide(leaf).reshape(-1, leaf.shape[-1])
        fixed = jax.lax.stop_gradient(w)
        v = jnp.zeros(w.shape[:1], w.dtype)
        for _ in range(iterations):
            v = _unit(jnp.dot(fixed, u, precision=_PRECISE), v)
            u = _unit(jnp.dot(v, fixed, precision=_PRECISE), u)
        sigma = jnp.dot(jnp.dot(v, w, precision=_PRECISE), u, precision=_PRECISE)
        zero = sigma <= 0
        return (_wide(leaf) / jnp.where(zero, 1, sigma)).astype(leaf.dtype), u

    leaves, tree = jax.tree.flatten(params)
    # Up to the leaves of `params`: there the vectors have an array or None.
    pairs = [divide(x, u) for x, u in zip(leaves, tree.flatten_up_to(vectors), strict=True)]
    return tree.unflatten([p for p, _ in pairs]), tree.unflatten([u for _, u in pairs])


def _unit(x: jax.Array, otherwise: jax.Array) -> jax.Array:
    """`x / |x|`; the other vector where `x` is 0, from which no iteration would ever come back."""
    largest = jnp.max(jnp.abs(x))
    # By the largest entry first: squares of small entries would vanish, those of large overflow.
    scaled = x / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(jnp.square(scaled)))
    return jnp.where(largest > 0, scaled / jnp.where(norm > 0, norm, 1), otherwise)
