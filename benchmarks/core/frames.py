"""Means over seeds, and how tables show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.core.records import Record


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Returns mean and standard deviation, None where a value is missing or one seed has none."""
    known = [value for value in values if value is not None]
    complete = bool(known) and len(known) == len(values)
    return {
        "mean": float(np.mean(known)) if complete else None,
        "std": float(np.std(known, ddof=1)) if complete and len(known) > 1 else None,
        "seeds": len(values),
    }


def paired(
    seeds: dict[int, Record],
    baseline: dict[int, Record],
    value: Callable[[Record], float | None],
) -> dict[str, Any]:
    """Returns the mean difference over the common seeds and its standard error."""
    pairs = [(value(seeds[seed]), value(baseline[seed])) for seed in seeds if seed in baseline]
    found = spread([None if a is None or b is None else a - b for a, b in pairs])
    error = None if found["std"] is None else found["std"] / len(pairs) ** 0.5
    return {"mean": found["mean"], "standard_error": error, "seeds": len(pairs)}


def show_percent(spread: dict[str, Any]) -> str:
    """Formats a spread of fractions in percent."""
    if spread["mean"] is None:
        return "-"
    text = f"{100 * spread['mean']:.2f}"
    return text if spread["std"] is None else f"{text} ± {100 * spread['std']:.2f}"


def show_difference(difference: dict[str, Any] | None) -> str:
    """Formats a paired difference of fractions in points."""
    if difference is None or difference["mean"] is None:
        return "-"
    text = f"{100 * difference['mean']:+.2f}"
    error = difference["standard_error"]
    return text if error is None else f"{text} ± {100 * error:.2f}"


def markdown_table(rows: list[list[str]]) -> str:
    """Returns a Markdown table with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([lines[0], f"| {' | '.join('-' * width for width in widths)} |", *lines[1:]])
