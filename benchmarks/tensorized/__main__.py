"""Trains a tensorized classifier on noisy labels with SGD, SAM and DAS.

    python -m benchmarks.tensorized
    python -m benchmarks.tensorized --data path/to/cifar10 --model tr-resnet32 --epochs 200

The results go to `--out`: a folder as that of `benchmarks.cifar` for each noise level, a combined
table and a figure. A run that was interrupted continues when the command is repeated; a finished
one is not repeated. What a step takes is measured by `benchmarks.step_time --problems tr-resnet32`.
"""

import dataclasses
from pathlib import Path

from benchmarks.core import command
from benchmarks.core.classification import report as level_report
from benchmarks.core.classification.experiment import ImageComparison, Images
from benchmarks.core.command import Names, Shares
from benchmarks.core.runs import complete_all
from benchmarks.tensorized import report


@dataclasses.dataclass(frozen=True)
class Configuration(Images):
    """The comparison at several noise levels."""

    model: str = "tr-cnn"
    methods: Names = ("sgd", "sam", "das")
    batch_size: int = 128
    # The shares of training labels made wrong, separated by commas.
    label_noise: Shares = (0.0, 0.4, 0.6, 0.8)

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        super().check()
        levels = self.label_noise
        inside = all(0 <= level < 1 for level in levels)
        if not levels or len(set(levels)) < len(levels) or not inside:
            text = ",".join(map(str, levels))
            raise ValueError(f"--label-noise {text!r} must be shares in [0, 1), none twice.")


@command.main(Configuration, "benchmarks.tensorized")
def main(arguments: Configuration) -> None:
    """Runs every method, seed and noise level, writes the reports and prints the combined one."""
    runs, dataset = arguments.runs(), arguments.dataset()
    folder = arguments.out or Path("runs") / f"tensorized-{dataset.name}-{arguments.model}"
    levels = sorted(arguments.label_noise)
    folders = [folder / f"noise{100 * level:g}" for level in levels]
    first = ImageComparison(arguments, dataset, folders[0], levels[0])
    first.check(runs)
    others = zip(levels[1:], folders[1:], strict=True)
    comparisons = [first, *(first.with_label_noise(*other) for other in others)]
    seeds = dict.fromkeys(seed for _, seed in runs)
    complete_all(
        (comparison, run)
        for seed in seeds  # seeds outside: a stop leaves whole comparisons
        for comparison in comparisons
        for run in runs
        if run[1] == seed
    )
    for path in folders:
        level_report.write(path)
    print(report.write(folder))
    print(f"Results and figures: {folder}")
