"""Random changes of training images, on the device, drawn by each example's own key."""

import jax
import jax.numpy as jnp

from blogjax.core.random import Key, uniform


def random_horizontal_flip(keys: Key, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2.

    Args:
      keys: typed keys `[B]`, one per image, so that the choice does not depend on the devices.
      images: `[B, H, W, C]`, any dtype.

    Returns:
      Shape and dtype of `images`.

    Raises:
      ValueError: if there is not one key per image, or the images are not of rank 4.

    >>> from blogjax.core.random import fold_in_rows
    >>> keys = fold_in_rows(jax.random.key(0), jnp.arange(4))
    >>> images = jnp.arange(2.0).reshape(1, 1, 2, 1).repeat(4, axis=0)
    >>> random_horizontal_flip(keys, images)[:, 0, :, 0].tolist()
    [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    """
    if images.ndim != 4 or keys.shape != images.shape[:1]:
        raise ValueError(
            f"images [B, H, W, C] need one key each, got images of shape {images.shape} "
            f"and keys of shape {keys.shape}"
        )
    mirrored = uniform(keys, keys.shape) < 0.5
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
