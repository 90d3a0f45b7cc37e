"""The one form in which every image data set reaches the benchmarks."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images and labels in host memory, with the statistics that normalize them."""

    name: str  # What results call the data, for example ``'cifar10-jpeg'``
    train_images: np.ndarray  # uint8 of shape ``(N, H, W, C)``
    train_labels: np.ndarray  # int32 of shape ``(N,)``, in ``[0, num_classes)``
    test_images: np.ndarray  # uint8 of shape ``(M, H, W, C)``
    test_labels: np.ndarray  # int32 of shape ``(M,)``
    class_names: tuple[str, ...]  # One name a class
    # What people took the train images for, by the name of the labelling; as `train_labels`.
    human_labels: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @functools.cached_property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel of the train images, scaled to [0, 1]."""
        return tuple((self._moment("nhwc->c", self.train_images) / 255).tolist())

    @functools.cached_property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel of the train images, scaled to [0, 1]."""
        square = self._moment("nhwc,nhwc->c", self.train_images, self.train_images)
        variance = square - self._moment("nhwc->c", self.train_images) ** 2
        # Rounding can make a zero negative.
        return tuple((np.sqrt(np.maximum(variance, 0)) / 255).tolist())

    def _moment(self, subscripts: str, *images: np.ndarray) -> np.ndarray:
        # Sums with a float64 accumulator: no float copy of the images.
        return np.einsum(subscripts, *images, dtype=np.float64) / self.train_images[..., 0].size
