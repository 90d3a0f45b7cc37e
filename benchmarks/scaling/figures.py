"""The figure of `benchmarks.scaling`: bars of what each device sends."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.core.plotting import STYLE, palette, save, subplots
from benchmarks.scaling.programs import LAYOUTS, METHODS

Row = dict[str, Any]


def write(folder: Path, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Writes `bytes.png`."""
    # Without a resolution of its own, that of the style.
    save(folder, {"bytes": lambda: _figure(settings, rows)}, dpi=STYLE["figure.dpi"])


def _figure(settings: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """A panel a layout: bars of what a device sends, by number of devices and method."""
    colours = palette(METHODS)
    figure, axes = subplots((11, 7.5), 2, 2)
    for axis, layout in zip(axes.flat, LAYOUTS, strict=True):
        _bars(axis, [row for row in rows if row["layout"] == layout], colours)
        axis.set_title(LAYOUTS[layout].replace(": ", ":\n", 1), fontsize=9, loc="left")
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside right center")
    figure.suptitle(
        f"What each device sends in a step; {settings['parameters']:,} parameters "
        f"({4 * settings['parameters'] / 1024:g} KiB)",
        fontsize=10,
    )
    return figure


def _bars(axis: Axes, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    sent = pd.DataFrame(rows).pivot(index="devices", columns="method", values="sent_bytes") / 1024
    names = list(dict.fromkeys(row["method"] for row in rows))
    bars: dict[str, Any] = {"color": colours, "width": 0.8, "rot": 0, "legend": False}
    sent[names].plot.bar(ax=axis, **bars, edgecolor="white", linewidth=0.6)
    axis.grid(axis="x", visible=False)
    axis.set(xlabel="devices", ylabel="sent by a device (KiB a step)")
