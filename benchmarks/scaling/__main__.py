"""SAM at scale: what a training step computes, sends and needs on up to 256 chips.

    pip install -e '.[bench,tpu]'
    python -m benchmarks.scaling --topology v5e:16x16 --models decoder_1b --layouts sharded
    python -m benchmarks.scaling --topology v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16 --methods adamw,sam
    python -m benchmarks.scaling --models decoder_1b --layouts sharded --methods adamw,sam --largest
    python -m benchmarks.scaling --models decoder_7b --methods adamw,sam --memory 1900
    python -m benchmarks.scaling --topology local:8 --models decoder_tiny --time

The programs are real ones: TPU's compiler makes them on any machine, for chips that need not be
there. XLA takes memory that a chip has to spare; `--memory` shows what it does with less, and
`--largest` where that ends. `local:8` are JAX's own devices, or on a CPU eight simulated ones.
A program is one JSON record, and is not compiled again; a table, a CSV and figures go to `--out`.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from benchmarks.core import command
from benchmarks.core.command import Command, Names, choose
from benchmarks.core.runs import complete_all
from benchmarks.scaling import report, timing, topologies
from benchmarks.scaling.experiment import Compilation, Run
from benchmarks.scaling.programs import METHODS, apart
from benchmarks.scaling.topologies import LOCAL
from benchmarks.scaling.workloads import LAYOUTS, ROWS, WORKLOADS


@dataclasses.dataclass(frozen=True)
class Configuration(Command):
    """Which programs are compiled, and for which chips."""

    topology: Names = ("v5e:16x16",)  # v4, v5e, v5p or v6e with a shape, or local:N.
    models: Names = ("decoder_1b",)  # decoder_100m, decoder_1b, decoder_7b, lora_7b, resnet50, ...
    layouts: Names = ("sharded",)  # data, sharded, tensor or mixed.
    methods: Names = ()  # By default all that the model and the layout allow.
    rows: int | None = None  # Of the batch, for each chip; by default 4 texts or 64 images.
    memory: int | None = None  # MiB of a chip that a program may take; by default all of it.
    largest: bool = False  # Instead search the largest batch that fits, in multiples of --rows.
    time: bool = False  # Also time the steps: of local:N alone.
    rounds: int = 50  # Of --time.
    out: Path = Path("runs/scaling")

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        self.at_least(1, "rows", "rounds", "memory")
        for topology in self.topology:
            topologies.check(topology)
        choose(self.models, list(WORKLOADS), "models")
        choose(self.layouts, list(LAYOUTS), "layouts")
        choose(self.methods or ["adamw"], list(METHODS), "methods")
        if self.time and any(topologies.chip(name) for name in self.topology):
            raise ValueError(f"--time runs on devices that are there: --topology {LOCAL}:N.")
        if self.memory and not all(topologies.chip(name) for name in self.topology):
            raise ValueError("--memory is of a TPU's chip: --topology v5e:16x16.")

    def runs(self) -> list[Run]:
        """Returns the programs, those of one model and layout together."""
        return [
            Run(*place, method, self.rows or ROWS[place[1]], self.largest, self.memory)
            for place in self.places()
            for method in self.own(*place[1:])
        ]

    def timed(self) -> list[timing.Run]:
        """Returns what is timed."""
        return [
            timing.Run(*place, self.own(*place[1:]), self.rows or ROWS[place[1]], self.rounds)
            for place in self.places()
            if self.time
        ]

    def places(self) -> Iterator[tuple[str, str, str]]:
        """Yields topologies, models and layouts."""
        for model, layout in itertools.product(self.models, self.layouts):
            for topology in self.topology:
                yield topology, model, layout

    def own(self, model: str, layout: str) -> tuple[str, ...]:
        """Returns the methods that are things of their own there."""
        return tuple(name for name in self.methods or METHODS if apart(model, layout, name))


@command.main(Configuration, "benchmarks.scaling", saved="Every program that is compiled")
def main(arguments: Configuration) -> None:
    """Compiles the programs, writes the report and prints its tables."""
    with command.needs("bench,tpu"):
        compilation = Compilation(arguments.out)
        complete_all([(compilation, run) for run in arguments.runs()], unit="program")
        times = timing.Timing(arguments.out)
        complete_all([(times, run) for run in arguments.timed()], unit="program")
    print(report.write(arguments.out))
    print(f"Results and figures: {arguments.out}")
