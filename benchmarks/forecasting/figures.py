"""The figures of a forecasting comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.core.plotting import COLOURS, Colours, legend, save, seed_rows, subplots
from benchmarks.core.records import Runs

# Curves of more methods than these cannot be told apart.
_CURVES = ("adam", "adamw", "linear", "sam", "sam_quarter", "stale_sam")
_FORECASTS = ("adam", "sam")


def write(folder: Path, runs: Runs, summary: dict[str, Any], title: str) -> None:
    """Writes `mse.png`, the learning curves, forecasts, and the validation error against time."""
    colours = _palette(runs)
    shown = _chosen(runs, _CURVES)
    apart = _palette(shown)  # among all rows colours come twice
    drawings = {
        "mse": lambda: _mse(runs, summary, colours),
        "learning_curves": lambda: _learning_curves(shown, apart),
        "validation_against_time": lambda: _against_time(shown, apart),
        "forecasts": lambda: _forecasts(runs, colours),
    }
    save(folder, drawings, title)


def _mse(runs: Runs, summary: dict[str, Any], colours: Colours) -> Figure:
    """Test error of each method, one dot per seed, with lines at Adam's and the best baseline's."""
    figure, axis = subplots((7.5, 1.6 + 0.42 * len(runs)))
    seed_rows(axis, runs, lambda run: run["final"]["test_mse"], colours, ".3f")
    for label in {summary["adam"], summary["best_baseline"]} & set(runs):
        mean = summary["methods"][label]["mse"]["mean"]
        axis.axvline(mean, color=colours[label], lw=1, ls=":", zorder=0)
    axis.margins(x=0.08)
    axis.set_xlabel("test MSE (dots: seeds; diamond: mean ± standard deviation)")
    axis.set_title(
        f"dotted: {summary['adam']}, and the best baseline, {summary['best_baseline']}",
        fontsize=9,
        loc="left",
    )
    return figure


def _learning_curves(runs: Runs, colours: Colours) -> Figure:
    """Errors over the epochs, one line per seed, with a dot at the epoch that counts."""
    figure, axes = subplots((10.5, 4), 1, 2)
    panels = (("train_loss", "training loss"), ("validation_mse", "validation MSE"))
    for axis, (key, name) in zip(axes, panels, strict=True):
        for label, seeds in runs.items():
            for index, record in enumerate(seeds.values()):
                values = [entry[key] for entry in record["epochs"]]
                best = record["final"]["best_epoch"]
                line = {"color": colours[label], "label": None if index else label}
                axis.plot(range(1, len(values) + 1), values, lw=1.3, alpha=0.75, **line)
                axis.plot(best, values[best - 1], "o", color=colours[label], ms=4)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
    axes[0].set_title("one line per seed; as the steps see it", fontsize=9, loc="left")
    axes[1].set_title("dot: the epoch that is tested", fontsize=9, loc="left")
    legend(figure, axes[0])
    return figure


def _against_time(runs: Runs, colours: Colours) -> Figure:
    """The lowest validation error so far against the time spent on training steps."""
    figure, axis = subplots((7.5, 4.2))
    ends = []
    for label, seeds in runs.items():
        for index, record in enumerate(seeds.values()):
            seconds = np.cumsum([entry["seconds"] for entry in record["epochs"]])
            lowest = np.minimum.accumulate([e["validation_mse"] for e in record["epochs"]])
            ends.append(lowest[-1])
            axis.step(
                seconds,
                lowest,
                where="post",
                color=colours[label],
                lw=1.4,
                alpha=0.8,
                label=None if index else label,
            )
            axis.plot(seconds[-1], lowest[-1], "o", color=colours[label], ms=4)
    axis.set_xscale("log")
    span = max(ends) - min(ends) or max(ends)
    axis.set_ylim(min(ends) - 0.15 * span, max(ends) + 0.6 * span)
    axis.set_xlabel("seconds of training steps")
    axis.set_ylabel("lowest validation MSE so far")
    axis.set_title("one line per seed; dot: the run's end", fontsize=9, loc="left")
    legend(figure, axis)
    return figure


def _forecasts(runs: Runs, colours: Colours) -> Figure:
    """The first seed's forecasts of one test window, of some channels, by Adam and SAM."""
    shown = _chosen(runs, _FORECASTS)
    first = {label: next(iter(seeds.values()))["forecast"] for label, seeds in shown.items()}
    common = next(iter(first.values()))
    count = len(common["channels"])
    figure, grid = subplots((10.5, 1 + 1.9 * count), count, 1, sharex=True, squeeze=False)
    axes = grid[:, 0]
    for row, (axis, channel) in enumerate(zip(axes, common["channels"], strict=True)):
        seen, truth = common["seen"][row], common["truth"][row]
        axis.plot(range(-len(seen), 0), seen, color="0.6", lw=1.2)
        axis.plot(range(len(truth)), truth, color="0.6", lw=1.2, label="measured")
        for label, found in first.items():
            axis.plot(
                range(len(truth)), found["forecast"][row], color=colours[label], lw=1.6, label=label
            )
        axis.axvline(-0.5, color="0.4", lw=1, ls=":")
        axis.set_title(channel, fontsize=9.5, loc="left")
    axes[-1].set_xlabel("steps from the present; standardized, the middle window of the test part")
    legend(figure, axes[0])
    return figure


def _chosen(runs: Runs, names: tuple[str, ...]) -> Runs:
    """Returns the first row of each of these methods; as published, where it has no other."""
    found = {}
    for name in names:
        own = [label for label in runs if _kind(label) == name]
        if own:
            found[own[0]] = runs[own[0]]
    return found or runs


def _kind(label: str) -> str:
    return label.split(":", maxsplit=1)[0].removesuffix("_published")


def _palette(runs: Runs) -> Colours:
    """Returns a colour for each method: the baselines are dark, the others bright."""
    dark = {"adam": "0.1", "adamw": "#7B3294", "linear": "0.55"}
    others = dict.fromkeys(_kind(label) for label in runs if _kind(label) not in dark)
    colours = {kind: COLOURS[index % len(COLOURS)] for index, kind in enumerate(others)}
    return {label: {**dark, **colours}[_kind(label)] for label in runs}
