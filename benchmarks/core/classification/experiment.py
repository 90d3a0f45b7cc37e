"""One training run from its configuration to its record, resumable at every epoch."""

from __future__ import annotations

import contextlib
import copy
import json
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import samax
from benchmarks import models
from benchmarks.core import records
from benchmarks.core.checkpoints import Checkpoints, save_model
from benchmarks.core.distributed import Cluster, DistributedTrainer
from benchmarks.core.methods import MethodSpec, parse_method
from benchmarks.core.progress import Progress
from benchmarks.core.training import Recipe, Trainer, TrainState
from benchmarks.data import Dataset, corrupt_labels

MOMENTUM = 0.9
LAST_EPOCHS = 10
_TRAINING_STREAM = 0x7472_6169  # keeps the training keys apart from those of the initialization


class Settings(NamedTuple):
    """What the runs of a comparison have in common."""

    model: str
    width: float
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    label_smoothing: float
    label_noise: float
    flip: bool
    bfloat16: bool


class Comparison:
    """Runs methods and seeds on one data set; programs and device data are shared between seeds."""

    def __init__(
        self, dataset: Dataset, settings: Settings, folder: Path, cluster: Cluster | None = None
    ):
        """Puts the data on the device.

        Args:
            dataset: The images to train and test on, already cut to size.
            settings: What all runs have in common.
            folder: Where records and checkpoints go.
            cluster: The devices to train on; None for this process's first.

        Raises:
            ValueError: The folder holds records of another comparison, or the devices of the
                cluster cannot share a batch.
        """
        if cluster is not None:
            cluster.check_batch_size(settings.batch_size)
        self._cluster = cluster
        self._dataset = dataset
        self._settings = settings
        self._folder = folder
        self._trainers: dict[str, Trainer] = {}
        self._crc32 = crc32(dataset)
        self._groups = models.CORE_GROUPS if settings.model in models.TENSORIZED else None
        self._check_folder()
        # In evaluation mode the training set is sampled: as many images as there are test images.
        count = min(len(dataset.train_labels), len(dataset.test_labels))
        rng = np.random.default_rng(0)
        self._sample = np.sort(rng.permutation(len(dataset.train_labels))[:count])
        self._sample_images, self._test_images, self._test_labels = self._put(
            (dataset.train_images[self._sample], dataset.test_images, dataset.test_labels)
        )
        # A cluster's trainer lays the batches out anew each epoch.
        images = dataset.train_images
        self._train_images: Any = images if cluster else self._put(images)

    def with_label_noise(self, label_noise: float, folder: Path) -> Comparison:
        """Returns the comparison with another label noise; programs and device data are shared.

        Raises:
            ValueError: The folder holds records of another comparison.
        """
        other = copy.copy(self)
        other._settings = self._settings._replace(label_noise=label_noise)
        other._folder = folder
        other._check_folder()
        return other

    def _check_folder(self) -> None:
        shared = records.shared_config(self.config(parse_method("sgd"), 0))
        for path, record in records.read_records(self._folder).items():
            records.check_config(records.shared_config(record["config"]), shared, path)

    def config(self, spec: MethodSpec, seed: int) -> dict[str, Any]:
        """Returns all that decides a run's numbers, as JSON types."""
        settings = self._settings._asdict()
        data = self._dataset
        config = {
            "dataset": data.name,
            "data_crc32": self._crc32,
            "train_images": len(data.train_labels),
            "test_images": len(data.test_labels),
            "num_classes": data.num_classes,
            **settings,
            "momentum": MOMENTUM,
            "method": spec.label,
            "epoch_factor": spec.epoch_factor,
            "hyperparameters": spec.hyperparameters,
            "seed": seed,
        }
        return json.loads(json.dumps(config))

    def optimizer(self, spec: MethodSpec) -> optax.GradientTransformation:
        """Returns a method's optimizer.

        Raises:
            ValueError: The method cannot be built, or not for this model.
        """
        schedule = self._schedule(spec)
        decay = optax.add_decayed_weights(self._settings.weight_decay)
        # The decay joins the gradient after the method, so that no ascent contains it.
        base = optax.chain(decay, optax.sgd(schedule, momentum=MOMENTUM))
        steps = self._settings.epochs * spec.epoch_factor * self._steps
        return spec.optimizer(base, learning_rate=schedule, steps=steps, groups=self._groups)

    def run(self, spec: MethodSpec, seed: int, progress: Progress) -> records.Record:
        """Trains one method with one seed, from its last checkpoint if there is one.

        Returns:
            The record, which is also written to `folder`; a finished run's is only read.

        Raises:
            ValueError: The folder holds this run with another configuration.
        """
        config = self.config(spec, seed)
        name = f"{spec.label.replace(':', '_')}_seed{seed}"
        path = self._folder / "runs" / f"{name}.json"
        work = spec.gradients
        finished = records.read_finished(path, config)
        if self._cluster is not None:
            self._cluster.check_agreement([config, finished is not None], "what is to be trained")
        if finished is not None:
            progress.skip(work * config["epochs"] * spec.epoch_factor)
            return finished
        with contextlib.closing(
            Checkpoints(self._folder / "checkpoints" / name, config)
        ) as checkpoints:
            state, record = self._train(spec, config, checkpoints, progress)
            save_model(model_folder(path), (state.params, state.model_state))
        if self._cluster is None or self._cluster.writes:
            records.write_record(path, record)
            checkpoints.delete()
        return record

    def _train(
        self,
        spec: MethodSpec,
        config: dict[str, Any],
        checkpoints: Checkpoints,
        progress: Progress,
    ) -> tuple[TrainState, records.Record]:
        seed, epochs = config["seed"], config["epochs"] * spec.epoch_factor
        trainer = self._trainer(spec)
        state = trainer.init(seed)
        start = self._norm_deviation(state.params)
        history: dict[str, Any] = {"resumed_after_epochs": [], "epochs": []}
        restored = checkpoints.restore(state)
        if restored is not None:
            state, history = restored
            history["resumed_after_epochs"].append(len(history["epochs"]))
        train_labels = corrupt_labels(
            self._dataset.train_labels, config["label_noise"], config["num_classes"], seed
        )
        labels: Any = train_labels if self._cluster else self._put(train_labels)
        sample_labels = self._put(train_labels[self._sample])
        key = jax.random.fold_in(jax.random.key(seed), _TRAINING_STREAM)
        first = len(history["epochs"])
        if self._cluster is not None:
            self._cluster.check_agreement(first, "the last checkpoint")
        progress.start(f"{spec.label} seed {seed}", epochs, spec.gradients, first)
        trainer.compile(state, self._train_images, labels)
        for epoch in range(first, epochs):
            epoch_key = jax.random.fold_in(key, epoch)
            wall, cpu = time.perf_counter(), time.process_time()
            state, metrics = trainer.train_epoch(
                state, self._train_images, labels, epoch_key, progress.step
            )
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            test = trainer.evaluate(state, self._test_images, self._test_labels)
            sample = trainer.evaluate(state, self._sample_images, sample_labels)
            entry = {
                "epoch": epoch + 1,
                "lr": float(self._schedule(spec)(epoch * self._steps)),
                **_epoch_means(metrics),
                "train_eval_loss": sample["loss"],
                "train_eval_top1": sample["top1"],
                **{f"test_{name}": value for name, value in test.items()},
                "wall_seconds": wall,
                "compute_seconds": cpu if jax.default_backend() == "cpu" else wall,
            }
            history["epochs"].append(entry)
            checkpoints.save(epoch + 1, state, history)
            progress.epoch(entry)
        end = self._norm_deviation(state.params)
        record = {
            "format": records.FORMAT,
            "config": config,
            "versions": records.versions(),
            "hardware": records.hardware(),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "steps_per_epoch": self._steps,
            "compile_seconds": trainer.compile_seconds,
            **history,
            **({"norm_deviation": {"start": start, "end": end}} if end else {}),
            "final": final_metrics(history["epochs"]),
        }
        return state, record

    def _put(self, tree: Any) -> Any:
        """Puts arrays on the device, or on all of the cluster's."""
        return jax.device_put(tree) if self._cluster is None else self._cluster.replicate(tree)

    def _norm_deviation(self, params: nnx.State) -> dict[str, float]:
        """Returns the norm deviation Q of each tensorized layer; empty where there is none."""
        if self._groups is None:
            return {}
        deviations = jax.jit(samax.norm_deviation, static_argnums=1)(params, self._groups)
        return {layer: float(value) for layer, value in deviations.items()}

    @property
    def _steps(self) -> int:
        return len(self._dataset.train_labels) // self._settings.batch_size

    def _schedule(self, spec: MethodSpec) -> optax.Schedule:
        epochs = self._settings.epochs * spec.epoch_factor
        return optax.cosine_decay_schedule(self._settings.lr, epochs * self._steps)

    def _trainer(self, spec: MethodSpec) -> Trainer:
        if spec.label not in self._trainers:
            settings, data, cluster = self._settings, self._dataset, self._cluster
            parts = (
                lambda seed: build_model(settings, data, seed),
                self.optimizer(spec),
                make_recipe(settings, data),
            )
            self._trainers[spec.label] = (
                Trainer(*parts) if cluster is None else DistributedTrainer(*parts, cluster)
            )
        return self._trainers[spec.label]


