"""The tables and targets of `benchmarks.scaling`, from its records alone.

python -m benchmarks.scaling.report DIR [DIR ...]
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.core import command, frames, records
from benchmarks.core.hlo import Collective
from benchmarks.core.records import Record
from benchmarks.scaling import figures, topologies
from benchmarks.scaling.programs import BASE, BASE_PER_DEVICE, METHODS
from benchmarks.scaling.workloads import DECODERS, LAYOUTS

Row = dict[str, Any]
Place = tuple[str, str, str, int, int | None]  # topology, model, layout, rows, memory

_NOTES = """\
Read in the compiled program of one step, for each chip. TFLOP: matrix products and convolutions,
the bodies of loops as often as they turn. Temp, args: temporary memory and that of the arguments,
parameters and state and batch; the temporaries are as much as the program takes, with the gaps
between what it puts there. Peak: all that is in use at one time. Launches: collectives in a step,
those in loops as often as they turn, of which so many carry scalars or vectors alone. Sent: by ring
algorithms, where an all-reduce of B bytes over n chips sends 2 B (n - 1) / n, and an all-gather or
a reduce-scatter half of that. Ratios, in brackets, are to AdamW's, and by `shard_map` to its step
by `shard_map`. Estimate: the largest of operations, bytes of arguments read and written once, and
sent bytes, each over the chip's published peak: a bound from below, not a measurement. Lower,
compile: seconds that tracing and lowering in Python, and XLA's compilation, take of one core of
{host}.
"""
_CPU_TIMES = "Simulated devices share the cores of one CPU: these times say nothing about scaling."


class Target(NamedTuple):
    """A claim, where it is looked at, what was found, and whether it holds."""

    where: str
    claim: str
    found: str
    verdict: str


def write(folder: Path) -> str:
    """Writes `results.csv`, `summary.json`, `summary.md` and the figures from the records.

    Returns the text of the summary.
    """
    found = list(records.read_records(folder).values())
    if not found:
        raise FileNotFoundError(f"{folder / 'runs'} holds no record (*.json) of a program.")
    rows = [_row(record) for record in found if "fits" in record]
    rows.sort(key=lambda row: list(METHODS).index(row["method"]))
    sizes = {_key(record["config"]): record["largest"] for record in found if "largest" in record}
    for row in rows:
        row["largest"] = sizes.get(_key(row))
    for own in _places(rows).values():
        _compare(own)
    times = [record for record in found if "times" in record]
    goals = targets(rows)
    text = to_markdown(found[0], rows, times, goals)
    lines = ({key: value for key, value in row.items() if key != "parts"} for row in rows)
    files: dict[str, Any] = {
        "results.csv": frames.csv(lines),
        "summary.json": {"rows": rows, "targets": [goal._asdict() for goal in goals]},
        "summary.md": text,
    }
    frames.write(folder, files)
    figures.write(folder, rows)
    return text


def _key(config: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("topology", "model", "layout", "method")
    return *(config[name] for name in names), config.get("memory")


def _row(record: Record) -> Row:
    """Returns a program's numbers."""
    names = ("topology", "model", "layout", "method", "rows")
    row = {name: record["config"][name] for name in names}
    row["memory"] = record["config"].get("memory")
    row |= {name: record[name] for name in ("chips", "parameters", "parameter_bytes", "fits")}
    row |= {name: record[name] for name in ("lower_seconds", "compile_seconds")}
    made_by_libtpu = topologies.chip(row["topology"]) is not None
    row["libtpu"] = record["versions"].get("libtpu") if made_by_libtpu else None
    if not record["fits"]:
        return row | {"why": record["why"]}
    found = [
        Collective(**{**item, "shape": tuple(item["shape"])}) for item in record["collectives"]
    ]
    launches = {item.launch: item.times for item in found}
    large = {item.launch for item in found if len(item.shape) > 1}
    kinds: dict[str, float] = {}
    for item in found:
        kinds[item.kind] = kinds.get(item.kind, 0) + item.sent_bytes
    row |= {name: record[name] for name in ("flops", "temp_bytes", "argument_bytes")}
    if record.get("peak_bytes") and made_by_libtpu:  # XLA's number for CPUs leaves out temporaries
        row["peak_bytes"] = record["peak_bytes"]
    row |= {
        "launches": sum(launches.values()),
        "scalar_launches": sum(times for launch, times in launches.items() if launch not in large),
        "sent_bytes": sum(kinds.values()),
        "parts": kinds,
    }
    chip = topologies.chip(row["topology"])
    if chip is not None:
        row["estimate_seconds"] = max(
            row["flops"] / chip.flops,
            2 * row["argument_bytes"] / chip.memory_rate,
            row["sent_bytes"] / chip.send_rate,
        )
    return row


