"""Lanczos' algorithm on flat vectors, run by matfree on the host."""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from matfree import decomp

from samax._core.checks import check_callable, check_parameters
from samax._core.numerics import widen
from samax.flatness.operators import Operator
from samax.flatness.perturbations import Progress


def flatten(
    operator: Operator, params: optax.Params
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array, Callable[[jax.Array], Any]]:
    """The operator on flat vectors, the flat parameters, and the way back to a pytree."""
    check_callable("operator", operator, "of a pytree like the parameters")
    check_parameters("params", params)
    vector, unravel = ravel_pytree(widen(params))

    def flat(direction: jax.Array) -> jax.Array:
        return ravel_pytree(operator(unravel(direction)))[0].astype(direction.dtype)

    return flat, vector, unravel


def counted(
    product: Callable[[jax.Array], jax.Array], progress: Progress | None, total: int
) -> Callable[[jax.Array], jax.Array]:
    """The product, telling `progress` how many are done."""
    done = 0

    def multiply(vector: jax.Array) -> jax.Array:
        nonlocal done
        result = jax.block_until_ready(product(vector))
        done += 1
        if progress is not None:
            progress(done, total)
        return result

    return multiply


def lanczos(
    product: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lanczos' basis (d, m), tridiagonal matrix (m, m), and the norm of what remains.

    m is `steps`, or less where the space of `start` is exhausted before.

    matfree traces the product, and would so unroll the whole data set into its program. A primitive
    is what a trace does not look into, and without jit matfree's loop runs on the host.
    """
    primitive = jax.extend.core.Primitive("samax_product")
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]

    def multiply(vector: jax.Array) -> jax.Array:
        with jax.disable_jit(False), jax.default_matmul_precision(precision):
            return product(vector)

    primitive.def_impl(multiply)
    primitive.def_abstract_eval(lambda vector: vector)
    # In full precision: GPUs would lose the orthogonality with their default one.
    with jax.disable_jit(), jax.default_matmul_precision("highest"):
        basis, matrix, remainder, _ = decomp.tridiag_sym(steps, custom_vjp=False)(
            primitive.bind, start
        )
        overlap = jnp.abs(jnp.tril(basis @ basis.T - jnp.eye(steps))).max(axis=1)
    # Once the space is exhausted a vector of rounding errors, or of norm zero, is normalized: it is
    # not orthogonal to the others, or NaN, and so is what follows.
    eps = jnp.finfo(overlap.dtype).eps
    lengths = jnp.pad(jnp.diag(matrix, -1), (1, 0), constant_values=jnp.inf)
    rounding = jnp.abs(lengths) <= 10 * eps * jnp.nanmax(jnp.abs(matrix))
    sound = jnp.cumprod(~rounding & (overlap < eps**0.5))
    usable = int(sound.sum())
    remaining = jnp.linalg.norm(remainder) if usable == steps else jnp.zeros_like(matrix[0, 0])
    return basis[:usable].T, matrix[:usable, :usable], remaining
