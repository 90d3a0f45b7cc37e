"""Trained classifiers: where they are kept, the images they saw, and how robust they are."""

import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import data
from benchmarks.core import records
from benchmarks.core.checkpoints import restore_model
from benchmarks.core.classification.task import Classification
from benchmarks.core.training import TrainState
from benchmarks.core.weights import add_noise, quantize
from benchmarks.data import Dataset

SUBSET_SEED = 0  # one subset for all runs: seeds vary the training, not the task
BITS = (8, 4, 3)
NOISES = (0.01, 0.02, 0.05)
DRAWS = 3


def model_folder(record: Path) -> Path:
    """Returns where the trained model of a run with this record is kept."""
    return record.parents[1] / "models" / record.stem


def restored(record: Path, config: dict[str, Any], task: Classification) -> TrainState:
    """Returns the trained model of a run.

    Raises:
        FileNotFoundError: It was not kept.
    """
    like = task.init(config["seed"])
    params, model_state = restore_model(model_folder(record), like)
    return TrainState(params, model_state, ())


def crc32(dataset: Dataset) -> int:
    """Returns a checksum of all images and labels."""
    crc = 0
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        crc = zlib.crc32(np.ascontiguousarray(getattr(dataset, name)).data, crc)
    return crc


def images_of(folder: Path, dataset: Dataset) -> Dataset:
    """Returns the part of a data set that the runs of a folder were trained and tested on.

    Raises:
        FileNotFoundError: There are no records.
        ValueError: The records are of different comparisons, or of other images.
    """
    shared = records.read_comparison(folder)[0]["config"]
    taken = data.take(dataset, shared["train_images"], shared["test_images"], seed=SUBSET_SEED)
    if crc32(taken) != shared["data_crc32"]:
        raise ValueError(
            f"{folder} was trained on other images ({shared['dataset']}) than --data holds "
            f"({dataset.name}): pass the --data that its command had."
        )
    return taken


def training_labels(dataset: Dataset, config: dict[str, Any], seed: int) -> np.ndarray:
    """Returns the labels that a run trains with: people's, or its own wrong ones among the true."""
    if "human_labels" in config:
        return dataset.human_labels[config["human_labels"]]
    return data.corrupt_labels(
        dataset.train_labels, config["label_noise"], dataset.num_classes, seed
    )


_rounded = jax.jit(quantize, static_argnums=1)


@jax.jit
def _noisy(params: Any, noise: Any, draw: Any) -> Any:
    # The key is made within: over a cluster it has no place of its own.
    return add_noise(params, noise, jax.random.key(draw))


def robustness(
    task: Classification, state: TrainState, images: Any, labels: Any
) -> dict[str, float]:
    """Returns the accuracy with rounded weights, and with noise on them.

    Returns:
        `top1_8_bits` and so on, by the rule of `weights.quantize`; `top1_noise_1` and so on, with
        Gaussian noise of so many percent of each matrix's norm, the mean over three draws.
    """

    def top1(params: Any) -> float:
        changed = TrainState(params, state.model_state, ())
        return task.evaluate(changed, images, labels)["top1"]

    params, found = state.evaluated(), {}
    for bits in BITS:
        found[f"top1_{bits}_bits"] = top1(_rounded(params, bits))
    for noise in NOISES:
        draws = [top1(_noisy(params, np.float32(noise), np.int32(draw))) for draw in range(DRAWS)]
        found[f"top1_noise_{100 * noise:g}"] = float(np.mean(draws))
    return found


def evaluate(folder: Path, dataset: Dataset) -> None:
    """Adds to a folder's records, from the models that were kept, what older runs do not say.

    Raises:
        FileNotFoundError: There are no records, or one was made without its model.
        ValueError: The records are of different comparisons, or of other images.
    """
    dataset = images_of(folder, dataset)
    images, labels = jax.device_put((dataset.test_images, dataset.test_labels))
    found = records.read_records(folder)
    task = Classification.of(next(iter(found.values()))["config"], dataset)  # one for all runs
    for path, record in found.items():
        state = restored(path, record["config"], task)
        more = {
            "test_ece": task.evaluate(state, images, labels)["ece"],
            **robustness(task, state, images, labels),
        }
        records.write_record(path, {**record, "final": {**record["final"], **more}})
