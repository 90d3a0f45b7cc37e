"""Methods and seeds compared on one image data set: what the loop of `core.runs` is told."""

import copy
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import samax
from benchmarks import models
from benchmarks.core import records
from benchmarks.core.checkpoints import save_model
from benchmarks.core.classification import trained
from benchmarks.core.classification.task import Classification
from benchmarks.core.classification.trained import SUBSET_SEED
from benchmarks.core.command import Command, Names
from benchmarks.core.comparison import EpochComparison, Run
from benchmarks.core.distributed import Cluster
from benchmarks.core.methods import MethodSpec, parse_methods
from benchmarks.core.runs import History, Tick
from benchmarks.core.timing import compute_clock
from benchmarks.core.training import Trainer, TrainState
from benchmarks.data import Dataset, load, take, take_fraction
from benchmarks.data.parquet import HUMAN_LABELS

MOMENTUM = 0.9
LAST_EPOCHS = 10
_TRAINING_STREAM = 0x7472_6169  # keeps the training keys apart from those of the initialization


@dataclasses.dataclass(frozen=True)
class Images(Command):
    """What all comparisons of classifiers are told, label noise apart."""

    data: str = "digits"  # A data set's name or the path of its files.
    train_images: int | None = None  # A class-balanced subset of the training images.
    test_images: int | None = None  # A class-balanced subset of the test images.
    fraction: float = 1.0  # The share of training images to keep.
    model: str = "cnn"  # Its name, such as cnn, resnet18 or tr-resnet32.
    width: float = 1.0  # Multiplies the model's channels.
    bfloat16: bool = False  # Compute in bfloat16 with float32 parameters.
    # Names, with settings after colons (sam:rho=0.1) and a multiple of the epochs after an @
    # (sgd@2).
    methods: Names = ("sgd", "sam", "samar")
    seeds: int = 3  # Runs of each method.
    seed_start: int = 0  # The first seed.
    epochs: int = 25  # Epochs of a run.
    batch_size: int = 256  # No more than there are training images.
    lr: float = 0.1  # The learning rate at the start of its cosine.
    weight_decay: float = 5e-4  # Added to the gradient after the method.
    label_smoothing: float = 0.0  # Probability mass spread over all classes.
    out: Path | None = None  # The results' folder; by default one in runs/.

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        self.at_least(1, "seeds", "epochs", "batch_size")
        self.within(0, float("inf"), "lr", "weight_decay")
        self.within(0, 1, "label_smoothing")

    def recorded(self) -> dict[str, Any]:
        """Returns what all records of a comparison state of the training."""
        names = ("model", "width", "epochs", "lr", "weight_decay", "label_smoothing", "bfloat16")
        return {name: getattr(self, name) for name in names}

    def dataset(self) -> Dataset:
        """Loads the data set and cuts it to size."""
        dataset = take_fraction(load(self.data), self.fraction, seed=SUBSET_SEED)
        return take(dataset, self.train_images, self.test_images, seed=SUBSET_SEED)

    def runs(self) -> list[Run]:
        """Returns what is run; seeds outside, so that a stop leaves whole comparisons."""
        specs = parse_methods(self.methods)
        return [(spec, self.seed_start + seed) for seed in range(self.seeds) for spec in specs]