def _places(rows: Iterable[Row]) -> dict[Place, list[Row]]:
    """Returns what differs in the method alone."""
    found: dict[Place, list[Row]] = {}
    for row in rows:
        place = row["topology"], row["model"], row["layout"], row["rows"], row["memory"]
        found.setdefault(place, []).append(row)
    return found


def _compare(rows: Sequence[Row]) -> None:
    """Notes in the rows of one place their ratios to the base optimizer's."""
    by = {row["method"]: row for row in rows}
    for row in rows:
        base = by.get(BASE_PER_DEVICE if METHODS[row["method"]].per_device else BASE)
        if base is None:
            continue
        row["compile_ratio"] = _seconds(row) / _seconds(base)
        if not (row["fits"] and base["fits"]):
            continue
        for name in ("flops", "temp_bytes", "peak_bytes", "sent_bytes", "estimate_seconds"):
            if base.get(name) and row.get(name):
                row[name.split("_")[0] + "_ratio"] = row[name] / base[name]
        more = row["argument_bytes"] - base["argument_bytes"]
        row["copies"] = more / base["parameter_bytes"]
        row["launches_more"] = row["launches"] - base["launches"]
        row["sent_more"] = row["sent_bytes"] - base["sent_bytes"]
        if row["largest"] is not None and base["largest"]:
            row["largest_ratio"] = row["largest"] / base["largest"]


def _seconds(row: Row) -> float:
    return row["lower_seconds"] + row["compile_seconds"]


def targets(rows: Sequence[Row]) -> list[Target]:
    """Returns the targets on what the rows hold."""
    found = []

    def add(row: Row, claim: str, shown: str, met: bool) -> None:
        where = f"{row['model']}, {row['layout']}, {row['topology']}{_within(row)}: {row['method']}"
        found.append(Target(where, claim, shown, "met" if met else "**not met**"))

    for row in rows:
        own = METHODS[row["method"]]
        if row["method"] == "sam" and "compile_ratio" in row:
            ratio = row["compile_ratio"]
            add(row, "traced and compiled in at most 1.6x", f"{ratio:.2f}x", ratio <= 1.6)
        if "flops_ratio" not in row or row["method"] in (BASE, BASE_PER_DEVICE):
            continue
        if row["method"] == "sam":
            ratio = row["flops_ratio"]
            add(row, "1.97 to 2.03x the operations", f"{ratio:.3f}x", 1.97 <= ratio <= 2.03)
            if row["model"] in DECODERS:
                ratio = row["temp_ratio"]
                add(row, "at most 1.02x the temporaries", f"{ratio:.3f}x", ratio <= 1.02)
            if "largest_ratio" in row:
                ratio = row["largest_ratio"]
                add(row, "the base optimizer's largest batch", f"{ratio:.3f}x", ratio == 1)
        elif own.gradients == 1:
            ratio = row["flops_ratio"]
            add(row, "1.00x the operations", f"{ratio:.4f}x", abs(ratio - 1) < 0.005)
            copies = row["copies"]
            claim = f"at most {own.copies} more copies of the parameters"
            add(row, claim, f"{copies:.3f}", copies <= own.copies + 0.01)
        if row["method"] == "sam_per_device":
            more = row["sent_more"]
            add(row, "exactly the base optimizer's bytes", f"{more:+g} bytes", more == 0)
        if own.balances:
            more, share = row["launches_more"], row["sent_more"] / row["sent_bytes"]
            shown = f"{more:+d} collectives, {row['sent_more']:+.0f} bytes"
            claim = "at most one more collective and 0.1 % more bytes"
            add(row, claim, shown, more <= 1 and share <= 1e-3)
    return found


