"""What the classifier reads: tokens, or what the frozen blocks below the adapters make of them."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from benchmarks.core.adapters import batch_indices
from benchmarks.data.text import Tokens
from benchmarks.models.bert import Bert

_SORTED = 8
"""Batches whose sentences are sorted by length, where batches are of similar lengths."""

Below = Callable[..., jax.Array]


class Hidden(NamedTuple):
    """Hidden states of sentences, to read as `Tokens` are."""

    tokens: Tokens
    states: dict[int, np.ndarray]  # (length, size) by position

    def batch(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns hidden states, zero on padding, and mask of the sentences at some positions."""
        mask = self.tokens.batch(chosen)[1]
        rows = [self.states[index] for index in chosen]
        hidden = np.zeros((*mask.shape, rows[0].shape[-1]), rows[0].dtype)
        for filled, row in zip(hidden, rows, strict=True):
            filled[: len(row)] = row
        return hidden, mask

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields all positions for evaluation, as `Tokens` does."""
        return self.tokens.chunks()


def compiled(below: Bert) -> Below:
    """Returns frozen blocks as a function of ids, mask and types."""
    graph, weights = nnx.split(below)
    function = jax.jit(lambda weights, *batch: nnx.merge(graph, weights)(*batch))
    return lambda *batch: function(weights, *batch)


def hidden(below: Below, tokens: Tokens, chosen: np.ndarray | None = None) -> Hidden:
    """Computes the hidden states of all sentences, or of those at some positions, once each."""
    states: dict[int, np.ndarray] = {}
    for own, filled in tokens.chunks(among=chosen):
        found = np.asarray(below(*tokens.batch(filled)))
        states |= {
            index: row[: tokens.lengths[index]].copy()
            for index, row in zip(own.tolist(), found, strict=False)
        }
    return Hidden(tokens, states)


def batches(
    lengths: np.ndarray, size: int, seed: int, steps: Iterable[int], by_length: bool
) -> Iterator[np.ndarray]:
    """Yields the examples of each step.

    By length, eight successive batches are sorted and cut anew, and come in a random order: what a
    batch is filled up to is then near the length of its sentences.
    """
    for step in steps:
        if not by_length:
            yield batch_indices(len(lengths), size, seed, step)
            continue
        position, first = step % _SORTED, step - step % _SORTED
        drawn = np.concatenate(
            [batch_indices(len(lengths), size, seed, first + i) for i in range(_SORTED)]
        )
        drawn = drawn[np.argsort(lengths[drawn], kind="stable")]
        order = np.random.default_rng((seed, first)).permutation(_SORTED)
        yield drawn[order[position] * size :][:size]