class ImageComparison(EpochComparison):
    """Methods and seeds on one data set; programs and device data are shared between them."""

    def __init__(
        self,
        images: Images,
        dataset: Dataset,
        folder: Path,
        label_noise: float = 0.0,
        human_labels: str | None = None,
        cluster: Cluster | None = None,
    ):
        """Puts the data on the device.

        Raises:
            ValueError: The data have no such labels by people, the folder holds records of another
                comparison, or the devices of the cluster cannot share a batch.
        """
        self.folder, self.cluster, self._dataset = folder, cluster, dataset
        self.shared = {
            "dataset": dataset.name,
            "data_crc32": trained.crc32(dataset),
            "train_images": len(dataset.train_labels),
            "test_images": len(dataset.test_labels),
            "num_classes": dataset.num_classes,
            **images.recorded(),
            "batch_size": min(images.batch_size, len(dataset.train_labels)),
            "label_noise": label_noise,
            "flip": dataset.name != "digits",  # a mirrored digit is none
            "momentum": MOMENTUM,
            # Earlier records do not have the key.
            **({} if human_labels is None else {"human_labels": human_labels}),
        }
        if human_labels is not None and human_labels not in dataset.human_labels:
            raise ValueError(
                f"--human-labels {human_labels!r}: {dataset.name!r} has "
                f"{', '.join(dataset.human_labels) or 'none'}; they are those of the file "
                f"{HUMAN_LABELS} beside the Parquet files."
            )
        records.check_folder(folder, self.shared)
        if cluster is not None:
            cluster.check_batch_size(self.shared["batch_size"])
        self.steps = self.shared["train_images"] // self.shared["batch_size"]
        self._groups = models.CORE_GROUPS if images.model in models.TENSORIZED else None
        self.task = Classification.of(self.shared, dataset, cluster)
        self.trainers = {}
        # In evaluation mode the training set is sampled: as many images as there are test images.
        count = min(len(dataset.train_labels), len(dataset.test_labels))
        rng = np.random.default_rng(0)
        self._sample = np.sort(rng.permutation(len(dataset.train_labels))[:count])
        self._sample_images, self._test_images, self._test_labels = self._put(
            (dataset.train_images[self._sample], dataset.test_images, dataset.test_labels)
        )
        # A cluster lays the batches out anew each epoch.
        train = dataset.train_images
        self._train_images: Any = train if cluster else self._put(train)
        self._labels: tuple[Any, Any, Any] = (None, None, None)

    def with_label_noise(self, label_noise: float, folder: Path) -> "ImageComparison":
        """Returns the comparison with another label noise; programs and device data are shared.

        Raises:
            ValueError: The folder holds records of another comparison.
        """
        other = copy.copy(self)
        other.folder, other.shared = folder, {**self.shared, "label_noise": label_noise}
        records.check_folder(folder, other.shared)
        return other

    def check(self, runs: Sequence[Run]) -> None:
        """Raises a `ValueError` if a method cannot be built: before hours of training."""
        for spec, _ in runs:
            self.optimizer(spec)

    def start(self, run: Run) -> tuple[TrainState, History]:
        """Returns a fresh model, and the norm deviations that its cores have."""
        state = self.trainer(run[0]).init(run[1])
        deviation = self._norm_deviation(state.evaluated())
        return state, {"resumed_after_epochs": [], "epochs": [], "norm_deviation": deviation}

    def advance(self, run: Run, part: int, state: Any, history: History, tick: Tick) -> TrainState:
        """Trains for an epoch and evaluates."""
        spec, seed = run
        trainer = self.trainer(spec)
        key = jax.random.fold_in(jax.random.key(seed), _TRAINING_STREAM)
        labels, sample_labels = self._train_labels(run)
        epoch = self.task.epoch(self._train_images, labels, jax.random.fold_in(key, part))
        ascend = self.ascending(run, part)
        trainer.compile(state, epoch, self.steps, ascend)
        wall, compute = time.perf_counter(), compute_clock()
        state, metrics = trainer.train(state, epoch, self.steps, tick, ascend)
        wall, compute = time.perf_counter() - wall, compute_clock() - compute
        test = self.task.evaluate(state, self._test_images, self._test_labels)
        sample = self.task.evaluate(state, self._sample_images, sample_labels)
        history["epochs"].append(
            {
                "epoch": part + 1,
                "lr": float(self.schedule(spec)(part * self.steps)),
                **_epoch_means(metrics),
                "train_eval_loss": sample["loss"],
                "train_eval_top1": sample["top1"],
                **{f"test_{name}": value for name, value in test.items()},
                "wall_seconds": wall,
                "compute_seconds": compute,
            }
        )
        return state

    def final(self, run: Run, state: TrainState, history: History) -> dict[str, Any]:
        """Returns the record's own part, and saves the trained model."""
        save_model(trained.model_folder(self.path(run)), (state.evaluated(), state.model_state))
        start, end = history.pop("norm_deviation"), self._norm_deviation(state.evaluated())
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "steps_per_epoch": self.steps,
            "compile_seconds": self.trainer(run[0]).compile_seconds,
            **history,
            **({"norm_deviation": {"start": start, "end": end}} if end else {}),
            "final": {
                **final_metrics(history["epochs"]),
                **trained.robustness(self.task, state, self._test_images, self._test_labels),
            },
        }

    def _train_labels(self, run: Run) -> tuple[Any, Any]:
        """Returns the labels that a run trains with, of all images and of the sample."""
        noise = self.shared["label_noise"]
        wanted = (noise, run[1])
        if self._labels[0] != wanted:
            noisy = trained.training_labels(self._dataset, self.shared, run[1])
            labels = noisy if self.cluster else self._put(noisy)
            self._labels = (wanted, labels, self._put(noisy[self._sample]))
        return self._labels[1:]

    def _put(self, tree: Any) -> Any:
        """Puts arrays on the device, or on all of the cluster's."""
        return jax.device_put(tree) if self.cluster is None else self.cluster.replicate(tree)

    def _norm_deviation(self, params: nnx.State) -> dict[str, float]:
        """Returns the norm deviation Q of each tensorized layer; empty where there is none."""
        if self._groups is None:
            return {}
        deviations = jax.jit(samax.norm_deviation, static_argnums=1)(params, self._groups)
        return {layer: float(value) for layer, value in deviations.items()}

    def schedule(self, spec: MethodSpec) -> optax.Schedule:
        """Returns the learning rate at each step."""
        return optax.cosine_decay_schedule(self.shared["lr"], self.epochs(spec) * self.steps)

    def optimizer(self, spec: MethodSpec) -> optax.GradientTransformation:
        """Returns a method with its base optimizer."""
        schedule = self.schedule(spec)
        # The decay joins the gradient after the method, so that no ascent contains it.
        base = optax.chain(
            optax.add_decayed_weights(self.shared["weight_decay"]),
            optax.sgd(schedule, momentum=MOMENTUM),
        )
        steps = self.epochs(spec) * self.steps
        return spec.optimizer(base, learning_rate=schedule, steps=steps, groups=self._groups)

    def make_trainer(self, spec: MethodSpec) -> Trainer:
        """Makes the method's trainer."""
        return self.task.trainer(self.optimizer(spec))


