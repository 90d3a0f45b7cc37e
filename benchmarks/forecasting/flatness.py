"""What flatness buys: the test error of rounded and noisy weights; and two measures of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from samax import flatness

BITS = (8, 4, 3, 2)
NOISES = (0.02, 0.05, 0.1, 0.2)
DRAWS = 3
WINDOWS, BATCH = 256, 32
PRODUCTS = 20
RADIUS, STEPS = 0.5, 10
"""Of the worst case: the rho that arXiv 2402.10198 trains with, and the steps of ascent."""


def measure(
    params: Any,
    test_mse: Callable[[Any], float],
    loss_fn: Callable[[Any, jax.Array], jax.Array],
    batches: Sequence[jax.Array],
) -> dict[str, Any]:
    """Returns the relative rises of the test error, the top eigenvalue and the worst case.

    Args:
        params: The trained parameters.
        test_mse: Maps parameters to the test error.
        loss_fn: Maps parameters and a batch to the training loss.
        batches: Of training windows, on which the last two are measured.
    """
    error = test_mse(params)

    def rise(changed: Any) -> float:
        return test_mse(changed) / error - 1

    noises = {}
    for noise in NOISES:
        rises = [rise(add_noise(params, noise, jax.random.key(draw))) for draw in range(DRAWS)]
        noises[f"{noise:g}"] = sum(rises) / DRAWS
    operator = flatness.hessian_operator(loss_fn, params, batches)
    pairs = flatness.top_eigenpairs(operator, params, 1, num_products=PRODUCTS)
    return {
        "rounded": {str(bits): rise(quantize(params, bits)) for bits in BITS},
        "noise": noises,
        "top_eigenvalue": float(pairs.values[0]),
        "residual": float(pairs.residuals[0]),
        "worst_case": float(
            flatness.worst_case_sharpness(loss_fn, params, batches, rho=RADIUS, steps=STEPS)
        ),
    }


def quantize(params: Any, bits: int) -> Any:
    """Rounds the matrices to whole multiples of one scale for each output channel, symmetrically.

    An output channel is a column; its largest entry is `2^(bits - 1) - 1` scales.
    """
    levels = 2 ** (bits - 1) - 1

    def rounded(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return leaf
        scale = jnp.max(jnp.abs(leaf), axis=0, keepdims=True) / levels
        return jnp.where(scale > 0, jnp.round(leaf / jnp.where(scale > 0, scale, 1)) * scale, leaf)

    return jax.tree.map(rounded, params)


def add_noise(params: Any, noise: float, key: jax.Array) -> Any:
    """Adds Gaussian noise to the matrices, of a standard deviation relative to each one's RMS."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def noisy(leaf: jax.Array, key: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return leaf
        scale = noise * jnp.sqrt(jnp.mean(leaf**2))
        return leaf + scale * jax.random.normal(key, leaf.shape, leaf.dtype)

    return jax.tree.unflatten(structure, [*map(noisy, leaves, keys)])
