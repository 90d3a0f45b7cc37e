"""The figures of `benchmarks.tensor_completion`: training, and the loss around the minima."""

import functools
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.core.plotting import legend, palette, save, subplots
from benchmarks.core.records import Record

_COLOURS = palette(("sam", "das", "obar", "hooi", "adam"), dark="adam")
Runs = dict[str, list[Record]]
"""Records by method, a split each."""


def write(folder: Path, runs: Runs) -> None:
    """Writes the PNG files to a folder."""
    drawings = {"training": _training, "sharpness": _sharpness}
    save(folder, {name: functools.partial(draw, runs) for name, draw in drawings.items()})


def _training(runs: Runs) -> Figure:
    """R^2 on both kinds of entries and the norm deviation over the steps, one line per split."""
    figure, axes = subplots((13, 4), 1, 3)
    panels = (
        ("r2_observed", r"$R^2$, observed entries"),
        ("r2_held_out", r"$R^2$, held-out entries (below 0: off the axis)"),
        ("norm_deviation", r"norm deviation $Q$ of the cores"),
    )
    for axis, (key, text) in zip(axes, panels, strict=True):
        for name, made in runs.items():
            for index, record in enumerate(made if name != "hooi" else []):
                values = record["curves"][key]
                steps = record["config"]["steps"] * np.arange(1, len(values) + 1) / len(values)
                label = None if index else name
                axis.plot(
                    steps / 1000, values, color=_COLOURS[name], lw=1.3, alpha=0.85, label=label
                )
        axis.set(xlabel="thousand steps", ylabel=text)
    axes[0].set_ylim(0, 1)
    axes[1].set_ylim(0, 1)
    axes[2].set_yscale("log")
    legend(figure, axes[0])
    return figure


def _sharpness(runs: Runs) -> Figure:
    """The rise of the loss along random directions of norm 1: the median and the quartiles."""
    figure, axis = subplots((7.5, 4.4))
    for name, made in runs.items():
        rises = np.concatenate(
            [np.array(record["loss_along_directions"]) - record["loss"] for record in made]
        )
        low, middle, high = np.percentile(rises, [25, 50, 75], axis=0)
        distances = made[0]["distances"]
        axis.plot(distances, middle, color=_COLOURS[name], label=name, lw=1.8)
        axis.fill_between(distances, low, high, color=_COLOURS[name], alpha=0.12, lw=0)
    axis.set_yscale("symlog", linthresh=1.0)
    axis.set_xlabel("distance along a random direction of norm 1 over all cores")
    axis.set_ylabel("rise of the training loss (band: quartiles)")
    legend(figure, axis)
    return figure
