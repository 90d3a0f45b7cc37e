"""Measures how sharp the minima are that the methods of `benchmarks.cifar` found.

    python -m benchmarks.cifar
    python -m benchmarks.sharpness runs/digits-cnn

Each RUN is a results' folder of `benchmarks.cifar`, with the trained models that it keeps. What is
measured goes to RUN/sharpness: one JSON record a model, a CSV, a table and figures. It is written
model by model: repeat the command to continue.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import data
from benchmarks.cifar.__main__ import SUBSET_SEED, run_command
from benchmarks.core import records
from benchmarks.core.checkpoints import restore_model
from benchmarks.core.classification.experiment import (
    Settings,
    build_model,
    crc32,
    make_recipe,
    model_folder,
)
from benchmarks.core.progress import Progress, show_progress
from benchmarks.core.training import split
from benchmarks.sharpness import report as sharpness_report
from benchmarks.sharpness.measures import Budget, Model, loss_function, measure

_KEY_SEED = 0  # one for all models, which are so compared on the same random vectors


class Run(NamedTuple):
    """A trained model's record, with where it lies and where its measures go."""

    path: Path
    record: records.Record
    target: Path


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharpness",
        description=__doc__.split("\n\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a results' folder of benchmarks.cifar")
    add("--data", default="digits", help="the data set that they were trained on")
    add("--examples", type=int, default=1024, help="training images to measure on")
    add("--products", type=int, default=20, help="Lanczos steps")
    add("--samples", type=int, default=12, help="random vectors")
    arguments = parser.parse_args(argv)
    for name, low in (("examples", 1), ("products", 5), ("samples", 2)):
        if getattr(arguments, name) < low:
            raise ValueError(f"--{name} must be {low} or more, got {getattr(arguments, name)}.")
    return arguments


def measure_all(arguments: argparse.Namespace) -> None:
    """Measures every model of every folder, writes the reports and prints their tables."""
    budget = Budget(arguments.examples, arguments.products, arguments.samples)
    dataset = data.load(arguments.data)
    found = {folder: _find(folder) for folder in arguments.runs}
    subsets = {
        folder: _subset(dataset, runs[0].record["config"], folder) for folder, runs in found.items()
    }
    work = sum(map(len, found.values())) * sum(budget.gradients().values())
    with show_progress(work, unit="measure") as progress:
        for folder, runs in found.items():
            for run in runs:
                _measure_run(run, subsets[folder], budget, progress)
    for folder in found:
        print(sharpness_report.write(folder / "sharpness"))
        print(f"Results and figures: {folder / 'sharpness'}")


def _find(folder: Path) -> list[Run]:
    records.read_comparison(folder)  # all of one comparison, and at least one
    return [
        Run(path, record, folder / "sharpness" / "runs" / path.name)
        for path, record in records.read_records(folder).items()
    ]


def _subset(dataset: data.Dataset, config: dict[str, Any], folder: Path) -> data.Dataset:
    """The images that the runs of a folder were trained on."""
    subset = data.take(dataset, config["train_images"], config["test_images"], seed=SUBSET_SEED)
    if crc32(subset) != config["data_crc32"]:
        raise ValueError(
            f"{folder} was trained on other images ({config['dataset']}) than --data holds "
            f"({dataset.name}): pass the --data that its command had."
        )
    return subset


def _measure_run(run: Run, dataset: data.Dataset, budget: Budget, progress: Progress) -> None:
    config = {**run.record["config"], **budget._asdict(), "key_seed": _KEY_SEED}
    costs = budget.gradients()
    if records.read_finished(run.target, config) is not None:
        progress.skip(sum(costs.values()))
        return
    model = _load(run, dataset, budget.examples)
    progress.start(f"{config['method']} seed {config['seed']}", len(costs), 0.0)
    key = jax.random.key(_KEY_SEED)
    found = measure(model, budget, key, lambda name: progress.part(name, costs[name]))
    record = {
        "format": records.FORMAT,
        "config": config,
        "versions": records.versions("matfree"),
        "hardware": records.hardware(),
        "parameters": run.record["parameters"],
        "examples": sum(len(labels) for _, labels in model.batches),
        "gradients": costs,
        "final": run.record["final"],
        "measures": found,
    }
    records.write_record(run.target, record)


def _load(run: Run, dataset: data.Dataset, examples: int) -> Model:
    """The trained model, and examples in whole batches with the labels that it was trained with."""
    config = run.record["config"]
    settings = Settings(**{name: config[name] for name in Settings._fields})
    module = build_model(settings, dataset, config["seed"])
    params, model_state = restore_model(model_folder(run.path), split(module))
    module.eval()
    labels = data.corrupt_labels(
        dataset.train_labels, config["label_noise"], config["num_classes"], config["seed"]
    )
    order = np.random.default_rng(0).permutation(len(labels))[:examples]
    size = min(settings.batch_size, len(order))
    starts = range(0, len(order) - size + 1, size)
    chosen = [order[start : start + size] for start in starts]
    batches = [(jnp.asarray(dataset.train_images[i]), jnp.asarray(labels[i])) for i in chosen]
    loss_fn = loss_function(nnx.graphdef(module), model_state, make_recipe(settings, dataset))
    return Model(loss_fn, params, batches)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(
        "benchmarks.sharpness",
        lambda: measure_all(parse_arguments(argv)),
        argv,
        saved="The last whole model",
    )


if __name__ == "__main__":
    sys.exit(main())
