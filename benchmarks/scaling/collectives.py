"""What a compiled program sends between devices, read from XLA's text of it."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?[\w.-]+ = (?P<type>.+?) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|"
    r"collective-broadcast|ragged-all-to-all)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]+\d+\w*|pred)\[(?P<shape>[\d,]*)\]")
_BITS = re.compile(r"\d+")

# Of the bytes of a whole array, what each of n devices sends: a ring's, which is the least possible
# for these. The others send once what they hold.
_RING_PASSES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}


class Collective(NamedTuple):
    """One array that one collective of a program takes."""

    launch: int  # Which collective of the program: XLA lets one carry several arrays
    # `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, `collective-permute`, ...
    kind: str
    dtype: str  # XLA's name of the element type, such as `f32`
    # The array's shape on each device once it is whole: an all-gather's result, a reduce-scatter's
    # operand.
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The array's size."""
        bits = _BITS.search(self.dtype)  # a `pred` has none and takes a byte
        return math.prod(self.shape) * (1 if bits is None else max(1, int(bits.group()) // 8))


def read_collectives(text: str, devices: int) -> list[Collective]:
    """Reads the collectives of a program without loops around them.

    Args:
        text: `jax.stages.Compiled.as_text()`.
        devices: How many devices take part in each.

    Raises:
        ValueError: A collective stands in a loop or a branch, where it runs an unknown number of
            times.
    """
    found = []
    launches = 0
    entry = False
    for line in text.splitlines():
        if not line.startswith(" "):
            entry = line.startswith("ENTRY")
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        if not entry:
            raise ValueError(f"A collective outside of the entry computation: {line.strip()[:100]}")
        kind = match["kind"]
        arrays = [
            (array["dtype"], tuple(map(int, re.findall(r"\d+", array["shape"]))))
            for array in _ARRAY.finditer(match["type"])
        ]
        if match["start"] and kind == "all-gather":  # operands, then results
            arrays = arrays[len(arrays) // 2 :]
        if match["start"] and kind == "collective-permute":  # operand, result, and two contexts
            arrays = arrays[1:2]
        for dtype, shape in arrays:
            whole = (devices * shape[0], *shape[1:]) if kind == "reduce-scatter" else shape
            found.append(Collective(launches, kind, dtype, whole))
        launches += 1
    return found


def ring_bytes(collectives: Iterable[Collective], devices: int) -> float:
    r"""Returns what each device sends with ring algorithms.

    An all-reduce of B bytes over n devices is a reduce-scatter and an all-gather, of
    $B (n - 1) / n$ each; that is also what one of them, or an all-to-all, takes alone.
    """
    share = (devices - 1) / devices
    return sum(
        c.bytes * share * _RING_PASSES[c.kind] if c.kind in _RING_PASSES else c.bytes
        for c in collectives
    )
