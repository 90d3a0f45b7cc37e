"""What SGD, SAM, nBAR, oBAR and DAS do to the norms of two or three cores, on toys.

    python -m benchmarks.balance_toys
    python -m benchmarks.balance_toys --toys nop --steps 10000 --seeds 2 --out runs/balance_toys

The balancedness `B` over time on the two toys of Li, Zhang and He 2024 (arXiv 2410.14802), and the
norm deviation `Q` on a Tucker-2 toy like that of Cao, Atarashi and Kashima 2025 (arXiv 2508.10435),
at several noise levels. Writes results.json, results.csv, curves.csv, summary.md and a figure a toy
to `--out`. A minute or two on one core.
"""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

import tqdm

from benchmarks.balance_toys import figures, report
from benchmarks.balance_toys.experiment import EVERY, curves, make_record
from benchmarks.core import command, frames, records
from benchmarks.core.command import Command
from benchmarks.models.toys import Toy, toys, trajectories

Name = Literal["nop", "op", "tucker_large_core", "tucker_small_core"]


@dataclasses.dataclass(frozen=True)
class Configuration(Command):
    """Which toys, and how long."""

    toys: tuple[Name, ...] = get_args(Name)  # Which toys.
    steps: int | None = None  # A multiple of 100; by default each toy's own.
    seeds: int = 8  # Runs at each noise level.
    out: Path = Path("benchmarks/results/balance_toys")  # The results' folder.

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        self.at_least(1, "seeds", "steps")
        if self.steps is not None and self.steps % EVERY:
            raise ValueError(f"--steps must be a multiple of {EVERY}, got {self.steps}.")


@command.main(Configuration, "benchmarks.balance_toys", saved="Nothing")
def main(arguments: Configuration) -> None:
    """Runs all methods of the toys, writes what was found and prints the tables."""
    chosen: dict[str, Toy] = {
        name: toy._replace(steps=arguments.steps or toy.steps)
        for name, toy in toys().items()
        if name in arguments.toys
    }
    results = {
        name: {
            method: trajectories(toy, method, arguments.seeds, EVERY)
            for method in tqdm.tqdm(toy.methods, name)
        }
        for name, toy in chosen.items()
    }
    folder = arguments.out
    records.write_record(folder / "results.json", make_record(chosen, results, arguments.seeds))
    frames.write(folder, {"curves.csv": frames.csv(curves(chosen, results))})
    print(report.write(folder))
    figures.write(folder, chosen, results, EVERY)
    print(f"Results and figures: {folder}")
