"""The theory in pictures: what normalization does, what SAM does to norms, what sharpness is.

    python -m benchmarks.theory
    python -m benchmarks.theory neuron sensing --quick --out runs/theory-quick

Measures the claims of the papers beside their predictions, in float64, and draws a figure a topic.
Writes a JSON record and a PNG file a topic, claims.csv and summary.md to `--out`. Where a law or a
method breaks down it is shown breaking down, as a claim of its own. A topic that is finished is not
measured again: after an interruption repeat the command. Minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from benchmarks.cifar.__main__ import run_command
from benchmarks.core import records
from benchmarks.theory import drawing, report
from benchmarks.theory.claims import (
    balancedness,
    deviation,
    factorization,
    neuron,
    sensing,
    thresholds,
    universal,
    universal_figure,
)
from benchmarks.theory.common import Findings

_STDERR = Console(stderr=True)


class Topic(NamedTuple):
    """What is measured together and drawn in one figure.

    Attributes:
        title: For people.
        measure: From whether shortened runs will do to what was found.
        draw: From the series that were found to the figure.
    """

    title: str
    measure: Callable[[bool], Findings]
    draw: Callable[[dict[str, Any]], Figure]


TOPICS = {
    "thresholds": Topic("Quadratics: thresholds", thresholds.measure, thresholds.draw),
    "factorization": Topic("Scalar factorization", factorization.measure, factorization.draw),
    "neuron": Topic("A single neuron", neuron.measure, neuron.draw),
    "sensing": Topic("Matrix sensing", sensing.measure, sensing.draw),
    "balancedness": Topic("Two cores: balancedness", balancedness.measure, balancedness.draw),
    "deviation": Topic("Three cores: norm deviation", deviation.measure, deviation.draw),
    "universal": Topic("Universal sharpness", universal.measure, universal_figure.draw),
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.theory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "topics",
        nargs="*",
        choices=[*TOPICS, "all"],
        default="all",
        metavar="topic",
        help=f"of {', '.join(TOPICS)}, or all, which is the default",
    )
    add("--quick", action="store_true", help="shortened runs, fewer points")
    add(
        "--out",
        type=Path,
        default=Path("runs/theory"),
        help="the results' folder; default: %(default)s",
    )
    arguments = parser.parse_args(argv)
    chosen = TOPICS if "all" in arguments.topics else arguments.topics
    arguments.topics = [name for name in TOPICS if name in chosen]
    return arguments


def run(name: str, folder: Path, quick: bool) -> records.Record:
    """Measures a topic unless its record is there, draws its figure and returns the record.

    Raises:
        ValueError: The record that is there has other settings.
    """
    path, topic = folder / f"{name}.json", TOPICS[name]
    config = {"topic": name, "quick": quick}
    record = records.read_finished(path, config)
    if record is None:
        start = time.process_time()
        found = topic.measure(quick)
        record = {
            "format": records.FORMAT,
            "config": config,
            "title": topic.title,
            "cpu_seconds": round(time.process_time() - start, 1),
            "hardware": records.hardware(),
            "versions": records.versions(),
            "claims": [claim._asdict() for claim in found.claims],
            "series": found.series,
        }
        records.write_record(path, record)
        record = records.read_record(path)  # figures are drawn from what is stored
    drawing.write(topic.draw, record["series"], folder / f"{name}.png")
    return record


def command(argv: Sequence[str] | None = None) -> None:
    """Measures the topics and writes the report of all that are in the folder."""
    arguments = parse_arguments(argv)
    for name in track(arguments.topics, "topics", console=_STDERR):
        record = run(name, arguments.out, arguments.quick)
        held = sum(claim["holds"] for claim in record["claims"])
        _STDERR.print(
            f"{name}: {held} of {len(record['claims'])} claims hold, "
            f"{record['cpu_seconds']:.0f} s of CPU time",
            highlight=False,
        )
        text = report.write(arguments.out, list(TOPICS))
    print(text)
    print(f"Results and figures: {arguments.out}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command("benchmarks.theory", lambda: command(argv), argv, "Every finished topic")


if __name__ == "__main__":
    sys.exit(main())
