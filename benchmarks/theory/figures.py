"""How the figures of `benchmarks.theory` look: dashed is the prediction, points the measurement."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import ArrayLike

from benchmarks.core import plotting

BLUE, ORANGE, GREEN, PINK, AMBER, SKY = plotting.COLOURS[:6]
GREY, BLACK = "0.4", "0.1"
COLOURS = {"GD": GREY, "SAM": BLUE, "USAM": ORANGE}
STYLE = plotting.STYLE | {"axes.titlesize": 11, "legend.fontsize": 9.5}


def panels(title: str, rows: int = 1, columns: int = 3) -> tuple[Figure, Any]:
    """Returns a figure and its axes, row by row, under the claim in words."""
    figure, axes = plotting.subplots((2.0 + 3.85 * columns, 0.7 + 3.7 * rows), rows, columns)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)  # type: ignore[union-attr, call-arg]
    figure.suptitle(title, fontsize=12.5, fontweight="bold")
    figure.supxlabel(
        "dashed: prediction;  markers and solid lines: measurement", fontsize=9.5, color=GREY
    )
    return figure, axes.ravel()


def predicted(axis: Axes, x: ArrayLike, y: ArrayLike) -> None:
    """Draws a prediction."""
    axis.plot(np.asarray(x, float), np.asarray(y, float), color=BLACK, ls=(0, (4, 2.5)), lw=1.3)


def note(axis: Axes, text: str, place: Any, **style: Any) -> None:
    """Writes beside the lines, at a place in the units of the data."""
    options: dict[str, Any] = {"color": BLACK, "fontsize": 9.5} | style
    axis.annotate(text, place, **options)


def finished(draw: Callable[[dict[str, Any]], Figure], series: dict[str, Any]) -> Figure:
    """Draws a topic's figure."""
    figure = draw({name: np.array(values, float) for name, values in series.items()})
    for axis in figure.axes:  # decades are enough
        for line in (axis.xaxis, axis.yaxis):
            if line.get_scale() == "log":
                line.set_minor_formatter(NullFormatter())
    return figure
