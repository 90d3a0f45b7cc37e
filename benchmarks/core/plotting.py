"""How all figures look, and what several of them draw."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from benchmarks.core.records import Record, Runs

Colours = dict[str, str]

# Okabe and Ito's colours, which colour-blind readers tell apart; SGD is the grey reference.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D00", "#6A3D9A")
STYLE: Any = {
    "figure.dpi": 130,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def subplots(size: tuple[float, float], *shape: int, **options: Any) -> tuple[Figure, Any]:
    """Returns a figure of a size in inches, and its axes."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(*shape, **options)


def seed_rows(
    axis: Axes, runs: Runs, value: Callable[[Record], float], colours: Colours, number: str = ".2f"
) -> None:
    """Draws a row a method: a dot a seed, the mean with its deviation; and a line at SGD's mean."""
    above: Any = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
    for row, (method, seeds) in enumerate(runs.items()):
        values = np.array([value(record) for record in seeds.values()])
        colour = colours[method]
        mean, error = values.mean(), values.std(ddof=1) if len(values) > 1 else 0
        axis.plot(values, np.full(len(values), row), "o", color=colour, alpha=0.35, ms=6)
        axis.errorbar(mean, row, xerr=error, fmt="D", color=colour, ms=6, capsize=3)
        axis.annotate(f"{mean:{number}}", (mean, row), **above, fontsize=8.5, color=colour)
        if method == "sgd":
            axis.axvline(mean, color="0.6", lw=1, ls=":")
    axis.set_yticks(range(len(runs)), list(runs))
    axis.set_ylim(len(runs) - 0.4, -0.75)


def band(axis: Axes, x: ArrayLike, values: np.ndarray, method: str, colour: str) -> None:
    """Draws the mean over seeds (the first axis) with a band of one standard deviation."""
    mean, style = values.mean(0), "--" if "@" in method else "-"
    order = 3 if method.startswith("sgd") else 2
    axis.plot(x, mean, color=colour, label=method, lw=1.8, ls=style, zorder=order)
    if len(values) > 1:
        deviation = values.std(0, ddof=1)
        axis.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.12, lw=0)


def entries(seeds: Mapping[int, Record], history: str, name: str) -> np.ndarray:
    """Returns one quantity of the entries of a history, by seed and entry; missing ones are NaN."""
    rows = [[entry.get(name) for entry in record[history]] for record in seeds.values()]
    return np.array(rows, dtype=float)


def bands(
    axis: Axes, runs: Runs, colours: Colours, history: str, x: str, y: str, *, scale: float = 1
) -> dict[str, np.ndarray]:
    """Draws quantities of the entries of a history as a band a method; returns those of `y`."""
    values = {method: scale * entries(seeds, history, y) for method, seeds in runs.items()}
    for method, seeds in runs.items():
        band(axis, entries(seeds, history, x)[0], values[method], method, colours[method])
    return values


def palette(methods: Iterable[str], dark: str = "sgd", grey: str = "sgd") -> Colours:
    """Returns a colour for each method, the same in every figure.

    Args:
        methods: Their labels.
        dark: The one that is the reference.
        grey: How the labels of further references begin.
    """
    labels = list(methods)
    others = [label for label in labels if label != dark and not label.startswith(grey)]
    colours = {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(others)}
    return {label: "0.15" if label == dark else colours.get(label, "0.5") for label in labels}


def legend(figure: Figure, axis: Axes) -> None:
    """Puts the legend of an axis beside the figure."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")


def save(
    folder: Path,
    drawings: Mapping[str, Callable[[], Figure]],
    title: str = "",
    style: Mapping[Any, Any] = STYLE,
    **options: Any,
) -> None:
    """Draws figures and writes their PNG files.

    Args:
        folder: Created if missing.
        drawings: What draws each, by the file's name.
        title: Over every figure.
        style: Matplotlib's settings.
        **options: Of `Figure.savefig`; without any, margins are cut off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(dict(style)):
        for name, draw in drawings.items():
            figure = draw()
            if title:
                figure.suptitle(title, fontsize=10)
            options = options or {"bbox_inches": "tight"}
            figure.savefig(folder / f"{name}.png", facecolor="white", **options)
