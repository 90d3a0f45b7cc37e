"""Trains an image classifier with several optimizers and shows which one generalizes better.

    python -m benchmarks.cifar
    python -m benchmarks.cifar --data path/to/cifar10 --model resnet18 --methods sgd,sgd@2,sam,samar
    python -m benchmarks.cifar --distributed --model resnet18  # in every process of a cluster

The results go to `--out`: one JSON record a run, a CSV, a table and figures. A run that was
interrupted continues when the command is repeated; a finished one is not repeated.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import data
from benchmarks.core import distributed
from benchmarks.core.classification import report
from benchmarks.core.classification.experiment import Comparison, Settings
from benchmarks.core.methods import METHODS, MethodSpec, parse_methods
from benchmarks.core.progress import show_progress
from benchmarks.models import MODELS

SUBSET_SEED = 0  # one subset for all runs: seeds vary the training, not the task


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser("benchmarks.cifar", __doc__)
    parser.add_argument(
        "--label-noise", type=float, default=0.0, help="the share of training labels made wrong"
    )
    distributed.add_arguments(parser)
    arguments = parser.parse_args(argv)
    check_arguments(arguments)
    distributed.check_arguments(arguments)
    return arguments


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser of what all comparisons of classifiers are told, label noise apart."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description.split("\n\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="digits", help="a data set's name or the path of its files")
    add("--train-images", type=int, help="a class-balanced subset of the training images")
    add("--test-images", type=int, help="a class-balanced subset of the test images")
    add("--fraction", type=float, default=1.0, help="the share of training images to keep")
    add("--model", default="cnn", choices=MODELS)
    add("--width", type=float, default=1.0, help="multiplies the model's channels")
    add("--bfloat16", action="store_true", help="compute in bfloat16 with float32 parameters")
    add(
        "--methods",
        default="sgd,sam,samar",
        help="names, with settings after colons (sam:rho=0.1) and a multiple of the epochs after "
        f"an @ (sgd@2), separated by commas; of {', '.join(METHODS)}",
    )
    add("--seeds", type=int, default=3, help="runs of each method")
    add("--seed-start", type=int, default=0, help="the first seed")
    add("--epochs", type=int, default=25)
    add("--batch-size", type=int, default=256, help="no more than there are training images")
    add("--lr", type=float, default=0.1, help="the learning rate at the start of its cosine")
    add("--weight-decay", type=float, default=5e-4)
    add("--label-smoothing", type=float, default=0.0)
    add("--out", type=Path, help="the results' folder; by default runs/DATA-MODEL")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises a `ValueError` that names an argument which is out of its range."""
    for name in ("seeds", "epochs", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be 1 or more, got {getattr(arguments, name)}."
            )
    for name, low, high in (
        ("lr", 0, float("inf")),
        ("weight_decay", 0, float("inf")),
        ("label_smoothing", 0, 1),
    ):
        value = getattr(arguments, name)
        if not low <= value < high:
            raise ValueError(f"--{name.replace('_', '-')} must be in [{low}, {high}), got {value}.")


def load(arguments: argparse.Namespace) -> data.Dataset:
    """Returns the data set that the arguments ask for, cut to size."""
    dataset = data.load(arguments.data)
    dataset = data.take_fraction(dataset, arguments.fraction, seed=SUBSET_SEED)
    return data.take(dataset, arguments.train_images, arguments.test_images, seed=SUBSET_SEED)


def settings(arguments: argparse.Namespace, dataset: data.Dataset) -> Settings:
    """Returns what all runs have in common."""
    return Settings(
        model=arguments.model,
        width=arguments.width,
        epochs=arguments.epochs,
        batch_size=min(arguments.batch_size, len(dataset.train_labels)),
        lr=arguments.lr,
        weight_decay=arguments.weight_decay,
        label_smoothing=arguments.label_smoothing,
        label_noise=arguments.label_noise,
        flip=dataset.name != "digits",  # a mirrored digit is none
        bfloat16=arguments.bfloat16,
    )


def compare(
    arguments: argparse.Namespace, specs: list[MethodSpec], cluster: distributed.Cluster | None
) -> None:
    """Runs every method with every seed, writes the report and prints its tables."""
    dataset = load(arguments)
    folder = arguments.out or Path("runs") / f"{dataset.name}-{arguments.model}"
    comparison = Comparison(dataset, settings(arguments, dataset), folder, cluster)
    run_all([comparison], arguments, specs)
    if cluster is None or cluster.writes:
        print(report.write(folder))
        print(f"Results and figures: {folder}")


def run_all(
    comparisons: Sequence[Comparison], arguments: argparse.Namespace, specs: list[MethodSpec]
) -> None:
    """Runs every method with every seed in every comparison."""
    for spec in specs:  # before hours of training: can each be built for this model?
        comparisons[0].optimizer(spec)
    seeds = range(arguments.seed_start, arguments.seed_start + arguments.seeds)
    work = sum(spec.gradients * spec.epoch_factor for spec in specs)
    with show_progress(work * arguments.epochs * len(seeds) * len(comparisons)) as progress:
        for seed in seeds:  # seeds outside: a stop leaves whole comparisons
            for comparison in comparisons:
                for spec in specs:
                    comparison.run(spec, seed, progress)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> None:
        arguments = parse_arguments(argv)
        specs = parse_methods(arguments.methods)
        with distributed.session(arguments) as cluster:
            compare(arguments, specs, cluster)

    return distributed.leave(run_command("benchmarks.cifar", command, argv))


def run_command(
    module: str,
    command: Callable[[], None],
    argv: list[str] | None,
    saved: str = "The last whole epoch",
) -> int:
    """Runs a module's command and returns its exit status: 2 on bad input, 130 when stopped."""
    try:
        command()
    except KeyboardInterrupt:
        arguments = shlex.join(sys.argv[1:] if argv is None else argv)
        print(
            f"\nStopped. {saved} is saved; to continue, repeat\n"
            f"  python -m {module} {arguments}".rstrip(),
            file=sys.stderr,
        )
        return 130
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
