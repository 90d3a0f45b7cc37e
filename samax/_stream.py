"""Samples of the universal class: their keys, and how they are visited one after the other."""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from samax._numerics import zero_after

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


def stream(
    visit: Callable[[Carry, tuple[jax.Array, jax.Array]], tuple[Carry, None]],
    carry: Carry,
    draws: tuple[jax.Array, jax.Array],
    unroll: int,
) -> Carry:
    """Visits the draws one after the other, without a loop if the loop's body would hold all."""
    keys, signs = draws
    if unroll < len(signs):
        return jax.lax.scan(visit, carry, draws, unroll=unroll)[0]
    for i in range(len(signs)):
        carry, _ = visit(carry, (_after(carry, keys[i]), signs[i]))
    return carry


def _after(carry: Carry, keys: jax.Array) -> jax.Array:
    """`keys` as they are, but not before the sums so far are there."""
    return jax.random.wrap_key_data(
        jax.random.key_data(keys) + zero_after(carry).astype(jnp.uint32),
        impl=jax.random.key_impl(keys),
    )
