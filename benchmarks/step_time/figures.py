"""The figure of `benchmarks.step_time`: bars of the ratios to the base optimizer."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.core.plotting import save, subplots

_STYLE = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}


def write(folder: Path, results: Mapping[str, Any], hardware: Mapping[str, Any]) -> None:
    """Writes `step_time.png`."""
    save(folder, {"step_time": lambda: _figure(results, hardware)}, style=_STYLE, dpi=130)


def _figure(results: Mapping[str, Any], hardware: Mapping[str, Any]) -> Figure:
    """A panel of bars for each problem: the median ratio with its quartiles."""
    columns = min(2, len(results))
    rows = math.ceil(len(results) / columns)
    figure, axes = subplots((7 * columns, 0.5 + 3.8 * rows), rows, columns, squeeze=False)
    panels = list(axes.flat)
    for axis, (name, problem) in zip(panels, results.items(), strict=False):
        _bars(axis, name, problem)
    for axis in panels[len(results) :]:
        axis.set_visible(False)
    figure.suptitle(
        f"{hardware['device']} (x{hardware['count']}): median and quartiles over rounds",
        fontsize=10,
    )
    return figure


def _bars(axis: Axes, name: str, problem: Mapping[str, Any]) -> None:
    methods = problem["methods"]
    ratios = [row["ratio"]["base"] for row in methods.values()]
    medians = np.array([ratio["median"] for ratio in ratios])
    below = medians - [ratio["lower_quartile"] for ratio in ratios]
    above = np.array([ratio["upper_quartile"] for ratio in ratios]) - medians
    colours = [_colour(method) for method in methods]
    positions = range(len(methods))
    axis.barh(positions, medians, color=colours, height=0.7)
    axis.errorbar(medians, positions, xerr=[below, above], fmt="none", ecolor="0.2", capsize=3)
    end = float((medians + above).max())
    for position, median, margin in zip(positions, medians, above, strict=True):
        axis.text(median + margin + 0.015 * end, position, f"{median:.2f}", va="center")
    for reference in {"base", "limit"} & methods.keys():
        axis.axvline(
            methods[reference]["ratio"]["base"]["median"], color="0.4", lw=1, ls=":", zorder=0
        )
    axis.set_xlim(0, 1.12 * end)
    axis.set_yticks(positions, list(methods))
    axis.invert_yaxis()
    axis.set_xlabel("time over the base optimizer's")
    title = textwrap.fill(f"{name}: {problem['title']}", 80)
    axis.set_title(title, fontsize=9, loc="left")


def _colour(method: str) -> str:
    """Okabe and Ito's blue for samax, their orange for Optax, grey for the two bounds."""
    if method in ("base", "limit"):
        return "0.6"
    return "#E69F00" if method.startswith("optax") else "#0072B2"
