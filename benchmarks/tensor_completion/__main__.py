"""Tensor completion on real data: Adam, SAM, DAS and oBAR on a Tucker model of serology.

    python -m benchmarks.tensor_completion
    python -m benchmarks.tensor_completion --steps 5000 --splits 1 --out runs/completion

The setting of Cao, Atarashi and Kashima (2025, arXiv 2508.10435): the COVID-19 serology tensor of
TensorLy (438 samples x 6 antigens x 11 receptors), a Tucker model of rank (8, 6, 8) that starts
from TensorLy's random cores, 30 % of the entries observed, the sum of squared errors on them, Adam
at 1e-3 for 50,000 steps, in float64. HOOI is TensorLy's alternating solver for the same model.

Every run leaves a record under `--out`; repeating the command continues after the last one. The
table, the CSV and the figures are made from the records.
"""

import dataclasses
from pathlib import Path

from benchmarks.core import command, records
from benchmarks.core.command import Command
from benchmarks.core.precision import float64
from benchmarks.core.runs import complete_all
from benchmarks.tensor_completion import experiment, report


@dataclasses.dataclass(frozen=True)
class Configuration(Command):
    """How long, and how often."""

    steps: int = 50_000  # A multiple of 100.
    splits: int = 3  # Splits of the entries.
    rounds: int = 60  # Timed rounds.
    out: Path = Path("benchmarks/results/tensor_completion")  # The results' folder.

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        self.at_least(1, "steps", "splits", "rounds")
        if self.steps % experiment.RECORDS:
            raise ValueError(
                f"--steps must be a multiple of {experiment.RECORDS}, got {self.steps}."
            )


@command.main(Configuration, "benchmarks.tensor_completion", saved="Every finished run")
def main(arguments: Configuration) -> None:
    """Makes the records that are missing, writes the report and prints its table."""
    with float64():  # as the authors' code
        names = ["hooi", *experiment.methods(arguments.steps)]
        completion = experiment.Completion(arguments.steps, arguments.out)
        splits = range(arguments.splits)
        complete_all(((completion, (name, split)) for split in splits for name in names), "run")
        path = arguments.out / "overhead.json"
        if not path.exists():
            times = experiment.overhead(min(1_000, arguments.steps), arguments.rounds)
            records.write_record(path, times)
    print(report.write(arguments.out))
    print(f"Results and figures: {arguments.out}")
