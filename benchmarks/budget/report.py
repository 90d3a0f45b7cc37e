"""The tables of one task of `benchmarks.budget`, from its JSON records alone.

python -m benchmarks.budget.report DIR [DIR ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.budget.methods import BASE, table
from benchmarks.budget.tasks import TASKS
from benchmarks.core import command, frames
from benchmarks.core.classification.report import DATA, total_seconds
from benchmarks.core.frames import difference, mean_std, numbers, paired, percent, spread
from benchmarks.core.records import Record, Runs, by_method, read_comparison

SCORE = "last10_test_top1"
"""What methods are compared by: the test accuracy, the mean over the last ten epochs."""

_NOTES = (
    "Every method has {budget} gradient evaluations of each training image, in as many epochs as "
    "they buy, with its learning rate's decay over all of them. Mean ± standard deviation over "
    "seeds; a difference is paired by seed, ± its standard error. Top-1 is the mean over the last "
    "ten epochs. Early stopped: on one half of the test images at the epoch that is best on the "
    "other half, the mean over both ways. NLL, ECE (15 bins) and the accuracies with the matrices "
    "rounded to 3 bits or with noise of 5 % of their norm are the last epoch's. Time is the "
    "training's, relative to the base optimizer's with its own budget.",
    "Learning rate, weight decay and rho are those of the highest accuracy on {validation} "
    "held-out training images, with labels as wrong as those trained with, of {trials} tried for "
    "each method with one seed that is in no table.",
)


def write(folder: Path) -> str:
    """Writes `summary.md`, `summary.json` and `runs.csv` from `runs/*.json`.

    Returns the text of the summary.
    """
    records = read_comparison(folder)
    task = records[0]["config"]["task"]
    runs = by_method(records, table(TASKS[task].optimizer))
    summary = {"task": task, "budget": records[0]["config"]["budget"], "methods": summarize(runs)}
    tried = read_comparison(folder / "tuning") if (folder / "tuning").exists() else []
    text = to_markdown(records[0], summary, runs, tried)
    lines = (frames.line(record, seconds=total_seconds(record)) for record in records)
    content = {"summary.md": text, "summary.json": summary, "runs.csv": frames.csv(lines)}
    frames.write(folder, content)
    return text


def summarize(runs: Runs) -> dict[str, Any]:
    """Returns each method's numbers, as spreads over seeds, with the scores seed by seed."""
    tables = {label: numbers(seeds, _numbers) for label, seeds in runs.items()}
    rows = {}
    for label, columns in tables.items():
        row: dict[str, Any] = {name: spread(values) for name, values in columns.items()}
        scores = columns[SCORE]
        row["scores"] = {str(seed): value for seed, value in scores.items()}
        if BASE in tables:
            seconds = columns["seconds"] / tables[BASE]["seconds"]
            row["relative_seconds"] = float(seconds.mean())
            if label != BASE:
                row["minus_base"] = paired(scores, tables[BASE][SCORE])
        rows[label] = row
    return rows


def _numbers(record: Record) -> dict[str, Any]:
    return {**record["final"], "seconds": total_seconds(record)}


def to_markdown(record: Record, summary: dict[str, Any], runs: Runs, tried: list[Record]) -> str:
    """Returns the tables, with what their columns mean."""
    config = record["config"]
    rows, settings = [], []
    for label, row in summary["methods"].items():
        rows.append(
            {
                "method": label,
                "gradients": f"{row['gradients']['mean']:.3g}",
                "epochs": f"{row['epochs']['mean']:.0f}",
                "top-1 %": percent(row[SCORE]),
                f"minus {BASE}": difference(row.get("minus_base")),
                "early stopped": percent(row["early_stopped_top1"]),
                "train top-1 %": percent(row["last10_train_eval_top1"]),
                "NLL": mean_std(row["test_loss"], ".3f", ".3f"),
                "ECE %": percent(row["test_ece"]),
                "3 bits": percent(row["top1_3_bits"]),
                "noise 5 %": percent(row["top1_noise_5"]),
                "time": frames.number(row.get("relative_seconds"), ".2f"),
            }
        )
        found = next(iter(runs[label].values()))["config"]["hyperparameters"]
        chosen = ("lr", "decay", "rho")
        settings.append(
            {"method": label, **{name: f"{found[name]:.3g}" for name in chosen if name in found}}
        )
    trials = [run["config"]["method"].split(":")[0] for run in tried]
    terms = {
        "budget": summary["budget"],
        "validation": f"{tried[0]['config']['test_images']:,}" if tried else "-",
        "trials": max(map(trials.count, trials), default=0),
    }
    made_on = frames.made_on(record, "jax", "flax", "optax")
    parts = [
        f"# {DATA.get(config['dataset'], config['dataset'])}: {TASKS[summary['task']].title}",
        f"{config['train_images']:,} training and {config['test_images']:,} test images, "
        f"{config['model']} x{config['width']:g} ({record['parameters']:,} parameters), batch "
        f"{config['batch_size']}. Seeds {frames.seeds_of(runs.values())}; {made_on}.",
        frames.markdown(rows),
        *frames.fill(*(note.format(**terms) for note in (_NOTES if tried else _NOTES[:1]))),
        "## Settings",
        frames.markdown(settings),
    ]
    return "\n\n".join(parts) + "\n"


def gain(methods: dict[str, Any], one: str, other: str) -> dict[str, Any] | None:
    """Returns one method's score minus another's, paired by seed; None where one is missing."""
    if one not in methods or other not in methods:
        return None
    first, second = (pd.Series(methods[name]["scores"], dtype=float) for name in (one, other))
    return paired(first, second)


if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.budget.report"))
