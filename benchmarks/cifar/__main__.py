"""Trains an image classifier with several optimizers and shows which one generalizes better.

    python -m benchmarks.cifar
    python -m benchmarks.cifar --data path/to/cifar10 --model resnet18 --methods sgd,sgd@2,sam,samar
    python -m benchmarks.cifar --distributed --model resnet18  # in every process of a cluster

The results go to `--out`: one JSON record per run, a CSV, a table and figures. A run that was
interrupted continues when the command is repeated; a finished one is not repeated.
"""

import contextlib
import dataclasses
from pathlib import Path

from benchmarks.core import command
from benchmarks.core.classification import report, trained
from benchmarks.core.classification.experiment import ImageComparison, Images
from benchmarks.core.distributed import Cluster, connected
from benchmarks.core.runs import complete_all
from benchmarks.data import load


@dataclasses.dataclass(frozen=True)
class Configuration(Images):
    """The comparison, and over which processes it is trained."""

    label_noise: float = 0.0  # The share of training labels made wrong.
    # Train with labels by people instead: worse_label, aggre_label, ... of human_labels.npz beside
    # the Parquet files (CIFAR-10N, CIFAR-100N).
    human_labels: str | None = None
    # Train over all devices of all processes that run this same command; JAX finds them where it
    # knows the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU).
    distributed: bool = False
    coordinator: str | None = None  # Elsewhere: HOST:PORT at process 0.
    processes: int | None = None  # Elsewhere: how many processes there are.
    process_id: int | None = None  # Elsewhere: which of them this is, from 0.
    # Train nothing: measure the models that the finished runs of this folder kept, where their
    # records do not say how calibrated and how robust they are.
    evaluate: Path | None = None

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        super().check()
        self.within(0, 1, "label_noise")
        if self.human_labels is not None and self.label_noise:
            raise ValueError(
                f"--human-labels {self.human_labels} has wrong labels of its own; leave out "
                f"--label-noise {self.label_noise:g}."
            )
        places = (self.coordinator, self.processes, self.process_id)
        if not self.distributed and any(place is not None for place in places):
            raise ValueError("--coordinator, --processes and --process-id need --distributed.")


@command.main(Configuration, "benchmarks.cifar")
def main(arguments: Configuration) -> None:
    """Runs every method with every seed, writes the report and prints its tables."""
    if arguments.evaluate is not None:
        trained.evaluate(arguments.evaluate, load(arguments.data))
        print(report.write(arguments.evaluate))
        return
    runs = arguments.runs()
    with contextlib.ExitStack() as stack:
        cluster: Cluster | None = None
        if arguments.distributed:
            places = arguments.coordinator, arguments.processes, arguments.process_id
            cluster = stack.enter_context(connected(*places))
        dataset = arguments.dataset()
        folder = arguments.out or Path("runs") / f"{dataset.name}-{arguments.model}"
        labels = arguments.label_noise, arguments.human_labels
        comparison = ImageComparison(arguments, dataset, folder, *labels, cluster)
        comparison.check(runs)
        complete_all((comparison, run) for run in runs)
        if cluster is None or cluster.writes:
            print(report.write(folder))
            print(f"Results and figures: {folder}")
