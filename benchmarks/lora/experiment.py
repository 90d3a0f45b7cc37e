"""Methods and seeds fine-tuned on one task: a part is what is trained until an evaluation."""

import functools
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import samax
from benchmarks.core import records, tunable
from benchmarks.core.adapters import (
    TRACE_EVERY,
    AdapterComparison,
    mean_imbalance,
)
from benchmarks.core.comparison import Run
from benchmarks.core.methods import MethodSpec
from benchmarks.core.runs import History, Tick
from benchmarks.core.training import Trainer, TrainState, first_rows, mean_scores
from benchmarks.data import corrupt_labels, text
from benchmarks.lora import inputs
from benchmarks.lora.methods import PROBE, WEIGHT_DECAY, optimizer
from benchmarks.models import bert
from benchmarks.models.lora import FULL, TRAINED, SentenceTask, build_classifier

if TYPE_CHECKING:
    from benchmarks.lora.__main__ import Configuration

_DECIDED = ("task", "shots", "steps", "eval_every", "batch_size", "length", "adapter", "rank")
_RECORDED = (*_DECIDED, "lora_alpha", "bfloat16")
_OPTIONAL = ("label_noise", "layers", "by_length")


class Pretrained(NamedTuple):
    """A frozen encoder with its tokenizer."""

    name: str
    crc32: int
    encoder: bert.Bert
    tokenizer: Any


class Split(NamedTuple):
    """What is trained on, by seed, and what is evaluated on."""

    sample: Callable[[int], text.Examples]
    evaluation: text.Examples
    evaluated_on: str
    crc32: int  # of all its examples


def drawn(
    pool: text.Examples, evaluation: text.Examples, evaluated_on: str, task: str, shots: int
) -> Split:
    """Returns a split whose training examples are drawn from a pool, so many a class."""

    def sample(seed: int) -> text.Examples:
        return text.k_shot(pool, shots, text.TASKS[task], seed)

    return Split(sample, evaluation, evaluated_on, _crc32(pool, evaluation))


def given(task: str, data: Path, label_noise: float, held_out: int) -> tuple[Split, Split]:
    """Returns the splits of a task that come with it: tested, and on the first one's dev set.

    A seed counts the splits. Of a dev set about `held_out` examples are used, as many of each class
    as its share. Of the training labels, and of the dev set's by which settings are chosen, the
    share of `label_noise` is replaced by others.
    """
    splits, test = text.load_splits(task, data)
    classes = len(text.TASKS[task].labels)

    def noisy(examples: text.Examples, seed: int) -> text.Examples:
        return examples._replace(labels=corrupt_labels(examples.labels, label_noise, classes, seed))

    def sample(seed: int) -> text.Examples:
        return noisy(splits[text.SPLITS[seed]][0], seed)

    dev = noisy(text.hold_out(splits[text.SPLITS[0]][1], held_out, seed=0)[1], 0)
    crc32 = _crc32(*(part for split in splits.values() for part in split), test)
    return Split(sample, test, "test", crc32), Split(sample, dev, "dev", crc32)


def _crc32(*parts: text.Examples) -> int:
    lines = (
        f"{label}\t{sentence}" for part in parts for sentence, label in zip(*part, strict=True)
    )
    return zlib.crc32("\n".join(lines).encode())


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


class Training(NamedTuple):
    """What a seed trains on."""

    sentences: text.Tokens | inputs.Hidden
    labels: np.ndarray
    batches: list[np.ndarray]  # the positions of each step's examples


