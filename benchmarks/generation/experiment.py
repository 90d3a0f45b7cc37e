"""A decoder's adapters trained to say triples: a part is what is trained until an evaluation."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

import samax
from benchmarks.core import records
from benchmarks.core.adapters import (
    TRACE_EVERY,
    AdapterComparison,
    batch_indices,
    mean_imbalance,
)
from benchmarks.core.comparison import Run
from benchmarks.core.methods import MethodSpec
from benchmarks.core.runs import History, Tick
from benchmarks.core.timing import compute_clock
from benchmarks.core.training import Trainer, TrainState
from benchmarks.data import webnlg
from benchmarks.data.webnlg import Entry, Packed
from benchmarks.generation.methods import GROUPS, WEIGHT_DECAY, optimizer
from benchmarks.models import llama
from benchmarks.models.lora import DecoderTask

if TYPE_CHECKING:
    from benchmarks.generation.__main__ import Configuration

SHOWN = 5
_DECIDED = (
    "steps",
    "eval_every",
    "batch_size",
    "length",
    "rank",
    "lora_alpha",
    "bfloat16",
    "test_sets",
    "new_tokens",
    "beams",
    "length_penalty",
)
_DATA_SEED = 0  # of which sets of triples are evaluated on
_WIDTHS = 32  # prompts are filled up to a multiple of so many tokens: few programs do
Batch = tuple[nnx.State, Any, Packed]  # frozen weights, what the adapted blocks see, the rows


class Pretrained(NamedTuple):
    """A decoder's weights and tokenizer."""

    name: str
    crc32: int
    config: llama.LlamaConfig
    tensors: Any
    tokenizer: Any
    end: int


def load_pretrained(path: Path | None) -> Pretrained:
    """Loads SmolLM2-135M-Instruct, or the model of a GGUF file.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: A package is missing.
        ValueError: The file does not fit this code.
    """
    place = llama.model_file() if path is None else path
    config, tensors, fields = llama.read(place)
    tokenizer = llama.load_tokenizer(fields)
    end = fields["tokenizer.ggml.eos_token_id"]
    name = llama.NAME if path is None else place.stem
    return Pretrained(name, zlib.crc32(place.read_bytes()), config, tensors, tokenizer, end)


