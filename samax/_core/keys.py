"""Random keys in the forms that users have: a seed, raw key data, a typed key.

A transformation is built with one of them, and nothing is computed then. Its state keeps a typed
key if it was built with one, and raw key data (a uint32 array) otherwise: a typed key in an
optimizer's state breaks code that does arithmetic on its leaves, and serializers that know NumPy's
dtypes alone.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Key: TypeAlias = jax.Array | int


def check_key(name: str, key: Any) -> None:
    """Raises a `TypeError` unless `key` is a seed or one key."""
    seed = isinstance(key, (int, np.integer)) and not isinstance(key, bool)
    if not (seed or is_typed(key) or getattr(key, "dtype", None) == np.uint32):
        raise TypeError(
            f"{name} must be an integer seed or a key (jax.random.key(0), jax.random.PRNGKey(0)), "
            f"got {key!r} of type {type(key).__name__}."
        )
    shape = () if seed else key.shape if is_typed(key) else key.shape[:-1]
    if shape:
        raise TypeError(f"{name} must be one key, got an array of keys of shape {shape}.")


def is_typed(key: Any) -> bool:
    """Whether `key` is a typed key, as `jax.random.key` makes them."""
    return jnp.issubdtype(getattr(key, "dtype", np.dtype("int32")), jax.dtypes.prng_key)


def typed_key(key: Key) -> jax.Array:
    """The typed key of a seed, of raw key data (`jax.random.PRNGKey`) or of a typed key."""
    check_key("key", key)
    if isinstance(key, (int, np.integer)):
        return jax.random.key(key)
    return key if is_typed(key) else jax.random.wrap_key_data(key)


def start_key(key: Key) -> jax.Array:
    """What a state keeps of `key` at first."""
    typed = typed_key(key)
    # A copy: a state that is donated would take the caller's key with it.
    return jnp.copy(typed if is_typed(key) else jax.random.key_data(typed))


def next_key(kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a state keeps for its next update, and the typed key of this one."""
    following, key = jax.random.split(typed_key(kept))
    return (following if is_typed(kept) else jax.random.key_data(following)), key
