"""The table and targets of `benchmarks.tensor_completion`, from its records alone.

python -m benchmarks.tensor_completion.report DIR [DIR ...]
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core import command, frames, records, timing
from benchmarks.core.frames import mean_std, spread
from benchmarks.core.records import Record
from benchmarks.tensor_completion import figures
from benchmarks.tensor_completion.figures import Runs

METHODS = ("hooi", "adam", "sam", "das", "obar")
EARLY = 5  # the early-stopped rows end at a fifth of the steps
PUBLISHED = {"hooi": 0.9268, "adam": 0.9482, "sam": 0.9485, "das": 0.9484}
"""R^2 on the observed entries after 50,000 steps, arXiv 2508.10435."""

_TOLERANCE = 0.002
_OVERHEAD = 1.05
_NOTES = """\
R^2 = 1 - ||error||^2 / ||data||^2, mean ± standard deviation over the splits. *Observed* entries
are those that the model is trained on, which is what the paper's script scores; *held out* are the
others. *Best* is the run's best on the held-out entries at any measurement, chosen with those
entries: what early stopping could reach, not a result of it. Q is the norm deviation of the four
cores at the end. Seconds are those of a whole run on one split (HOOI: until its tolerance, or as
many iterations as the others make steps); time / Adam is the ratio of the steps' times, measured
in turn in one process, with its 95 % confidence interval.
"""


def write(folder: Path) -> str:
    """Writes `summary.md`, `summary.json`, `results.csv` and the figures; returns the summary."""
    found = records.read_comparison(folder)
    overhead = records.read_record(folder / "overhead.json")
    every = {name: [r for r in found if r["config"]["method"] == name] for name in METHODS}
    runs = {name: made for name, made in every.items() if made}
    rows = {name: summarize(made) for name, made in runs.items()}
    claims = targets(runs, overhead)
    text = to_markdown(runs, rows, overhead, claims)
    lines = frames.csv(_line(record) for made in runs.values() for record in made)
    answer = {"rows": rows, "targets": claims}
    frames.write(folder, {"summary.md": text, "summary.json": answer, "results.csv": lines})
    figures.write(folder, runs)
    return text


def summarize(made: list[Record]) -> dict[str, list[float]]:
    """Returns a method's figures, a number for each split."""
    row = {
        "observed": [record["final"]["r2_observed"] for record in made],
        "held_out": [record["final"]["r2_held_out"] for record in made],
        "norm_deviation": [record["final"]["norm_deviation"] for record in made],
        "seconds": [record["seconds"] for record in made],
    }
    curves = [record["curves"] for record in made if record["curves"]]
    if curves:
        early = len(curves[0]["r2_observed"]) // EARLY - 1
        row["early_observed"] = [curve["r2_observed"][early] for curve in curves]
        row["early_held_out"] = [curve["r2_held_out"][early] for curve in curves]
        row["best_held_out"] = [max(curve["r2_held_out"]) for curve in curves]
    return row


def targets(runs: Runs, overhead: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns what was asked for, what was found, and whether they agree."""
    found = []
    if runs["adam"][0]["config"]["steps"] == 50_000:
        for name in (name for name in ("adam", "sam", "das") if name in runs):
            value = np.mean([record["final"]["r2_observed"] for record in runs[name]])
            met = abs(value - PUBLISHED[name]) <= _TOLERANCE
            target = f"{name}: observed R^2 within {_TOLERANCE} of {PUBLISHED[name]}"
            verdict = "met" if met else "not met"
            found.append({"target": target, "measured": f"{value:.4f}", "verdict": verdict})
    ratio = overhead["methods"]["das"]["ratio"]
    return [
        *found,
        {
            "target": f"das: a step at most {_OVERHEAD}x Adam's",
            "measured": timing.show(ratio),
            "verdict": timing.verdict(ratio, _OVERHEAD),
        },
    ]


def to_markdown(
    runs: Runs,
    rows: Mapping[str, Mapping[str, list[float]]],
    overhead: Mapping[str, Any],
    claims: list[dict[str, str]],
) -> str:
    """Returns the tables."""
    first = runs["adam"][0]
    config = first["config"]
    early = f"{config['steps'] // EARLY:,}"
    lines = []
    for name, row in rows.items():
        times = overhead["methods"].get(name)
        lines.append(
            {
                "method": name,
                "observed": _spread(row, "observed", 4),
                "published": frames.number(PUBLISHED.get(name), ".4f"),
                "held out": _spread(row, "held_out", 2),
                f"observed, {early}": _spread(row, "early_observed", 3),
                f"held out, {early}": _spread(row, "early_held_out", 3),
                "held out, best": _spread(row, "best_held_out", 3),
                "Q": f"{np.mean(row['norm_deviation']):.3g}",
                "seconds": f"{np.median(row['seconds']):.1f}",
                "time / Adam": timing.show(times["ratio"]) if times else "-",
            }
        )
    parts = [
        f"# Tucker completion of the COVID-19 serology tensor, {config['steps']:,} steps",
        f"Rank {tuple(config['rank'])}, {100 * config['observed']:.0f} % observed, "
        f"{len(runs['adam'])} split(s), Adam {config['learning_rate']}, SAM rho "
        f"{config['rho']}, DAS alpha {config['das_alpha']} and oBAR alpha "
        f"{config['obar_alpha']} with linear decay to 0, {config['dtype']}; "
        f"{frames.made_on(first, 'jax', 'optax')}.",
        frames.markdown(lines),
        _NOTES.strip(),
        frames.markdown(claims),
    ]
    return "\n\n".join(parts) + "\n"


def _line(record: Record) -> dict[str, Any]:
    return {
        **{key: record["config"][key] for key in ("method", "split", "steps")},
        **{key: record["final"][key] for key in ("r2_observed", "r2_held_out", "norm_deviation")},
        **{key: record[key] for key in ("loss", "seconds", "compile_seconds")},
    }


def _spread(row: Mapping[str, list[float]], name: str, digits: int) -> str:
    form = f".{digits}f"
    return mean_std(spread(row[name]), form, form) if name in row else "-"


if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.tensor_completion.report"))