class Generation(AdapterComparison):
    """Runs methods and seeds; the seed decides the adapters' start and the order of the rows."""

    packages = ("tokenizers", "sacrebleu")

    def __init__(
        self,
        data: dict[str, list[Entry]],
        pretrained: Pretrained,
        arguments: Configuration,
        folder: Path,
    ):
        """Packs the data.

        Raises:
            ValueError: The model has fewer layers, no example is short enough, or the folder holds
                records of another comparison.
        """
        self.folder, self._settings, self._pretrained = folder, arguments, pretrained
        config = pretrained.config
        top = arguments.layers or config.num_layers
        dtype = jnp.bfloat16 if arguments.bfloat16 else jnp.float32
        model = llama.load(config, pretrained.tensors, dtype=dtype, top=top, remat=arguments.remat)
        rng = np.random.default_rng(_DATA_SEED)
        order = rng.permutation(len(data["train"]))
        train, left_out = self._packed([data["train"][i] for i in order])
        dev, _ = self._packed([data["dev"][i] for i in rng.permutation(len(data["dev"]))])
        self._train, self._dev = (
            Packed(*(array[: count or None] for array in rows))
            for rows, count in ((train, arguments.train_rows), (dev, arguments.dev_rows))
        )
        if len(self._train.ids) < arguments.batch_size:
            raise ValueError(
                f"--batch-size {arguments.batch_size} is more than the {len(self._train.ids)} rows."
            )
        most = max(int(rows.learned.sum(1).max()) for rows in (self._train, self._dev))
        self._task = DecoderTask(model, rank=arguments.rank, alpha=arguments.lora_alpha, most=most)
        seen = {entry.category for entry in data["train"]}
        chosen = _balanced([entry.category in seen for entry in data["test"]], arguments.test_sets)
        self.test = [data["test"][i] for i in chosen]
        self._seen = [entry.category in seen for entry in self.test]
        self.shared = {
            **{name: getattr(arguments, name) for name in _DECIDED},
            "layers": top,
            "dev_rows": len(self._dev.ids),
            "model": pretrained.name,
            "model_crc32": pretrained.crc32,
            "data_crc32": zlib.crc32(repr(data).encode()),
            "train_rows": len(self._train.ids),
            "left_out": left_out,
            "weight_decay": WEIGHT_DECAY,
        }
        records.check_folder(folder, self.shared)
        self.trainers = {}
        self._loss = jax.jit(lambda params, batch: self._task.loss(params, ((), batch))[0])
        self._compute_below = jax.jit(self._task.below)
        self._dev_batches = list(self._batches(self._dev))

    def start(self, run: Run) -> tuple[Any, History]:
        """Returns fresh adapters, and notes the loss of the decoder as it is loaded."""
        state, history = super().start(run)
        history["start_dev_loss"] = self._dev_loss(state.params)
        return state, history

    def advance(self, run: Run, part: int, state: Any, history: History, tick: Tick) -> TrainState:
        """Trains until the next evaluation, and evaluates on the development rows."""
        spec, seed = run
        trainer, start, end = self.trainer(spec), *self.ends[part : part + 2]
        losses, seconds, tokens = [], 0.0, 0
        for step in range(start, end):
            if step % TRACE_EVERY == 0:
                self.note(state, step, history)
            data = self._batch(seed, step)
            trainer.compile(state, data)
            before = compute_clock()
            state, values = trainer.train(state, data)
            seconds += compute_clock() - before
            tokens += int((data[-1].segments > 0).sum())
            losses.append(values["train_loss"])
            tick((step + 1 - start) / (end - start))
        history["evaluations"].append(
            {
                "step": end,
                "train_loss": float(np.mean(losses, dtype=np.float64)),
                "dev_loss": self._dev_loss(state.evaluated()),
                "seconds": seconds,
                "tokens": tokens,
            }
        )
        return state

    def status(self, history: History) -> str:
        """Returns the losses after the last part."""
        last = history["evaluations"][-1]
        return f"train {last['train_loss']:.3f}, dev {last['dev_loss']:.3f}"

    def final(self, run: Run, state: TrainState, history: History) -> dict[str, Any]:
        """Returns the record's own part, with the texts that the trained decoder generates."""
        self.note(state, self._settings.steps, history)
        texts = self.generate(state.evaluated())
        evaluations = history["evaluations"]
        seconds = sum(entry["seconds"] for entry in evaluations)
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "compile_seconds": self.trainer(run[0]).compile_seconds,
            **history,
            "texts": texts,
            # What the first texts are of.
            "examples": [
                {"prompt": entry.prompt().strip(), "references": list(entry.texts)}
                for entry in self.test[:SHOWN]
            ],
            "final": {
                "train_loss": evaluations[-1]["train_loss"],
                "dev_loss": evaluations[-1]["dev_loss"],
                **self.scores(texts),
                "imbalance": mean_imbalance(history),
                "seconds_per_step": seconds / self._settings.steps,
                "tokens_per_second": sum(e["tokens"] for e in evaluations) / seconds,
            },
        }

    def generate(self, params: nnx.State) -> list[str]:
        """Returns the decoder's text of each set of triples that is tested."""
        tokenizer, settings = self._pretrained.tokenizer, self._settings
        prompts = [tokenizer.encode(entry.prompt()).ids for entry in self.test]
        # With others of about its length little of a prompt's row is filled up.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        model = self._task.model(params, self._task.frozen)
        found = [""] * len(prompts)
        for first in range(0, len(prompts), settings.generation_batch):
            part = order[first : first + settings.generation_batch]
            longest = -(-len(prompts[part[-1]]) // _WIDTHS) * _WIDTHS
            ids = np.zeros((settings.generation_batch, longest), np.int32)
            lengths = np.ones(settings.generation_batch, np.int32)
            for row, index in enumerate(part):
                prompt = prompts[index]
                ids[row, longest - len(prompt) :] = prompt
                lengths[row] = len(prompt)
            made = llama.generate(
                model,
                jnp.asarray(ids),
                jnp.asarray(lengths),
                end=self._pretrained.end,
                new_tokens=settings.new_tokens,
                beams=settings.beams,
                length_penalty=settings.length_penalty,
            )
            for index, row in zip(part, np.asarray(made.ids).tolist(), strict=False):
                found[index] = tokenizer.decode(_until(row, self._pretrained.end)).strip()
        return found

    def scores(self, texts: Sequence[str]) -> dict[str, float]:
        """Returns BLEU, chrF++ and TER over all, seen and unseen categories, by sacrebleu."""
        found: dict[str, float] = {}
        for name, wanted in (("all", (True, False)), ("seen", (True,)), ("unseen", (False,))):
            chosen = [i for i, seen in enumerate(self._seen) if seen in wanted]
            references = [self.test[i].texts for i in chosen]
            if not chosen:
                continue
            scores = corpus_scores([texts[i] for i in chosen], references)
            found |= {f"{metric}_{name}": value for metric, value in scores.items()}
        return found

    def make_trainer(self, spec: MethodSpec) -> Trainer:
        """Makes the method's trainer."""
        tx = optimizer(spec, self._settings.steps)
        return Trainer(self._task.init, self._task.loss, tx, scan=False)

    def _packed(self, entries: list[Entry]) -> tuple[Packed, int]:
        tokenizer = self._pretrained.tokenizer
        encode = lambda text: tokenizer.encode(text).ids  # noqa: E731
        examples = webnlg.tokenize(entries, encode, self._pretrained.end)
        return webnlg.pack(examples, self._settings.length)

    @functools.cached_property
    def _train_below(self) -> np.ndarray:
        """What the adapted blocks see of the training rows, for all runs."""
        found = self._batches(self._train)
        parts = (below for _, below, _ in tqdm.tqdm(found, "below", leave=False))
        return np.concatenate([np.asarray(below) for below in parts])

    def _batch(self, seed: int, step: int) -> Batch:
        """Returns a step's rows, with what the adapted blocks see of them."""
        size, count = self._settings.batch_size, len(self._train.ids)
        chosen = batch_indices(count, size, seed, step)
        rows = Packed(*(array[chosen] for array in self._train))
        return self._task.frozen, self._train_below[chosen], rows

    def _batches(self, rows: Packed) -> Iterator[Batch]:
        """Yields the rows in their order, with what the adapted blocks see of them."""
        for first in range(0, len(rows.ids), self._settings.batch_size):
            part = Packed(*(array[first : first + self._settings.batch_size] for array in rows))
            yield self._task.frozen, self._compute_below(self._task.frozen, part), part

    def _dev_loss(self, params: nnx.State) -> float:
        """Returns the mean loss of the development rows' texts, a batch after another."""
        total, count = 0.0, 0
        for batch in self._dev_batches:
            learned = int(batch[-1].learned[:, 1:].sum())
            total += learned * float(self._loss(params, batch))
            count += learned
        return total / count

    def imbalances(self, params: nnx.State) -> dict[str, Any]:
        """Returns the balancedness of each adapter, by block."""
        return _balancedness(params)


def corpus_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns BLEU, chrF++ and TER of texts with several references each."""
    from sacrebleu.metrics import BLEU, CHRF, TER

    most = max(map(len, references))
    # As many streams as there are references at most; a text that has fewer has none there.
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    metrics: dict[str, Any] = {"bleu": BLEU(), "chrf": CHRF(word_order=2), "ter": TER()}
    return {
        name: float(metric.corpus_score(list(texts), streams).score)
        for name, metric in metrics.items()
    }


@jax.jit
def _balancedness(params: nnx.State) -> dict[str, jax.Array]:
    return samax.balancedness(params, GROUPS)


def _balanced(seen: Sequence[bool], count: int) -> list[int]:
    """Returns so many places, at most half of them unseen where there are enough of both."""
    rng = np.random.default_rng(_DATA_SEED)
    groups = [
        rng.permutation([i for i, s in enumerate(seen) if s is kind]) for kind in (True, False)
    ]
    unseen = min(len(groups[1]), count // 2)
    return sorted([*groups[0][: count - unseen].tolist(), *groups[1][:unseen].tolist()])


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
