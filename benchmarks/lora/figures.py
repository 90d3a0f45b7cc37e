"""The figures of a fine-tuning comparison."""

import re
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.core.plotting import Colours, bands, legend, palette, save, seed_rows, subplots
from benchmarks.core.records import Runs
from benchmarks.lora.methods import BASELINE, PROBE

_PLACE = re.compile(r"layers/(?P<layer>\d+)/(?P<part>\w+)/")
_MEASURES = {
    "lora": r"balancedness $(\|A\|^2 - \|B\|^2)/2$",
    "flora": r"norm deviation $\sum_k (\|G_k\|^2 - mean)^2$",
}


def write(folder: Path, runs: Runs, title: str) -> None:
    """Writes `accuracy.png` and, where anything was trained, the curves and the balancedness."""
    trained = {label: seeds for label, seeds in runs.items() if not label.startswith(PROBE)}
    colours = palette(runs, dark=BASELINE, grey=PROBE)
    drawings = {"accuracy": lambda: _accuracy(runs, colours)}
    if trained:
        record = next(iter(next(iter(trained.values())).values()))
        if len(record["evaluations"]) > 1:
            drawings["learning_curves"] = lambda: _learning_curves(trained, colours)
        if record["config"]["adapter"] in _MEASURES:
            drawings["balancedness"] = lambda: _balancedness(trained, colours)
    save(folder, drawings, title)


def _accuracy(runs: Runs, colours: Colours) -> Figure:
    """Test accuracy of each method, one dot per seed."""
    figure, axis = subplots((7.5, 1.6 + 0.45 * len(runs)))
    seed_rows(axis, runs, lambda record: 100 * record["final"]["test_top1"], colours)
    axis.set_xlabel("accuracy (%) (dots: seeds; diamond: mean ± standard deviation)")
    axis.margins(x=0.1)
    axis.set_ylim(top=-0.8)
    return figure


def _learning_curves(runs: Runs, colours: Colours) -> Figure:
    figure, axes = subplots((10, 4), 1, 2)
    panels = (("test_top1", "accuracy (%)", 100), ("train_loss", "training loss (nats)", 1))
    for axis, (name, axis_label, scale) in zip(axes, panels, strict=True):
        bands(axis, runs, colours, "evaluations", "step", name, scale=scale)
        axis.set(xlabel="iteration", ylabel=axis_label)
    axes[0].set_title("line and band: mean ± standard deviation", fontsize=9, loc="left")
    axes[1].set_title("mean since the evaluation before", fontsize=9, loc="left")
    legend(figure, axes[0])
    return figure


def _balancedness(runs: Runs, colours: Colours) -> Figure:
    """The measure of the first, the middle and the last layer's adapters over training."""
    record = next(iter(next(iter(runs.values())).values()))
    places = {}
    for group in record["trace"][0]:
        match = _PLACE.search(group)
        if match is not None:
            places[match["part"], int(match["layer"])] = group
    parts = list(dict.fromkeys(part for part, _ in places))
    layers = sorted({layer for _, layer in places})
    shown = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    figure, axes = subplots(
        (12, 1 + 2.9 * len(parts)), len(parts), len(shown), sharex=True, squeeze=False
    )
    for row, part in zip(axes, parts, strict=True):
        for axis, layer in zip(row, shown, strict=True):
            bands(axis, runs, colours, "trace", "step", places[part, layer])
            axis.axhline(0, color="0.4", lw=1, ls=":")
            axis.set_title(f"{part}, layer {layer + 1}", fontsize=9.5, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("iteration")
    for axis in axes[:, 0]:
        axis.set_ylabel(_MEASURES[record["config"]["adapter"]])
    legend(figure, axes[0, 0])
    return figure
