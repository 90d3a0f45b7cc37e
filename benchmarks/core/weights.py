"""Trained weights as they are after rounding, or with noise on them."""

from typing import Any

import jax
import jax.numpy as jnp


def quantize(params: Any, bits: int) -> Any:
    """Rounds the matrices to whole multiples of one scale for each output channel, symmetrically.

    An output channel is an index of the last axis; its largest entry is `2^(bits - 1) - 1` scales.
    Kernels of convolutions count as matrices; vectors stay as they are.
    """
    levels = 2 ** (bits - 1) - 1

    def rounded(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return leaf
        inputs = tuple(range(leaf.ndim - 1))
        scale = jnp.max(jnp.abs(leaf), axis=inputs, keepdims=True) / levels
        return jnp.where(scale > 0, jnp.round(leaf / jnp.where(scale > 0, scale, 1)) * scale, leaf)

    return jax.tree.map(rounded, params)


def add_noise(params: Any, noise: Any, key: jax.Array) -> Any:
    """Adds Gaussian noise to the matrices, of a standard deviation relative to each one's RMS."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def noisy(leaf: jax.Array, key: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return leaf
        scale = noise * jnp.sqrt(jnp.mean(leaf**2))
        return leaf + scale * jax.random.normal(key, leaf.shape, leaf.dtype)

    return jax.tree.unflatten(structure, [*map(noisy, leaves, keys)])
