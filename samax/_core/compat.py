"""What JAX renamed or added within the supported versions; nowhere else asks which one it is."""

from typing import Any

import jax


def varying_axes(*trees: Any) -> frozenset[str]:
    """The axes of a `shard_map` over which leaves may differ by their types; none where untyped."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(trees):
        array_type = jax.typeof(leaf)
        if hasattr(array_type, "manual_axis_type"):
            axes |= array_type.manual_axis_type.varying
        else:  # before JAX 0.10
            axes |= getattr(array_type, "vma", frozenset())
    return axes


def vary_over(axes: frozenset[str], tree: Any) -> Any:
    """`tree`, to start a loop whose results differ over `axes` of a `shard_map`."""

    def cast(leaf: jax.Array) -> jax.Array:
        missing = tuple(axes - varying_axes(leaf))
        if not missing:
            return leaf
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(leaf, missing, to="varying")
        return jax.lax.pvary(leaf, missing)  # type: ignore[attr-defined]

    return jax.tree.map(cast, tree)
