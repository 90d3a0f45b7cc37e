"""One fine-tuning run from its configuration to its record, resumable at every evaluation."""

from __future__ import annotations

import contextlib
import json
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.core import records
from benchmarks.core.checkpoints import Checkpoints
from benchmarks.core.methods import MethodSpec
from benchmarks.core.progress import Progress
from benchmarks.data import text
from benchmarks.lora.methods import METHODS, PROBE, WEIGHT_DECAY, optimizer
from benchmarks.lora.training import Batch, Trainer, batch_indices, imbalance
from benchmarks.models import bert
from benchmarks.models.lora import SentenceClassifier, adapt

TRACE_EVERY = 10


class Settings(NamedTuple):
    """What the runs of a comparison have in common."""

    task: str
    shots: int
    steps: int
    eval_every: int
    batch_size: int
    length: int
    adapter: str
    rank: int
    lora_alpha: float
    bfloat16: bool


class Pretrained(NamedTuple):
    """A frozen encoder with its tokenizer."""

    name: str
    crc32: int
    encoder: bert.Bert
    tokenizer: Any


class Split(NamedTuple):
    """Where training examples are drawn from, and what is evaluated on."""

    pool: text.Examples
    evaluation: text.Examples
    evaluated_on: str


def load_pretrained(folder: Path | None, bfloat16: bool) -> Pretrained:
    """Loads all-MiniLM-L6-v2, or the model of a folder.

    Raises:
        FileNotFoundError: A file of the folder is missing.
        ModuleNotFoundError: A package is missing.
        ValueError: The folder's files do not fit this code.
    """
    place = bert.model_folder() if folder is None else folder
    encoder = bert.load(place, dtype=jnp.bfloat16 if bfloat16 else jnp.float32)
    crc32 = zlib.crc32((place / "model.safetensors").read_bytes())
    name = bert.NAME if folder is None else folder.name
    return Pretrained(name, crc32, encoder, text.load_tokenizer(place))


def build_model(
    encoder: bert.Bert, settings: Settings, num_classes: int, seed: int
) -> SentenceClassifier:
    """Puts adapters and a classifier on a copy of the encoder, whose arrays are shared."""
    model, rngs = nnx.clone(encoder), nnx.Rngs(seed)
    adapt(model, settings.adapter, rank=settings.rank, alpha=settings.lora_alpha, rngs=rngs)
    return SentenceClassifier(model, num_classes, rngs=rngs)


