"""Fingerprints of a state's content: what tells a changed bit, on any mesh."""

from typing import Any

import jax
import jax.numpy as jnp

from blogjax.train.task import leaf_paths


@jax.jit
def leaf_fingerprints(leaves: list[jax.Array]) -> list[jax.Array]:
    """One uint32 per leaf, from every bit of its content.

    A sum modulo 2^32 of the entries' bits times odd weights that depend on the place. Integer sums
    are exact in any order, so the number is the same under any sharding. A single changed entry
    changes it, since an odd weight has an inverse.
    """

    def one(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            x = jnp.stack([x.real, x.imag])
        narrow = min(x.dtype.itemsize, 4)
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[narrow]
        # Eight-byte entries become two of four bytes along a new last axis.
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, length in enumerate(bits.shape):
            iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            place = place * jnp.uint32(length % 2**32) + iota
        # Mix the place before making it odd: neighbouring weights must not be alike.
        place = (place ^ (place >> 16)) * jnp.uint32(0x45D9F3B)
        place = (place ^ (place >> 13)) * jnp.uint32(0x9E3779B1)
        return jnp.sum(bits * (place | jnp.uint32(1)), dtype=jnp.uint32)

    return [one(x) for x in leaves]


def fingerprints(state: Any) -> dict[str, int]:
    """Content fingerprint of each leaf, by path; equal on any mesh.

    >>> a, b = (fingerprints({"w": jnp.array([1.0, x])})["w"] for x in (2.0, 2.0000002))
    >>> a == b
    False
    """
    values = jax.device_get(leaf_fingerprints(jax.tree.leaves(state)))
    return {path: int(value) for path, value in zip(leaf_paths(state), values, strict=True)}
