"""The tables and targets of `benchmarks.scaling`, from its record alone.

python -m benchmarks.scaling.report DIR [DIR ...]
"""

import operator
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.core import command, frames, records
from benchmarks.scaling import figures
from benchmarks.scaling.programs import LAYOUTS, methods

Row = dict[str, Any]

_NOTES = """\
Counted in the compiled program: what each device sends in a step with ring algorithms, in KiB, and
in brackets the number of collectives, each of which may carry several arrays. An all-reduce of B
bytes over n devices sends 2 B (n - 1) / n, an all-gather B (n - 1) / n. The step returns no loss,
whose mean would be 4 bytes more for every method alike.

XLA for CPU has no reduce-scatter: under `fsdp` it all-reduces the gradients, of every method alike.
SGD's go in one all-reduce there. Beside the norms of BAR and DAS, some of which wait for a gradient
and then travel with the next one's, they go one by one: the bytes are the same, the collectives are
more. Which arrays share a collective is XLA's choice, and another on accelerators.
"""
_CPU_TIMES = "Simulated devices share the cores of one CPU: these times say nothing about scaling."
_BALANCING = ("nbar", "obar", "das")


class Target(NamedTuple):
    """A claim about all numbers of devices above one, what was found, and whether it holds."""

    layout: str
    claim: str
    found: str
    verdict: str


def targets(rows: Sequence[Row]) -> list[Target]:
    """Returns the targets on what the rows hold."""
    by = {(row["layout"], row["method"], row["devices"]): row for row in rows}
    several = sorted({row["devices"] for row in rows if row["devices"] > 1})
    if not several:
        return []

    def pairs(layout: str, method: str) -> list[tuple[Row, Row]]:
        return [(by[layout, method, n], by[layout, "sgd", n]) for n in several]

    found = []
    for layout in ("jit", "shard_map"):
        claims = [
            ("sam", 2, "synchronized SAM moves exactly twice SGD's bytes"),
            ("sam_per_device", 1, "per-device SAM moves exactly SGD's bytes"),
            *((name, 1, f"{name} moves exactly SGD's bytes") for name in _BALANCING),
        ]
        for method, times, claim in claims:
            if method not in methods(layout):
                continue
            ratios = {row["bytes"] / base["bytes"] for row, base in pairs(layout, method)}
            shown = ", ".join(f"{ratio:g}" for ratio in sorted(ratios))
            verdict = "met" if ratios == {times} else "not met"
            found.append(Target(layout, claim, f"{shown} times", verdict))
    for layout in ("fsdp", "tensor"):
        found += [_norms_target(layout, method, pairs(layout, method)) for method in _BALANCING]
    return found


def _norms_target(layout: str, method: str, pairs: list[tuple[Row, Row]]) -> Target:
    """At most one all-reduce that carries norms and nothing else; nothing else beside norms."""
    alone = max(norm_collectives(row) for row, _ in pairs)
    more = max(row["bytes"] - base["bytes"] for row, base in pairs)
    launches = max(row["collectives"] - base["collectives"] for row, base in pairs)
    same = all(_matrices(row) == _matrices(base) for row, base in pairs)
    met = alone <= 1 and same
    return Target(
        layout,
        f"{method} adds at most one all-reduce of norms alone, and else moves SGD's bytes",
        f"{alone} of norms alone; in all {more} bytes and {launches} collectives more",
        "met" if met else "not met",
    )


def norm_collectives(row: Row) -> int:
    """How many collectives carry norms alone: scalars, or vectors of sums over a factor's rows."""
    launches = defaultdict(list)
    for array in row["arrays"]:
        launches[array["launch"]].append(len(array["shape"]) < 2)
    return sum(all(norms) for norms in launches.values())


def _matrices(row: Row) -> Counter:
    """The parameters, gradients and activations that are sent."""
    arrays = ((a["kind"], a["dtype"], tuple(a["shape"])) for a in row["arrays"])
    return Counter(array for array in arrays if len(array[2]) > 1)


def write(folder: Path) -> str:
    """Writes `results.csv`, `summary.md` and `bytes.png` from `results.json`.

    Returns the text of the summary.
    """
    record = records.read_record(folder / "results.json")
    text = to_markdown(record)
    program = operator.itemgetter("layout", "method", "devices")
    seconds = {program(row): row["seconds"] for row in record["times"]}
    names = ("layout", "method", "devices", "collectives", "bytes", "sent_bytes")
    lines = frames.csv(
        {
            **{name: row[name] for name in names},
            "norm_collectives": norm_collectives(row),
            "seconds": seconds.get(program(row)),
        }
        for row in record["programs"]
    )
    frames.write(folder, {"results.csv": lines, "summary.md": text})
    figures.write(folder, record["settings"], record["programs"])
    return text


def to_markdown(record: records.Record) -> str:
    """Returns a table a layout, one of the times if there are any, and one of the targets."""
    settings, backend = record["settings"], record["hardware"]["backend"]
    software = frames.software(record, "jax", "optax")
    parts = [
        f"# What a step sends between devices ({backend}, {software})",
        f"{settings['layers']} layers of two factors, {settings['width']} x {settings['rank']}: "
        f"{settings['parameters']:,} parameters ({4 * settings['parameters'] / 1024:g} KiB), "
        f"{settings['batch']} examples on each device.",
        _NOTES.strip(),
    ]
    for layout, description in LAYOUTS.items():
        parts += [f"## {layout}: {description}", _table(record["programs"], layout, _sent)]
    if record["times"]:
        parts.append("## Milliseconds a step, weak scaling")
        if backend == "cpu":
            parts.append(_CPU_TIMES)
        for layout in dict.fromkeys(row["layout"] for row in record["times"]):
            parts += [f"{layout}:", _table(record["times"], layout, _milliseconds)]
    if record["targets"]:
        rows = [list(target.values()) for target in record["targets"]]
        parts += ["## Targets", frames.markdown(rows, ["layout", "target", "found", ""])]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row], layout: str, show: Callable[[Row], str]) -> str:
    own = [row for row in rows if row["layout"] == layout]
    own.sort(key=lambda row: row["devices"])
    return frames.cross(own, lambda r: f"{r['devices']} device{'s' * (r['devices'] > 1)}", show)


def _sent(row: Row) -> str:
    kib = f"{row['sent_bytes'] / 1024:.3f}".rstrip("0").rstrip(".")
    return f"{kib} ({row['collectives']})"


def _milliseconds(row: Row) -> str:
    return f"{1e3 * row['seconds']:.4g} ({row['over_fewest']['median']:.2f}x)"


if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.scaling.report"))
