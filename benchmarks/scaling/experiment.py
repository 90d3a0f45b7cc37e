"""What one step of each program sends between devices, and what it takes."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.core.timing import going_on, interleave, spread
from benchmarks.scaling.collectives import read_collectives, ring_bytes
from benchmarks.scaling.programs import Program

Key = tuple[str, str, int]  # layout, method, number of devices

_TIMED_LAYOUTS = ("jit", "shard_map")


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
    runs = {}
    for key, program in timed.items():
        step = functools.partial(_step, program)
        runs[repr(key)] = going_on(step, (program.params, program.state), program.batch)
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


def _step(program: Program, carry: Any, batch: Any) -> tuple[Any, tuple[()]]:
    return program.run(*carry, batch), ()
