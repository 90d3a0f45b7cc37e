"""The claims' table and figures, from the records of `benchmarks.theory` alone.

python -m benchmarks.theory.report DIR [DIR ...]
"""

import functools
import sys
from pathlib import Path

from benchmarks.core import command, frames, records
from benchmarks.core.plotting import save
from benchmarks.theory import figures
from benchmarks.theory.experiment import TOPICS

_NOTES = """\
*Outside* marks a claim about where a law or a method breaks down; it holds if that happens. Dashed
lines in the figures are predictions, markers and solid lines are measurements. CPU time is that of
all threads, compilation included.
"""


def write(folder: Path) -> str:
    """Writes `claims.csv`, `summary.md` and the figures of the topics that are in the folder.

    Returns the text of the summary.
    """
    paths = {name: folder / f"{name}.json" for name in TOPICS}
    found = {name: records.read_record(path) for name, path in paths.items() if path.exists()}
    if not found:
        return ""
    text = _summary(found)
    lines = frames.csv(
        {"topic": name, **claim} for name, record in found.items() for claim in record["claims"]
    )
    frames.write(folder, {"claims.csv": lines, "summary.md": text})
    drawings = {
        name: functools.partial(figures.finished, TOPICS[name].draw, record["series"])
        for name, record in found.items()
    }
    save(folder, drawings, style=figures.STYLE, dpi=130)
    return text


def _summary(found: dict[str, records.Record]) -> str:
    claims = [claim for record in found.values() for claim in record["claims"]]
    held = sum(claim["holds"] for claim in claims)
    seconds = sum(record["cpu_seconds"] for record in found.values())
    first = next(iter(found.values()))
    lengths = "shortened runs, " if first["config"]["quick"] else ""
    parts = [
        f"The theory, measured: {held} of {len(claims)} claims hold; {lengths}float64, "
        f"{first['hardware']['device']}, {frames.software(first, 'jax', 'optax')}, "
        f"{seconds:.0f} s of CPU time.",
        _NOTES.strip(),
    ]
    for name, record in found.items():
        rows = [
            {
                "claim": "*Outside:* " * claim["outside"] + claim["text"],
                "where": claim["setting"],
                "prediction": claim["prediction"],
                "measured": claim["measured"],
                "holds?": "yes" if claim["holds"] else "**no**",
            }
            for claim in record["claims"]
        ]
        figure = f"![{record['title']}]({name}.png)"
        parts += [f"### {record['title']}", figure, frames.markdown(rows)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.theory.report"))
