"""Augmentation on the device, as pure functions to call inside the jitted training step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Scales uint8 images to [0, 1] and standardizes each channel, in float32, before the cast."""
    scaled = images.astype(jnp.float32) / 255
    standardized = (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
    return standardized.astype(dtype)


def random_crop_flip(
    key: jax.Array, images: jax.Array, pad: int = 4, flip: bool = True
) -> jax.Array:
    """Shifts each image by up to ``pad`` pixels and mirrors half of them.

    The image is padded by ``pad`` zeros on each side and cropped to its size at a random place of
    its own. On uint8 images, before ``normalize``, the border is black, as in the usual pipelines.

    Args:
        key: A PRNG key.
        images: Shape ``(N, H, W, C)``, any dtype.
        pad: Pixels of zeros on each side.
        flip: Whether half of the images are mirrored left to right. Not for digits.
    """
    count, height, width, _ = images.shape
    row_key, column_key, flip_key = jax.random.split(key, 3)
    rows = jnp.arange(height) + jax.random.randint(row_key, (count, 1), 0, 2 * pad + 1)
    columns = jnp.arange(width) + jax.random.randint(column_key, (count, 1), 0, 2 * pad + 1)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(count, 1))
        columns = jnp.where(mirrored, columns[:, ::-1], columns)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    image = jnp.arange(count)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]]
