"""The figures of `benchmarks.balance_toys`."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.core.plotting import STYLE, save, subplots
from benchmarks.models.toys import Toy, Trajectory

# Okabe and Ito's colours; dashes tell apart what lies on top of one another.
_LINES: dict[str, dict[str, Any]] = {
    "SGD": {"color": "0.15", "ls": "-"},
    "SAM": {"color": "#0072B2", "ls": "-"},
    "nBAR": {"color": "#E69F00", "ls": "-"},
    "oBAR": {"color": "#009E73", "ls": "--"},
    "DAS": {"color": "#D55E00", "ls": (0, (4, 1.5, 1, 1.5))},
}
_FLOOR = 3e-4  # the lowest distance that is drawn


def write(
    folder: Path,
    toys: Mapping[str, Toy],
    results: Mapping[str, Mapping[str, Trajectory]],
    every: int,
) -> None:
    """Draws each toy's runs, as the papers' Figure 1 does."""
    drawings = {
        name: functools.partial(_figure, toys[name], runs, every) for name, runs in results.items()
    }
    save(folder, drawings, style=STYLE | {"font.size": 9.5}, dpi=120)


def _figure(toy: Toy, runs: Mapping[str, Trajectory], every: int) -> Figure:
    """A column a noise level: the imbalance above; below, what drives it or what it costs."""
    two = len(toy.start) == 2
    columns = len(toy.levels)
    figure, axes = subplots((3.1 * columns, 5.4), 2, columns, sharex=True, squeeze=False)
    for index, level in enumerate(toy.levels):
        above, below = axes[:, index]
        above.sharey(axes[0, 0])
        for method, run in runs.items():
            _line(above, run.imbalance[index], method, every)
            lower = run.distance[index] if two else _smooth(run.covariance[index])
            _line(below, lower, method, every)
        above.set_title(f"noise a = {level:g}", fontsize=10)
        below.set_xlabel("step (thousands)")
        if two:
            top = 1.4 * max(float(run.imbalance[index, 0, 0]) for run in runs.values())
            _mark_what_leaves(above, index, runs, top)
            above.set_ylim(0, top)
            above.axhline(toy.rest, color="0.4", lw=1, ls=":", zorder=0)
            below.sharey(axes[1, 0])
            below.set_yscale("log")
            below.set_ylim(_FLOOR, 2)
        else:
            below.axhline(0, color="0.4", lw=0.8, zorder=0)
    axes[0, 0].set_ylabel("$|B|$" if two else "$Q$")
    axes[1, 0].set_ylabel(
        r"$\|P - T\|^2$" if two else r"$\mathrm{Cov}(\|G_k\|^2, \|g_k\|^2)$, running mean"
    )
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    settings = rf"$\eta$ = {toy.learning_rate:g}, $\rho$ = {toy.rho:g}"
    figure.suptitle(f"{toy.title};  {settings}", fontsize=10)
    return figure


def _mark_what_leaves(axis: Axes, level: int, runs: Mapping[str, Trajectory], top: float) -> None:
    """Says where lines go that leave the panel at its top."""
    ends = {method: float(run.imbalance[level, :, -1].mean()) for method, run in runs.items()}
    text = "\n".join(f"{method} ends at {end:.3g}" for method, end in ends.items() if end > top)
    axis.text(0.97, 0.97, text, transform=axis.transAxes, ha="right", va="top", fontsize=8.5)


def _line(axis: Axes, values: np.ndarray, method: str, every: int) -> None:
    """The mean over seeds (the first axis) with a band from the lowest to the highest."""
    line = _LINES[method]
    thousands = every * np.arange(values.shape[-1]) / 1000
    axis.plot(thousands, values.mean(0), label=method, lw=1.7, **line)
    axis.fill_between(
        thousands, values.min(0), values.max(0), color=line["color"], alpha=0.15, lw=0
    )


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running means over a fiftieth of the run: a step's covariance is mostly noise."""
    width = max(1, values.shape[-1] // 50)
    return pd.DataFrame(values.T).rolling(width).mean().to_numpy().T
