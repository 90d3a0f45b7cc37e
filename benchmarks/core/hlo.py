"""What a compiled program computes and sends, read from XLA's text of it.

XLA's own count takes the body of a loop once. Here it counts as often as the loop turns.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all"),
)
# Of the bytes of a whole array, what each of n devices sends: a ring's, which is the least possible
# for these. The others send once what they hold.
_RING_PASSES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}

_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.+?) (?P<kind>[a-z][\w-]*)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]+\d+\w*|pred)\[(?P<shape>[\d,]*)\]")
# A reduction's own sum counts for nothing, and a loop's condition computes nothing to count.
_CALLED = re.compile(r"\b(?:calls|body)=%?([\w.-]+)")
_BITS = re.compile(r"\d+")
_NAME = re.compile(r"%([\w.-]+)")


class Array(NamedTuple):
    """An array of a program, as each device has it."""

    dtype: str  # XLA's name of the element type, such as `f32`
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        bits = _BITS.search(self.dtype)  # a `pred` has none and takes a byte
        return math.prod(self.shape) * (1 if bits is None else max(1, int(bits.group()) // 8))


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    kind: str
    arrays: tuple[Array, ...]  # what it makes
    operands: tuple[str, ...]
    text: str  # what follows the kind: operands and attributes
    root: bool

    def attribute(self, name: str) -> str:
        """Returns an attribute's text up to the next one; empty where there is none."""
        found = re.search(rf"\b{name}=(\{{.*?\}}|[^,\s]+)", self.text)
        return found[1] if found else ""


Program = dict[str, dict[str, Instruction]]
"""Instructions by name, by computation; the entry's name is empty."""


class Collective(NamedTuple):
    """One array that one collective of a program takes."""

    launch: int  # Which collective of the program: XLA lets one carry several arrays
    kind: str
    dtype: str
    # The array's shape on each device once it is whole: an all-gather's result, a reduce-scatter's
    # operand.
    shape: tuple[int, ...]
    devices: int  # How many take part in each
    times: int = 1  # How often it runs in a step

    @property
    def bytes(self) -> int:
        """What is made whole in a step."""
        return self.times * Array(self.dtype, self.shape).bytes

    @property
    def sent_bytes(self) -> float:
        r"""What each device sends in a step with ring algorithms.

        An all-reduce of B bytes over n devices is a reduce-scatter and an all-gather, of
        $B (n - 1) / n$ each; that is also what one of them, or an all-to-all, takes alone.
        """
        if self.kind not in _RING_PASSES:
            return self.bytes
        return self.bytes * _RING_PASSES[self.kind] * (self.devices - 1) / self.devices


