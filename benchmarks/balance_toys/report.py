"""The results of `benchmarks.balance_toys`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.balance_toys import figures
from benchmarks.core import records
from benchmarks.models import toys as problems
from benchmarks.models.toys import BAR_ALPHA, Toy, Trajectory, steps_to_half

Results = Mapping[str, Mapping[str, Trajectory]]  # by toy and method

# Measured independently, with other random numbers: by toy and method, the imbalance at the end
# and the steps to half of it, by noise level. The Tucker-2 problem's shapes were not those here.
_ENDS = {
    ("nop", "SGD"): {0.5: 0.559, 1.0: 0.556},
    ("nop", "SAM"): {0.5: 0.112, 1.0: 0.072},
    ("tucker_large_core", "SGD"): {0.5: 2.00, 2.0: 1.68},
    ("tucker_large_core", "SAM"): {0.5: 1.373, 1.0: 0.895, 1.5: 0.533, 2.0: 0.282},
    ("tucker_large_core", "DAS"): {0.5: 1.393, 1.0: 0.904, 1.5: 0.534, 2.0: 0.280},
}
_HALVES = {("nop", "SAM"): {0.5: 25_600, 1.0: 12_200, 2.0: 6_100}}

_NOTES = f"""\
`||P - T||^2` is the loss without noise: the product's squared distance from its target. *Steps to
half*: the first record with half of the imbalance at the start, the median over seeds, or a dash
where most seeds never have it. *Collapsed*: the cores shrank to less than a tenth of their
squared norms, so that balance means nothing there. *Rises*: the imbalance ends at least 1 % above
its start. The references were measured independently, with other random numbers.

SAM has the radius rho of the toy's paper and DAS `alpha = rho`, constant. nBAR and oBAR have
`alpha_0 = {BAR_ALPHA}`, the smallest of their paper's 0.5, 1 and 2, with linear decay to 0 over the
run.
"""

# What the runs of full length show, and why.
_COMMENTS = {
    "nop": """\
SGD keeps `|B|`; SAM cuts it the faster the louder the noise. Without noise SAM, nBAR and DAS first
cut it and then *raise* it above its start: they go by the gradients' norms, and by then the larger
core has the larger gradient. For the same reason they do not aim at `B = 0` under noise: at the
minimum both cores have equal expected gradient norms at `|B| = {rest:.3f}` (dotted in the figure),
near which nBAR and DAS stay. oBAR, which compares the norms of the cores themselves, goes to 0 at
every noise level. At `a = 2` SAM shrinks both cores to 0, and its `B` of 0 is no balance; nBAR,
oBAR and DAS do not shrink them.
""",
    "op": """\
nBAR and oBAR are the same method on this loss. SAM collapses under the loudest noise. DAS is drawn
to 0 at every level, without noise too (where it is just leaving again at the end): the start has
`x^T y < 0`, so that `x` must pass through 0, but DAS has `||x||^2` in the denominator of its rate
and holds `x` at a norm of about `alpha / 2`, while `y` shrinks until `x = -y`, from where the
gradient leads to the saddle at 0. From `y = +3 x`, or with half the alpha and `a` up to 1, it
reaches the target.
""",
    "tucker_large_core": """\
The covariance of the cores' squared norms with those of their gradients is negative, and `Q` falls:
DAS follows SAM without SAM's second gradient. What SGD loses is due to its step size; in the limit
of small steps it conserves `Q`.
""",
    "tucker_small_core": """\
