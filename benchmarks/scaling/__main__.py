"""What a training step sends between devices, counted in the compiled program.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --devices 1,2
    python -m benchmarks.scaling --time --devices 1,2,4,8  # on a machine with 8 GPUs

The devices are JAX's, or simulated on the CPU, where the program is partitioned in the same way.
Writes results.json, results.csv, summary.md and bytes.png to `--out`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.cifar.__main__ import run_command
from benchmarks.core.timing import interleave, spread
from benchmarks.scaling import report
from benchmarks.scaling.collectives import read_collectives, ring_bytes
from benchmarks.scaling.programs import LAYOUTS, Program, Size, build, methods

Key = tuple[str, str, int]  # layout, method, number of devices

_TIMED_LAYOUTS = ("jit", "shard_map")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
        ValueError: An argument is out of its range.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--devices", default="1,2,4,8", help="numbers of devices; default: %(default)s")
    add("--width", type=int, default=Size().width, help="of each layer; default: %(default)s")
    add("--layers", type=int, default=Size().layers, help="default: %(default)s")
    add("--time", action="store_true", help="also time the steps: weak scaling")
    add("--rounds", type=int, default=50, help="with --time: timed rounds; default: %(default)s")
    add(
        "--out",
        type=Path,
        default=Path("benchmarks/results/scaling"),
        help="the results' folder; default: %(default)s",
    )
    arguments = parser.parse_args(argv)
    counts = arguments.devices.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise ValueError(
            f"--devices {arguments.devices!r} must be whole numbers of 1 or more, separated by "
            "commas."
        )
    arguments.devices = sorted({int(count) for count in counts})
    for name in ("width", "layers", "rounds"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(arguments, name)}.")
    odd = [count for count in arguments.devices if arguments.width % count]
    if odd:
        raise ValueError(f"--width {arguments.width} must be a multiple of --devices {odd[0]}.")
    return arguments


def check_devices(most: int) -> None:
    """Raises a `ValueError` unless JAX has so many devices; simulates them on a CPU."""
    with contextlib.suppress(RuntimeError):  # JAX has started already
        jax.config.update("jax_num_cpu_devices", most)
    found = len(jax.devices())
    if found < most:
        raise ValueError(
            f"--devices {most} needs as many devices, and JAX has {found} of the kind "
            f"{jax.default_backend()}; JAX_PLATFORMS=cpu simulates them."
        )


def count(program: Program, layout: str, method: str, devices: int) -> dict[str, Any]:
    """Returns what one step of a program sends, as JSON types."""
    found = read_collectives(program.run.as_text() or "", devices)
    return {
        "layout": layout,
        "method": method,
        "devices": devices,
        "collectives": len({item.launch for item in found}),
        "bytes": sum(item.bytes for item in found),
        "sent_bytes": ring_bytes(found, devices),
        "arrays": [item._asdict() for item in found],
    }


def measure_time(programs: Mapping[Key, Program], rounds: int) -> list[dict[str, Any]]:
    """Times the data-parallel steps: the same batch on each device, whatever their number."""
    timed = {key: program for key, program in programs.items() if key[0] in _TIMED_LAYOUTS}
    fewest = min(devices for _, _, devices in timed)
    runs = {repr(key): _runner(program) for key, program in timed.items()}
    seconds = interleave(runs, range(rounds))
    rows = []
    for layout, method, devices in timed:
        own, one = (seconds[repr((layout, method, number))] for number in (devices, fewest))
        rows.append(
            {
                "layout": layout,
                "method": method,
                "devices": devices,
                "seconds": float(np.median(own)),
                "over_fewest": spread(own / one)._asdict(),  # weak scaling: at best 1
            }
        )
    return rows


def _runner(program: Program) -> Callable[[], Any]:
    carry = program.params, program.state

    def run() -> Any:
        nonlocal carry
        carry = program.run(*carry, program.batch)
        return carry

    return run


def measure(arguments: argparse.Namespace) -> None:
    """Counts, times if that is wanted, and writes the report."""
    check_devices(arguments.devices[-1])
    size = Size(layers=arguments.layers, width=arguments.width)
    programs = {
        (layout, method, devices): build(layout, method, devices, size)
        for layout in LAYOUTS
        for method in methods(layout)
        for devices in arguments.devices
    }
    rows = [count(program, *key) for key, program in programs.items()]
    times = measure_time(programs, arguments.rounds) if arguments.time else []
    settings = {
        **size._asdict(),
        "parameters": size.parameters,
        "devices": arguments.devices,
    }
    if times:
        settings["rounds"] = arguments.rounds
    print(report.write(arguments.out, settings, rows, times))
    print(f"Results and figure: {arguments.out}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(
        "benchmarks.scaling", lambda: measure(parse_arguments(argv)), argv, saved="Nothing"
    )


if __name__ == "__main__":
    sys.exit(main())
