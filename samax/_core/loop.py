"""One evaluation after the other, in a loop or unrolled into none."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

# XLA runs convolutions inside loops about 22 times slower than outside on CPU, so short loops are
# unrolled; longer ones stay loops, so that the program stops growing.
UNROLLED_STEPS = 8

Carry = TypeVar("Carry")


def draw(
    key: jax.Array, shape: tuple[int, int], antithetic: bool, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Each sample's key and sign, of a shape (visits, samples a visit)."""
    if not antithetic:
        return jax.random.split(key, shape), jnp.ones(shape, dtype)
    places = jnp.arange(math.prod(shape)).reshape(shape)
    keys = jax.random.split(key, places.size // 2)[places // 2]
    return keys, (1 - 2 * (places % 2)).astype(dtype)


def spread(
    draws: tuple[jax.Array, jax.Array], sharding: jax.sharding.NamedSharding | None
) -> tuple[jax.Array, jax.Array]:
    """Gives each device its share of the draws that are evaluated at once."""
    if sharding is None:
        return draws
    if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(draws, sharding)
    return jax.lax.with_sharding_constraint(draws, sharding)


def default_unroll(length: int) -> int:
    """How many iterations a loop's body holds: all of a short loop, which is then no loop."""
    return length if length <= UNROLLED_STEPS else 1


def stream(
    visit: Callable[[Carry, Any], tuple[Carry, Any]], carry: Carry, items: Any, unroll: int
) -> tuple[Carry, Any]:
    """`jax.lax.scan`, but without a loop if the loop's body would hold all items.

    One item after the other even so: which one is visited waits for the sums so far.
    """
    length = len(jax.tree.leaves(items)[0])
    if unroll < length:
        return jax.lax.scan(visit, carry, items, unroll=unroll)
    results = []
    for i in range(length):
        place = i + zero_after(carry)
        item = jax.tree.map(lambda x: jnp.take(x, place, axis=0), items)  # noqa: B023
        carry, result = visit(carry, item)
        results.append(result)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def zero_after(tree: Any) -> jax.Array:
    """A zero, int32, that XLA does not know before the leaves of `tree` are there.

    What is made from it waits for them. Evaluations of a gradient that do not depend on one another
    XLA would run at once, without a loop, and hold the activations of all of them; on CPU an
    `optimization_barrier` is gone before the program is scheduled.
    """
    ready = sum((jnp.sum(leaf) for leaf in jax.tree.leaves(tree)), start=jnp.zeros(()))
    return (0.0 * jnp.where(jnp.isfinite(ready), ready, 0.0)).astype(jnp.int32)
