"""The command of an experiment: a frozen dataclass is the command line, its help and the record.

An experiment's `Configuration` inherits from `Command`; the comments of its fields are the help.
"""

import contextlib
import dataclasses
import functools
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro


def _commas(kind: Callable[[str], Any]) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """Values in one argument, separated by commas."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="A,B,...",
        instance_from_str=lambda text: tuple(
            kind(part.strip()) for part in text[0].split(",") if part.strip()
        ),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(f"{part}" for part in value)],
    )


Names = Annotated[tuple[str, ...], _commas(str)]
Counts = Annotated[tuple[int, ...], _commas(int)]
Shares = Annotated[tuple[float, ...], _commas(float)]
Paths = tyro.conf.Positional[tuple[Path, ...]]


@dataclasses.dataclass(frozen=True)
class Command:
    """What the commands have in common: how an argument out of its range is refused."""

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""

    def at_least(self, least: int, *names: str) -> None:
        """Raises a `ValueError` if one of the arguments is less."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{option(name)} must be {least} or more, got {value}.")

    def within(self, low: float, high: float, *names: str) -> None:
        """Raises a `ValueError` if one of the arguments is not in [low, high)."""
        for name in names:
            value = getattr(self, name)
            if not low <= value < high:
                raise ValueError(f"{option(name)} must be in [{low}, {high}), got {value}.")

    def above_zero(self, *names: str) -> None:
        """Raises a `ValueError` if one of the arguments is not above 0 and finite."""
        for name in names:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{option(name)} must be above 0, got {value}.")


C = TypeVar("C", bound=Command)


def option(name: str) -> str:
    """Returns the name of a field as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def choose(names: Sequence[str], known: Sequence[str], name: str) -> tuple[str, ...]:
    """Returns the names once each.

    Raises:
        ValueError: There is none, or one of them is not known.
    """
    unknown = [each for each in names if each not in known]
    if unknown or not names:
        raise ValueError(
            f"{option(name)} {','.join(names)!r}: choose, separated by commas, from "
            f"{', '.join(known)}."
        )
    return tuple(dict.fromkeys(names))


def parse(config: type[C], module: str, argv: Sequence[str] | None = None) -> C:
    """Reads a command line.

    Args:
        config: The experiment's configuration.
        module: What is run, such as `benchmarks.cifar`; its docstring heads the help.
        argv: The arguments; by default the process's.

    Raises:
        ValueError: An argument is out of its range.
        SystemExit: An argument cannot be read.
    """
    found = tyro.cli(
        config,
        prog=f"python -m {module}",
        description=sys.modules[config.__module__].__doc__,
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    found.check()
    return found


def run(
    config: type[C],
    action: Callable[[C], None],
    module: str,
    argv: Sequence[str] | None = None,
    saved: str = "The last whole epoch",
) -> int:
    """Runs a command and returns its exit status: 2 on bad input, 130 when it was stopped."""
    try:
        action(parse(config, module, argv))
    except KeyboardInterrupt:
        arguments = shlex.join(sys.argv[1:] if argv is None else argv)
        print(
            f"\nStopped. {saved} is saved; to continue, repeat\n"
            f"  python -m {module} {arguments}".rstrip(),
            file=sys.stderr,
        )
        return 130
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main(
    config: type[C], module: str, saved: str = "The last whole epoch"
) -> Callable[[Callable[[C], None]], Callable[..., int]]:
    """Decorates what a command does with its configuration: `run` with `argv` is left.

    In the module that is the program, whose last definition it is, it runs the command and exits.
    """

    def decorate(action: Callable[[C], None]) -> Callable[..., int]:
        command = functools.partial(run, config, action, module, saved=saved)
        if action.__module__ == "__main__":
            sys.exit(command())
        return command

    return decorate


@contextlib.contextmanager
def needs(extras: str) -> Iterator[None]:
    """Makes of a missing package a `ValueError` that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        advice = "" if "pip install" in str(error) else f"; pip install -e '.[{extras}]'"
        raise ValueError(f"{error}{advice}") from error


@dataclasses.dataclass(frozen=True)
class Folders(Command):
    """The results whose tables and figures are to be made anew."""

    folders: Paths  # Results' folders.


@dataclasses.dataclass(frozen=True)
class Summaries(Command):
    """The comparisons, each in its folder, to put side by side."""

    folders: Paths  # Folders with a `summary.json`.

    def check(self) -> None:
        """Raises a `ValueError` if no folder is named, or one that has no results."""
        for folder in self.folders:
            if not (folder / "summary.json").exists():
                raise ValueError(f"{folder} has no summary.json; its command writes it.")
        if not self.folders:
            raise ValueError("Name at least one folder of results, with its summary.json.")


def report(write: Callable[[Path], str], module: str, argv: Sequence[str] | None = None) -> int:
    """Makes the tables and figures of folders from their records; returns the exit status."""

    def action(arguments: Folders) -> None:
        for folder in arguments.folders:
            print(write(folder))

    return run(Folders, action, module, argv)
