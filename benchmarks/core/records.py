"""The record of a run: one JSON file, written whole or not at all, where reports start."""

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from benchmarks.core.methods import METHODS

FORMAT = 1

Record = dict[str, Any]
Runs = dict[str, dict[int, Record]]
"""Records by method label and seed."""


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_record(path: Path, record: Record) -> None:
    """Writes a run's record; a number that is not finite becomes null, which JSON can hold."""
    write_text(path, json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")


def read_record(path: Path) -> Record:
    """Reads a run's record.

    Raises:
        ValueError: The file is no record of this format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a run's record ({error}); delete it.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is not a run's record of format {FORMAT}; move it elsewhere.")
    return record


def read_records(folder: Path) -> dict[Path, Record]:
    """Reads all records of a results' folder, by path."""
    return {path: read_record(path) for path in sorted((folder / "runs").glob("*.json"))}


def read_comparison(folder: Path) -> list[Record]:
    """Reads the records of a folder, all of one comparison.

    Raises:
        FileNotFoundError: The folder holds no records.
        ValueError: The records are of different comparisons.
    """
    found = read_records(folder)
    if not found:
        raise FileNotFoundError(f"{folder / 'runs'} holds no record (*.json) of a finished run.")
    records = list(found.values())
    for path, record in found.items():
        check_config(shared_config(record["config"]), shared_config(records[0]["config"]), path)
    return records


def check_folder(folder: Path, shared: dict[str, Any]) -> None:
    """Raises a `ValueError` if a folder holds records of another comparison."""
    for path, record in read_records(folder).items():
        check_config(shared_config(record["config"]), json.loads(json.dumps(shared)), path)


def by_method(records: Iterable[Record], names: Iterable[str] = METHODS) -> Runs:
    """Groups records by method and seed, the methods in the order of their names in a table."""
    order = list(names)

    def position(record: Record) -> tuple[int, int, str, int]:
        config = record["config"]
        name = re.split("[:@]", config["method"])[0]
        return order.index(name), config.get("epoch_factor", 1), config["method"], config["seed"]

    runs: Runs = {}
    for record in sorted(records, key=position):
        runs.setdefault(record["config"]["method"], {})[record["config"]["seed"]] = record
    return runs


def check_config(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Raises a `ValueError` unless what was stored has the configuration that is wanted now."""
    keys = sorted({*found, *wanted})
    differences = [key for key in keys if found.get(key) != wanted.get(key)]
    if differences:
        changes = ", ".join(
            f"{key}={found.get(key)!r} there but {wanted.get(key)!r} now" for key in differences
        )
        raise ValueError(
            f"{where} holds a run of another configuration: {changes}. "
            "Choose another --out, or delete it."
        )


def shared_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a configuration that all runs of one comparison share."""
    own = {"method", "hyperparameters", "epoch_factor", "seed", "split"}
    return {key: value for key, value in config.items() if key not in own}


def versions(*more: str) -> dict[str, str]:
    """Returns the versions of Python and the libraries, and of `more`, that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "samax", *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed: imported from the source tree"
    return found


def hardware() -> dict[str, Any]:
    """Returns what the run computes on: the accelerators, or the CPU's model and usable cores."""
    backend = jax.default_backend()
    if backend != "cpu":
        kinds = [device.device_kind for device in jax.devices()]
        return {"backend": backend, "device": kinds[0], "count": len(kinds)}
    affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    return {"backend": backend, "device": _cpu_model(), "count": cores}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # not on macOS
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
