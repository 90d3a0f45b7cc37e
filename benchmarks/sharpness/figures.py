"""The figures of `benchmarks.sharpness`: the measures, the spectra, and the losses around."""

import functools
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import norm

from benchmarks.core.plotting import band, legend, palette, save, seed_rows, subplots
from benchmarks.core.records import Runs
from benchmarks.sharpness.measures import COLUMNS, EIGENVALUES


def write(folder: Path, runs: Runs, title: str) -> None:
    """Writes the PNG files to a folder, with the settings over every figure."""
    drawings = {"measures": _measures, "spectrum": _spectrum, "landscape": _landscape}
    save(folder, {name: functools.partial(draw, runs) for name, draw in drawings.items()}, title)


def _measures(runs: Runs) -> Figure:
    """One panel per measure, one row per method, one dot per seed."""
    colours = palette(runs)
    columns = [column for column in COLUMNS if column.name != "1st / 5th"]
    figure, grid = subplots((14, 1.6 + 0.8 * len(runs)), 2, 4, sharey=True)
    for axis, column in zip(grid.flat, columns, strict=True):
        seed_rows(axis, runs, column.of, colours, ".3g")
        axis.set_xlabel(column.title)
        axis.set_xlim(left=0)
        axis.margins(x=0.12)
    return figure


def _spectrum(runs: Runs) -> Figure:
    """The largest eigenvalues of each method's Hessians, and their spectral density."""
    colours = palette(runs)
    figure, (largest, density) = subplots((13, 4.6), 1, 2, width_ratios=(2, 3))
    every = [made["measures"]["density"] for seeds in runs.values() for made in seeds.values()]
    low, high = (bound([node for d in every for node in d["nodes"]]) for bound in (min, max))
    width = (high - low) / 100
    grid = np.linspace(low - 4 * width, high + 4 * width, 600)
    for label, seeds in runs.items():
        top = np.array([made["measures"]["top_eigenvalues"]["values"] for made in seeds.values()])
        band(largest, np.arange(1, top.shape[1] + 1), top, label, colours[label])
        densities = [made["measures"]["density"] for made in seeds.values()]
        curves = [
            norm.pdf(grid[:, None], np.array(d["nodes"]), width) @ np.array(d["weights"])
            for d in densities
        ]
        density.semilogy(grid, np.mean(curves, axis=0), color=colours[label], label=label)
    largest.set_xticks(range(1, EIGENVALUES + 1))
    largest.set_xlabel("rank of the eigenvalue (line and band: mean ± standard deviation)")
    largest.set_ylabel("eigenvalue of the Hessian")
    parameters = next(iter(next(iter(runs.values())).values()))["parameters"]
    # From less than one eigenvalue to all of them.
    density.set_ylim(0.1 / parameters / width, 1 / width)
    density.set(xlabel="eigenvalue of the Hessian", ylabel="density (mean over seeds)")
    legend(figure, density)
    return figure


def _landscape(runs: Runs) -> Figure:
    """The loss along a random filter-normalized direction and along the top eigenvector."""
    colours = palette(runs)
    figure, axes = subplots((13, 4.4), 1, 2)
    panels = (
        ("random", "distance along a random direction (norms of the filters)"),
        ("top_eigenvector", "distance along the top eigenvector"),
    )
    for axis, (name, label) in zip(axes, panels, strict=True):
        for method, seeds in runs.items():
            lines = np.array([made["measures"]["landscape"][name] for made in seeds.values()])
            distances = next(iter(seeds.values()))["measures"]["landscape"]["distances"]
            rises = lines - lines[:, [len(distances) // 2]]
            axis.plot(distances, rises.mean(0), color=colours[method], label=method)
        axis.set(xlabel=label, ylabel="rise of the training loss (nats, mean over seeds)")
    legend(figure, axes[0])
    return figure
