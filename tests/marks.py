"""Marks that several test files share."""

import jax
import pytest

needs_explicit_sharding = pytest.mark.skipif(
    not hasattr(jax.sharding, "reshard"), reason="this version of JAX has no explicit sharding"
)
