"""One evaluation after the other, in a loop or none."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from samax._core.numerics import zero_after

Carry = TypeVar("Carry")


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
