"""The official CIFAR-10 and CIFAR-100 Python pickles, read without running what they contain."""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.data.dataset import Dataset

# A pickle can name any function and call it. These are what an array of plain numbers needs, and
# the encoding with which Python 3 writes bytes in protocol 2; nothing else is looked up.
_ADMITTED = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class _Unpickler(pickle.Unpickler):
    """Refuses every global but NumPy's reconstruction of arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns an admitted global."""
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names the global '{module}.{name}', which is refused")
        return super().find_class(module.replace("numpy.core.", "numpy._core."), name)


class Pickles(NamedTuple):
    """What one of the two data sets calls its files and their entries, and how it is read."""

    name: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    class_names: str
    subfolders: tuple[str, ...]  # Where the files lie when the user names the folder's parent

    @property
    def description(self) -> str:
        """The files, for error messages."""
        files = ", ".join((*self.train, self.test, self.meta))
        return f"the official {self.name} Python pickles ({files}), as in {self.subfolders[0]}/"

    def matches(self, folder: Path) -> bool:
        """Whether a folder holds at least one of the files."""
        return any((folder / file).is_file() for file in (*self.train, self.test, self.meta))

    def load(self, folder: Path) -> Dataset:
        """Reads a folder that matches; missing or damaged files are its errors."""
        names = [_text(name) for name in self._read(folder / self.meta)[self.class_names]]
        batches = [self._images_and_labels(folder / file, len(names)) for file in self.train]
        images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        test = self._images_and_labels(folder / self.test, len(names))
        return Dataset(self.name, images, labels, *test, tuple(names))

    def _read(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the file is missing; expected {self.description}")
        try:
            with path.open("rb") as file:
                content = _Unpickler(file, encoding="bytes").load()
            return {_text(key): value for key, value in content.items()}
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise ValueError(
                f"{path}: not readable ({type(error).__name__}: {error}); "
                f"expected {self.description}"
            ) from error

    def _images_and_labels(self, path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        content = self._read(path)
        try:
            rows, labels = content["data"], np.asarray(content[self.labels])
            if rows.dtype != np.uint8 or labels.dtype.kind not in "iu":
                raise ValueError(f"data of {rows.dtype} and labels of {labels.dtype}")
            if labels.shape != rows.shape[:1] or not np.all((labels >= 0) & (labels < num_classes)):
                raise ValueError(f"labels that are not one of 0..{num_classes - 1} for each image")
            # One row an image: the red plane, the green, the blue, each row by row.
            images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        except (KeyError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path}: not a batch of images ({type(error).__name__}: {error}); "
                f"expected {self.description}"
            ) from error
        return np.ascontiguousarray(images), labels.astype(np.int32)


def _text(value: str | bytes) -> str:
    """Decodes what Python 2 wrote as a byte string."""
    return value.decode("latin-1") if isinstance(value, bytes) else value


CIFAR10 = Pickles(
    "cifar10",
    tuple(f"data_batch_{number}" for number in range(1, 6)),
    *("test_batch", "batches.meta", "labels", "label_names", ("cifar-10-batches-py",)),
)
CIFAR100 = Pickles(
    *("cifar100", ("train",), "test", "meta", "fine_labels", "fine_label_names"),
    ("cifar-100-python",),
)
