"""The tables of one task of `benchmarks.budget`, from its JSON records alone.

python -m benchmarks.budget.report DIR [DIR ...]
"""

from __future__ import annotations

import math
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

TOP1 = "test_top1"
"""What classifiers are compared by: the last epoch's test accuracy.

A mean over the last ten would reach into the early ones of a method that has few.
"""

_BUDGET = (
    "Every method has {budget} gradient evaluations of each training {unit}, in as many epochs as "
    "they buy, with its learning rate's decay over all of them. Mean ± standard deviation over "
    "seeds; a difference is paired by seed, ± its standard error. "
)
_IMAGES = (
    "All numbers are the last epoch's, where the learning rate is 0, but for early stopped: on one "
    "half of the test images at the epoch that is best on the other half, the mean over both ways. "
    "ECE has 15 bins; 3 bits and noise of 5 % of the norm are those of the weight matrices. "
)
_SERIES = (
    "The errors are those of the epoch that is best on the validation part, MSE at the end those "
    "of the last epoch. The difference is that of the MSE's logarithm, in percent: below 0 is "
    "better. "
)
_TIME = "Time is the training's, relative to the base optimizer's with its own budget."
_SEARCH = (
    "Learning rate, weight decay and rho are those of the {best}, of {trials} tried for each "
    "method with one seed that is in no table."
)
_BEST_TOP1 = (
    "highest accuracy on {validation:,} held-out training images, with labels as wrong as those "
    "trained with"
)


def write(folder: Path) -> str:
    """Writes `summary.md`, `summary.json` and `runs.csv` from `runs/*.json`.

    Returns the text of the summary.
    """
    records = read_comparison(folder)
    task = records[0]["config"]["task"]
    runs = by_method(records, table(task))
    summary = {"task": task, "budget": records[0]["config"]["budget"], "methods": summarize(runs)}
    tried = read_comparison(folder / "tuning") if (folder / "tuning").exists() else []
    text = to_markdown(records[0], summary, runs, tried)
    lines = (frames.line(record, seconds=_numbers(record)["seconds"]) for record in records)
    content = {"summary.md": text, "summary.json": summary, "runs.csv": frames.csv(lines)}
    frames.write(folder, content)
    return text


def summarize(runs: Runs) -> dict[str, Any]:
    """Returns each method's numbers, as spreads over seeds, with the scores seed by seed."""
    tables = {label: numbers(seeds, _numbers) for label, seeds in runs.items()}
    rows = {}
    for label, columns in tables.items():
        row: dict[str, Any] = {name: spread(values) for name, values in columns.items()}
        row["scores"] = {str(seed): value for seed, value in columns["score"].items()}
        if BASE in tables:
            seconds = columns["seconds"] / tables[BASE]["seconds"]
            row["relative_seconds"] = float(seconds.mean())
            if label != BASE:
                row["minus_base"] = paired(columns["score"], tables[BASE]["score"])
        rows[label] = row
    return rows


def _numbers(record: Record) -> dict[str, Any]:
    """A run's numbers; of the score more is better, and a hundredth is a point or a percent."""
    final = record["final"]
    if "test_mse" in final:
        return {**final, "score": -math.log(final["test_mse"]), "seconds": final["train_seconds"]}
    train = record["epochs"][-1]["train_eval_top1"]
    seconds = total_seconds(record)
    return {**final, "score": final[TOP1], "train_top1": train, "seconds": seconds}


def to_markdown(record: Record, summary: dict[str, Any], runs: Runs, tried: list[Record]) -> str:
    """Returns the tables, with what their columns mean."""
    config, task = record["config"], TASKS[summary["task"]]
    columns = _classified if task.series is None else _forecast
    rows, settings = [], []
    for label, row in summary["methods"].items():
        cost = {
            "method": label,
            "gradients": f"{row['gradients']['mean']:.3g}",
            "epochs": f"{row['epochs']['mean']:.0f}",
        }
        time = frames.number(row.get("relative_seconds"), ".2f")
        rows.append({**cost, **columns(row), "time": time})
        found = next(iter(runs[label].values()))["config"]["hyperparameters"]
        chosen = ("lr", "decay", "rho")
        settings.append(
            {"method": label, **{name: f"{found[name]:.3g}" for name in chosen if name in found}}
        )
    made_on = frames.made_on(record, "jax", "flax", "optax")
    if task.series is None:
        title = f"{DATA.get(config['dataset'], config['dataset'])}: {task.title}"
        about = (
            f"{config['train_images']:,} training and {config['test_images']:,} test images, "
            f"shifted by up to {config['shift']} and mirrored; {config['model']} "
            f"x{config['width']:g} ({record['parameters']:,} parameters), batch "
            f"{config['batch_size']}."
        )
        best = _BEST_TOP1.format(validation=tried[0]["config"]["test_images"]) if tried else ""
    else:
        title = task.title[0].upper() + task.title[1:]
        about = (
            f"Channel attention ({record['parameters']:,} parameters) on {config['channels']} "
            f"channels, look-back {config['look_back']}, horizon {config['horizon']}, every "
            f"{config['stride']}th window, batch {config['batch_size']}."
        )
        best = "lowest validation error"
    trials = [run["config"]["method"].split(":")[0] for run in tried]
    search = _SEARCH.format(best=best, trials=max(map(trials.count, trials), default=0))
    unit, meaning = ("image", _IMAGES) if task.series is None else ("window", _SERIES)
    note = _BUDGET.format(budget=summary["budget"], unit=unit) + meaning + _TIME
    parts = [
        f"# {title}",
        *frames.fill(f"{about} Seeds {frames.seeds_of(runs.values())}; {made_on}."),
        frames.markdown(rows),
        *frames.fill(note, search if tried else ""),
        "## Settings",
        frames.markdown(settings),
    ]
    return "\n\n".join(parts) + "\n"


def _classified(row: dict[str, Any]) -> dict[str, str]:
    return {
        "top-1 %": percent(row[TOP1]),
        f"minus {BASE}": difference(row.get("minus_base")),
        "early stopped": percent(row["early_stopped_top1"]),
        "train top-1 %": percent(row["train_top1"]),
        "NLL": mean_std(row["test_loss"], ".3f", ".3f"),
        "ECE %": percent(row["test_ece"]),
        "3 bits": percent(row["top1_3_bits"]),
        "noise 5 %": percent(row["top1_noise_5"]),
    }


def _forecast(row: dict[str, Any]) -> dict[str, str]:
    less = row.get("minus_base")
    return {
        "MSE": mean_std(row["test_mse"], ".4f", ".4f"),
        f"minus {BASE}, %": difference(less and {**less, "mean": -less["mean"]}),
        "MSE at the end": mean_std(row["last_test_mse"], ".4f", ".4f"),
        "MAE": mean_std(row["test_mae"], ".4f", ".4f"),
        "best epoch": mean_std(row["best_epoch"], ".1f", ".1f"),
    }


def gain(methods: dict[str, Any], one: str, other: str) -> dict[str, Any] | None:
    """Returns one method's score minus another's, paired by seed; None where one is missing."""
    if one not in methods or other not in methods:
        return None
    first, second = (pd.Series(methods[name]["scores"], dtype=float) for name in (one, other))
    return paired(first, second)


if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.budget.report"))
