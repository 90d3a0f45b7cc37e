"""The tasks of `benchmarks.budget`: data, labels, network and base optimizer."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from benchmarks.core.classification.trained import SUBSET_SEED
from benchmarks.data import Dataset, corrupt_labels, hold_out, take
from benchmarks.data.series import AIRPORTS


class Task(NamedTuple):
    """What is learned, and with what."""

    title: str
    label_noise: float = 0.0
    human_labels: str | None = None
    model: str = "cnn"
    series: str | None = None  # of a task that forecasts
    look_back: int = 512
    optimizer: str = "sgd"
    warms_up: bool = False
    budget: int = 30  # gradient evaluations of each image or window


def _forecast(title: str, series: str, look_back: int) -> Task:
    return Task(title, series=series, look_back=look_back, optimizer="adam", budget=20)


TASKS = {
    "clean": Task("correct labels"),
    "symmetric": Task("40 % wrong labels, drawn at random", label_noise=0.4),
    "human": Task("40 % wrong labels, by people", human_labels="worse_label"),
    "human_few": Task("9 % wrong labels, by people", human_labels="aggre_label"),
    "vit": Task("correct labels, transformer", model="vit", optimizer="adam", warms_up=True),
    "airports": _forecast("forecasts, New York's weather", AIRPORTS, 336),
    "ETTh2": _forecast("forecasts, ETTh2", "ETTh2", 512),
}
HORIZON, STRIDE = 96, 4
"""Of the forecasts: hours ahead, and of the training's windows every so many."""


def split(
    dataset: Dataset, task: Task, train: int, validation: int, test: int
) -> tuple[Dataset, Dataset]:
    """Returns the data of the comparison, and those of the search.

    Both have the same train images. The search's test images are held-out train images, with the
    labels that somebody would have who has no better ones: wrong as often as those trained with.

    Raises:
        ValueError: There are fewer images, or no such labels by people.
    """
    whole = take(dataset, train + validation, test, SUBSET_SEED)
    if task.human_labels is None:
        labels = corrupt_labels(
            whole.train_labels, task.label_noise, whole.num_classes, SUBSET_SEED
        )
    elif task.human_labels in whole.human_labels:
        labels = whole.human_labels[task.human_labels]
    else:
        raise ValueError(
            f"The task needs the labels by people {task.human_labels!r}, and {dataset.name!r} has "
            f"{', '.join(dataset.human_labels) or 'none'}: --data must hold human_labels.npz."
        )
    search = hold_out(whole, validation, SUBSET_SEED, labels)
    test_part: dict[str, Any] = {
        name: getattr(whole, name) for name in ("test_images", "test_labels")
    }
    return dataclasses.replace(search, **test_part), search
