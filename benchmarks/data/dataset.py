"""The one form in which every image data set reaches the benchmarks."""

from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """Images and labels in host memory, with the statistics that normalize them.

    Attributes:
        name: What results call the data, for example ``'cifar10-jpeg'``.
        train_images: uint8 of shape ``(N, H, W, C)``.
        train_labels: int32 of shape ``(N,)``, in ``[0, num_classes)``.
        test_images: uint8 of shape ``(M, H, W, C)``.
        test_labels: int32 of shape ``(M,)``.
        num_classes: The number of classes.
        mean: Per channel, over the train images scaled to ``[0, 1]``.
        std: Per channel, over the train images scaled to ``[0, 1]``.
        class_names: One name a class.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and standard deviation of each channel of uint8 images scaled to [0, 1]."""
    means, stds = [], []
    for channel in range(images.shape[-1]):
        # Moments of the 256 grey levels: exact, and no float copy of the images.
        levels = np.arange(256) / 255
        weights = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., 0].size
        mean = float(weights @ levels)
        means.append(mean)
        stds.append(float(np.sqrt(weights @ (levels - mean) ** 2)))
    return tuple(means), tuple(stds)


def make_dataset(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    class_names: tuple[str, ...],
) -> Dataset:
    """Builds a ``Dataset`` from (images, labels) pairs, computing what follows from them."""
    mean, std = channel_statistics(train[0])
    return Dataset(
        name=name,
        train_images=train[0],
        train_labels=train[1].astype(np.int32),
        test_images=test[0],
        test_labels=test[1].astype(np.int32),
        num_classes=len(class_names),
        mean=mean,
        std=std,
        class_names=class_names,
    )