def build_model(settings: Settings, dataset: Dataset, seed: int) -> nnx.Module:
    """Returns the freshly initialized model of a run."""
    return models.build(
        settings.model,
        num_classes=dataset.num_classes,
        in_channels=dataset.train_images.shape[-1],
        width=settings.width,
        dtype=_compute_dtype(settings),
        rngs=nnx.Rngs(seed),
    )


def make_recipe(settings: Settings, dataset: Dataset) -> Recipe:
    """Returns how a run makes batches and losses."""
    return Recipe(
        settings.batch_size,
        dataset.mean,
        dataset.std,
        settings.flip,
        settings.label_smoothing,
        _compute_dtype(settings),
    )


def model_folder(record: Path) -> Path:
    """Returns where the trained model of a run with this record is kept."""
    return record.parents[1] / "models" / record.stem


def crc32(dataset: Dataset) -> int:
    """Returns a checksum of all images and labels."""
    crc = 0
    for array in (
        dataset.train_images,
        dataset.train_labels,
        dataset.test_images,
        dataset.test_labels,
    ):
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc


def final_metrics(epochs: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the last epoch's test metrics, the last ten epochs' means, and the gap of the two.

    The training accuracy is that of evaluation mode without augmentation, on the labels that the
    run was trained with: the noisy ones, where there is label noise.
    """
    last = epochs[-LAST_EPOCHS:]
    means = {
        name: float(np.mean([entry[name] for entry in last]))
        for name in ("test_top1", "train_eval_top1", "test_loss", "train_eval_loss")
    }
    return {
        "test_top1": epochs[-1]["test_top1"],
        "test_top5": epochs[-1]["test_top5"],
        "test_loss": epochs[-1]["test_loss"],
        **{f"last10_{name}": value for name, value in means.items()},
        "generalization_gap": means["train_eval_top1"] - means["test_top1"],
    }


def _compute_dtype(settings: Settings) -> Any:
    return jnp.bfloat16 if settings.bfloat16 else jnp.float32


def _epoch_means(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    means = {name: float(np.mean(values, dtype=np.float64)) for name, values in metrics.items()}
    if "adaptive_weight" in metrics:
        means["adaptive_weight_last"] = float(metrics["adaptive_weight"][-1])
        means["sharpness_ratio_last"] = float(metrics["sharpness_ratio"][-1])
    return means
