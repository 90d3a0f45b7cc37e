"""Less data and noisy labels: the two ways in which the papers make a data set harder."""

import dataclasses
from typing import Any

import numpy as np

from benchmarks.data.dataset import Dataset


def _balanced_indices(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Chooses ``count`` indices with every class in its share of ``labels``, to within one."""
    shuffled = rng.permutation(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    # Equal positions of different classes keep the shuffled order: the remainder falls at random.
    chosen = shuffled[np.argsort(position[shuffled], kind="stable")][:count]
    return np.sort(chosen)


def _part(dataset: Dataset, name: str, keep: np.ndarray) -> Dataset:
    """Returns the data set with some of its images of one kind, and what belongs to them."""
    images, labels = (getattr(dataset, f"{name}_{part}") for part in ("images", "labels"))
    parts: dict[str, Any] = {f"{name}_images": images[keep], f"{name}_labels": labels[keep]}
    if name == "train":
        given = dataset.human_labels.items()
        parts["human_labels"] = {labelling: each[keep] for labelling, each in given}
    return dataclasses.replace(dataset, **parts)


def take(dataset: Dataset, train: int | None, test: int | None, seed: int) -> Dataset:
    """Returns a class-balanced subset by number of images.

    Every class keeps its share of the data to within one image, and with one seed a smaller subset
    is contained in a larger one.

    Raises:
        ValueError: If a number is not between 1 and the images there are.
    """
    for stream, (name, count) in enumerate((("train", train), ("test", test))):
        if count is None:
            continue
        labels = getattr(dataset, f"{name}_labels")
        if not 1 <= count <= len(labels):
            raise ValueError(
                f"{name}={count}: {dataset.name!r} has {len(labels)} {name} images; "
                f"pass a number from 1 to {len(labels)}, or None for all"
            )
        keep = _balanced_indices(labels, count, np.random.default_rng([seed, stream]))
        dataset = _part(dataset, name, keep)
    return dataset


def hold_out(dataset: Dataset, count: int, seed: int, labels: np.ndarray | None = None) -> Dataset:
    """Returns the data set with a class-balanced part of its train images as its test images.

    Args:
        dataset: The whole.
        count: How many train images are held out.
        seed: Draws them.
        labels: Of all train images, from which the held-out ones have theirs; by default the true
            ones.

    Raises:
        ValueError: If ``count`` is not between 1 and the images there are, less one.
    """
    total = len(dataset.train_labels)
    if not 1 <= count < total:
        raise ValueError(f"count={count}: pass a number from 1 to {total - 1}")
    kept = _balanced_indices(dataset.train_labels, total - count, np.random.default_rng([seed, 0]))
    held = np.setdiff1d(np.arange(total), kept)
    given = dataset.train_labels if labels is None else labels
    rest = _part(dataset, "train", kept)
    test_images = dataset.train_images[held]
    return dataclasses.replace(rest, test_images=test_images, test_labels=given[held])


def take_fraction(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """Returns the data set with a class-balanced fraction of its train images.

    Raises:
        ValueError: If ``fraction`` is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction}: pass a number in (0, 1]; 1 keeps all the images")
    total = len(dataset.train_labels)
    return take(dataset, max(1, round(fraction * total)), None, seed)


def corrupt_labels(labels: np.ndarray, rate: float, num_classes: int, seed: int) -> np.ndarray:
    """Replaces a fraction of the labels by wrong ones: symmetric label noise.

    Exactly ``round(rate * n)`` labels, chosen uniformly without replacement, become a class drawn
    uniformly from the ``num_classes - 1`` others, so ``rate`` is the share of wrong labels. Foret
    et al. 2021 (arXiv 2010.01412, section 3.3) flip a fraction of the training labels at random
    and leave open whether a flip may return the same class. Part of the label-noise literature
    draws from all classes, which leaves only ``rate * (1 - 1 / num_classes)`` of the labels wrong:
    40 % here compares with 44.4 % there on ten classes.

    Raises:
        ValueError: If ``rate`` is outside [0, 1), or ``num_classes`` is below 2.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate}: pass a share of wrong labels in [0, 1)")
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a wrong label needs at least 2 classes")
    rng = np.random.default_rng(seed)
    count = round(rate * len(labels))
    chosen = rng.choice(len(labels), count, replace=False)
    # A shift of 1 .. num_classes - 1 (modulo num_classes) reaches every other class equally often.
    shift = rng.integers(1, num_classes, count)
    noisy = labels.copy()
    noisy[chosen] = (labels[chosen] + shift) % num_classes
    return noisy
