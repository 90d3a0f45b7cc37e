"""Steps that are run and timed, on JAX's own devices: the methods in turn, round by round."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.core.runs import Experiment, History, Tick
from benchmarks.core.timing import going_on, interleave, spread
from benchmarks.scaling import programs
from benchmarks.scaling.programs import BASE


class Run(NamedTuple):
    """The methods of one model and layout, which are compared within each round."""

    topology: str
    model: str
    layout: str
    methods: tuple[str, ...]
    rows: int
    rounds: int


class Timing(Experiment[Run]):
    """Times the steps of methods beside one another."""

    saves = False

    def __init__(self, folder: Path):
        """Takes the results' folder."""
        self.folder = folder

    def name(self, run: Run) -> str:
        """Returns what is timed."""
        return f"{run.topology}_{run.model}_{run.layout}_time"

    def config(self, run: Run) -> dict[str, Any]:
        """Returns what is timed."""
        return run._asdict()

    def advance(self, run: Run, part: int, state: Any, history: History, tick: Tick) -> Any:
        """Compiles the steps and times them."""
        steps = {method: _step(run, method) for method in run.methods}
        seconds = interleave(steps, _told(run.rounds, tick))
        base = seconds.get(BASE)
        history["times"] = [
            {
                "method": method,
                "seconds": float(np.median(own)),
                "ratio": None if base is None else spread(own / base)._asdict(),
            }
            for method, own in seconds.items()
        ]


def _told(rounds: int, tick: Tick) -> Iterator[int]:
    for index in range(rounds):
        yield index
        tick((index + 1) / rounds)


def _step(run: Run, method: str) -> Any:
    lowered = programs.lower(run.topology, run.model, run.layout, method, run.rows)
    compiled = lowered.step.compile()

    def step(carry: Any, batch: Any) -> tuple[Any, Any]:
        *carry, value = compiled(*carry, batch)
        return tuple(carry), value

    *carry, batch = (jax.tree.map(_values, each) for each in lowered.arguments)
    return going_on(step, tuple(carry), batch)


def _values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Some values of a shape, each device's part made there."""
    small = 0.01 if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
    make = jax.jit(lambda: jnp.full(leaf.shape, small, leaf.dtype), out_shardings=leaf.sharding)
    return make()
