"""What SGD, SAM, nBAR, oBAR and DAS do to the norms of two or three cores, on toys.

    python -m benchmarks.balance_toys
    python -m benchmarks.balance_toys --toys nop --steps 10000 --seeds 2 --out runs/balance_toys

The balancedness `B` over time on the two toys of Li, Zhang and He 2024 (arXiv 2410.14802), and the
norm deviation `Q` on a Tucker-2 toy like that of Cao, Atarashi and Kashima 2025 (arXiv 2508.10435),
at several noise levels. Writes results.json, results.csv, curves.csv, summary.md and a figure a toy
to `--out`. A minute or two on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.balance_toys import report
from benchmarks.models.toys import Toy, Trajectory, toys, trajectories

EVERY = 100  # steps between two records


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.balance_toys",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--toys", nargs="+", choices=list(toys()), default=list(toys()), help="default: all")
    add("--steps", type=_steps, help=f"a multiple of {EVERY}; default: each toy's own")
    add("--seeds", type=_positive, default=8, help="runs at each noise level; default: %(default)s")
    add(
        "--out",
        type=Path,
        default=Path("benchmarks/results/balance_toys"),
        help="the results' folder; default: %(default)s",
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of 1 or more")
    return int(text)


def _steps(text: str) -> int:
    if not text.isdigit() or int(text) < 1 or int(text) % EVERY:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a positive multiple of {EVERY}")
    return int(text)


def run(toy: Toy, name: str, seeds: int) -> dict[str, Trajectory]:
    """Runs all methods of a toy, with a line about each on standard error."""
    found = {}
    for method in toy.methods:
        start = time.perf_counter()
        found[method] = trajectories(toy, method, seeds, EVERY)
        ends = found[method].imbalance[:, :, -1].mean(1)
        at_levels = ", ".join(
            f"{end:.3g} (a = {level:g})" for level, end in zip(toy.levels, ends, strict=True)
        )
        symbol = "|B|" if len(toy.start) == 2 else "Q"
        seconds = time.perf_counter() - start
        print(f"{name}  {method:4}  {symbol} {at_levels}  {seconds:.1f} s", file=sys.stderr)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    arguments = parse_arguments(argv)
    chosen = {
        name: toy._replace(steps=arguments.steps or toy.steps)
        for name, toy in toys().items()
        if name in arguments.toys
    }
    results = {name: run(toy, name, arguments.seeds) for name, toy in chosen.items()}
    settings = {"seeds": arguments.seeds, "every": EVERY}
    print(report.write(arguments.out, chosen, results, settings))
    print(f"Results and figures: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
