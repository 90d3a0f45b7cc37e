"""The results of `benchmarks.theory`: a table of claims, from the topics' records."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from benchmarks.core import records
from benchmarks.core.frames import markdown_table

_NOTES = """\
*Outside* marks a claim about where a law or a method breaks down; it holds if that happens. Dashed
lines in the figures are predictions, markers and solid lines are measurements. CPU time is that of
all threads, compilation included.
"""


def write(folder: Path, topics: Sequence[str]) -> str:
    """Writes `claims.csv` and `summary.md` about the topics whose records are in the folder.

    Args:
        folder: The results' folder.
        topics: The topics' names, in the order of the report.

    Returns:
        The text of `summary.md`.
    """
    paths = {name: folder / f"{name}.json" for name in topics}
    found = {name: records.read_record(path) for name, path in paths.items() if path.exists()}
    text = _summary(found)
    records.write_text(folder / "claims.csv", _csv(found))
    records.write_text(folder / "summary.md", text)
    return text


def _summary(found: dict[str, records.Record]) -> str:
    claims = [claim for record in found.values() for claim in record["claims"]]
    held = sum(claim["holds"] for claim in claims)
    seconds = sum(record["cpu_seconds"] for record in found.values())
    first = next(iter(found.values()))
    software = ", ".join(f"{name} {first['versions'][name]}" for name in ("jax", "optax"))
    lengths = "shortened runs, " if first["config"]["quick"] else ""
    lines = [
        f"The theory, measured: {held} of {len(claims)} claims hold; {lengths}float64, "
        f"{first['hardware']['device']}, {software}, {seconds:.0f} s of CPU time.",
        "",
        _NOTES,
    ]
    for name, record in found.items():
        rows = [["claim", "where", "prediction", "measured", "holds?"]]
        for claim in record["claims"]:
            outside = "*Outside:* " if claim["outside"] else ""
            columns = [claim[key] for key in ("text", "setting", "prediction", "measured")]
            text, *others = (column.replace("|", r"\|") for column in columns)
            rows.append([outside + text, *others, "yes" if claim["holds"] else "**no**"])
        lines += [f"### {record['title']}", "", f"![{record['title']}]({name}.png)", ""]
        lines += [markdown_table(rows), ""]
    return "\n".join(lines)


def _csv(found: dict[str, records.Record]) -> str:
    stream = io.StringIO()
    rows = [
        {"topic": name, **claim} for name, record in found.items() for claim in record["claims"]
    ]
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
