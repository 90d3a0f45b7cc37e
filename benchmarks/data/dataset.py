"""The one form in which every image data set reaches the benchmarks, and where it comes from."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """Images and labels in host memory, with the statistics that normalize them."""

    name: str  # What results call the data, for example ``'cifar10-jpeg'``
    train_images: np.ndarray  # uint8 of shape ``(N, H, W, C)``
    train_labels: np.ndarray  # int32 of shape ``(N,)``, in ``[0, num_classes)``
    test_images: np.ndarray  # uint8 of shape ``(M, H, W, C)``
    test_labels: np.ndarray  # int32 of shape ``(M,)``
    num_classes: int  # The number of classes
    mean: tuple[float, ...]  # Per channel, over the train images scaled to ``[0, 1]``
    std: tuple[float, ...]  # Per channel, over the train images scaled to ``[0, 1]``
    class_names: tuple[str, ...]  # One name a class


class Layout(NamedTuple):
    """A way in which a data set lies in a folder."""

    description: str  # The files expected, for error messages
    subfolders: tuple[str, ...]  # Where the files lie when the user names the folder's parent
    matches: Callable[[Path], bool]  # Whether a folder holds at least one of the files
    # Reads a folder that matches; missing or damaged files are its errors.
    load: Callable[[Path], Dataset]


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and standard deviation of each channel of uint8 images scaled to [0, 1]."""
    # Sums with a float64 accumulator: no float copy of the images.
    pixels = images[..., 0].size
    mean = np.einsum("nhwc->c", images, dtype=np.float64) / pixels
    square = np.einsum("nhwc,nhwc->c", images, images, dtype=np.float64) / pixels
    std = np.sqrt(np.maximum(square - mean**2, 0))  # rounding can make a zero negative
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


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
