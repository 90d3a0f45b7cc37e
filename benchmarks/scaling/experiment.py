"""Programs that are compiled and read: a run is one program, and a search for the largest batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.core import hlo
from benchmarks.core.runs import Experiment, History, Tick
from benchmarks.core.timing import compute_clock
from benchmarks.scaling import programs, topologies


class Run(NamedTuple):
    """A program, or with `search` the largest batch for which it fits into the chips' memory."""

    topology: str
    model: str
    layout: str
    method: str
    rows: int  # On each chip
    search: bool = False
    memory: int | None = None  # MiB of each chip that the program may take; None: all of it


class Compilation(Experiment[Run]):
    """Compiles programs and reads what they compute, send and need."""

    packages = ("libtpu",)
    saves = False

    def __init__(self, folder: Path):
        """Takes the results' folder."""
        self.folder = folder

    def name(self, run: Run) -> str:
        """Returns what is compiled."""
        what = "largest" if run.search else f"{run.rows}_rows"
        within = "" if run.memory is None else f"_in_{run.memory}_mib"
        return f"{run.topology}_{run.model}_{run.layout}_{run.method}_{what}{within}"

    def config(self, run: Run) -> dict[str, Any]:
        """Returns what is compiled."""
        return {name: value for name, value in run._asdict().items() if value is not None}

    def advance(self, run: Run, part: int, state: Any, history: History, tick: Tick) -> Any:
        """Compiles."""
        history.update(largest(run) if run.search else measure(run))

    def status(self, history: History) -> str:
        """Returns what was found."""
        if "largest" in history:
            return f"{history['largest']} rows a chip"
        if not history["fits"]:
            return "does not fit"
        return f"{history['compile_seconds']:.0f} s, {history['flops'] / 1e12:.3g} TFLOP a chip"


def measure(run: Run) -> dict[str, Any]:
    """Compiles a program and reads it."""
    lowered = programs.lower(*run[:5])
    start = compute_clock()
    compiled, why = _compile(lowered.step, run.memory)
    found: dict[str, Any] = {
        "chips": len(topologies.devices(run.topology)),
        "parameters": lowered.parameters,
        "parameter_bytes": lowered.parameter_bytes,
        "lower_seconds": lowered.seconds,
        "compile_seconds": compute_clock() - start,
        "fits": compiled is not None,
    }
    if compiled is None:
        return found | {"why": why}
    program = hlo.read(compiled.as_text() or "")
    memory: Any = compiled.memory_analysis()
    return found | {
        "flops": hlo.flops(program),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "peak_bytes": getattr(memory, "peak_memory_in_bytes", None),  # None with JAX 0.6
        "collectives": [item._asdict() for item in hlo.collectives(program, found["chips"])],
    }


def largest(run: Run) -> dict[str, Any]:
    """Searches the largest number of rows on each chip that fits, in steps of a multiple."""

    def fits(multiple: int) -> bool:
        step = programs.lower(*run[:4], multiple * run.rows).step
        return _compile(step, run.memory)[0] is not None

    return {"largest": run.rows * search(fits)}


def search(fits: Callable[[int], bool]) -> int:
    """Returns the largest whole number that fits, where all up to it do; 0 where none does."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _compile(
    lowered: jax.stages.Lowered, memory: int | None = None
) -> tuple[jax.stages.Compiled | None, str]:
    """Returns a program, or why it does not fit into the chips' memory, or into so many MiB."""
    options: dict[str, str | bool] = {}
    if memory is not None:
        options["xla_tpu_max_hbm_size_mib"] = str(memory)
    try:
        return lowered.compile(options), ""
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        return None, text.splitlines()[0]
