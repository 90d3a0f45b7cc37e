"""Image classification data: one ``load`` for every layout, subsets and label noise."""

from benchmarks.data import digits
from benchmarks.data.dataset import Dataset
from benchmarks.data.subset import corrupt_labels, take, take_fraction

__all__ = ["Dataset", "corrupt_labels", "load", "take", "take_fraction"]


def load(name_or_path: str = "digits") -> Dataset:
    """Loads a data set by name."""
    if name_or_path == "digits":
        return digits.load()
    raise ValueError(name_or_path)
