"""The official CIFAR-10 and CIFAR-100 Python pickles, read without running what they contain."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.data.dataset import Dataset, Layout, make_dataset

# A pickle can name any function and call it. NumPy's own unpickling functions are not safe to
# offer either, because they trust the dtype's state in the file. So these stand-ins take their
# place and admit arrays of plain numbers alone.


def _text(value: str | bytes) -> str:
    """Decodes what Python 2 wrote as a byte string."""
    return value.decode("latin-1") if isinstance(value, bytes) else value


class _Dtype:
    """Stands for ``numpy.dtype``: booleans, integers and floats."""

    def __init__(self, code: str | bytes, *_: object):
        self.value = np.dtype(_text(code))
        if self.value.kind not in "biuf":
            raise pickle.UnpicklingError(f"an array of dtype {_text(code)!r}, not of plain numbers")

    def __setstate__(self, state: tuple) -> None:
        order = _text(state[1])  # '<', '>' or '|'; NumPy refuses what is no byte order
        self.value = self.value.newbyteorder(order)  # type: ignore[arg-type]


class _Array:
    """Stands for ``numpy.ndarray``."""

    value: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, content = state
        self.value = np.frombuffer(content, dtype.value).reshape(
            shape, order="F" if fortran_order else "C"
        )


def _reconstruct(*_: object) -> _Array:
    """Stands for NumPy's ``_reconstruct``: an array whose content follows as its state."""
    return _Array()


def _encode(content: str, encoding: str) -> bytes:
    """Stands for ``_codecs.encode``, with which Python 3 writes bytes in protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}, not 'latin1'")
    return content.encode("latin-1")


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _RestrictedUnpickler(pickle.Unpickler):
    """Admits NumPy arrays and plain types only."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """Returns the stand-in of an admitted global and refuses every other."""
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names the global '{module}.{name}', which is refused")
        return _ADMITTED[module, name]


class _Files(NamedTuple):
    """What one of the two data sets calls its files and their entries."""

    name: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    class_names: str
    folder: str

    @property
    def description(self) -> str:
        files = ", ".join((*self.train, self.test, self.meta))
        return f"the official {self.name} Python pickles ({files}), as in {self.folder}/"

    def matches(self, folder: Path) -> bool:
        return any((folder / file).is_file() for file in (*self.train, self.test, self.meta))

    def load(self, folder: Path) -> Dataset:
        names = tuple(_text(name) for name in self._read(folder / self.meta)[self.class_names])
        batches = [self._images_and_labels(folder / file, len(names)) for file in self.train]
        images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        test = self._images_and_labels(folder / self.test, len(names))
        return make_dataset(self.name, (images, labels), test, names)

    def _read(self, path: Path) -> dict[str, Any]:
        """Reads the dictionary in one file."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the file is missing; expected {self.description}")
        try:
            with path.open("rb") as file:
                content = _RestrictedUnpickler(file, encoding="bytes").load()
            return {_text(key): value for key, value in content.items()}
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise ValueError(
                f"{path}: not readable ({type(error).__name__}: {error}); "
                f"expected {self.description}"
            ) from error

    def _images_and_labels(self, path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads one batch as NHWC images and their labels."""
        content = self._read(path)
        try:
            rows = content["data"].value
            labels = np.asarray(content[self.labels])
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
        return np.ascontiguousarray(images), labels


def _layout(files: _Files) -> Layout:
    return Layout(files.description, (files.folder,), files.matches, files.load)


CIFAR10 = _layout(
    _Files(
        name="cifar10",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        labels="labels",
        class_names="label_names",
        folder="cifar-10-batches-py",
    )
)

CIFAR100 = _layout(
    _Files(
        name="cifar100",
        train=("train",),
        test="test",
        meta="meta",
        labels="fine_labels",
        class_names="fine_label_names",
        folder="cifar-100-python",
    )
)
