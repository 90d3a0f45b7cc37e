"""WebNLG 2017: sets of triples and texts that say them, and tokens of both, packed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PARTS = ("train", "dev", "test")


class Entry(NamedTuple):
    """Triples, and the texts that people wrote of them."""

    category: str
    triples: tuple[tuple[str, str, str], ...]
    texts: tuple[str, ...]

    def prompt(self) -> str:
        """Returns the triples as a line of text, which a text follows."""
        said = (" | ".join(triple).replace("_", " ") for triple in self.triples)
        return f"{' && '.join(said)}\n"


def load(data: Path) -> dict[str, list[Entry]]:
    """Loads the entries by part; those without a text are left out.

    Args:
        data: The folder of `webnlg_v1.6_en_PART.jsonl`, a line of JSON an entry with `category`,
            `triples` and `texts`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A line has another layout.
    """
    found = {}
    for part in PARTS:
        path = data / f"webnlg_v1.6_en_{part}.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"--data {data} has no {path.name}; pass WebNLG's folder.")
        lines = path.read_text(encoding="utf-8").splitlines()
        entries = [_entry(path, number, line) for number, line in enumerate(lines, start=1)]
        found[part] = [entry for entry in entries if entry.texts]
    return found


def _entry(path: Path, number: int, line: str) -> Entry:
    try:
        row = json.loads(line)
        triples = tuple((str(a), str(b), str(c)) for a, b, c in row["triples"])
        return Entry(row["category"], triples, tuple(row["texts"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}, line {number}: must be an object with category, triples and texts; {error!r}."
        ) from error


class Packed(NamedTuple):
    """Examples one behind the other in rows of one length; each array is of shape (rows, length).

    The segments count a row's examples from 1, and are 0 where it is filled up.
    """

    ids: Any  # int32
    segments: Any  # int32
    positions: Any  # int32: places in the example
    learned: Any  # bool: the tokens of texts and their ends, not those of prompts


def pack(examples: Sequence[tuple[list[int], list[int]]], length: int) -> tuple[Packed, int]:
    """Packs examples, in their order, into rows.

    Args:
        examples: The tokens of each prompt, and of its text with its end.
        length: That of the rows.

    Returns:
        The rows, and how many examples are longer and left out.

    Raises:
        ValueError: None fits.
    """
    rows: list[list[tuple[list[int], list[int]]]] = [[]]
    room, left_out = length, 0
    for prompt, text in examples:
        size = len(prompt) + len(text)
        if size > length:
            left_out += 1
            continue
        if size > room:
            rows.append([])
            room = length
        rows[-1].append((prompt, text))
        room -= size
    if not rows[0]:
        raise ValueError(f"--length {length}: no example is so short.")
    shape = len(rows), length
    ids, segments, positions = np.zeros((3, *shape), np.int32)
    packed = Packed(ids, segments, positions, np.zeros(shape, bool))
    for row, members in enumerate(rows):
        start = 0
        for segment, (prompt, text) in enumerate(members, start=1):
            here = slice(start, start + len(prompt) + len(text))
            packed.ids[row, here] = prompt + text
            packed.segments[row, here] = segment
            packed.positions[row, here] = np.arange(len(prompt) + len(text))
            packed.learned[row, start + len(prompt) : here.stop] = True
            start = here.stop
    return packed, left_out


def tokenize(
    entries: Sequence[Entry], encode: Callable[[str], list[int]], end: int
) -> list[tuple[list[int], list[int]]]:
    """Returns the tokens of each entry's prompt with each of its texts."""
    return [
        (encode(entry.prompt()), [*encode(text), end]) for entry in entries for text in entry.texts
    ]
