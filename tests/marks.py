"""Marks that several test files share."""

import jax
import pytest


def slow_unless(fast, names):
    """Parameters of a test that is slow for all names but some: CI runs the others too."""
    return [
        pytest.param(name, marks=[] if name in fast else [pytest.mark.slow], id=str(name))
        for name in names
    ]


def first_fast(params, count):
    """Parameters of a test that is slow for all but the first few."""
    return [
        pytest.param(*each.values, id=each.id, marks=[pytest.mark.slow] * (number >= count))
        for number, each in enumerate(params)
    ]


needs_explicit_sharding = pytest.mark.skipif(
    not hasattr(jax.sharding, "reshard"), reason="this version of JAX has no explicit sharding"
)
