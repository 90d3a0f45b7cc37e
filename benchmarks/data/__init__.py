"""Image classification data: one ``load`` for every layout, subsets and label noise."""

from pathlib import Path

from benchmarks.data import digits
from benchmarks.data.dataset import Dataset
from benchmarks.data.parquet import Parquet
from benchmarks.data.pickles import CIFAR10, CIFAR100, Pickles
from benchmarks.data.subset import corrupt_labels, hold_out, take, take_fraction

__all__ = ["Dataset", "corrupt_labels", "hold_out", "load", "take", "take_fraction"]

LAYOUTS: tuple[Pickles | Parquet, ...] = (CIFAR10, CIFAR100, Parquet())


def load(name_or_path: str = "digits") -> Dataset:
    """Loads a data set by name or from a folder, whose layout is detected from its files.

    Args:
        name_or_path: ``'digits'``, which needs no file, or a folder with the official CIFAR-10 or
            CIFAR-100 Python pickles (fine labels), or with the Parquet files of their Hugging Face
            exports; the folder's parent will do too. Parquet files that hold JPEG or WebP images
            give names such as ``'cifar10-jpeg'`` and ``'cifar100-webp'``; a file
            ``human_labels.npz`` beside them gives the labels by people.

    Raises:
        FileNotFoundError: If the folder, or one of its layout's files, is missing.
        ValueError: If the folder holds several data sets, or a file is damaged.
    """
    if name_or_path == "digits":
        return digits.load()
    root = Path(name_or_path).expanduser()
    found = [
        (layout, folder)
        for layout in LAYOUTS
        for folder in (root, *(root / subfolder for subfolder in layout.subfolders))
        if folder.is_dir() and layout.matches(folder)
    ]
    if not found:
        state = "holds no known layout" if root.is_dir() else "is not an existing folder"
        expected = "; or ".join(layout.description for layout in LAYOUTS)
        raise FileNotFoundError(
            f"data {str(name_or_path)!r} {state}; pass 'digits', or a folder with {expected}"
        )
    if len(found) > 1:
        folders = ", ".join(str(folder) for _, folder in found)
        raise ValueError(f"data {str(name_or_path)!r} holds several data sets; pass one: {folders}")
    layout, folder = found[0]
    return layout.load(folder)
