"""Where does the budget of gradients belong? Ways to spend SAM's second one, at equal cost.

    python -m benchmarks.budget --data path/to/cifar10 --task clean
    python -m benchmarks.budget --data path/to/cifar10 --task human --methods base,sam,late_25
    python -m benchmarks.budget --task airports
    python -m benchmarks.budget --data path/to/cifar10 --task human --model resnet18
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
from typing import Any, Literal

from benchmarks.budget import report
from benchmarks.budget.experiment import BudgetedImages, BudgetedSeries, Training
from benchmarks.budget.methods import table
from benchmarks.budget.tasks import HORIZON, STRIDE, TASKS, split
from benchmarks.core import command, tuning
from benchmarks.core.command import Command, Names
from benchmarks.core.methods import MethodSpec, Table, parse_methods
from benchmarks.core.records import Record
from benchmarks.core.runs import complete_all
from benchmarks.data import load
from benchmarks.data.series import load as load_series

Budgeted = BudgetedImages | BudgetedSeries


@dataclasses.dataclass(frozen=True)
class Configuration(Command):
    """The task, its size and the methods."""

    task: Literal["clean", "symmetric", "human", "human_few", "vit", "airports", "ETTh2"] = "clean"
    # An image data set's name or the path of its files; of ETTh2 the folder of its CSV file.
    data: str = "digits"
    methods: Names = ()  # By default all.
    # Gradient evaluations of each training image or window; by default 30 or 20.
    budget: int | None = None
    seeds: int = 5  # Runs of each method.
    trials: int = 6  # Settings that the search tries for each method.
    train_images: int = 5000
    validation_images: int = 2000
    test_images: int = 2000
    model: str | None = None  # The classifier's name; by default the task's.
    width: float = 1.0  # Multiplies the classifier's channels.
    shift: int = 1  # Training images are shifted at random by up to so many pixels.
    batch_size: int | None = None  # By default 128 images or 32 windows.
    out: Path | None = None  # The results' folder; by default runs/budget-TASK.

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        self.at_least(0, "shift")
        self.at_least(1, "budget", "seeds", "trials", "batch_size")
        self.at_least(1, "train_images", "validation_images", "test_images")
        if self.model is not None and TASKS[self.task].series is not None:
            raise ValueError(
                f"--model {self.model!r} classifies images, and --task {self.task} forecasts with "
                "a network of its own: leave --model out."
            )


def _comparisons(arguments: Configuration, folder: Path) -> tuple[Budgeted, Budgeted]:
    """Returns the comparison and its search, whose programs are the same."""
    task = TASKS[arguments.task]
    budget = task.budget if arguments.budget is None else arguments.budget
    told: dict[str, Any] = {"task": arguments.task, "budget": budget}
    if task.series is not None:
        series = load_series(task.series, Path(arguments.data))
        told |= {"look_back": task.look_back, "horizon": HORIZON, "stride": STRIDE}
        told |= {"batch_size": arguments.batch_size or 32, "revin": True}
        return (
            BudgetedSeries(series, told, folder, tuning=False),
            BudgetedSeries(series, told, folder / "tuning", tuning=True),
        )
    sizes = arguments.train_images, arguments.validation_images, arguments.test_images
    dataset, searched = split(load(arguments.data), task, *sizes)
    model = arguments.model or task.model
    told |= {"width": arguments.width, "shift": arguments.shift, "model": model}
    training = Training(batch_size=arguments.batch_size or 128, **told)
    return (
        BudgetedImages(training, dataset, folder),
        BudgetedImages(training, searched, folder / "tuning"),
    )


def _tuned(spec: MethodSpec, search: Budgeted, trials: int, rows: Table) -> MethodSpec:
    """The method with the settings of the lowest validation error."""

    def error(record: Record) -> float:
        final = record["final"]
        return final["validation_mse"] if "validation_mse" in final else 1 - final[report.TOP1]

    start = {name: spec.hyperparameters[name] for name in spec.method.search}
    found = tuning.tune(spec.name, search, trials, rows, error=error, starts=(start,))
    # Under the method's own name: what was found is a setting, and no other method.
    return dataclasses.replace(spec, hyperparameters=found.hyperparameters)


@command.main(Configuration, "benchmarks.budget")
def main(arguments: Configuration) -> None:
    """Searches, runs every method with every seed, writes the report and prints its table."""
    rows = table(arguments.task)
    specs = parse_methods(arguments.methods or tuple(rows), rows)
    folder = arguments.out or Path("runs") / f"budget-{arguments.task}"
    comparison, search = _comparisons(arguments, folder)
    search.trainers = comparison.trainers
    for spec in specs:  # before anything is trained: can each be built?
        comparison.optimizer(spec)
    found = [_tuned(spec, search, arguments.trials, rows) for spec in specs]
    # Seeds outside: a stop leaves whole comparisons.
    complete_all((comparison, (spec, seed)) for seed in range(arguments.seeds) for spec in found)
    print(report.write(folder))
    print(f"Results: {folder}")