class Comparison:
    """Runs methods and seeds on one task; programs and frozen weights are shared between seeds."""

    def __init__(self, split: Split, pretrained: Pretrained, settings: Settings, folder: Path):
        """Tokenizes what is evaluated on.

        Args:
            split: The data.
            pretrained: The encoder and its tokenizer.
            settings: What all runs have in common.
            folder: Where records and checkpoints go, kept as `folder`.

        Raises:
            ValueError: The length is more than the model allows, a class has too few examples, or
                the folder holds records of another comparison.
        """
        bert.check_length(settings.length, pretrained.encoder.config, "--length")
        self._split, self._pretrained, self._settings = split, pretrained, settings
        self._task = text.TASKS[settings.task]
        self.folder = folder
        self._trainers: dict[str, Trainer] = {}
        self._crc32 = zlib.crc32(
            "\n".join(
                f"{label}\t{sentence}"
                for part in split[:2]
                for sentence, label in zip(*part, strict=True)
            ).encode()
        )
        self._examples = len(self._sample(0).labels)
        if settings.batch_size > self._examples:
            raise ValueError(
                f"--batch-size {settings.batch_size} is more than the {self._examples} training "
                "examples."
            )
        self._evaluation = self._tokenize(split.evaluation)
        shared = records.shared_config(self.config(MethodSpec(PROBE, PROBE, {}), 0))
        for path, record in records.read_records(folder).items():
            records.check_config(records.shared_config(record["config"]), shared, path)

    def config(self, spec: MethodSpec, seed: int) -> dict[str, Any]:
        """Returns all that decides a run's numbers, as JSON types."""
        config = {
            **self._settings._asdict(),
            "model": self._pretrained.name,
            "model_crc32": self._pretrained.crc32,
            "data_crc32": self._crc32,
            "train_examples": self._examples,
            "evaluated_on": self._split.evaluated_on,
            "test_examples": len(self._split.evaluation.labels),
            "weight_decay": WEIGHT_DECAY,
            "method": spec.label,
            "hyperparameters": spec.hyperparameters,
            "seed": seed,
        }
        return json.loads(json.dumps(config))

    def run(self, spec: MethodSpec, seed: int, progress: Progress) -> records.Record:
        """Trains one method with one seed, from its last checkpoint if there is one.

        The seed decides the training examples, the initialization and the batches, so that methods
        are compared in pairs.

        Returns:
            The record, which is also written to `folder`; a finished run's is only read.

        Raises:
            ValueError: The folder holds this run with another configuration.
        """
        config = self.config(spec, seed)
        name = f"{spec.label.replace(':', '_')}_seed{seed}"
        path = self.folder / "runs" / f"{name}.json"
        finished = records.read_finished(path, config)
        if finished is not None:
            progress.skip(work(spec, self._settings))
            return finished
        if spec.name == PROBE:
            record = self._probe(config, seed)
            records.write_record(path, record)
            return record
        with contextlib.closing(
            Checkpoints(self.folder / "checkpoints" / name, config)
        ) as checkpoints:
            record = self._train(spec, config, checkpoints, progress)
            records.write_record(path, record)
            checkpoints.delete()
        return record

    def _train(
        self,
        spec: MethodSpec,
        config: dict[str, Any],
        checkpoints: Checkpoints,
        progress: Progress,
    ) -> records.Record:
        settings, seed = self._settings, config["seed"]
        trainer = self._trainer(spec)
        state = trainer.init(seed)
        history: dict[str, Any] = {"resumed_after_steps": [], "evaluations": [], "trace": []}
        restored = checkpoints.restore(state)
        if restored is not None:
            state, history = restored
            history["resumed_after_steps"].append(history["evaluations"][-1]["step"])
        ends = [*range(settings.eval_every, settings.steps, settings.eval_every), settings.steps]
        first = len(history["evaluations"])
        progress.start(
            spec.label + f" seed {seed}", len(ends), work(spec, settings) / len(ends), first
        )
        examples = self._sample(seed)
        tokens = self._tokenize(examples)
        for index in range(first, len(ends)):
            start = ends[index - 1] if index else 0
            wall, compiling, metrics = time.perf_counter(), trainer.compile_seconds, []
            for step in range(start, ends[index]):
                if step % TRACE_EVERY == 0:
                    history["trace"].append({"step": step, **_floats(imbalance(state.params))})
                chosen = batch_indices(len(examples.labels), settings.batch_size, seed, step)
                batch = Batch(*tokens.batch(chosen), examples.labels[chosen])
                state, values = trainer.train_step(state, batch)
                metrics.append(values)
                progress.step(step + 1 - start, ends[index] - start)
            seconds = time.perf_counter() - wall - (trainer.compile_seconds - compiling)
            test = trainer.evaluate(state, self._evaluation, self._split.evaluation.labels)
            entry = {
                "step": ends[index],
                **{f"train_{key}": _mean(metrics, key) for key in metrics[0]},
                **{f"test_{key}": value for key, value in test.items()},
                "wall_seconds": seconds,
            }
            history["evaluations"].append(entry)
            checkpoints.save(ends[index], state, history)
            progress.epoch(entry)
        history["trace"].append({"step": settings.steps, **_floats(imbalance(state.params))})
        last = history["evaluations"][-1]
        seconds = sum(entry["wall_seconds"] for entry in history["evaluations"])
        return {
            **_provenance(config),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "compile_seconds": trainer.compile_seconds,
            **history,
            "final": {
                **{key: last[key] for key in ("test_top1", "test_loss", "train_loss")},
                "imbalance": float(
                    np.mean([abs(v) for k, v in history["trace"][-1].items() if k != "step"])
                ),
                "seconds_per_step": seconds / settings.steps,
            },
        }

    def _probe(self, config: dict[str, Any], seed: int) -> records.Record:
        """Logistic regression on the pretrained encoder's mean-pooled features."""
        from sklearn.linear_model import LogisticRegression

        examples = self._sample(seed)
        classifier = LogisticRegression(max_iter=10_000)
        classifier.fit(self._features(self._tokenize(examples)), examples.labels)
        features, labels = self._features(self._evaluation), self._split.evaluation.labels
        return {
            **_provenance(config),
            "parameters": classifier.coef_.size + classifier.intercept_.size,
            "final": {"test_top1": float(classifier.score(features, labels))},
        }

    def _features(self, tokens: text.Tokens) -> np.ndarray:
        graph, weights = nnx.split(self._pretrained.encoder)

        @jax.jit
        def pooled(weights: nnx.State, ids: Any, mask: Any) -> jax.Array:
            return bert.mean_pool(nnx.merge(graph, weights)(ids, mask), mask)

        features = np.empty((len(tokens.lengths), self._pretrained.encoder.config.hidden_size))
        for chosen, filled in tokens.chunks():
            features[chosen] = pooled(weights, *tokens.batch(filled))[: len(chosen)]
        return features

    def _sample(self, seed: int) -> text.Examples:
        return text.k_shot(self._split.pool, self._settings.shots, self._task, seed)

    def _tokenize(self, examples: text.Examples) -> text.Tokens:
        return text.tokenize(self._pretrained.tokenizer, examples.sentences, self._settings.length)

    def _trainer(self, spec: MethodSpec) -> Trainer:
        if spec.label not in self._trainers:
            classes = len(self._task.labels)
            self._trainers[spec.label] = Trainer(
                lambda seed: build_model(self._pretrained.encoder, self._settings, classes, seed),
                optimizer(spec, self._settings.steps),
            )
        return self._trainers[spec.label]


def work(spec: MethodSpec, settings: Settings) -> int:
    """Returns a run's work in gradient evaluations."""
    return 0 if spec.name == PROBE else METHODS[spec.name].gradients * settings.steps


def _provenance(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": records.FORMAT,
        "config": config,
        "versions": records.versions("tokenizers", "scikit-learn"),
        "hardware": records.hardware(),
    }


def _mean(metrics: list[dict[str, float]], key: str) -> float:
    return float(np.mean([values[key] for values in metrics], dtype=np.float64))


def _floats(values: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
