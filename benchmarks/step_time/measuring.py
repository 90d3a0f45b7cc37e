"""How `benchmarks.step_time` measures: programs compiled, gradients counted, cycles timed in turn.

Where a method ascends on some steps alone, its numbers are means over the steps of its cycle, and
its memory is that of the larger program. Gradients are counted while the programs are traced, in
backward passes of the network, by the share of the batch that they see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from benchmarks.core.timing import Compiled, compile_program, going_on, interleave, spread
from benchmarks.step_time.experiment import Cycle, Problem
from benchmarks.step_time.methods import METHODS

# Those that targets compare with, not the base alone: a quotient of two medians would bring the
# noise back that the rounds are there to cancel.
_REFERENCES = ("base", "limit", "optax_opaque", "optax_transparent")
_PARTS = ("lower_seconds", "compile_seconds", "argument_bytes", "temp_bytes", "flops")


class Counter:
    """Counts backward passes, in batches, of what goes through `mark`."""

    def __init__(self, batch_size: int) -> None:
        """Counts passes of `batch_size` examples as one."""
        self.passes = 0.0

        @jax.custom_vjp
        def mark(outputs: jax.Array) -> jax.Array:
            return outputs

        def backward(_: None, cotangents: jax.Array) -> tuple[jax.Array]:
            self.passes += len(cotangents) / batch_size
            return (cotangents,)

        mark.defvjp(lambda outputs: (outputs, None), backward)
        self.mark = mark


def count_gradients(problem: Problem, name: str, batch_size: int) -> float:
    """Counts the backward passes of a method's step, the mean over its cycle."""
    counter = Counter(batch_size)
    cycle = problem.build(name, counter.mark)
    jax.eval_shape(in_turn(cycle.programs, cycle.order), cycle.carry, *cycle.inputs)
    return counter.passes / METHODS[name].steps


def in_turn(programs: Mapping[bool | None, Callable], order: Iterable[bool | None]) -> Callable:
    """Returns a function that calls a cycle's programs in their order, as one of them is called."""

    def whole(carry: Any, *inputs: Any) -> tuple[Any, Any]:
        output = None
        for ascend in order:
            carry, output = programs[ascend](carry, *inputs)
        return carry, output

    return whole


def compile_cycle(cycle: Cycle, steps: int) -> Compiled:
    """Compiles a cycle: FLOPs of the mean of its steps, memory of the largest program."""
    programs = {
        ascend: compile_program(program, cycle.carry, *cycle.inputs)
        for ascend, program in cycle.programs.items()
    }
    parts = programs.values()
    flops = [programs[ascend].flops for ascend in cycle.order]
    return Compiled(
        in_turn({ascend: part.run for ascend, part in programs.items()}, cycle.order),
        sum(part.lower_seconds for part in parts),
        sum(part.compile_seconds for part in parts),
        _told(max, [part.argument_bytes for part in parts]),
        _told(max, [part.temp_bytes for part in parts]),
        _told(lambda found: sum(found) / steps, flops),
    )


def _told(function: Callable[[Any], Any], values: Sequence[Any]) -> Any:
    """What a function makes of values; None where the backend does not tell them."""
    return None if None in values else function(values)


def measure(problem: Problem, methods: Sequence[str], rounds: int) -> dict[str, Any]:
    """Compiles and times `base`, and of the methods those that a problem has.

    Returns:
        The problem's part of the results, as JSON types.
    """
    names = [name for name in problem.methods if name == "base" or name in methods]
    runs, compiled = {}, {}
    for name in tqdm.tqdm(names, "compile" if problem.compiled else "prepare"):
        cycle = problem.build(name)
        if problem.compiled:
            compiled[name] = compile_cycle(cycle, METHODS[name].steps)
            run = compiled[name].run
        else:
            run = in_turn(cycle.programs, cycle.order)
        runs[name] = going_on(run, cycle.carry, *cycle.inputs)
    times = interleave(runs, tqdm.trange(rounds, desc="time   "))
    seconds = {name: values / METHODS[name].steps for name, values in times.items()}
    found = {
        name: {
            "seconds": float(np.median(seconds[name])),
            "ratio": {
                other: spread(seconds[name] / seconds[other])._asdict()
                for other in _REFERENCES
                if other in seconds
            },
            **{part: getattr(compiled.get(name), part, None) for part in _PARTS},
        }
        for name in names
    }
    if problem.batch_size is not None:
        for name in names:
            found[name]["gradients"] = count_gradients(problem, name, problem.batch_size)
    return {
        "title": problem.title,
        "rounds": rounds,
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params)),
        "methods": found,
    }
