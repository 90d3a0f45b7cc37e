"""Measures how sharp the minima are that the methods of `benchmarks.cifar` found.

    python -m benchmarks.cifar
    python -m benchmarks.sharpness runs/digits-cnn

Each RUN is a results' folder of `benchmarks.cifar`, with the trained models that it keeps. What is
measured goes to RUN/sharpness: one JSON record a model, a CSV, a table and figures. It is written
model by model: repeat the command to continue.
"""

import dataclasses

from benchmarks import data
from benchmarks.core import command
from benchmarks.core.command import Command, Paths
from benchmarks.core.runs import complete_all
from benchmarks.sharpness import report
from benchmarks.sharpness.experiment import Measurement
from benchmarks.sharpness.measures import Budget


@dataclasses.dataclass(frozen=True)
class Configuration(Command):
    """What is measured, and how much is spent on a model."""

    runs: Paths  # Results' folders of benchmarks.cifar.
    data: str = "digits"  # The data set that they were trained on.
    examples: int = 1024  # Training images to measure on.
    products: int = 20  # Lanczos steps.
    samples: int = 12  # Random vectors.

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        self.at_least(1, "examples")
        self.at_least(5, "products")
        self.at_least(2, "samples")


@command.main(Configuration, "benchmarks.sharpness", saved="The last whole model")
def main(arguments: Configuration) -> None:
    """Measures every model of every folder, writes the reports and prints their tables."""
    budget = Budget(arguments.examples, arguments.products, arguments.samples)
    dataset = data.load(arguments.data)
    found = [Measurement(folder, dataset, budget) for folder in arguments.runs]
    complete_all(((each, path) for each in found for path in each.models), unit="measure")
    for each in found:
        print(report.write(each.folder))
        print(f"Results and figures: {each.folder}")
