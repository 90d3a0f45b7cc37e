"""The figures of `benchmarks.tensor_completion`: training, and the loss around the minima."""

import functools
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.core.plotting import COLOURS, save
from benchmarks.core.records import Record

Runs = dict[str, list[Record]]
"""Records by method, a split each."""


def write(folder: Path, runs: Runs) -> None:
    """Writes the PNG files to a folder."""
    drawings = {"training": _training, "sharpness": _sharpness}
    save(folder, {name: functools.partial(draw, runs) for name, draw in drawings.items()})


def _training(runs: Runs) -> Figure:
    """R^2 on both kinds of entries and the norm deviation over the steps, a line a split."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (
        ("r2_observed", r"$R^2$, observed entries", (0, 1)),
        ("r2_held_out", r"$R^2$, held-out entries (below 0: off the axis)", (0, 1)),
        ("norm_deviation", r"norm deviation $Q$ of the cores", None),
    )
    for axis, (key, label, limits) in zip(axes, panels, strict=True):
        for name, made in runs.items():
            for index, record in enumerate(made if name != "hooi" else []):
                values = record["curves"][key]
                steps = record["config"]["steps"] * np.arange(1, len(values) + 1) / len(values)
                axis.plot(
                    steps / 1000,
                    values,
                    color=_colour(name),
                    lw=1.3,
                    alpha=0.85,
                    label=None if index else name,
                )
        axis.set_xlabel("thousand steps")
        axis.set_ylabel(label)
        if limits:
            axis.set_ylim(*limits)
    axes[2].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def _sharpness(runs: Runs) -> Figure:
    """The rise of the loss along random directions of norm 1: the median and the quartiles."""
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axis = figure.subplots()
    for name, made in runs.items():
        rises = np.concatenate(
            [np.array(record["loss_along_directions"]) - record["loss"] for record in made]
        )
        low, middle, high = np.percentile(rises, [25, 50, 75], axis=0)
        distances = made[0]["distances"]
        axis.plot(distances, middle, color=_colour(name), label=name, lw=1.8)
        axis.fill_between(distances, low, high, color=_colour(name), alpha=0.12, lw=0)
    axis.set_yscale("symlog", linthresh=1.0)
    axis.set_xlabel("distance along a random direction of norm 1 over all cores")
    axis.set_ylabel("rise of the training loss (band: quartiles)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    return figure


def _colour(name: str) -> str:
    others = dict(zip(("sam", "das", "obar", "hooi"), COLOURS, strict=False))
    return others.get(name, "0.15")
