"""Where does the budget of gradients belong? Ways to spend SAM's second one, at equal cost.

    python -m benchmarks.budget --data path/to/cifar10 --task clean
    python -m benchmarks.budget --data path/to/cifar10 --task human --methods base,sam,late_25
    python -m benchmarks.budget.map runs/budget-*

Every method gets the same number of gradient evaluations, which its share of ascents makes more
epochs or fewer, and the same number of trials for learning rate, weight decay and rho on a
validation part with labels as wrong as those it trains with. The results go to `--out`: one JSON
record per run, a table and what the search found. A run that was interrupted continues when the
command is repeated; a finished one is not repeated.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from benchmarks.budget import report
from benchmarks.budget.experiment import Budgeted, Training
from benchmarks.budget.methods import table
from benchmarks.budget.tasks import TASKS, split
from benchmarks.core import command, tuning
from benchmarks.core.command import Command, Names
from benchmarks.core.methods import MethodSpec, Table, parse_methods
from benchmarks.core.records import Record
from benchmarks.core.runs import complete_all
from benchmarks.data import load


@dataclasses.dataclass(frozen=True)
class Configuration(Command):
    """The task, its size and the methods."""

    task: Literal["clean", "symmetric", "human", "human_few", "vit"] = "clean"
    data: str = "digits"  # A data set's name or the path of its files.
    methods: Names = ()  # By default all.
    budget: int = 30  # Gradient evaluations of each training image.
    seeds: int = 5  # Runs of each method.
    trials: int = 6  # Settings that the search tries for each method.
    train_images: int = 5000
    validation_images: int = 2000
    test_images: int = 2000
    width: float = 1.0  # Multiplies the model's channels.
    shift: int = 1  # Training images are shifted at random by up to so many pixels.
    batch_size: int = 128
    out: Path | None = None  # The results' folder; by default runs/budget-TASK.

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        self.at_least(0, "shift")
        self.at_least(1, "budget", "seeds", "trials", "batch_size")
        self.at_least(1, "train_images", "validation_images", "test_images")


_TOLD = "task", "budget", "width", "shift", "batch_size"


def _tuned(spec: MethodSpec, search: Budgeted, trials: int, rows: Table) -> MethodSpec:
    """The method with the settings of the lowest validation error, over the last epochs."""

    def error(record: Record) -> float:
        return 1 - record["final"]["last10_test_top1"]

    start = {name: spec.hyperparameters[name] for name in spec.method.search}
    found = tuning.tune(spec.name, search, trials, rows, error=error, start=start)
    # Under the method's own name: what was found is a setting, and no other method.
    return dataclasses.replace(spec, hyperparameters=found.hyperparameters)


@command.main(Configuration, "benchmarks.budget")
def main(arguments: Configuration) -> None:
    """Searches, runs every method with every seed, writes the report and prints its table."""
    task = TASKS[arguments.task]
    rows = table(task.optimizer)
    specs = parse_methods(arguments.methods or tuple(rows), rows)
    sizes = arguments.train_images, arguments.validation_images, arguments.test_images
    dataset, searched = split(load(arguments.data), task, *sizes)
    training = Training(
        **{name: getattr(arguments, name) for name in _TOLD},
        model=task.model,
    )
    folder = arguments.out or Path("runs") / f"budget-{arguments.task}"
    comparison = Budgeted(training, dataset, folder)
    search = Budgeted(training, searched, folder / "tuning")
    search.trainers = comparison.trainers  # the train images, and so the programs, are the same
    comparison.check([(spec, 0) for spec in specs])
    found = [_tuned(spec, search, arguments.trials, rows) for spec in specs]
    # Seeds outside: a stop leaves whole comparisons.
    complete_all((comparison, (spec, seed)) for seed in range(arguments.seeds) for spec in found)
    print(report.write(folder))
    print(f"Results: {folder}")
