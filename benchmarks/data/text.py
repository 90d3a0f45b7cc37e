"""Sentence classification data: tab-separated files, k-shot samples, and tokens in batches."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MULTIPLE = 16
"""By default batches have lengths that it divides: few, as each is a program to compile."""


class Task(NamedTuple):
    """A task: a folder with tab-separated files.

    Their header is `sentence`, `label`, or, of one whose splits are given, `sentence1`,
    `sentence2`, `label`.
    """

    title: str  # What results call it
    train: str  # The training pool's file; of one whose splits are given, in each split's folder
    test: str  # The test file
    labels: tuple[str, ...]  # The labels, in the order of the classes
    # Labels with few examples, of which a k-shot sample may take fewer than k.
    rare: tuple[str, ...] = ()
    folder: str | None = None  # The folder's name; by default the task's
    dev: str | None = None  # The development file in each split's folder

    @property
    def given(self) -> bool:
        """Whether the task comes with splits."""
        return self.dev is not None


SPLITS = (13, 21, 42, 87, 100)
"""The seeds of the splits that are given, as few-shot work has them (Gao et al. 2021, arXiv
2012.15723); their folders are `512-SEED`."""


def _given(title: str, folder: str, labels: tuple[str, ...], end: str = ".tsv") -> Task:
    rare = ("2",) if folder == "trec" else ()
    return Task(title, "train.tsv", f"test{end}", labels, rare, folder, dev=f"dev{end}")


_INFERENCE = ("contradiction", "entailment", "neutral")
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
    "SST-2": _given("SST-2, few-shot", "SST-2", ("0", "1")),
    "SST-5": _given("SST-5, few-shot", "sst-5", tuple("01234")),
    "SNLI": _given("SNLI, few-shot", "SNLI", _INFERENCE),
    "MNLI": _given("MNLI, few-shot", "MNLI", _INFERENCE, "_matched.tsv"),
    "RTE": _given("RTE, few-shot", "RTE", ("entailment", "not_entailment")),
    "TREC": _given("TREC, few-shot", "trec", tuple("012345")),
}
FEW_SHOT = tuple(name for name, task in TASKS.items() if task.given)
"""The six tasks of arXiv 2410.14802."""


class Examples(NamedTuple):
    """Sentences and the positions of their labels in the task's labels."""

    sentences: np.ndarray  # of strings, or pairs of them, (n,)
    labels: np.ndarray  # int32, (n,)

    def take(self, chosen: np.ndarray) -> "Examples":
        """Returns the examples at some positions."""
        return Examples(self.sentences[chosen], self.labels[chosen])


class Tokens(NamedTuple):
    """Token ids of sentences, filled up with zeros."""

    ids: np.ndarray  # int32, (n, longest)
    lengths: np.ndarray  # int32, (n,)
    types: np.ndarray  # int32, (n, longest): 1 in the second sentence of a pair
    multiple: int = MULTIPLE  # What the length of a batch is a multiple of

    def batch(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns ids, mask and types of the sentences at some positions, (sentences, length).

        The length is that of the longest of them, rounded up to `multiple`: what is cut off is
        padding, which no result depends on.
        """
        lengths = self.lengths[chosen]
        length = -(-int(lengths.max()) // self.multiple) * self.multiple
        ids, types = np.zeros((2, len(chosen), length), np.int32)
        for filled, values in ((ids, self.ids), (types, self.types)):
            rows = values[chosen, :length]
            filled[:, : rows.shape[1]] = rows
        return ids, np.arange(length) < lengths[:, None], types

    def chunks(
        self, size: int = 64, among: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields all positions, or some, for evaluation, short sentences with short ones.

        Each time the positions, and the same filled up to `size` by repeating them.
        """
        among = np.arange(len(self.lengths)) if among is None else among
        order = among[np.argsort(self.lengths[among], kind="stable")]
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
    folder = _folder(name, data, (TASKS[name].train, TASKS[name].test))
    return read(folder / TASKS[name].train, TASKS[name]), read(
        folder / TASKS[name].test, TASKS[name]
    )


def load_splits(name: str, data: Path) -> tuple[dict[int, tuple[Examples, Examples]], Examples]:
    """Loads a task whose splits are given.

    Returns:
        The training and the development examples by the split's seed, and the test set.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is not in the layout of `Task`.
    """
    task = TASKS[name]
    folders = {seed: f"512-{seed}" for seed in SPLITS}
    files = [f"{folder}/{file}" for folder in folders.values() for file in (task.train, task.dev)]
    place = _folder(name, data, (*files, task.test))
    splits = {
        seed: (read(place / folder / task.train, task), read(place / folder / str(task.dev), task))
        for seed, folder in folders.items()
    }
    return splits, read(place / task.test, task)


def _folder(name: str, data: Path, files: Sequence[str]) -> Path:
    """Returns the folder of a task's files: the one that is named, or one in it."""
    own = TASKS[name].folder or name
    folder = data / own if (data / own).is_dir() else data
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"--data {data} has no {file}: pass the folder of {TASKS[name].title}'s files "
                f"{' and '.join(files[-2:])}, or its parent with {own}/ in it."
            )
    return folder


def read(path: Path, task: Task) -> Examples:
    """Reads one file.

    Raises:
        ValueError: A line is not a sentence, a tab and one of the task's labels.
    """
    columns = ["sentence1", "sentence2", "label"] if task.given else ["sentence", "label"]
    # No other sign than this ends a line, and quotes are text.
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if lines[0].split("\t") != columns:
        raise ValueError(f"{path} must start with the header {'<tab>'.join(columns)!r}.")
    rows = [line.split("\t") for line in lines[1:]]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(columns) or row[-1] not in task.labels:
            raise ValueError(
                f"{path}, line {number}: must be {'two sentences' if task.given else 'a sentence'}"
                f", a tab and one of {', '.join(task.labels)}, and is {lines[number - 1]!r}."
            )
    positions = {label: index for index, label in enumerate(task.labels)}
    sentences = np.empty(len(rows), dtype=object)
    for index, row in enumerate(rows):
        sentences[index] = (row[0], row[1]) if task.given and row[1] else row[0]
    return Examples(sentences, np.array([positions[row[-1]] for row in rows], np.int32))


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


def tokenize(
    tokenizer: Any, sentences: np.ndarray, length: int, multiple: int = MULTIPLE
) -> Tokens:
    """Turns sentences, or pairs, into token ids, cut after `length` tokens.

    The last of them stays [SEP]; of a pair the longer sentence is cut.
    """
    tokenizer.enable_truncation(length)
    encoded = tokenizer.encode_batch(list(sentences))
    tokenizer.no_truncation()
    lengths = np.array([len(one.ids) for one in encoded], np.int32)
    ids, types = np.zeros((2, len(encoded), int(lengths.max(initial=0))), np.int32)
    for index, one in enumerate(encoded):
        ids[index, : len(one.ids)] = one.ids
        types[index, : len(one.ids)] = one.type_ids
    return Tokens(ids, lengths, types, multiple)
