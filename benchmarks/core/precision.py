"""Computing in float64, for a block of work."""

import contextlib
from typing import Any

import jax


def float64() -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which JAX computes in float64."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    # JAX 0.6 and 0.7
    from jax.experimental import enable_x64  # type: ignore[attr-defined]

    return enable_x64(True)