def read(text: str) -> Program:
    """Reads `jax.stages.Compiled.as_text()`."""
    program: Program = {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = program.setdefault("" if head["entry"] else head["name"], {})
            continue
        match = _INSTRUCTION.match(line)
        if match:
            current[match["name"]] = Instruction(
                match["name"],
                match["kind"],
                tuple(_arrays(match["type"])),
                tuple(_NAME.findall(_until_closed(match["rest"]))),
                match["rest"],
                bool(match["root"]),
            )
    return program


def _arrays(text: str) -> Iterator[Array]:
    for found in _ARRAY.finditer(text):
        yield Array(found["dtype"], tuple(map(int, re.findall(r"\d+", found["shape"]))))


def _until_closed(text: str) -> str:
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[:place]
    return text


def walk(
    program: Program, name: str = "", times: int = 1
) -> Iterator[tuple[str, Instruction, int]]:
    """Yields each instruction with its computation, and how often it runs in a step.

    Raises:
        ValueError: How often a loop turns, or which branch is taken, is not known.
    """
    for instruction in program[name].values():
        yield name, instruction, times
        if instruction.kind == "conditional":
            raise ValueError(f"A branch, which is taken an unknown number of times: {instruction}")
        turns = _turns(program, program[name], instruction) if instruction.kind == "while" else 1
        for called in _CALLED.findall(instruction.text):
            yield from walk(program, called, times * turns)


def _turns(program: Program, around: dict[str, Instruction], loop: Instruction) -> int:
    """How often a loop turns; unless XLA says it, from a constant by constants to below one."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)  # which XLA for CPU says
    if known:
        return int(known[1])
    condition = program[loop.attribute("condition").lstrip("%")]
    root = _root(condition)
    counter, bound = (condition.get(name) for name in root.operands)
    start = step = None
    if counter and counter.kind == "get-tuple-element":
        place = int(counter.attribute("index"))
        start = _traced(around, around[loop.operands[0]], place)
        step = _step(program[loop.attribute("body").lstrip("%")], place)
    if (
        root.kind != "compare"
        or root.attribute("direction") != "LT"
        or bound is None
        or bound.kind != "constant"
        or start is None
        or step is None
    ):
        raise ValueError(f"A loop that turns an unknown number of times: {loop.text[:100]}")
    return -((start - _constant(bound)) // step)


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(item for item in computation.values() if item.root)


def _step(body: dict[str, Instruction], place: int) -> int | None:
    """What is added to the counter at a place of the carry; None if it is not a constant."""
    added = body[_root(body).operands[place]]
    constants = [body[name] for name in added.operands if body[name].kind == "constant"]
    return _constant(constants[0]) if added.kind == "add" and len(constants) == 1 else None


def _traced(around: dict[str, Instruction], carry: Instruction, index: int) -> int | None:
    """The constant at a place of a tuple."""
    if carry.kind != "tuple":
        return None
    found = around[carry.operands[index]]
    while found.kind in ("copy", "bitcast"):
        found = around[found.operands[0]]
    return _constant(found) if found.kind == "constant" else None


def _constant(instruction: Instruction) -> int:
    return int(instruction.text.partition(")")[0])


def flops(program: Program) -> int:
    """Returns the operations of all matrix products and convolutions of a step, on each device."""
    total = 0
    for name, instruction, times in walk(program):
        around = program[name]
        if instruction.kind == "dot":
            left = around[instruction.operands[0]].arrays[0].shape
            summed = map(int, re.findall(r"\d+", instruction.attribute("lhs_contracting_dims")))
            total += (
                times
                * 2
                * math.prod(instruction.arrays[0].shape)
                * math.prod(left[axis] for axis in summed)
            )
        elif instruction.kind == "convolution":
            left, right = (around[operand].arrays[0].shape for operand in instruction.operands)
            total += times * _convolution(instruction, left, right)
    return total


def _convolution(instruction: Instruction, inputs: tuple[int, ...], kernel: tuple[int, ...]) -> int:
    """Counts what no padding or dilation makes a product with zero.

    XLA for TPU writes a product of batches of matrices as a convolution that is mostly padding.
    """
    labels = re.split("_|->", instruction.attribute("dim_labels"))
    outputs = instruction.arrays[0].shape
    count = 2 * kernel[labels[1].index("i")]
    for label, size in zip(labels[2], outputs, strict=True):
        if not label.isdigit():
            count *= size
    window = _window(instruction.attribute("window"))
    for label in filter(str.isdigit, labels[2]):
        axis = int(label)
        given = {key: values[axis] for key, values in window.items()}
        low = int(given.get("pad", "0_0").split("_")[0])
        stride, dilation, spread = (
            int(given.get(key, "1")) for key in ("stride", "rhs_dilate", "lhs_dilate")
        )
        output = np.arange(outputs[labels[2].index(label)])[:, None] * stride
        place = output + np.arange(kernel[labels[1].index(label)]) * dilation - low
        size = inputs[labels[0].index(label)]
        inside = (place >= 0) & (place <= (size - 1) * spread) & (place % spread == 0)
        count *= int(inside.sum())
    return count


def _window(text: str) -> dict[str, list[str]]:
    return {key: value.split("x") for key, value in re.findall(r"(\w+)=([\w-]+)", text)}


def collectives(program: Program, devices: int) -> list[Collective]:
    """Returns what the collectives of a step carry.

    Args:
        program: What `read` returns.
        devices: How many devices there are.
    """
    found = []
    launches = 0
    chains = set()
    for name, instruction, times in walk(program):
        kind = instruction.kind.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if "chain_id=" in instruction.text:  # of one that goes on beside several computations
            chain = instruction.attribute("channel_id")
            if chain in chains:
                continue
            chains.add(chain)
        started = kind != instruction.kind
        arrays = instruction.arrays
        if started and kind == "all-gather":  # operands, then results
            arrays = arrays[len(arrays) // 2 :]
        if started and kind == "collective-permute":  # operand, result, and two contexts
            arrays = arrays[1:2]
        group = _group(instruction, devices)
        # On TPU a reduce-scatter is a fusion of an all-reduce and the slice that is kept.
        scattered = kind == "all-reduce" and name.startswith("all-reduce-scatter")
        for array in arrays:
            whole = array.shape
            if kind == "reduce-scatter":
                whole = (group * array.shape[0], *array.shape[1:])
            label = "reduce-scatter" if scattered else kind
            found.append(Collective(launches, label, array.dtype, whole, group, times))
        launches += 1
    return found


def _group(instruction: Instruction, devices: int) -> int:
    """How many devices take part in a collective."""
    text = instruction.text.partition("replica_groups=")[2]
    named = re.match(r"mesh\[(.*?)\]\s*\{(.*?)\}", text)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    tiled = re.match(r"\[(\d+),(\d+)\]<=", text)
    if tiled:
        return int(tiled[2])
    listed = re.match(r"\{\{([\d,]+)\}", text)
    return len(listed[1].split(",")) if listed else devices


def sent_bytes(found: Iterable[Collective]) -> float:
    """Returns what each device sends in a step."""
    return sum(item.sent_bytes for item in found)
