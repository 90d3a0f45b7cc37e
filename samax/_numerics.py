"""Arithmetic over pytrees that neither overflows nor makes a NaN of its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax


def wide_dtype(*dtypes: Any) -> jnp.dtype:
    """The widest of `dtypes`, at least float32."""
    return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def widen(tree: Any) -> Any:
    """Casts float16 and bfloat16 leaves to float32 and leaves the wider ones as they are."""
    return jax.tree.map(lambda x: jnp.asarray(x, wide_dtype(jnp.result_type(x))), tree)


def tree_wide_dtype(tree: Any) -> jnp.dtype:
    """The dtype in which scalars that belong to `tree` are kept."""
    return wide_dtype(*(jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)))


def cast_like(tree: Any, target: Any) -> Any:
    """Casts the leaves of `tree` to the dtypes of `target`."""
    return jax.tree.map(lambda x, t: x.astype(jnp.result_type(t)), tree, target)


def all_finite(tree: Any) -> jax.Array:
    """Whether every entry of every leaf is finite."""
    return jnp.isfinite(max_abs(tree))


def max_abs(tree: Any) -> jax.Array:
    """The largest absolute entry; NaN where there is one, 0 for an empty tree."""
    largest = [jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.maximum, largest, jnp.zeros((), tree_wide_dtype(tree)))


def normalized(tree: Any, eps: jax.typing.ArrayLike = 0.0) -> Any:
    """`tree / (||tree|| + eps)` with the global l2 norm, or zero where that is not defined.

    The entries are divided by the largest one before they are squared, so that the norm of tiny
    gradients does not underflow and that of huge ones does not overflow. A zero tree, and one
    with a non-finite entry, give zero.
    """
    largest = max_abs(tree)
    defined = jnp.isfinite(largest) & (largest > 0)
    largest = jnp.where(defined, largest, 1.0)
    scaled = jax.tree.map(lambda x: x / largest.astype(x.dtype), tree)
    norm = jnp.where(defined, optax.tree.norm(scaled), 1.0)
    factor = 1.0 / (norm + eps / largest)
    return jax.tree.map(lambda x: jnp.where(defined, x * factor.astype(x.dtype), 0.0), scaled)
