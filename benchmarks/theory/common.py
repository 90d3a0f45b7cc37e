"""How the topics of `benchmarks.theory` say what they found: claims, numbers in words, slopes."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Claim(NamedTuple):
    """A sentence of a paper beside what was measured."""

    text: str  # What is claimed
    setting: str  # Where
    prediction: str  # What the theory says
    measured: str  # What came out
    holds: Any  # Whether the two agree within the tolerance that `prediction` states, everywhere
    outside: bool = False


limit = functools.partial(Claim, outside=True)
"""A claim about where a method or a law breaks down: it holds if that does happen."""


class Findings(NamedTuple):
    """What a topic's measurement returns."""

    claims: list[Claim]  # In the order in which they are to be read
    series: dict[str, Any]  # What the figure is drawn from, as JSON types


def findings(claims: list[Claim], **series: ArrayLike) -> Findings:
    """Returns claims, and arrays as nested lists of floats with six significant digits."""
    rounded = np.vectorize(lambda x: float(f"{x:.6g}"))
    lists = {name: rounded(np.asarray(values, float)).tolist() for name, values in series.items()}
    return Findings(claims, lists)


def near(values: ArrayLike, wanted: ArrayLike, tolerance: float) -> np.ndarray:
    """Returns whether values are what is wanted, up to a share of it."""
    return np.abs(np.asarray(values) / np.asarray(wanted) - 1) < tolerance


def slope(x: ArrayLike, y: ArrayLike) -> float:
    """Returns the slope of the line through the points on logarithmic axes."""
    return float(np.polyfit(np.log(np.asarray(x)), np.log(np.asarray(y)), 1)[0])


def spread(values: ArrayLike, form: str = ".3g") -> str:
    """Returns "lowest to highest" of some numbers, or the number if they read the same."""
    low, high = (format(float(f(np.asarray(values))), form) for f in (np.min, np.max))
    return low if low == high else f"{low} to {high}"


def listed(values: Sequence[float] | np.ndarray, form: str = ".3g") -> str:
    """Returns the numbers with commas between them."""
    return ", ".join(format(float(value), form) for value in values)