With the norms the other way round the covariance is positive after the first steps, and both SAM
and DAS *raise* `Q`: they are not balancing methods whatever the problem.
""",
}


def write(folder: Path, toys: Mapping[str, Toy], results: Results, settings: dict[str, Any]) -> str:
    """Writes `results.json`, `results.csv`, `curves.csv`, `summary.md` and a figure a toy.

    Args:
        folder: Created if missing.
        toys: The problems by name.
        results: What was measured, by toy and method.
        settings: The command's own: `seeds`, and `every`, the steps between two records.

    Returns:
        The text of `summary.md`.
    """
    every = settings["every"]
    rows = [
        row
        for name, runs in results.items()
        for method, run in runs.items()
        for row in _rows(name, toys[name], method, run, every)
    ]
    hardware, versions = records.hardware(), records.versions()
    software = ", ".join(f"{name} {versions[name]}" for name in ("jax", "optax"))
    header = f"Norm balancing on toys: {settings['seeds']} seeds, float64, {hardware['device']}, "
    text = "\n".join([f"{header}{software}.", "", _NOTES, *_tables(toys, rows)])
    record = {
        "format": records.FORMAT,
        "settings": settings | {"bar_alpha": BAR_ALPHA},
        "hardware": hardware,
        "versions": versions,
        "toys": {
            name: {key: getattr(toy, key) for key in ("rho", "learning_rate", "steps", "rest")}
            for name, toy in toys.items()
        },
        "results": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    records.write_record(folder / "results.json", record)
    records.write_text(folder / "results.csv", _csv(rows))
    records.write_text(folder / "curves.csv", _csv(_curves(toys, results, every)))
    records.write_text(folder / "summary.md", text)
    for name, runs in results.items():
        figures.write(folder / f"{name}.png", toys[name], runs, every)
    return text


def _rows(name: str, toy: Toy, method: str, run: Trajectory, every: int) -> list[dict[str, Any]]:
    """One row a noise level."""
    rows = []
    halves = steps_to_half(run.imbalance, every)
    for index, level in enumerate(toy.levels):
        end = run.imbalance[index, :, -1]
        # The median of runs of which most never get there is no number of steps.
        half = float(np.median(np.nan_to_num(halves[index], nan=np.inf)))
        size = run.size[index]
        rows.append(
            {
                "toy": name,
                "method": method,
                "noise": level,
                "start": float(run.imbalance[index, 0, 0]),
                "end": float(end.mean()),
                "end_std": float(end.std(ddof=1)) if len(end) > 1 else None,
                "steps_to_half": half if np.isfinite(half) else None,
                "covariance": float(np.nanmean(run.covariance[index])),
                "distance": float(run.distance[index, :, -1].mean()),
                "size": float(size[:, -1].mean()),
                "collapsed": bool(np.all(size[:, -1] < 0.1 * size[:, 0])),
                "reference_end": _ENDS.get((name, method), {}).get(level),
                "reference_steps_to_half": _HALVES.get((name, method), {}).get(level),
            }
        )
    return rows


def _tables(toys: Mapping[str, Toy], rows: list[dict[str, Any]]) -> list[str]:
    lines, full = [], problems.toys()
    for name, toy in toys.items():
        symbol = "|B|" if len(toy.start) == 2 else "Q"
        quoted = f"`{symbol}`".replace("|", r"\|")
        own = [row for row in rows if row["toy"] == name]
        header = [
            "method",
            "noise a",
            f"{quoted} at the end (start {own[0]['start']:.3g})",
            "reference",
            "steps to half",
            "reference",
            r"`\|\|P - T\|\|^2` at the end",
            "",
        ]
        lines += [f"### {name}", ""]
        lines += [f"eta {toy.learning_rate:g}, rho {toy.rho:g}, {toy.steps:,} steps.", ""]
        if toy.steps == full[name].steps:
            lines += [_COMMENTS[name].format(rest=toy.rest)]
        cells = [header, ["---"] * len(header), *(_cells(row) for row in own)]
        lines += [f"| {' | '.join(row)} |" for row in cells]
        lines += [""]
    return lines


def _cells(row: Mapping[str, Any]) -> list[str]:
    deviation = "" if row["end_std"] is None else f" ± {row['end_std']:.1g}"
    remark = "rises" if row["end"] > 1.01 * row["start"] else ""
    return [
        row["method"],
        f"{row['noise']:g}",
        f"{row['end']:.3g}{deviation}",
        _number(row["reference_end"], ".3f"),
        _number(row["steps_to_half"], ",.0f", missing="-"),
        _number(row["reference_steps_to_half"], ",.0f"),
        f"{row['distance']:.2g}",
        "collapsed" if row["collapsed"] else remark,
    ]


def _number(value: float | None, form: str, missing: str = "") -> str:
    return missing if value is None else format(value, form)


def _curves(toys: Mapping[str, Toy], results: Results, every: int) -> list[dict[str, Any]]:
    """The means over seeds at about fifty steps of each run."""
    rows = []
    for name, runs in results.items():
        for method, run in runs.items():
            count = run.imbalance.shape[-1]
            for index, level in enumerate(toys[name].levels):
                for record in range(0, count, max(1, count // 50)):
                    rows.append(
                        {"toy": name, "method": method, "noise": level, "step": every * record}
                        | {
                            field: f"{values[index, :, record].mean():.5g}"
                            for field, values in run._asdict().items()
                        }
                    )
    return rows


def _csv(rows: list[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
