"""One evaluation after the other, in a loop or unrolled into none."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

# XLA runs convolutions inside loops about 22 times slower than outside on CPU, so short loops are
# unrolled; longer ones stay loops, so that the program stops growing.
UNROLLED_STEPS = 8

Carry = TypeVar("Carry")


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
        item = jax.tree.map(lambda x: jnp.take(x, place, axis=0, mode="clip"), items)  # noqa: B023
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
