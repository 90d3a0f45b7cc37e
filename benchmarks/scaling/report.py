"""The tables, targets and figure of `benchmarks.scaling`."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.core import plotting, records
from benchmarks.core.frames import markdown_table
from benchmarks.scaling.programs import LAYOUTS, METHODS

Row = dict[str, Any]

_NOTES = """\
Counted in the compiled program: what each device sends in a step with ring algorithms, in KiB, and
in brackets the number of collectives, each of which may carry several arrays. An all-reduce of B
bytes over n devices sends 2 B (n - 1) / n, an all-gather B (n - 1) / n. The step returns no loss,
whose mean would be 4 bytes more for every method alike.

XLA for CPU has no reduce-scatter: under `fsdp` it all-reduces the gradients, of every method alike.
SGD's go in one all-reduce there. Beside the norms of BAR and DAS, some of which wait for a gradient
and then travel with the next one's, they go one by one: the bytes are the same, the collectives are
more. Which arrays share a collective is XLA's choice, and another on accelerators.
"""
_CPU_TIMES = """\
Simulated devices share the cores of one CPU: these times say nothing about scaling.
"""
_BALANCING = ("nbar", "obar", "das")
_DATA_PARALLEL = ("jit", "shard_map")


class Target(NamedTuple):
    """A claim about all numbers of devices above one, what was found, and whether it holds."""

    layout: str
    claim: str
    found: str
    verdict: str


def targets(rows: Sequence[Row]) -> list[Target]:
    """Returns the targets on what the rows hold."""
    by = {(row["layout"], row["method"], row["devices"]): row for row in rows}
    several = sorted({row["devices"] for row in rows if row["devices"] > 1})
    found = []
    for layout in _DATA_PARALLEL if several else ():
        claims = [
            ("sam", 2, "synchronized SAM moves exactly twice SGD's bytes"),
            *((name, 1, f"{name} moves exactly SGD's bytes") for name in _BALANCING),
        ]
        if layout == "shard_map":
            claims.insert(1, ("sam_per_device", 1, "per-device SAM moves exactly SGD's bytes"))
        for method, times, claim in claims:
            pairs = [(by[layout, method, n], by[layout, "sgd", n]) for n in several]
            ratios = [row["bytes"] / base["bytes"] for row, base in pairs]
            same = all(row["bytes"] == times * base["bytes"] for row, base in pairs)
            shown = ", ".join(f"{ratio:g}" for ratio in sorted(set(ratios)))
            found.append(Target(layout, claim, f"{shown} times", "met" if same else "not met"))
    for layout in ("fsdp", "tensor") if several else ():
        for method in _BALANCING:
            pairs = [(by[layout, method, n], by[layout, "sgd", n]) for n in several]
            found.append(_norms_target(layout, method, pairs))
    return found


def _norms_target(layout: str, method: str, pairs: list[tuple[Row, Row]]) -> Target:
    """At most one all-reduce that carries norms and nothing else; nothing else beside norms."""
    alone = max(norm_collectives(row) for row, _ in pairs)
    more = max(row["bytes"] - base["bytes"] for row, base in pairs)
    launches = max(row["collectives"] - base["collectives"] for row, base in pairs)
    same = all(_matrices(row) == _matrices(base) for row, base in pairs)
    met = alone <= 1 and same
    return Target(
        layout,
        f"{method} adds at most one all-reduce of norms alone, and else moves SGD's bytes",
        f"{alone} of norms alone; in all {more} bytes and {launches} collectives more",
        "met" if met else "not met",
    )


def norm_collectives(row: Row) -> int:
    """How many collectives carry norms alone: scalars, or vectors of sums over a factor's rows."""
    launches = defaultdict(list)
    for array in row["arrays"]:
        launches[array["launch"]].append(len(array["shape"]) < 2)
    return sum(all(norms) for norms in launches.values())


def _matrices(row: Row) -> Counter:
    """The parameters, gradients and activations that are sent."""
    arrays = ((a["kind"], a["dtype"], tuple(a["shape"])) for a in row["arrays"])
    return Counter(array for array in arrays if len(array[2]) > 1)