def final_metrics(epochs: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the last epoch's test metrics, the last ten epochs' means, and the gap of the two.

    The training accuracy is that of evaluation mode without augmentation, on the labels that the
    run was trained with: the noisy ones, where there is label noise.
    """
    names = ("test_top1", "train_eval_top1", "test_loss", "train_eval_loss")
    means = {
        name: float(np.mean([entry[name] for entry in epochs[-LAST_EPOCHS:]])) for name in names
    }
    return {
        **{name: epochs[-1][name] for name in ("test_top1", "test_top5", "test_loss", "test_ece")},
        **{f"last10_{name}": value for name, value in means.items()},
        "generalization_gap": means["train_eval_top1"] - means["test_top1"],
        "early_stopped_top1": early_stopped([entry["test_top1_halves"] for entry in epochs]),
    }


def early_stopped(halves: Sequence[Sequence[float]]) -> float:
    """Returns the accuracy on one half of the test images at the best epoch on the other half.

    Args:
        halves: The accuracies on both halves, epoch by epoch; the mean over both ways is returned.
    """
    first, second = np.argmax(halves, axis=0)
    return (halves[first][1] + halves[second][0]) / 2


def _epoch_means(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    means = {name: float(np.mean(values, dtype=np.float64)) for name, values in metrics.items()}
    if "adaptive_weight" in metrics:
        means["adaptive_weight_last"] = float(metrics["adaptive_weight"][-1])
        means["sharpness_ratio_last"] = float(metrics["sharpness_ratio"][-1])
    return means
