"""Tables and a figure over the noise levels of `benchmarks.tensorized`, from its records alone.

python -m benchmarks.tensorized_report DIR [DIR ...]
"""

from __future__ import annotations

import csv
import io
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.core import plotting
from benchmarks.core.classification import report
from benchmarks.core.frames import markdown_table, show_difference, show_percent, spread
from benchmarks.core.records import Record, check_config, read_records, shared_config, write_text

_NOTES = (
    "Mean ± standard deviation over seeds; a difference is paired by seed, ± its standard error. "
    "Accuracy is test top-1 with the right labels, the mean over the last ten epochs; train "
    "accuracy is measured in evaluation mode on the labels trained with, wrong ones included.",
    "The norm deviation Q of a layer is the sum over its cores of the squared deviation of "
    "||G_k||^2 from the layer's mean; here its mean over layers, after training. Weight decay and "
    "the data shrink and grow the cores under every method, so compare down a column.",
    "Time is that of the training steps relative to SGD's, the median over epochs and seeds; "
    "`--time` measures it better.",
)


def write(folder: Path) -> str:
    """Writes `summary.md`, `summary.json`, `summary.csv` and `accuracy.png` over `noise*/`.

    Returns:
        The text of `summary.md`.

    Raises:
        FileNotFoundError: There is no record below the folder.
        ValueError: The noise levels' records differ in more than the noise.
    """
    levels: dict[float, report.Runs] = {}
    shared: dict[str, Any] = {}
    for level_folder in folder.glob("noise*"):
        found = read_records(level_folder)
        for path, record in found.items():
            config = {**shared_config(record["config"]), "label_noise": None}
            shared = shared or config
            check_config(config, shared, path)
        if found:
            level = next(iter(found.values()))["config"]["label_noise"]
            levels[level] = report.by_method(found.values())
    if not levels:
        raise FileNotFoundError(f"{folder} holds no noise*/runs/*.json of a finished run.")
    levels = dict(sorted(levels.items()))
    rows = summarize(levels)
    text = to_markdown(levels, rows)
    write_text(folder / "summary.md", text)
    write_text(folder / "summary.json", json.dumps(rows, indent=1) + "\n")
    write_text(folder / "summary.csv", _to_csv(rows))
    record = _any_record(levels)
    figure = draw(rows, "\n".join(_title(record)))
    figure.savefig(folder / "accuracy.png", bbox_inches="tight", facecolor="white", dpi=130)
    return text


def summarize(levels: dict[float, report.Runs]) -> list[dict[str, Any]]:
    """Returns one row a noise level and method: `report.summarize`'s, and the norm deviation."""
    rows = []
    for level, runs in levels.items():
        for row in report.summarize(runs):
            values = [
                float(np.mean(list(record["norm_deviation"]["end"].values())))
                for record in runs[row["method"]].values()
                if "norm_deviation" in record
            ]
            deviation = spread(values) if values else None
            rows.append({"label_noise": level, **row, "norm_deviation": deviation})
    return rows


def to_markdown(levels: dict[float, report.Runs], rows: list[dict[str, Any]]) -> str:
    """Returns the tables, a row a method and a column a noise level."""
    record = _any_record(levels)
    seeds = sorted({seed for runs in levels.values() for seeds in runs.values() for seed in seeds})
    hardware, versions = record["hardware"], record["versions"]
    software = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax"))
    unit = "core(s)" if hardware["backend"] == "cpu" else "device(s)"
    heading, details = _title(record)
    parts = [
        f"# {heading}\n\n{details}. Seeds {', '.join(map(str, seeds))}; {hardware['device']}, "
        f"{hardware['count']} {unit}; {software}."
    ]
    difference = f"last10_test_top1_minus_{report.BASELINE}"
    tables = {
        "Test accuracy (%)": lambda row: show_percent(row["last10_test_top1"]),
        "Test accuracy minus SGD's (points)": lambda row: show_difference(row.get(difference)),
        "Train accuracy (%)": lambda row: show_percent(row["last10_train_eval_top1"]),
        "Norm deviation Q": lambda row: _number(row["norm_deviation"]),
        "Time relative to SGD": lambda row: (
            f"{row['relative_epoch_time']:.2f}" if "relative_epoch_time" in row else "-"
        ),
    }
    cells = {(row["method"], row["label_noise"]): row for row in rows}
    methods = dict.fromkeys(row["method"] for row in rows)
    for title, cell in tables.items():
        table = [["method", *(f"{100 * level:g} % wrong labels" for level in levels)]]
        for method in methods:
            found = (cells.get((method, level)) for level in levels)
            table.append([method, *(cell(row) if row else "-" for row in found)])
        parts.append(f"## {title}\n\n{markdown_table(table)}")
    parts += [textwrap.fill(note, 100) for note in _NOTES]
    return "\n\n".join(parts) + "\n"


