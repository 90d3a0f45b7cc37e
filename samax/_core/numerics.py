"""Arithmetic over pytrees that neither overflows nor hides a NaN."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def wide_dtype(*dtypes: Any) -> jnp.dtype:
    """The widest of `dtypes`, at least float32."""
    return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def widen(tree: Any) -> Any:
    """Casts float16 and bfloat16 leaves to float32 and leaves the wider ones as they are."""
    return jax.tree.map(_widen_leaf, tree)


def tree_wide_dtype(tree: Any) -> jnp.dtype:
    """The dtype in which scalars that belong to `tree` are kept."""
    return wide_dtype(*{jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)})


def cast_like(tree: Any, target: Any) -> Any:
    """Casts the leaves of `tree` to the dtypes of `target`."""
    return jax.tree.map(_cast_leaf, tree, target)


def copies(tree: Any) -> Any:
    """`tree` in buffers of its own, which may be donated; zeros where a leaf is abstract."""
    abstract = jax.ShapeDtypeStruct
    return jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf) if isinstance(leaf, abstract) else jnp.copy(leaf), tree
    )


def displace(params: optax.Params, eps: optax.Updates) -> optax.Params:
    """`params + eps`, summed in float32 or wider and rounded to the dtypes of `params`."""
    return jax.tree.map(lambda w, e: _cast_leaf(_widen_leaf(w) + _widen_leaf(e), w), params, eps)


def difference(left: Any, right: Any) -> Any:
    """`left - right` in float32 or wider."""
    return optax.tree.sub(widen(left), widen(right))


def all_finite(tree: Any) -> jax.Array:
    """Whether every entry of every leaf is finite."""
    return jnp.isfinite(max_abs(tree))


def max_abs(tree: Any) -> jax.Array:
    """The largest absolute entry; NaN where there is one, 0 for an empty tree."""
    largest = [jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree.leaves(tree)]
    return jnp.max(_gather(largest, tree), initial=0.0)


def vdot(left: Any, right: Any) -> jax.Array:
    """The inner product over all leaves."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), left, right)
    return jnp.sum(_gather(jax.tree.leaves(products), left))


def norm(tree: Any) -> jax.Array:
    """The global l2 norm; the leaves are float32 or wider (see `widen`)."""
    return jnp.sqrt(vdot(tree, tree))


def safe_norm(tree: Any) -> jax.Array:
    """The global l2 norm, safe from underflow and overflow of the squares."""
    scaled, largest, _ = _over_largest(tree)
    return largest * norm(scaled)


def normalized(tree: Any, eps: jax.typing.ArrayLike = 0.0) -> Any:
    """`tree / (||tree|| + eps)` with the global l2 norm, and zero for a zero tree.

    Safe from underflow and overflow of the squares.
    """
    scaled, largest, zero = _over_largest(tree)
    total = jnp.where(zero, 1.0, norm(scaled)) + eps / largest
    factor = jax.lax.optimization_barrier(1.0 / total)
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), scaled)


def orthogonal(tree: Any, unit: Any) -> Any:
    """What `tree` has orthogonal to a unit vector, by the inner product over all leaves."""
    along = vdot(tree, unit)
    return jax.tree.map(lambda x, u: x - along.astype(x.dtype) * u, tree, unit)


def _over_largest(tree: Any) -> tuple[Any, jax.Array, jax.Array]:
    """`tree` over its largest absolute entry, that entry (1 for a zero tree), whether it is zero.

    Divided before they are squared, the entries of tiny gradients have a norm that does not
    underflow, and those of huge ones a norm that does not overflow.
    """
    largest = max_abs(tree)
    zero = largest == 0
    largest, zero = jax.lax.optimization_barrier((jnp.where(zero, 1.0, largest), zero))
    return jax.tree.map(lambda x: x / largest.astype(x.dtype), tree), largest, zero


def _widen_leaf(leaf: Any) -> Any:
    dtype = jnp.result_type(leaf)
    wide = wide_dtype(dtype)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, wide, sharding=leaf.sharding)
    if wide == dtype and isinstance(leaf, (jax.Array, np.ndarray)):
        return leaf
    return jnp.asarray(leaf, wide)


def _cast_leaf(leaf: Any, target: Any) -> Any:
    dtype = jnp.result_type(target)
    same = leaf.dtype == dtype and not getattr(leaf, "weak_type", False)
    return leaf if same else leaf.astype(dtype)


def _gather(scalars: list[jax.Array], tree: Any) -> jax.Array:
    """One vector of the scalars that the leaves of `tree` were reduced to.

    XLA fuses a sum of many scalars with all the reductions behind it, and takes quadratic time to
    compile that on CPU: 24 s for the norm of 2,000 leaves, against 3.5 s behind barriers.
    """
    dtype = tree_wide_dtype(tree)
    vectors = [scalar.astype(dtype).reshape(1) for scalar in scalars]
    vectors = jax.lax.optimization_barrier(vectors)
    return jax.lax.optimization_barrier(jnp.concatenate([*vectors, jnp.zeros(1, dtype)]))
