"""Tables and figures of `benchmarks.sharpness`, made from its JSON records alone.

python -m benchmarks.sharpness_report DIR [DIR ...]
"""

from __future__ import annotations

import csv
import io
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import norm

from benchmarks.core.classification import report
from benchmarks.core.frames import markdown_table, spread
from benchmarks.core.plotting import STYLE, band, draw_seeds, legend, palette
from benchmarks.core.records import Record, Runs, read_comparison, write_text
from benchmarks.sharpness.measures import (
    ADAPTIVE_RHO,
    ASCENT_STEPS,
    AVERAGE_RHO,
    EIGENVALUES,
    RHO,
)

BASELINE = report.BASELINE


class Column(NamedTuple):
    """A number of a record: what tables call it, what figures call it, and how to read it."""

    name: str
    title: str
    read: Callable[[dict[str, Any]], float]


COLUMNS = (
    Column("top eigenvalue", r"top eigenvalue $\lambda_1$", lambda m: _eigenvalue(m, 0)),
    Column(
        "1st / 5th", r"$\lambda_1 / \lambda_5$", lambda m: _eigenvalue(m, 0) / _eigenvalue(m, 4)
    ),
    Column("trace", r"trace", lambda m: m["trace"]["value"]),
    Column("Frobenius", r"Frobenius norm", lambda m: m["frobenius_norm"]["value"]),
    Column(
        "adaptive top",
        r"adaptive: top eigenvalue of $|w| H |w|$",
        lambda m: m["adaptive_top_eigenvalue"]["value"],
    ),
    Column("worst case", f"worst case, rho {RHO:g} (nats)", lambda m: m["worst_case"]["value"]),
    Column(
        "adaptive worst case",
        f"adaptive worst case, rho {ADAPTIVE_RHO:g} (nats)",
        lambda m: m["adaptive_worst_case"]["value"],
    ),
    Column("m-sharpness", f"m-sharpness, rho {RHO:g} (nats)", lambda m: m["m_sharpness"]["value"]),
    Column(
        "average case",
        f"average case, N(0, {AVERAGE_RHO:g}²) (nats)",
        lambda m: m["average_case"]["value"],
    ),
)
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

    Returns:
        The text of `summary.md`.
    """
    found = read_comparison(folder)
    runs = report.by_method(found)
    rows = {
        label: {
            column.name: spread([column.read(record["measures"]) for record in seeds.values()])
            for column in COLUMNS
        }
        for label, seeds in runs.items()
    }
    text = to_markdown(found[0], runs, rows)
    write_text(folder / "summary.md", text)
    answer = {"ratios": top_eigenvalue_ratios(runs), "rows": rows}
    write_text(folder / "summary.json", json.dumps(answer, indent=1) + "\n")
    write_text(folder / "results.csv", to_csv(runs))
    title = "\n".join(report.title(found[0]))
    with mpl.rc_context(STYLE):
        drawings = {
            "measures": _measures(runs),
            "spectrum": _spectrum(runs),
            "landscape": _landscape(runs),
        }
        for name, figure in drawings.items():
            figure.suptitle(title, fontsize=10)
            figure.savefig(folder / f"{name}.png", bbox_inches="tight", facecolor="white")
    return text


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
    heading, details = report.title(record)
    measured = [made for seeds in runs.values() for made in seeds.values()]
    hardware = record["hardware"]
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("jax", "matfree"))
    numbers = sorted({made["config"]["seed"] for made in measured})
    setting = f"{details}. Seeds {', '.join(map(str, numbers))}"
    tables = []
    for columns in (COLUMNS[:5], COLUMNS[5:]):
        table = [["method", *(column.name for column in columns)]]
        table += [[label, *(_show(row[c.name]) for c in columns)] for label, row in rows.items()]
        tables.append(markdown_table(table))
    pairs = [made["measures"]["top_eigenvalues"] for made in measured]
    residual = max(pair["residuals"][0] / pair["values"][0] for pair in pairs)
    notes = " ".join(_NOTES[:2]).format(
        examples=record["examples"],
        residual=f"{residual:.1g}" if residual > _ROUNDING else f"below {_ROUNDING:g}",
        steps=ASCENT_STEPS,
        batch=record["config"]["batch_size"],
    )
    costs = markdown_table(
        [["measure", "gradients"]]
        + [[name.replace("_", " "), f"{cost:.3g}"] for name, cost in record["gradients"].items()]
    )
    losses = [["method", "train loss", "gradient norm", "test top-1 %"]]
    for label, seeds in runs.items():
        values = [[made["measures"]["loss"][name] for made in seeds.values()] for name in _LOSS]
        accuracy = [100 * made["final"]["test_top1"] for made in seeds.values()]
        losses.append([label, *(_show(spread(found)) for found in (*values, accuracy))])
    parts = [
        f"# Sharpness of the minima: {heading}",
        f"{setting}; {hardware['device']}, {hardware['count']} core(s); {versions}.",
        *tables,
        markdown_table(losses),
        *(textwrap.fill(text, 100) for text in (_answer(runs), notes, _NOTES[2]) if text),
        costs,
    ]
    return "\n\n".join(parts) + "\n"


_LOSS = ("value", "grad_norm")
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


def to_csv(runs: Runs) -> str:
    """Returns one row a model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", *(column.name for column in COLUMNS)])
    for label, seeds in runs.items():
        for seed, record in seeds.items():
            writer.writerow([label, seed, *(c.read(record["measures"]) for c in COLUMNS)])
    return text.getvalue()


