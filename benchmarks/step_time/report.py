"""The tables, targets and figure of `benchmarks.step_time`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.core import records
from benchmarks.core.timing import Compiled, spread

_MIB = 2**20
_REFERENCES = ("base", "limit", "optax_opaque", "optax_transparent")

_NOTES = """\
Ratio: the method's time over the base optimizer's in the same round; median with its quartiles.
Lower: tracing and lowering in Python. Compile: XLA. Temp, args: the compiled program's peak
temporary and its argument memory. A target about time compares two methods round by round, in
brackets the 95 % confidence interval of the median; *within noise* means that the median misses the
bound and the interval does not.
"""


class Target(NamedTuple):
    """A claim about one problem, the figure found, and whether it holds."""

    problem: str
    claim: str
    found: str
    verdict: str


def method_record(
    seconds: Mapping[str, np.ndarray], name: str, program: Compiled | None
) -> dict[str, Any]:
    """Returns one method's results as JSON types.

    Args:
        seconds: Times by method, one a round.
        name: The method.
        program: What was compiled; None if nothing was.
    """
    return {
        "seconds": float(np.median(seconds[name])),
        # Over every method that targets compare with, not the base alone: a quotient of two
        # medians would bring the noise back that the rounds are there to cancel.
        "ratio": {
            other: spread(seconds[name] / seconds[other])._asdict()
            for other in _REFERENCES
            if other in seconds
        },
        "lower_seconds": program and program.lower_seconds,
        "compile_seconds": program and program.compile_seconds,
        "argument_bytes": program and program.argument_bytes,
        "temp_bytes": program and program.temp_bytes,
    }


def targets(results: Mapping[str, Any]) -> list[Target]:
    """Returns the targets that the measured problems and methods have something to say about."""
    found = []
    for name, problem in results.items():
        if name.startswith("pytree"):
            claims = [("sam", "base", 3.0, "overhead of sam under 3x AdamW's update")]
        else:
            claims = [
                ("sam", "limit", 1.02, "sam within 2 % of the hand-written step"),
                ("sam", "optax_opaque", 1.0, "sam not slower than optax.contrib.sam, opaque"),
                (
                    "sam",
                    "optax_transparent",
                    1.0,
                    "sam not slower than optax.contrib.sam, two calls",
                ),
                (
                    "sam_quarter",
                    "base",
                    1.3,
                    "clean gradient on a quarter of the batch: at most 1.3x",
                ),
                ("das", "base", 1.05, "das at most 1.05x the base optimizer"),
            ]
        methods = problem["methods"]
        for method, other, bound, claim in claims:
            if method in methods and other in methods:
                ratio = methods[method]["ratio"][other]
                figures = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
                found.append(Target(name, claim, figures, _verdict(ratio, bound)))
        if "sam" in methods and "limit" in methods and methods["sam"]["temp_bytes"] is not None:
            more = methods["sam"]["temp_bytes"] - methods["limit"]["temp_bytes"]
            copies = more / problem["parameter_bytes"]
            claim = (
                "temporary memory of sam at most one parameter copy above the hand-written step's"
            )
            verdict = "met" if copies <= 1 else "not met"
            found.append(Target(name, claim, f"{copies:+.3f} copies", verdict))
    return found


def _verdict(ratio: Mapping[str, float], bound: float) -> str:
    if ratio["median"] <= bound:
        return "met"
    return "within noise" if ratio["low"] <= bound else "not met"


def write(folder: Path, settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Writes `results.json`, `results.csv`, `summary.md` and `step_time.png`.

    Returns:
        The text of `summary.md`.
    """
    found = targets(results)
    hardware, versions = records.hardware(), records.versions()
    text = to_markdown(hardware, versions, results, found)
    record = {
        "format": 1,
        "settings": settings,
        "hardware": hardware,
        "versions": versions,
        "targets": [target._asdict() for target in found],
        "problems": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    records.write_record(folder / "results.json", record)
    records.write_text(folder / "results.csv", to_csv(results))
    records.write_text(folder / "summary.md", text)
    _figure(results, hardware).savefig(folder / "step_time.png", dpi=130, facecolor="white")
    return text


def to_markdown(
    hardware: Mapping[str, Any],
    versions: Mapping[str, str],
    results: Mapping[str, Any],
    found: list[Target],
) -> str:
    """Returns a table a problem and one of the targets."""
    software = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax"))
    lines = [f"Step time on {hardware['device']} (x{hardware['count']}), {software}.", "", _NOTES]
    for name, problem in results.items():
        lines += [f"### {name}: {problem['title']}; {problem['rounds']} rounds", ""]
        lines += _table(
            "method|ratio|quartiles|ms|lower s|compile s|temp MiB|args MiB",
            [_cells(method, row) for method, row in problem["methods"].items()],
        )
    if found:
        lines += ["### Targets", "", *_table("problem|target|measured|", found)]
    return "\n".join(lines)


def _cells(method: str, row: Mapping[str, Any]) -> list[str]:
    ratio = row["ratio"]["base"]
    return [
        method,
        f"{ratio['median']:.2f}",
        f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}",
        f"{1e3 * row['seconds']:.4g}",
        _number(row["lower_seconds"]),
        _number(row["compile_seconds"]),
        _number(row["temp_bytes"], _MIB),
        _number(row["argument_bytes"], _MIB),
    ]


