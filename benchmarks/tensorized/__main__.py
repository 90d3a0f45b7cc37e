"""Trains a tensorized classifier on noisy labels with SGD, SAM and DAS.

    python -m benchmarks.tensorized
    python -m benchmarks.tensorized --data path/to/cifar10 --model tr-resnet32 --epochs 200
    python -m benchmarks.tensorized --model tr-resnet32 --batch-size 128 --time

The results go to `--out`: a folder as that of `benchmarks.cifar` for each noise level, a combined
table and a figure; with `--time` instead the time of a step of each method, measured in turn. A run
that was interrupted continues when the command is repeated; a finished one is not repeated.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.cifar import __main__ as cifar
from benchmarks.core.classification import report
from benchmarks.core.classification.experiment import Comparison
from benchmarks.core.methods import MethodSpec, parse_methods
from benchmarks.models import TENSORIZED
from benchmarks.step_time import __main__ as step_time
from benchmarks.step_time import report as step_time_report
from benchmarks.step_time.problems import DESCRIPTIONS, training
from benchmarks.tensorized import report as tensorized_report


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = cifar.make_parser("benchmarks.tensorized", __doc__)
    parser.add_argument(
        "--label-noise",
        dest="levels",
        default="0,0.4,0.6,0.8",
        help="the shares of training labels made wrong, separated by commas",
    )
    parser.add_argument("--time", action="store_true", help="measure the time of a step instead")
    parser.add_argument("--rounds", type=int, default=30, help="with --time: timed rounds")
    parser.set_defaults(model="tr-cnn", methods="sgd,sam,das", batch_size=128, label_noise=0.0)
    arguments = parser.parse_args(argv)
    cifar.check_arguments(arguments)
    if arguments.rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, got {arguments.rounds}.")
    arguments.levels = _parse_levels(arguments.levels)
    return arguments


def _parse_levels(text: str) -> list[float]:
    try:
        levels = [float(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or len(set(levels)) < len(levels) or not all(0 <= level < 1 for level in levels):
        raise ValueError(
            f"--label-noise {text!r} must be shares in [0, 1) separated by commas, none twice."
        )
    return sorted(levels)


def compare(arguments: argparse.Namespace, specs: list[MethodSpec]) -> None:
    """Runs every method, seed and noise level, writes the reports and prints the combined one."""
    dataset = cifar.load(arguments)
    folder = arguments.out or Path("runs") / f"tensorized-{dataset.name}-{arguments.model}"
    folders = {level: folder / f"noise{100 * level:g}" for level in arguments.levels}
    first, *others = folders.items()
    settings = cifar.settings(arguments, dataset)._replace(label_noise=first[0])
    comparison = Comparison(dataset, settings, first[1])
    comparisons = [comparison, *(comparison.with_label_noise(*other) for other in others)]
    cifar.run_all(comparisons, arguments, specs)
    for path in folders.values():
        report.write(path)
    print(tensorized_report.write(folder))
    print(f"Results and figures: {folder}")


def measure_time(arguments: argparse.Namespace, specs: list[MethodSpec]) -> None:
    """Times a step of each method relative to SGD's, on random images."""
    names = ["base" if spec.name == "sgd" else spec.label for spec in specs]
    unknown = [name for name in names if name not in DESCRIPTIONS]
    if unknown:
        raise ValueError(
            f"--time knows methods at their defaults alone, not {', '.join(unknown)}; "
            f"choose sgd or one of {', '.join(DESCRIPTIONS)}."
        )
    problem = training(arguments.model, arguments.batch_size, arguments.rounds)
    missing = [name for name in names if name not in problem.methods]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} balances the cores of tensorized layers, and {arguments.model} "
            f"has none; choose one of {', '.join(TENSORIZED)}."
        )
    folder = arguments.out or Path("runs") / f"tensorized-time-{arguments.model}"
    results = {arguments.model: step_time.measure(problem, names, arguments.rounds)}
    settings = {
        "model": arguments.model,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "methods": names,
    }
    print(step_time_report.write(folder, settings, results))
    print(f"Results and figure: {folder}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> None:
        arguments = parse_arguments(argv)
        action = measure_time if arguments.time else compare
        action(arguments, parse_methods(arguments.methods))

    return cifar.run_command("benchmarks.tensorized", command, argv)


if __name__ == "__main__":
    sys.exit(main())
