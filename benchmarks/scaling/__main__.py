"""What a training step sends between devices, counted in the compiled program.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --devices 1,2
    python -m benchmarks.scaling --time --devices 1,2,4,8  # on a machine with 8 GPUs

The devices are JAX's, or simulated on the CPU, where the program is partitioned in the same way.
Writes results.json, results.csv, summary.md and bytes.png to `--out`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.core import command, records
from benchmarks.core.command import Command, Counts
from benchmarks.scaling import report
from benchmarks.scaling.experiment import check_devices, count, measure_time
from benchmarks.scaling.programs import LAYOUTS, Size, build, methods


@dataclasses.dataclass(frozen=True)
class Configuration(Command):
    """How many devices, and the size of the model."""

    devices: Counts = (1, 2, 4, 8)  # Numbers of devices, separated by commas.
    width: int = Size().width  # Of each layer.
    layers: int = Size().layers
    time: bool = False  # Also time the steps: weak scaling.
    rounds: int = 50  # With --time: timed rounds.
    out: Path = Path("benchmarks/results/scaling")

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        self.at_least(1, "width", "layers", "rounds")
        shown = ",".join(map(str, self.devices))
        if not self.devices or min(self.devices) < 1:
            raise ValueError(f"--devices {shown!r} must be whole numbers of 1 or more.")
        odd = [count for count in self.devices if self.width % count]
        if odd:
            raise ValueError(f"--width {self.width} must be a multiple of --devices {odd[0]}.")


@command.main(Configuration, "benchmarks.scaling", saved="Nothing")
def main(arguments: Configuration) -> None:
    """Counts, times if that is wanted, writes the report and prints its tables."""
    counts = sorted(set(arguments.devices))
    check_devices(counts[-1])
    size = Size(layers=arguments.layers, width=arguments.width)
    programs = {
        (layout, method, devices): build(layout, method, devices, size)
        for layout in LAYOUTS
        for method in methods(layout)
        for devices in counts
    }
    rows = [count(program, *key) for key, program in programs.items()]
    times = measure_time(programs, arguments.rounds) if arguments.time else []
    settings: dict[str, Any] = {
        **size._asdict(),
        "parameters": size.parameters,
        "devices": counts,
        **({"rounds": arguments.rounds} if times else {}),
    }
    record = {
        "format": records.FORMAT,
        "settings": settings,
        "hardware": records.hardware(),
        "versions": records.versions(),
        "targets": [target._asdict() for target in report.targets(rows)],
        "programs": rows,
        "times": times,
    }
    records.write_record(arguments.out / "results.json", record)
    print(report.write(arguments.out))
    print(f"Results and figure: {arguments.out}")
