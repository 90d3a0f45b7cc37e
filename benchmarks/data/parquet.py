"""CIFAR in Parquet files with the columns of the Hugging Face exports."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from PIL import Image

from benchmarks.data.dataset import Dataset

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
CIFAR100_CLASSES = tuple(f"class {label}" for label in range(100))
DESCRIPTION = (
    "Parquet files train-*.parquet and test-*.parquet with the columns of the Hugging Face export "
    "uoft-cs/cifar10 (img: struct of bytes and path, label) or cifar100 (img, fine_label); the "
    "images are JPEG, WebP or PNG"
)
HUMAN_LABELS = "human_labels.npz"
"""Labels by people of the train rows, in their order (Wei et al. 2022, arXiv 2110.12088)."""

# What loses detail, which makes the task another: results must say so.
_LOSSY = {
    "-jpeg": lambda content: content.startswith(b"\xff\xd8"),
    "-webp": lambda content: content[8:12] == b"WEBP",
}


def _read_split(folder: Path, split: str) -> tuple[list[bytes], np.ndarray, tuple[str, ...]]:
    """Reads the encoded images, the labels and the class names of one split."""
    paths = sorted(folder.glob(f"{split}*.parquet"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no {split}*.parquet; expected {DESCRIPTION}")
    encoded: list[bytes] = []
    labels = []
    for path in paths:
        try:
            schema = pyarrow.parquet.read_schema(path)
            column = "fine_label" if "fine_label" in schema.names else "label"
            table = pyarrow.parquet.read_table(path, columns=["img", column])
            encoded += pyarrow.compute.struct_field(table["img"], "bytes").to_pylist()
            labels.append(table[column].to_numpy())
        except (pyarrow.ArrowException, KeyError, OSError) as error:
            raise ValueError(f"{path}: not readable ({error}); expected {DESCRIPTION}") from error
    names = CIFAR100_CLASSES if column == "fine_label" else CIFAR10_CLASSES
    merged = np.concatenate(labels)
    if not np.all((merged >= 0) & (merged < len(names))):
        raise ValueError(
            f"{paths[0]}: column {column!r} has values outside 0..{len(names) - 1}; "
            f"expected {DESCRIPTION}"
        )
    return encoded, merged.astype(np.int32), names


def _decode(encoded: list[bytes], where: str) -> np.ndarray:
    """Decodes JPEG, WebP or PNG images into one uint8 array of shape (N, H, W, 3)."""
    images = []
    for row, content in enumerate(encoded):
        try:
            with Image.open(BytesIO(content), formats=("JPEG", "WEBP", "PNG")) as image:
                images.append(np.asarray(image.convert("RGB")))
            if images[row].shape != images[0].shape:
                raise ValueError(f"shape {images[row].shape}, the first has {images[0].shape}")
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: image {row} is not usable ({error}); expected {DESCRIPTION}"
            ) from error
    return np.stack(images)


class Parquet:
    """Parquet files of a Hugging Face export in a folder."""

    description = DESCRIPTION
    subfolders = ("plain_text", "cifar100")

    def matches(self, folder: Path) -> bool:
        """Whether a folder holds at least one of the files."""
        return any(folder.glob("*.parquet"))

    def load(self, folder: Path) -> Dataset:
        """Reads a folder that matches; missing or damaged files are its errors."""
        train_encoded, train_labels, names = _read_split(folder, "train")
        test_encoded, test_labels, _ = _read_split(folder, "test")
        train_images = _decode(train_encoded, f"{folder}/train*.parquet")
        test_images = _decode(test_encoded, f"{folder}/test*.parquet")
        every = train_encoded + test_encoded
        kinds = [kind for kind, is_kind in _LOSSY.items() if any(map(is_kind, every))]
        name = f"cifar{len(names)}{''.join(kinds)}"
        test = test_images, test_labels, names
        return Dataset(name, train_images, train_labels, *test, _human(folder, train_labels))


def _human(folder: Path, train_labels: np.ndarray) -> dict[str, np.ndarray]:
    """Reads the labels of CIFAR-10N or CIFAR-100N by name; none where the file is not there."""
    path = folder / HUMAN_LABELS
    if not path.is_file():
        return {}
    with np.load(path) as file:
        found = {name: file[name].astype(np.int32) for name in file.files}
    if not np.array_equal(found.pop("clean_label", None), train_labels):
        raise ValueError(
            f"{path}: its clean_label is not the labels of the train images beside it, in their "
            "order; take the file that was made for these Parquet files, or none"
        )
    return found
