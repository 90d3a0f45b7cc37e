"""What a SAM step costs: time beside the base optimizer's, compile time and memory.

    python -m benchmarks.step_time
    python -m benchmarks.step_time --problems cnn --methods limit,sam,optax_opaque --rounds 200
    python -m benchmarks.step_time --problems tr-resnet32 --methods sam,das --batch-size 128
    python -m benchmarks.step_time --problems lora
    python -m benchmarks.step_time --problems decoder,decoder_remat --length 96 --rank 4
    python -m benchmarks.step_time --problems costs --out benchmarks/results/method_costs

`costs` has every method at its published defaults: gradients counted, FLOPs, memory and time of a
step of a small network. The other problems hold SAM against what one would write by hand. `lora`
is a step of all-MiniLM-L6-v2's adapters (see `benchmarks.lora`), `decoder` one of the adapters of
all of SmolLM2's blocks, `decoder_remat` with the blocks computed again for their gradients; any
name of an image model is a problem. All methods run in one process, in turn, and are compared
within each round, so that what else happens on the machine does not decide between them. Writes
results.json, results.csv, summary.md and step_time.png to `--out`.

XLA compiles for CPU in a time that is quadratic in the number of leaves, for any optimizer. So
10,000 leaves run operation by operation, and fewer compiled; where the minutes do not matter,
`--problems pytree --leaves 10000 --methods limit,sam` compiles them too.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.core import command, records
from benchmarks.core.command import Command, Names, choose
from benchmarks.models import bert, llama
from benchmarks.step_time import report
from benchmarks.step_time.experiment import Problem, costs, decoder, lora, pytree, training
from benchmarks.step_time.measuring import measure
from benchmarks.step_time.methods import METHODS

# A round of all methods takes over a minute on the larger network; `costs` has the others.
_COMPARED = (
    *("base", "limit", "sam", "sam_quarter", "samar"),
    *("optax_opaque", "optax_transparent"),
)
_PROBLEMS: dict[str, Callable[[Configuration], Problem]] = {
    "costs": lambda c: costs(c.batch_size or 64),
    "cnn": lambda c: training("cnn", c.batch_size or 64, 200, _COMPARED),
    "resnet18": lambda c: training("resnet18", c.batch_size or 64, 7, _COMPARED),
    "pytree": lambda c: pytree(c.leaves or 1_000, rounds=200, compiled=True),
    "pytree_eager": lambda c: pytree(c.leaves or 10_000, rounds=5, compiled=False),
    "lora": lambda c: lora(
        c.batch_size or 16, c.length, c.rank, 30, bert.load(c.model or bert.model_folder())
    ),
    "decoder": lambda c: _decoder(c, remat=False),
    "decoder_remat": lambda c: _decoder(c, remat=True),
}
_SMOKE: dict[str, Any] = {
    "problems": ("costs", "cnn", "pytree", "pytree_eager"),
    "methods": (
        *("base", "limit", "sam", "sam_quarter", "optax_opaque", "optax_transparent"),
        *("sam_every_5", "stale_sam"),
    ),
    "batch_size": 8,
    "leaves": 20,
    "rounds": 3,
}


@dataclasses.dataclass(frozen=True)
class Configuration(Command):
    """What is timed, and at which size."""

    # Of costs, cnn, resnet18, pytree, pytree_eager, lora, decoder, decoder_remat and all names of
    # image models.
    problems: Names = ("cnn", "resnet18", "pytree", "pytree_eager")
    # By default each problem's own choice.
    methods: Names = ()
    batch_size: int | None = None  # By default 64 images, or 16 sentences.
    rounds: int | None = None  # Timed rounds; by default each problem's own number.
    leaves: int | None = None  # Of both pytrees; by default 1,000, and 10,000 not compiled.
    length: int = 64  # Of lora and decoder: tokens.
    rank: int = 8  # Of lora and decoder: the adapters' rank.
    # Of lora a BERT model's folder, of decoder a GGUF file; by default as installed.
    model: Path | None = None
    smoke: bool = False  # Seconds instead of minutes: does it run at all?
    out: Path = Path("benchmarks/results/step_time")

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        self.at_least(1, "batch_size", "rounds", "leaves", "length", "rank")
        choose(self.problems, [*_PROBLEMS, *models.MODELS], "problems")
        choose(self.methods or ["base"], list(METHODS), "methods")

    def problem(self, name: str) -> Problem:
        """Makes a problem of the size asked for.

        Raises:
            ValueError: LoRA's model is not installed, or is not at its place.
        """
        if name not in _PROBLEMS:
            return training(name, self.batch_size or 64, rounds=30)
        with command.needs("bench,lora"):
            return _PROBLEMS[name](self)


def _decoder(arguments: Configuration, *, remat: bool) -> Problem:
    path = arguments.model or llama.model_file()
    config, tensors, _ = llama.read(path)
    model = llama.load(config, tensors, remat=remat)
    size = arguments.batch_size or 2
    return decoder(size, arguments.length, arguments.rank, 15, model, path.stem)


@command.main(Configuration, "benchmarks.step_time", saved="Nothing")
def main(arguments: Configuration) -> None:
    """Measures the problems, writes the report and prints its tables."""
    if arguments.smoke:
        given = {
            field.name: getattr(arguments, field.name)
            for field in dataclasses.fields(Configuration)
            if getattr(arguments, field.name) != field.default
        }
        arguments = dataclasses.replace(arguments, **_SMOKE | given)
    results = {}
    busy = [os.getloadavg()[0]]
    for name in arguments.problems:
        problem = arguments.problem(name)
        print(f"{name}: {problem.title}", file=sys.stderr)
        methods = arguments.methods or problem.default_methods
        results[name] = measure(problem, methods, arguments.rounds or problem.rounds)
    busy.append(os.getloadavg()[0])
    settings = dataclasses.asdict(arguments)
    left_out = ("out", "model", "smoke")  # where, and what is told by the rest
    record = {
        "format": records.FORMAT,
        "settings": {name: value for name, value in settings.items() if name not in left_out},
        "hardware": records.hardware(),
        "load_average": busy,  # Of the machine over a minute, at the start and at the end.
        "versions": records.versions(),
        "targets": report.targets(results),
        "problems": results,
    }
    records.write_record(arguments.out / "results.json", record)
    print(report.write(arguments.out))
    print(f"Results and figure: {arguments.out}")
