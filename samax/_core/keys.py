"""Random keys in the forms that users have: a seed, raw key data, a typed key."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_typed(key: Any) -> bool:
    """Whether `key` is a typed key, as `jax.random.key` makes them."""
    return jnp.issubdtype(getattr(key, "dtype", np.dtype("int32")), jax.dtypes.prng_key)


def typed_key(key: Any) -> jax.Array:
    """The typed key of a seed, of raw key data (`jax.random.PRNGKey`) or of a typed key."""
    typed: jax.Array
    if is_typed(key):
        typed = key
    elif isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        typed = jax.random.key(key)
    elif jnp.issubdtype(getattr(key, "dtype", np.dtype("int32")), jnp.uint32):
        typed = jax.random.wrap_key_data(key)
    else:
        raise TypeError(
            f"key must be an integer seed or a key (jax.random.key(0), jax.random.PRNGKey(0)), got "
            f"{key!r} of type {type(key).__name__}."
        )
    if typed.shape:
        raise TypeError(f"key must be one key, got an array of keys of shape {typed.shape}.")
    return typed


def with_type(key: jax.Array, implementation: Any) -> jax.Array:
    """The typed key of a state's, which holds a typed one or its data."""
    return key if is_typed(key) else jax.random.wrap_key_data(key, impl=implementation)
