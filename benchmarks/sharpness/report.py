"""Tables of `benchmarks.sharpness`, made from its JSON records alone.

python -m benchmarks.sharpness.report DIR [DIR ...]
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core import command, frames
from benchmarks.core.classification import report
from benchmarks.core.classification.report import BASELINE
from benchmarks.core.frames import numbers, spread
from benchmarks.core.records import Record, Runs, by_method, read_comparison
from benchmarks.sharpness import figures
from benchmarks.sharpness.measures import ASCENT_STEPS, COLUMNS

_NOTES = (
    "Mean ± standard deviation over seeds, on the same {examples:,} training images for all "
    "models: without augmentation, in evaluation mode, with the labels and the loss of the "
    "training.",
    "Eigenvalues, trace and Frobenius norm are the Hessian's, over all parameters; the largest "
    "residual of a top eigenvalue is {residual} of it. The adaptive measures do not change "
    "when layers are rescaled without effect on the loss; the others do. Worst cases are the "
    "largest rise of the loss in {steps} normalized ascent steps; m-sharpness is one such step on "
    "each batch of {batch}. Average case: normal perturbations.",
    "Cost: in gradients over those images. A product with the Hessian counts as two, a forward "
    "pass as a third.",
)


def write(folder: Path) -> str:
    """Writes `summary.md`, `summary.json`, `results.csv` and the figures from `runs/*.json`.

    Returns the text of the summary.
    """
    found = read_comparison(folder)
    runs = by_method(found)
    rows = {
        label: {name: spread(values) for name, values in numbers(seeds, _measures).items()}
        for label, seeds in runs.items()
    }
    text = to_markdown(found[0], runs, rows)
    lines = [
        {"method": label, "seed": seed, **_measures(record)}
        for label, seeds in runs.items()
        for seed, record in seeds.items()
    ]
    answer = {"ratios": top_eigenvalue_ratios(runs), "rows": rows}
    files = {"summary.md": text, "summary.json": answer, "results.csv": frames.csv(lines)}
    frames.write(folder, files)
    figures.write(folder, runs, "\n".join(report.title(found[0])))
    return text


def _measures(record: Record) -> dict[str, float]:
    return {column.name: column.of(record) for column in COLUMNS}


def top_eigenvalue_ratios(runs: Runs) -> dict[str, dict[int, float]]:
    """Returns each method's top eigenvalue over SGD's, by common seed."""
    baseline = runs.get(BASELINE, {})
    top = COLUMNS[0].read
    return {
        label: {
            seed: top(record["measures"]) / top(baseline[seed]["measures"])
            for seed, record in seeds.items()
            if seed in baseline
        }
        for label, seeds in runs.items()
        if label != BASELINE and baseline
    }


def to_markdown(record: Record, runs: Runs, rows: dict[str, dict[str, Any]]) -> str:
    """Returns the tables, what each method did to the top eigenvalue, and the columns' meaning."""
    measured = [made for seeds in runs.values() for made in seeds.values()]
    # matfree made the eigenvalues of the earlier records.
    head = report.head(record, runs.values(), "jax", "matfree")
    tables = [
        frames.markdown(
            {"method": label, **{c.name: _show(row[c.name]) for c in columns}}
            for label, row in rows.items()
        )
        for columns in (COLUMNS[:5], COLUMNS[5:])
    ]
    losses = []
    for label, seeds in runs.items():
        found = numbers(seeds, lambda r: {**r["measures"]["loss"], **r["final"]})
        shown = {
            "train loss": found["value"],
            "gradient norm": found["grad_norm"],
            "test top-1 %": 100 * found["test_top1"],
        }
        cells = {name: _show(spread(values)) for name, values in shown.items()}
        losses.append({"method": label, **cells})
    pairs = [made["measures"]["top_eigenvalues"] for made in measured]
    residual = max(pair["residuals"][0] / pair["values"][0] for pair in pairs)
    notes = " ".join(_NOTES[:2]).format(
        examples=record["examples"],
        residual=f"{residual:.1g}" if residual > _ROUNDING else f"below {_ROUNDING:g}",
        steps=ASCENT_STEPS,
        batch=record["config"]["batch_size"],
    )
    costs = [
        {"measure": name.replace("_", " "), "gradients": f"{cost:.3g}"}
        for name, cost in record["gradients"].items()
    ]
    parts = [
        head.replace("# ", "# Sharpness of the minima: ", 1),
        *tables,
        frames.markdown(losses),
        *frames.fill(_answer(runs), notes, _NOTES[2]),
        frames.markdown(costs),
    ]
    return "\n\n".join(parts) + "\n"


_ROUNDING = 1e-6  # of a product with the Hessian in float32, relative to the largest eigenvalue


def _answer(runs: Runs) -> str:
    """Says for each method how its top eigenvalue compares with SGD's; nothing without SGD."""
    parts = []
    for label, ratios in top_eigenvalue_ratios(runs).items():
        smaller = sum(ratio < 1 for ratio in ratios.values())
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios.values())
        parts.append(f"`{label}` {shown} (smaller in {smaller} of {len(ratios)})")
    answer = f"Top eigenvalue over `{BASELINE}`'s, seed by seed: {'; '.join(parts)}."
    return answer if parts else ""


def _show(found: Mapping[str, Any]) -> str:
    """Formats a spread with three digits of its mean."""
    if found["mean"] is None:
        return "-"
    digits = max(0, 2 - int(np.floor(np.log10(max(abs(found["mean"]), 1e-12)))))
    return frames.mean_std(found, f".{digits}f", f".{digits}f")


if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.sharpness.report"))
