"""What a SAM step costs: time beside the base optimizer's, compile time and memory.

    python -m benchmarks.step_time
    python -m benchmarks.step_time --problems cnn --methods limit,sam,optax_opaque --rounds 200

All methods run in one process, in turn, and are compared within each round, so that what else
happens on the machine does not decide between them. Writes results.json, results.csv, summary.md
and step_time.png to `--out`.

XLA compiles for CPU in a time that is quadratic in the number of leaves, for any optimizer. So
10,000 leaves run operation by operation, and fewer compiled; where the minutes do not matter,
`--problems pytree --leaves 10000 --methods limit,sam` compiles them too.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from benchmarks.core.timing import compile_program, interleave
from benchmarks.step_time import report
from benchmarks.step_time.problems import DESCRIPTIONS, Problem, Step, pytree, training

_STDERR = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The size of the benchmark.

    Attributes:
        problems: Which problems.
        methods: Which methods, and always `base`; None for each problem's own choice.
        batch_size: Images in a training step.
        leaves: Leaves of the compiled pytree.
        eager_leaves: Leaves of the pytree that is not compiled.
        rounds: Timed rounds; None for each problem's own number.
    """

    problems: tuple[str, ...]
    methods: tuple[str, ...] | None = None
    batch_size: int = 64
    leaves: int = 1_000
    eager_leaves: int = 10_000
    rounds: int | None = None


# A round of all twelve takes over a minute on two cores.
_SLOW_METHODS = (
    *("base", "limit", "sam", "sam_quarter", "samar"),
    *("optax_opaque", "optax_transparent"),
)
_PROBLEMS: dict[str, Callable[[Settings], Problem]] = {
    "cnn": lambda s: training("cnn", s.batch_size, rounds=200),
    "resnet18": lambda s: training("resnet18", s.batch_size, 7, _SLOW_METHODS),
    "pytree": lambda s: pytree(s.leaves, rounds=200, compiled=True),
    "pytree_eager": lambda s: pytree(s.eager_leaves, rounds=5, compiled=False),
}
_FULL = Settings(tuple(_PROBLEMS))
_SMOKE = Settings(
    problems=("cnn", "pytree", "pytree_eager"),
    methods=("base", "limit", "sam", "sam_quarter", "optax_opaque", "optax_transparent"),
    batch_size=8,
    leaves=20,
    eager_leaves=50,
    rounds=3,
)


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[Settings, Path]:
    """Reads the command line.

    Returns:
        The settings and the results' folder.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--problems", type=_names(_PROBLEMS), help=f"of {', '.join(_PROBLEMS)}; default: all")
    add("--methods", type=_names(DESCRIPTIONS), help=f"of {', '.join(DESCRIPTIONS)}")
    add("--rounds", type=_positive, help="timed rounds; default: each problem's own number")
    add("--leaves", type=_positive, help="leaves of both pytrees")
    add("--smoke", action="store_true", help="seconds instead of minutes: does it run at all?")
    add(
        "--out",
        type=Path,
        default=Path("benchmarks/results/step_time"),
        help="the results' folder; default: %(default)s",
    )
    arguments = parser.parse_args(argv)
    chosen: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("problems", "methods", "rounds", "leaves")
        if getattr(arguments, name) is not None
    }
    if "leaves" in chosen:
        chosen["eager_leaves"] = chosen["leaves"]
    return dataclasses.replace(_SMOKE if arguments.smoke else _FULL, **chosen), arguments.out


def _names(known: dict[str, Any]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"{text!r}: choose, separated by commas, from {', '.join(known)}"
            )
        return names

    return parse


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of 1 or more")
    return int(text)


def measure(problem: Problem, methods: Sequence[str], rounds: int) -> dict[str, Any]:
    """Compiles and times methods on a problem.

    Args:
        problem: The problem.
        methods: The methods; those that the problem does not have are left out, `base` is added.
        rounds: Timed rounds.

    Returns:
        The problem's part of the results, as JSON types.
    """
    names = [name for name in problem.methods if name == "base" or name in methods]
    runs, programs = {}, {}
    for name in track(names, "compile" if problem.compiled else "prepare", console=_STDERR):
        step = problem.build(name)
        if problem.compiled:
            programs[name] = compile_program(step.function, step.carry, *step.inputs)
            step = step._replace(function=programs[name].run)
        runs[name] = _runner(step)
    seconds = interleave(runs, track(range(rounds), "time   ", console=_STDERR))
    return {
        "title": problem.title,
        "rounds": rounds,
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params)),
        "methods": {
            name: report.method_record(seconds, name, programs.get(name)) for name in names
        },
    }


def _runner(step: Step) -> Callable[[], Any]:
    carry = step.carry

    def run() -> Any:
        nonlocal carry
        for _ in range(step.calls):
            carry, output = step.function(carry, *step.inputs)
        return carry, output

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    settings, folder = parse_arguments(argv)
    results = {}
    for name in settings.problems:
        problem = _PROBLEMS[name](settings)
        _STDERR.print(f"{name}: {problem.title}", highlight=False)
        results[name] = measure(
            problem,
            settings.methods or problem.default_methods,
            settings.rounds or problem.rounds,
        )
    print(report.write(folder, dataclasses.asdict(settings), results))
    print(f"Results and figure: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