def _eigenvalue(measures: dict[str, Any], index: int) -> float:
    return measures["top_eigenvalues"]["values"][index]


def _show(found: dict[str, Any]) -> str:
    if found["mean"] is None:
        return "-"
    digits = max(0, 2 - int(np.floor(np.log10(max(abs(found["mean"]), 1e-12)))))
    text = f"{found['mean']:.{digits}f}"
    return text if found["std"] is None else f"{text} ± {found['std']:.{digits}f}"


def _measures(runs: Runs) -> Figure:
    """A panel a measure: a row a method, a dot a seed."""
    colours = palette(runs)
    columns = [column for column in COLUMNS if column.name != "1st / 5th"]
    figure = Figure(figsize=(14, 1.6 + 0.8 * len(runs)), layout="constrained")
    grid = figure.subplots(2, 4, sharey=True)
    for axis, column in zip(grid.flat, columns, strict=True):
        for row, (label, seeds) in enumerate(runs.items()):
            values = np.array([column.read(record["measures"]) for record in seeds.values()])
            draw_seeds(axis, row, values, colours[label], number=".3g")
            if label == BASELINE:
                axis.axvline(values.mean(), color="0.6", lw=1, ls=":")
        axis.set_xlabel(column.title)
        axis.set_xlim(left=0)
        axis.margins(x=0.12)
        axis.set_ylim(len(runs) - 0.4, -0.75)
        axis.set_yticks(range(len(runs)), list(runs))
    return figure


def _spectrum(runs: Runs) -> Figure:
    """The largest eigenvalues of each method's Hessians, and their spectral density."""
    colours = palette(runs)
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    largest, density = figure.subplots(1, 2, width_ratios=(2, 3))
    every = [made["measures"]["density"] for seeds in runs.values() for made in seeds.values()]
    low, high = (bound([node for d in every for node in d["nodes"]]) for bound in (min, max))
    width = (high - low) / 100
    grid = np.linspace(low - 4 * width, high + 4 * width, 600)
    for label, seeds in runs.items():
        top = np.array([made["measures"]["top_eigenvalues"]["values"] for made in seeds.values()])
        band(largest, np.arange(1, top.shape[1] + 1), top, label, colours[label])
        densities = [made["measures"]["density"] for made in seeds.values()]
        curves = [
            norm.pdf(grid[:, None], np.array(d["nodes"]), width) @ np.array(d["weights"])
            for d in densities
        ]
        density.semilogy(grid, np.mean(curves, axis=0), color=colours[label], label=label)
    largest.set_xticks(range(1, EIGENVALUES + 1))
    largest.set_xlabel("rank of the eigenvalue (line and band: mean ± standard deviation)")
    largest.set_ylabel("eigenvalue of the Hessian")
    parameters = next(iter(next(iter(runs.values())).values()))["parameters"]
    # From less than one eigenvalue to all of them.
    density.set_ylim(0.1 / parameters / width, 1 / width)
    density.set_xlabel("eigenvalue of the Hessian")
    density.set_ylabel("density (mean over seeds)")
    legend(figure, density)
    return figure


def _landscape(runs: Runs) -> Figure:
    """The loss along a random filter-normalized direction and along the top eigenvector."""
    colours = palette(runs)
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    panels = (
        ("random", "distance along a random direction (norms of the filters)"),
        ("top_eigenvector", "distance along the top eigenvector"),
    )
    for axis, (name, label) in zip(axes, panels, strict=True):
        for method, seeds in runs.items():
            lines = np.array([made["measures"]["landscape"][name] for made in seeds.values()])
            distances = next(iter(seeds.values()))["measures"]["landscape"]["distances"]
            rises = lines - lines[:, [len(distances) // 2]]
            axis.plot(distances, rises.mean(0), color=colours[method], label=method)
        axis.set_xlabel(label)
        axis.set_ylabel("rise of the training loss (nats, mean over seeds)")
    legend(figure, axes[0])
    return figure


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return report.run_command("benchmarks.sharpness_report", __doc__, write, argv)


if __name__ == "__main__":
    sys.exit(main())
