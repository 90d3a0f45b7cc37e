"""The figures of a comparison: what a reader should see before reading any number."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.core.plotting import (
    Colours,
    band,
    bands,
    entries,
    legend,
    palette,
    save,
    seed_rows,
    subplots,
)
from benchmarks.core.records import Runs


def write(folder: Path, runs: Runs, title: str, equal_time: float | None) -> None:
    """Writes the comparison's PNG files; `equal_time` is marked, in seconds."""
    colours = palette(runs)
    drawings = {
        "accuracy": lambda: _accuracy(runs, colours),
        "learning_curves": lambda: _learning_curves(runs, colours),
        "accuracy_against_time": lambda: _against_time(runs, colours, equal_time),
    }
    adaptive = {
        label: seeds
        for label, seeds in runs.items()
        if "adaptive_weight" in next(iter(seeds.values()))["epochs"][0]
    }
    if adaptive:
        drawings["samar"] = lambda: _adaptive(adaptive, colours)
    save(folder, drawings, title)


def _accuracy(runs: Runs, colours: Colours) -> Figure:
    """Last-10 test accuracy and generalization gap of each method, one dot per seed."""
    figure, (accuracy, gap) = subplots((9, 1.4 + 0.42 * len(runs)), 1, 2, sharey=True)
    seed_rows(accuracy, runs, lambda run: 100 * run["final"]["last10_test_top1"], colours)
    accuracy.set_xlabel(
        "test top-1 (%), mean of the last 10 epochs\n"
        "(dots: seeds; diamond: mean ± standard deviation)"
    )
    seed_rows(gap, runs, lambda run: 100 * run["final"]["generalization_gap"], colours)
    gap.set_xlabel("generalization gap (points), train - test")
    for axis in (accuracy, gap):
        axis.margins(x=0.12)
    return figure


def _learning_curves(runs: Runs, colours: Colours) -> Figure:
    figure, axes = subplots((13, 4), 1, 3)
    panels = (
        ("test_top1", "test top-1 (%)", 100),
        ("train_eval_top1", "train top-1 (%), evaluation mode", 100),
        ("test_loss", "test loss (nats)", 1),
    )
    for axis, (name, label, scale) in zip(axes, panels, strict=True):
        curves = bands(axis, runs, colours, "epochs", "epoch", name, scale=scale)
        axis.set(xlabel="epoch (line and band: mean ± standard deviation)", ylabel=label)
        _zoom(axis, curves)
    legend(figure, axes[0])
    return figure


def _against_time(runs: Runs, colours: Colours, equal_time: float | None) -> Figure:
    figure, axis = subplots((8.5, 4.6))
    curves = {}
    for method, seeds in runs.items():
        times = np.cumsum(entries(seeds, "epochs", "compute_seconds"), axis=1).mean(0)
        curves[method] = values = 100 * entries(seeds, "epochs", "test_top1")
        band(axis, times, values, method, colours[method])
        axis.plot(times[-1], values[:, -1].mean(), "o", color=colours[method], ms=6, zorder=4)
    _zoom(axis, curves)
    backend = next(iter(next(iter(runs.values())).values()))["hardware"]["backend"]
    clock = "CPU" if backend == "cpu" else "wall-clock"
    if equal_time is not None:
        axis.axvline(equal_time, color="0.4", lw=1, ls=":")
        place: Any = {"xycoords": ("data", "axes fraction"), "fontsize": 8.5, "color": "0.3"}
        axis.annotate(" equal time", (equal_time, 0.02), **place)
    axis.set_xlim(left=0)
    axis.set_xlabel(f"training time ({clock} seconds, without compilation and evaluation)")
    axis.set_ylabel("test top-1 (%)")
    legend(figure, axis)
    return figure


def _adaptive(runs: Runs, colours: Colours) -> Figure:
    figure, axes = subplots((8.5, 5.6), 2, 1, sharex=True)
    panels = (
        ("adaptive_weight", r"weight $\lambda_k$ (epoch mean)"),
        ("sharpness_ratio", r"ratio $r_k$ (epoch mean)"),
    )
    for axis, (name, label) in zip(axes, panels, strict=True):
        curves = bands(axis, runs, colours, "epochs", "epoch", name)
        for method, values in curves.items():
            epochs = np.arange(1, values.shape[1] + 1)
            axis.plot(epochs, values.T, color=colours[method], lw=0.6, alpha=0.5)
        axis.axhline(1, color="0.4", lw=1, ls=":")
        axis.set_ylabel(label)
    axes[0].set_title(r"dotted: $\lambda = 1$ is SAM, 0 the base optimizer", fontsize=9, loc="left")
    axes[1].set_title(r"dotted: equally sharp; above it $\lambda$ grows", fontsize=9, loc="left")
    axes[1].set_xlabel("epoch (thin lines: seeds)")
    legend(figure, axes[0])
    return figure


def _zoom(axis: Axes, curves: dict[str, np.ndarray]) -> None:
    """Cuts off the first third of training, where all curves look alike and fill the axis."""
    late = [values[:, values.shape[1] // 3 :] for values in curves.values()]
    low = min(float(np.nanmin(values)) for values in late)
    high = max(float(np.nanmax(values)) for values in late)
    margin = 0.06 * (high - low) or 1
    axis.set_ylim(low - margin, high + margin)
