"""Floating-point operations of a function's matrix products, those in loops as often as they run.

XLA states the operations of a loop's body once, however often it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def product_flops(function: Callable, *arguments: Any) -> int:
    """Returns two operations for each product of two numbers in the matrix products.

    Raises:
        ValueError: The function has a loop whose length is not known beforehand.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "while":
            raise ValueError("A `while` loop runs nobody knows how often: its work has no number.")
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            summed = math.prod(left[axis] for axis in contracted)
            total += 2 * summed * math.prod(equation.outvars[0].aval.shape)
        inner = [_count(each) for each in _inside(equation.params)]
        if name == "cond":  # one branch runs: the longest, to be on the safe side
            inner = [max(inner)]
        total += equation.params.get("length", 1) * sum(inner)
    return total


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the functions that an operation calls."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            found = getattr(each, "jaxpr", each)
            if hasattr(found, "eqns"):
                yield found
