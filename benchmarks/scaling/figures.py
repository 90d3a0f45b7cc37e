"""The figures of `benchmarks.scaling`: what methods cost a chip, and how that grows with chips."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.core.plotting import legend, palette, save, subplots
from benchmarks.scaling import topologies
from benchmarks.scaling.programs import BASE, METHODS

Row = dict[str, Any]


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Writes `chips.png`, where programs are for several numbers of chips."""
    if by_chips(rows):
        save(folder, {"chips": lambda: _chips(rows)})


def by_chips(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Returns programs that differ in their number of chips alone, and have all their memory."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["fits"] and row["memory"] is None:
            kind = topologies.chip(row["topology"])
            key = row["model"], row["layout"], row["method"], row["rows"], kind
            found.setdefault(key, []).append(row)
    return {
        key[:3]: sorted(own, key=lambda row: row["chips"])
        for key, own in found.items()
        if len(own) > 1
    }


def _chips(rows: Sequence[Row]) -> Figure:
    """What a chip sends, and in how many collectives, by the number of chips."""
    lines = by_chips(rows)
    places = list(dict.fromkeys(key[:2] for key in lines))
    methods = [name for name in METHODS if any(key[2] == name for key in lines)]
    colours = palette(methods, dark=BASE, grey=BASE)
    figure, axes = subplots((4.2 * len(places) + 1.6, 6.4), 2, len(places), squeeze=False)
    for column, (model, layout) in enumerate(places):
        own = {key[2]: line for key, line in lines.items() if key[:2] == (model, layout)}
        axes[0, column].set_title(f"{model}, {layout}", fontsize=10, loc="left")
        _lines(axes[0, column], own, colours, "sent_bytes", 2**20)
        _lines(axes[1, column], own, colours, "launches", 1)
        axes[0, column].set_ylim(bottom=0)
        axes[1, column].set_yscale("log")
        axes[1, column].set_xlabel("chips, each with the same rows")
    axes[0, 0].set_ylabel("sent by a chip (MiB a step)")
    axes[1, 0].set_ylabel("collectives a step")
    legend(figure, axes[0, 0])
    return figure


def _lines(
    axis: Axes,
    own: Mapping[str, Sequence[Row]],
    colours: Mapping[str, str],
    name: str,
    unit: float,
) -> None:
    for index, (method, rows) in enumerate(own.items()):
        frame = pd.DataFrame(rows)
        # Lines that lie on one another stay apart: the first ones are wider.
        width = 1.6 + 1.4 * (len(own) - 1 - index)
        values = frame[name] / unit
        axis.plot(frame["chips"], values, "o-", color=colours[method], label=method, lw=width)
    chips = sorted({row["chips"] for rows in own.values() for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(chips, [str(count) for count in chips])
    axis.xaxis.set_minor_formatter(NullFormatter())
