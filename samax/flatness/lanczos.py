"""Lanczos' algorithm with full reorthogonalization, as a loop on the host."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def lanczos(
    product: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lanczos' basis (m, d), tridiagonal matrix (m, m), and the norm of what remains.

    m is `steps`, or less where the space of `start` is exhausted before.
    """
    # Written here and not taken from a library, for JAX's trace the product; it is a loop over a
    # data set on the host, and a trace would unroll that into one program.
    basis = jnp.zeros((steps, start.size), start.dtype)
    matrix = np.zeros((steps, steps), start.dtype)
    rounding = 10 * jnp.finfo(start.dtype).eps
    vector, length = start, jnp.linalg.norm(start)
    for i in range(steps):
        vector = vector / length
        basis = basis.at[i].set(vector)
        image = product(vector)
        # In full precision: GPUs would lose the orthogonality with their default one.
        with jax.default_matmul_precision("highest"):
            matrix[i, i] = vector @ image
            for _ in range(2):  # once leaves rounding errors of the size of the image
                image = image - (basis @ image) @ basis
        vector, length = image, jnp.linalg.norm(image)
        # Once the space is exhausted, rounding errors remain, and are no direction. So for NaN.
        if not length > rounding * max(np.abs(matrix).max(), length):
            return basis[: i + 1], jnp.asarray(matrix[: i + 1, : i + 1]), 0 * length
        if i + 1 < steps:
            matrix[i, i + 1] = matrix[i + 1, i] = length
    return basis, jnp.asarray(matrix), length