def write(
    folder: Path, settings: Mapping[str, Any], rows: Sequence[Row], times: Sequence[Row]
) -> str:
    """Writes `results.json`, `results.csv`, `summary.md` and `bytes.png`.

    Args:
        folder: Created if missing.
        settings: The sizes.
        rows: What each layout, method and number of devices sends.
        times: What a step of each takes; empty if nothing was timed.

    Returns:
        The text of `summary.md`.
    """
    found = targets(rows)
    hardware, versions = records.hardware(), records.versions()
    text = to_markdown(settings, hardware, versions, rows, times, found)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "format": records.FORMAT,
        "settings": dict(settings),
        "hardware": hardware,
        "versions": versions,
        "targets": [target._asdict() for target in found],
        "programs": list(rows),
        "times": list(times),
    }
    records.write_record(folder / "results.json", record)
    records.write_text(folder / "results.csv", to_csv(rows, times))
    records.write_text(folder / "summary.md", text)
    _figure(settings, rows).savefig(folder / "bytes.png", facecolor="white")
    return text


def to_markdown(
    settings: Mapping[str, Any],
    hardware: Mapping[str, Any],
    versions: Mapping[str, str],
    rows: Sequence[Row],
    times: Sequence[Row],
    found: Sequence[Target],
) -> str:
    """Returns a table a layout, one of the times if there are any, and one of the targets."""
    software = ", ".join(f"{name} {versions[name]}" for name in ("jax", "optax"))
    lines = [
        f"# What a step sends between devices ({hardware['backend']}, {software})",
        "",
        f"{settings['layers']} layers of two factors, {settings['width']} x {settings['rank']}: "
        f"{settings['parameters']:,} parameters ({4 * settings['parameters'] / 1024:g} KiB), "
        f"{settings['batch']} examples on each device.",
        "",
        _NOTES,
    ]
    for layout, description in LAYOUTS.items():
        lines += [f"## {layout}: {description}", ""]
        lines += [_table(rows, layout, lambda r: f"{_kib(r)} ({r['collectives']})"), ""]
    if times:
        lines += ["## Milliseconds a step, weak scaling", ""]
        if hardware["backend"] == "cpu":
            lines += [_CPU_TIMES]
        for layout in dict.fromkeys(row["layout"] for row in times):
            lines += [f"{layout}:", "", _table(times, layout, _milliseconds), ""]
    if found:
        header = ["layout", "target", "found", ""]
        lines += ["## Targets", "", markdown_table([header, *(list(row) for row in found)]), ""]
    return "\n".join(lines)


def _table(rows: Sequence[Row], layout: str, show: Any) -> str:
    cells: dict[str, list[str]] = {}
    counts = sorted({row["devices"] for row in rows})
    for row in sorted(rows, key=lambda row: row["devices"]):
        if row["layout"] == layout:
            cells.setdefault(row["method"], []).append(show(row))
    header = ["method", *(f"{n} device{'s' if n > 1 else ''}" for n in counts)]
    return markdown_table([header, *([method, *cells[method]] for method in cells)])


def _kib(row: Row) -> str:
    return f"{row['sent_bytes'] / 1024:.3f}".rstrip("0").rstrip(".")


def _milliseconds(row: Row) -> str:
    return f"{1e3 * row['seconds']:.4g} ({row['over_fewest']['median']:.2f}x)"


def to_csv(rows: Sequence[Row], times: Sequence[Row]) -> str:
    """Returns one line a layout, method and number of devices."""
    seconds = {(t["layout"], t["method"], t["devices"]): t["seconds"] for t in times}
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = ("layout", "method", "devices", "collectives", "bytes", "sent_bytes")
    writer.writerow([*names, "norm_collectives", "seconds"])
    for row in rows:
        time = seconds.get((row["layout"], row["method"], row["devices"]))
        writer.writerow([*(row[name] for name in names), norm_collectives(row), time])
    return stream.getvalue()


def _figure(settings: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """A panel a layout: bars of what a device sends, by number of devices and method."""
    colours = plotting.palette(METHODS)
    with mpl.rc_context(plotting.STYLE):
        figure = Figure(figsize=(11, 7.5), layout="constrained")
        axes = figure.subplots(2, 2).flat
        for axis, layout in zip(axes, LAYOUTS, strict=True):
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
    counts = sorted({row["devices"] for row in rows})
    names = list(dict.fromkeys(row["method"] for row in rows))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        sent = {row["devices"]: row["sent_bytes"] / 1024 for row in rows if row["method"] == name}
        offset = (place - (len(names) - 1) / 2) * width
        axis.bar(
            np.arange(len(counts)) + offset,
            [sent[number] for number in counts],
            0.9 * width,
            color=colours[name],
        )
    axis.set_xticks(range(len(counts)), [str(number) for number in counts])
    axis.grid(axis="x", visible=False)
    axis.set_xlabel("devices")
    axis.set_ylabel("sent by a device (KiB a step)")