class FineTuning(AdapterComparison):
    """Runs methods and seeds on one task; programs and frozen weights are shared between seeds.

    The seed decides the training examples, the initialization and the batches, so that methods are
    compared in pairs.
    """

    packages = ("tokenizers", "scikit-learn")

    def __init__(
        self, split: Split, pretrained: Pretrained, arguments: "Configuration", folder: Path
    ):
        """Tokenizes what is evaluated on.

        Raises:
            ValueError: The length or the layers are more than the model allows, a class has too few
                examples, or the folder holds records of another comparison.
        """
        bert.check_length(arguments.length, pretrained.encoder.config, "--length")
        self.folder, self._split, self._pretrained = folder, split, pretrained
        self._settings = arguments
        examples = len(self._sample(0).labels)
        if arguments.batch_size > examples:
            raise ValueError(
                f"--batch-size {arguments.batch_size} is more than the {examples} training "
                "examples."
            )
        self.shared = {
            **{name: getattr(arguments, name) for name in _RECORDED},
            "model": pretrained.name,
            "model_crc32": pretrained.crc32,
            "data_crc32": split.crc32,
            "train_examples": examples,
            "evaluated_on": split.evaluated_on,
            "test_examples": len(split.evaluation.labels),
            "weight_decay": WEIGHT_DECAY,
            # Earlier records do not have these keys.
            **{name: getattr(arguments, name) for name in _OPTIONAL if getattr(arguments, name)},
        }
        records.check_folder(folder, self.shared)
        encoder: bert.Bert | bert.LastBlocks = pretrained.encoder
        self._below: inputs.Below | None = None
        if arguments.layers:
            below, encoder = bert.cut(pretrained.encoder, arguments.layers)
            self._below = inputs.compiled(below)
        # Once for all runs; of a seed's training examples until the next seed comes.
        self._evaluation = functools.cache(self._read_evaluation)
        self._training = functools.lru_cache(1)(self._read_training)
        # One part needs no checkpoint.
        self.saves = arguments.eval_every < arguments.steps
        build = functools.partial(build_classifier, encoder, len(text.TASKS[arguments.task].labels))
        options: dict[str, Any] = {"adapter": arguments.adapter, "rank": arguments.rank}
        build = functools.partial(build, alpha=arguments.lora_alpha, **options)
        self._full = arguments.adapter == FULL
        self._model = SentenceTask(build, nnx.Param if self._full else TRAINED)
        self.trainers = {}

    def parts(self, run: Run) -> list[float]:
        """Returns the gradients until each evaluation; the probe is done at once."""
        return [] if run[0].name == PROBE else super().parts(run)

    def start(self, run: Run) -> tuple[TrainState | None, History]:
        """Returns fresh adapters and classifier, told the run's hyper-parameters."""
        if run[0].name == PROBE:
            return None, {}
        state, history = super().start(run)
        return tunable.told(state, run[0]), history

    def advance(self, run: Run, part: int, state: Any, history: History, tick: Tick) -> TrainState:
        """Trains until the next evaluation, and evaluates."""
        trainer, training = self.trainer(run[0]), self._training(run[1])
        start, end = self.ends[part : part + 2]
        wall, compiling, metrics = time.perf_counter(), trainer.compile_seconds, []
        for step in range(start, end):
            if step % TRACE_EVERY == 0:
                self.note(state, step, history)
            chosen = training.batches[step]
            batch = (
                self._model.frozen,
                *training.sentences.batch(chosen),
                training.labels[chosen],
            )
            state, values = trainer.train(state, batch)
            metrics.append(values)
            tick((step + 1 - start) / (end - start))
        seconds = time.perf_counter() - wall - (trainer.compile_seconds - compiling)
        labels, params = self._split.evaluation.labels, state.evaluated()
        evaluation = self._evaluation()
        test = mean_scores(
            lambda batch: self._model.scores(params, (self._model.frozen, *batch)),
            (
                ((*evaluation.batch(filled), labels[filled]), len(chosen))
                for chosen, filled in evaluation.chunks()
            ),
        )
        means = {
            key: float(np.mean([values[key] for values in metrics], dtype=np.float64))
            for key in metrics[0]
        }
        scores = {f"test_{key}": value for key, value in test.items()}
        history["evaluations"].append({"step": end, **means, **scores, "wall_seconds": seconds})
        return state

    def final(self, run: Run, state: TrainState | None, history: History) -> dict[str, Any]:
        """Returns the record's own part."""
        if state is None:
            return self._probe(run[1])
        steps = self._settings.steps
        self.note(state, steps, history)
        last = history["evaluations"][-1]
        imbalances = {} if self._full else {"imbalance": mean_imbalance(history)}
        seconds = sum(entry["wall_seconds"] for entry in history["evaluations"])
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "compile_seconds": self.trainer(run[0]).compile_seconds,
            **history,
            "final": {
                **{key: last[key] for key in ("test_top1", "test_loss", "train_loss")},
                **imbalances,
                "seconds_per_step": seconds / steps,
            },
        }

    def imbalances(self, params: nnx.State) -> dict[str, Any]:
        """Returns what `imbalance` finds; nothing where there are no adapters."""
        return {} if self._full else imbalance(params)

    def _probe(self, seed: int) -> dict[str, Any]:
        """Logistic regression on the pretrained encoder's mean-pooled features."""
        from sklearn.linear_model import LogisticRegression

        examples = self._sample(seed)
        classifier = LogisticRegression(max_iter=10_000)
        classifier.fit(self._features(self._tokenize(examples)), examples.labels)
        evaluation = self._split.evaluation
        features, labels = self._features(self._tokenize(evaluation)), evaluation.labels
        return {
            "parameters": classifier.coef_.size + classifier.intercept_.size,
            "final": {"test_top1": float(classifier.score(features, labels))},
        }

    def _features(self, tokens: text.Tokens) -> np.ndarray:
        graph, weights = nnx.split(self._pretrained.encoder)

        @jax.jit
        def pooled(weights: nnx.State, ids: Any, mask: Any, types: Any) -> jax.Array:
            return bert.mean_pool(nnx.merge(graph, weights)(ids, mask, types), mask)

        features = np.empty((len(tokens.lengths), self._pretrained.encoder.config.hidden_size))
        for chosen, filled in tokens.chunks():
            features[chosen] = pooled(weights, *tokens.batch(filled))[: len(chosen)]
        return features

    def _sample(self, seed: int) -> text.Examples:
        return self._split.sample(seed)

    def _tokenize(self, examples: text.Examples) -> text.Tokens:
        settings = self._settings
        return text.tokenize(
            self._pretrained.tokenizer, examples.sentences, settings.length, settings.multiple
        )

    def _read_evaluation(self) -> text.Tokens | inputs.Hidden:
        tokens = self._tokenize(self._split.evaluation)
        return tokens if self._below is None else inputs.hidden(self._below, tokens)

    def _read_training(self, seed: int) -> Training:
        settings, examples = self._settings, self._sample(seed)
        tokens = self._tokenize(examples)
        steps = range(settings.steps)
        batches = list(
            inputs.batches(tokens.lengths, settings.batch_size, seed, steps, settings.by_length)
        )
        if self._below is None:
            return Training(tokens, examples.labels, batches)
        hidden = inputs.hidden(self._below, tokens, np.unique(np.concatenate(batches)))
        return Training(hidden, examples.labels, batches)

    def program(self, spec: MethodSpec) -> str:
        """Returns what methods share that differ in numbers which programs are told."""
        return tunable.program(spec)

    def make_trainer(self, spec: MethodSpec) -> Trainer:
        """Makes the method's trainer."""
        tx, share = optimizer(spec, self._settings.steps), spec.method.ascent_share
        return Trainer(
            self._model.init, self._model.loss, tx, ascent_share=share, part_of=_first_examples
        )


def _first_examples(batch: Any, share: float) -> Any:
    """A share of a batch, whose first entry are the frozen weights."""
    return batch[0], *first_rows(batch[1:], share)


@jax.jit
def imbalance(params: nnx.State) -> dict[str, jax.Array]:
    """Returns each adapter's balancedness; of three cores (FLoRA) its norm deviation."""
    cores = jax.tree.leaves(samax.lora_groups(params))
    if len(cores) == 2 * len(set(cores)):
        return samax.balancedness(params, samax.lora_groups)
    return samax.norm_deviation(params, samax.lora_groups)