def to_markdown(
    record: Record, rows: Sequence[Row], times: Sequence[Record], goals: Sequence[Target]
) -> str:
    """Returns a table a model and layout, one of several numbers of chips, and the targets."""
    software = frames.software(record, "jax", "flax", "optax")
    hardware = record["hardware"]
    parts = [
        f"# A training step at scale ({software})",
        _NOTES.format(host=hardware["device"]).strip(),
    ]
    for (topology, model, layout, count, _), own in _places(rows).items():
        params = own[0]["parameters"]
        title = f"## {model}, {layout}, {topology}{_within(own[0])}"
        compilers = sorted({row["libtpu"] for row in own if row["libtpu"]})
        made = f" Made by libtpu {' and '.join(compilers)}." if compilers else ""
        what = f"{params / 1e6:,.1f} M parameters, {count} rows a chip; {LAYOUTS[layout]}.{made}"
        parts += [title, what, frames.markdown(_cells(row) for row in own)]
    weak = _weak(rows)
    if weak:
        parts += ["## More chips, each with the same rows", frames.markdown(weak)]
    for timed in times:
        config = timed["config"]
        head = (
            f"## Milliseconds a step: {config['model']}, {config['layout']}, {config['topology']}"
        )
        note = [_CPU_TIMES] if timed["hardware"]["backend"] == "cpu" else []
        parts += [head, *note, frames.markdown(map(_time, timed["times"]))]
    if goals:
        header = ["where", "target", "found", ""]
        parts += ["## Targets", frames.markdown([list(goal) for goal in goals], header)]
    return "\n\n".join(parts) + "\n"


def _within(row: Row) -> str:
    return "" if row["memory"] is None else f", in {row['memory']:,} MiB"


def _cells(row: Row) -> dict[str, str]:
    lower = {"lower s": f"{row['lower_seconds']:.1f}", "compile s": f"{row['compile_seconds']:.0f}"}
    if not row["fits"]:
        return {"method": row["method"], "TFLOP": "does not fit", **lower}
    return {
        "method": row["method"],
        "TFLOP": _with_ratio(row, "flops", 1e12),
        "temp MiB": _with_ratio(row, "temp_bytes", 2**20),
        "args MiB": f"{row['argument_bytes'] / 2**20:.4g}",
        **({"peak MiB": _with_ratio(row, "peak_bytes", 2**20)} if "peak_bytes" in row else {}),
        "launches": f"{row['launches']} ({row['scalar_launches']})",
        "sent MiB": _with_ratio(row, "sent_bytes", 2**20),
        **({} if row["largest"] is None else {"largest batch": f"{row['largest']}"}),
        "estimate ms": _with_ratio(row, "estimate_seconds", 1e-3),
        **lower,
    }


def _with_ratio(row: Row, name: str, unit: float) -> str:
    if name not in row:
        return "-"
    ratio = row.get(name.split("_", maxsplit=1)[0] + "_ratio")
    text = f"{row[name] / unit:.4g}"
    return text if ratio is None else f"{text} ({ratio:.2f})"


def _weak(rows: Sequence[Row]) -> list[dict[str, str]]:
    """One line for each model, layout and method that is compiled for several numbers of chips."""
    found = []
    for (model, layout, method), own in figures.by_chips(rows).items():
        line = {"model": model, "layout": layout, "method": method}
        for row in own:
            sent = f"{row['sent_bytes'] / 2**20:.4g} MiB ({row['launches']})"
            line[f"{row['chips']} chips"] = sent
        found.append(line)
    return found


def _time(row: Row) -> dict[str, str]:
    ratio = row["ratio"]
    return {
        "method": row["method"],
        "ms": f"{1e3 * row['seconds']:.4g}",
        "ratio": "-" if ratio is None else f"{ratio['median']:.2f}",
    }


if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.scaling.report"))