def draw(rows: list[dict[str, Any]], title: str) -> Figure:
    """Draws the accuracy, and its difference to SGD's, against the share of wrong labels."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = plotting.palette(methods)
    difference = f"last10_test_top1_minus_{report.BASELINE}"
    panels = (
        ("last10_test_top1", "std", "test top-1 (%), mean of the last 10 epochs"),
        (difference, "standard_error", "test top-1 minus SGD's (points)"),
    )
    with mpl.rc_context(plotting.STYLE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, (name, error, label) in zip(axes, panels, strict=True):
            for place, method in enumerate(methods):
                own = [row for row in rows if row["method"] == method]
                own = [row for row in own if row.get(name, {}).get("mean") is not None]
                # Side by side, or their bars would cover one another.
                shift = 0.8 * (place - (len(methods) - 1) / 2)
                axis.errorbar(
                    [100 * row["label_noise"] + shift for row in own],
                    [100 * row[name]["mean"] for row in own],
                    [100 * (row[name][error] or 0) for row in own],
                    fmt="o-",
                    color=colours[method],
                    capsize=3,
                    label=method,
                )
            axis.set_xticks(sorted({100 * row["label_noise"] for row in rows}))
            axis.set_xlabel("wrong training labels (%)")
            axis.set_ylabel(label)
        axes[0].set_title("mean ± standard deviation over seeds", fontsize=9, loc="left")
        axes[1].set_title("mean ± standard error, paired by seed", fontsize=9, loc="left")
        axes[1].axhline(0, color=colours.get(report.BASELINE, "0.15"), lw=1, ls=":")
        axes[0].legend()
        figure.suptitle(title, fontsize=10)
    return figure


def _to_csv(rows: list[dict[str, Any]]) -> str:
    difference = f"last10_test_top1_minus_{report.BASELINE}"
    parts = {
        "last10_test_top1": ("mean", "std"),
        difference: ("mean", "standard_error"),
        "last10_train_eval_top1": ("mean", "std"),
        "norm_deviation": ("mean", "std"),
    }
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [f"{name}_{part}" for name, own in parts.items() for part in own]
    writer.writerow(["label_noise", "method", "seeds", *names])
    for row in rows:
        values = [(row.get(name) or {}).get(part) for name, own in parts.items() for part in own]
        seeds = row["last10_test_top1"]["seeds"]
        writer.writerow([row["label_noise"], row["method"], seeds, *values])
    return stream.getvalue()


def _any_record(levels: dict[float, report.Runs]) -> Record:
    return next(iter(next(iter(next(iter(levels.values())).values())).values()))


def _title(record: Record) -> tuple[str, str]:
    """Returns the subject and the settings that all noise levels share."""
    return report.title({**record, "config": {**record["config"], "label_noise": 0.0}})


def _number(found: dict[str, Any] | None) -> str:
    if found is None or found["mean"] is None:
        return "-"
    text = f"{found['mean']:.3g}"
    return text if found["std"] is None else f"{text} ± {found['std']:.2g}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return report.run_command("benchmarks.tensorized_report", __doc__, write, argv)


if __name__ == "__main__":
    sys.exit(main())
