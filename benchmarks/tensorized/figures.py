"""The figure of `benchmarks.tensorized`: accuracy against the share of wrong labels."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.core.plotting import palette, save, subplots

_PANELS = (
    ("last10_test_top1", "std", "test top-1 (%), mean of the last 10 epochs"),
    ("last10_test_top1_minus_sgd", "standard_error", "test top-1 minus SGD's (points)"),
)


def write(folder: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Writes `accuracy.png`."""
    drawings = {"accuracy": lambda: _accuracy(rows)}
    save(folder, drawings, title, bbox_inches="tight", dpi=130)


def _accuracy(rows: list[dict[str, Any]]) -> Figure:
    """The accuracy, and its difference to SGD's, against the share of wrong labels."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = palette(methods)
    figure, axes = subplots((10.5, 4.2), 1, 2)
    for axis, (name, error, label) in zip(axes, _PANELS, strict=True):
        for place, method in enumerate(methods):
            own = [row for row in rows if row["method"] == method]
            own = [row for row in own if row.get(name, {}).get("mean") is not None]
            # Side by side, or their bars would cover one another.
            shift = 0.8 * (place - (len(methods) - 1) / 2)
            axis.errorbar(
                [100 * row["label_noise"] + shift for row in own],
                [100 * row[name]["mean"] for row in own],
                [100 * (row[name][error] or 0) for row in own],
                fmt="o-",
                color=colours[method],
                capsize=3,
                label=method,
            )
        axis.set_xticks(sorted({100 * row["label_noise"] for row in rows}))
        axis.set(xlabel="wrong training labels (%)", ylabel=label)
    axes[0].set_title("mean ± standard deviation over seeds", fontsize=9, loc="left")
    axes[1].set_title("mean ± standard error, paired by seed", fontsize=9, loc="left")
    axes[1].axhline(0, color=colours.get("sgd", "0.15"), lw=1, ls=":")
    axes[0].legend()
    return figure
