"""The theory in pictures: what normalization does, what SAM does to norms, what sharpness is.

    python -m benchmarks.theory
    python -m benchmarks.theory neuron sensing --quick --out runs/theory-quick

Measures the claims of the papers beside their predictions, in float64, and draws a figure a topic.
Writes a JSON record and a PNG file a topic, claims.csv and summary.md to `--out`. Where a law or a
method breaks down it is shown breaking down, as a claim of its own. A topic that is finished is not
measured again: after an interruption repeat the command. Minutes on two cores.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.core import command
from benchmarks.core.command import Command
from benchmarks.core.runs import complete_all
from benchmarks.theory import report
from benchmarks.theory.experiment import TOPICS, Theory

Topics = tyro.conf.Positional[tuple[Literal[*TOPICS, "all"], ...]]  # type: ignore[valid-type]


@dataclasses.dataclass(frozen=True)
class Configuration(Command):
    """Which topics, and how long."""

    topics: Topics = ("all",)  # What is measured.
    quick: bool = False  # Shortened runs, fewer points.
    out: Path = Path("runs/theory")


@command.main(Configuration, "benchmarks.theory", saved="Every finished topic")
def main(arguments: Configuration) -> None:
    """Measures the topics, writes the report of all that are in the folder and prints it."""
    every = "all" in arguments.topics
    topics = [name for name in TOPICS if every or name in arguments.topics]
    theory = Theory(arguments.quick, arguments.out)
    try:
        complete_all(((theory, name) for name in topics), unit="topic")
    finally:  # also of what was finished before a stop
        text = report.write(arguments.out)
    print(text)
    print(f"Results and figures: {arguments.out}")