def _number(value: float | None, unit: float = 1) -> str:
    return "" if value is None else f"{value / unit:.2f}"


def _table(header: str, rows: list[Any]) -> list[str]:
    names = header.split("|")
    lines = ["| " + " | ".join(cells) + " |" for cells in (names, ["---"] * len(names), *rows)]
    return [*lines, ""]


def to_csv(results: Mapping[str, Any]) -> str:
    """Returns one line a problem and method."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    measured = ("seconds", "lower_seconds", "compile_seconds", "argument_bytes", "temp_bytes")
    ratios = ("median", "lower_quartile", "upper_quartile", "low", "high")
    writer.writerow(
        ["problem", "method", "rounds", *(f"ratio_{part}" for part in ratios), *measured]
    )
    for name, problem in results.items():
        for method, row in problem["methods"].items():
            ratio = [f"{row['ratio']['base'][part]:.5f}" for part in ratios]
            writer.writerow(
                [name, method, problem["rounds"], *ratio, *(row[part] for part in measured)]
            )
    return stream.getvalue()


def _figure(results: Mapping[str, Any], hardware: Mapping[str, Any]) -> Figure:
    """A panel of bars for each problem: the median ratio with its quartiles."""
    style: dict[Any, Any] = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}
    columns = min(2, len(results))
    rows = math.ceil(len(results) / columns)
    with mpl.rc_context(style):
        figure = Figure(figsize=(7 * columns, 0.5 + 3.8 * rows), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, (name, problem) in zip(panels, results.items(), strict=False):
            _bars(axis, name, problem)
        for axis in panels[len(results) :]:
            axis.set_visible(False)
        figure.suptitle(
            f"{hardware['device']} (x{hardware['count']}): median and quartiles over rounds",
            fontsize=10,
        )
    return figure


def _bars(axis: Axes, name: str, problem: Mapping[str, Any]) -> None:
    methods = problem["methods"]
    ratios = [row["ratio"]["base"] for row in methods.values()]
    medians = np.array([ratio["median"] for ratio in ratios])
    below = medians - [ratio["lower_quartile"] for ratio in ratios]
    above = np.array([ratio["upper_quartile"] for ratio in ratios]) - medians
    colours = [_colour(method) for method in methods]
    positions = range(len(methods))
    axis.barh(positions, medians, color=colours, height=0.7)
    axis.errorbar(medians, positions, xerr=[below, above], fmt="none", ecolor="0.2", capsize=3)
    end = float((medians + above).max())
    for position, median, margin in zip(positions, medians, above, strict=True):
        axis.text(median + margin + 0.015 * end, position, f"{median:.2f}", va="center")
    for reference in {"base", "limit"} & methods.keys():
        axis.axvline(
            methods[reference]["ratio"]["base"]["median"], color="0.4", lw=1, ls=":", zorder=0
        )
    axis.set_xlim(0, 1.12 * end)
    axis.set_yticks(positions, list(methods))
    axis.invert_yaxis()
    axis.set_xlabel("time over the base optimizer's")
    axis.set_title(f"{name}: {problem['title']}", fontsize=9, loc="left")


def _colour(method: str) -> str:
    """Okabe and Ito's blue for samax, their orange for Optax, grey for the two bounds."""
    if method in ("base", "limit"):
        return "0.6"
    return "#E69F00" if method.startswith("optax") else "#0072B2"
