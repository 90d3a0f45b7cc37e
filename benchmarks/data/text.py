"""Sentence classification data: tab-separated files, k-shot samples, and tokens in batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MULTIPLE = 16  # batches have few different lengths, as each is a program to compile


class Task(NamedTuple):
    """A task: a folder with tab-separated files, header `sentence`, `label`."""

    title: str  # What results call it
    train: str  # The training pool's file
    test: str  # The test file
    labels: tuple[str, ...]  # The labels, in the order of the classes
    # Labels with few examples, of which a k-shot sample may take fewer than k.
    rare: tuple[str, ...] = ()


TASKS = {
    "sst2": Task("SST-2", "train.tsv", "validation.tsv", ("0", "1")),  # GLUE's test has no labels
    # ABBR has 84 training questions in all; few-shot work with k above that takes all of them.
    "trec": Task(
        "TREC",
        "train.tsv",
        "test.tsv",
        ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"),
        rare=("ABBR",),
    ),
}


class Examples(NamedTuple):
    """Sentences and the positions of their labels in the task's labels."""

    sentences: np.ndarray  # of strings, (n,)
    labels: np.ndarray  # int32, (n,)

    def take(self, chosen: np.ndarray) -> "Examples":
        """Returns the examples at some positions."""
        return Examples(self.sentences[chosen], self.labels[chosen])


class Tokens(NamedTuple):
    """Token ids of sentences, filled up with zeros."""

    ids: np.ndarray  # int32, (n, longest)
    lengths: np.ndarray  # int32, (n,)

    def batch(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and mask of the sentences at some positions, of shape (sentences, length).

        The length is that of the longest of them, rounded up to a multiple of 16: what is cut off
        is padding, which no result depends on.
        """
        lengths = self.lengths[chosen]
        length = -(-int(lengths.max()) // _MULTIPLE) * _MULTIPLE
        ids = np.zeros((len(chosen), length), np.int32)
        rows = self.ids[chosen, :length]
        ids[:, : rows.shape[1]] = rows
        return ids, np.arange(length) < lengths[:, None]

    def chunks(self, size: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields all positions for evaluation, short sentences with short ones.

        Each time the positions, and the same filled up to `size` by repeating them.
        """
        order = np.argsort(self.lengths, kind="stable")
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            yield chosen, np.resize(chosen, size)


def check(name: str) -> None:
    """Raises a `ValueError` unless there is such a task."""
    if name not in TASKS:
        raise ValueError(f"--task {name!r} is unknown; the tasks are {', '.join(TASKS)}.")


def load(name: str, data: Path) -> tuple[Examples, Examples]:
    """Loads a task's training pool and test set.

    Args:
        name: A key of `TASKS`.
        data: The task's folder, or the folder that holds it under the task's name.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The task is unknown, or a file is not in the layout of `Task`.
    """
    check(name)
    task = TASKS[name]
    folder = data / name if (data / name).is_dir() else data
    for file in (task.train, task.test):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"--data {data} has no {file}: pass the folder of {task.title}'s files "
                f"{task.train} and {task.test}, or its parent with {name}/ in it."
            )
    return read(folder / task.train, task), read(folder / task.test, task)


def read(path: Path, task: Task) -> Examples:
    """Reads one file.

    Raises:
        ValueError: A line is not a sentence, a tab and one of the task's labels.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or lines[0].split("\t") != ["sentence", "label"]:
        raise ValueError(f"{path} must start with the header 'sentence<tab>label'.")
    rows = [line.split("\t") for line in lines[1:]]
    for number, row in enumerate(rows, start=2):
        if len(row) != 2 or row[1] not in task.labels:
            raise ValueError(
                f"{path}, line {number}: must be a sentence, a tab and one of "
                f"{', '.join(task.labels)}, and is {lines[number - 1]!r}."
            )
    positions = {label: index for index, label in enumerate(task.labels)}
    sentences, labels = zip(*rows, strict=True) if rows else ((), ())
    return Examples(
        np.array(sentences, dtype=object),
        np.array([positions[label] for label in labels], np.int32),
    )


def k_shot(examples: Examples, shots: int, task: Task, seed: int) -> Examples:
    """Draws k examples a class; of a rare label all, where there are fewer.

    Raises:
        ValueError: A class that is not rare has fewer than k examples.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for index, label in enumerate(task.labels):
        found = np.flatnonzero(examples.labels == index)
        if len(found) < shots and label not in task.rare:
            raise ValueError(
                f"--shots {shots}: the class {label} of {task.title} has {len(found)} training "
                "examples; pass fewer shots."
            )
        chosen.append(rng.permutation(found)[:shots])
    return examples.take(np.sort(np.concatenate(chosen)))


def hold_out(examples: Examples, count: int, seed: int) -> tuple[Examples, Examples]:
    """Splits off about `count` examples, as many of each class as its share.

    Returns:
        The rest, and what was split off.
    """
    rng = np.random.default_rng(seed)
    share = min(0.5, count / len(examples.labels))
    held = np.zeros(len(examples.labels), bool)
    for label in np.unique(examples.labels):
        found = rng.permutation(np.flatnonzero(examples.labels == label))
        held[found[: round(share * len(found))]] = True
    return examples.take(np.flatnonzero(~held)), examples.take(np.flatnonzero(held))


def load_tokenizer(folder: Path) -> Any:
    """Loads a model's `tokenizer.json`, without the padding and truncation that it may hold.

    Raises:
        FileNotFoundError: The file is missing.
    """
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json; pass a BERT model's folder.")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokenize(tokenizer: Any, sentences: np.ndarray, length: int) -> Tokens:
    """Turns sentences into token ids, cut after `length` tokens (the last of which stays [SEP])."""
    tokenizer.enable_truncation(length)
    encoded = tokenizer.encode_batch(list(sentences))
    tokenizer.no_truncation()
    lengths = np.array([len(one.ids) for one in encoded], np.int32)
    ids = np.zeros((len(encoded), int(lengths.max(initial=0))), np.int32)
    for row, one in zip(ids, encoded, strict=True):
        row[: len(one.ids)] = one.ids
    return Tokens(ids, lengths)
