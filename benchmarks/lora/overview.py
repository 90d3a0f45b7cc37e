"""The six few-shot tasks in one table, beside the paper's averages.

    python -m benchmarks.lora.overview DIR [DIR ...]

Each `DIR` is what `benchmarks.lora` wrote for one task. The tables go to `--out`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.core import command, frames
from benchmarks.core.command import Summaries
from benchmarks.core.frames import by_seed, difference, paired, percent, resolved, spread
from benchmarks.core.records import Record, Runs, by_method, read_comparison
from benchmarks.data.text import FEW_SHOT
from benchmarks.lora import report
from benchmarks.lora.methods import BASELINE, table

PAPER = {"adamw": 80.0, "sam": 81.3, "obar": 80.9, "nbar": 81.2}
"""The averages of arXiv 2410.14802 over its six tasks, RoBERTa-large."""

_VERDICTS = {1: "better", -1: "worse", 0: "not resolved"}
_NOTE = (
    "Test accuracy in percent, mean ± standard deviation over seeds, each with a split of its own. "
    "The average is over the tasks. The last columns are over all {pairs} pairs of a task and a "
    "seed: the mean difference to AdamW in points ± its standard error, which is resolved where it "
    "is more than two standard errors from 0. Paper: the averages of arXiv 2410.14802 over its six "
    "tasks, with RoBERTa-large and correct labels."
)

_SAME = ("model", "adapter", "steps", "rank", "label_noise", "layers", "by_length")
Tasks = dict[str, Runs]


@dataclasses.dataclass(frozen=True)
class Configuration(Summaries):
    """The tasks to put side by side."""

    out: Path = Path("runs/lora-overview")  # The folder of the table.


def read(folders: tuple[Path, ...]) -> tuple[Record, Tasks]:
    """Returns a record, and the runs by task, in the tasks' order.

    Raises:
        ValueError: Two folders are of one task, or differ in more than the task.
    """
    tasks: Tasks = {}
    comparisons = [read_comparison(folder) for folder in folders]
    first = comparisons[0][0]
    for folder, records in zip(folders, comparisons, strict=True):
        config = records[0]["config"]
        own, wanted = ({key: each.get(key) for key in _SAME} for each in (config, first["config"]))
        if own != wanted:
            raise ValueError(f"{folder} differs from {folders[0]}: {own} and {wanted}.")
        if config["task"] in tasks:
            raise ValueError(f"{folder}: another folder has the task {config['task']!r} too.")
        tasks[config["task"]] = by_method(records, table(config["adapter"]))
    known = dict.fromkeys([*FEW_SHOT, *tasks])
    return first, {task: tasks[task] for task in known if task in tasks}


def accuracies(tasks: Tasks) -> dict[str, dict[str, pd.Series]]:
    """Returns the accuracies by method and task, each by seed; settings are each task's own."""
    found: dict[str, dict[str, pd.Series]] = {}
    for task, runs in tasks.items():
        for label, seeds in runs.items():
            name = label.partition(":")[0]
            values = by_seed(seeds, lambda record: record["final"]["test_top1"])
            found.setdefault(name, {})[task] = values
    return found


def summarize(tasks: Tasks) -> dict[str, dict[str, Any]]:
    """Returns each method's spreads by task, its average, and the paired difference to AdamW."""
    found = accuracies(tasks)
    rows: dict[str, dict[str, Any]] = {}
    for name, own in found.items():
        row: dict[str, Any] = {task: spread(values) for task, values in own.items()}
        if len(own) == len(tasks):
            average = sum(values.mean() for values in own.values()) / len(own)
            row["average"] = float(average)
        if name != BASELINE and BASELINE in found:
            row["minus_adamw"] = paired(pd.concat(own), pd.concat(found[BASELINE]))
        rows[name] = row
    return rows


def to_markdown(record: Record, tasks: Tasks, rows: dict[str, dict[str, Any]]) -> str:
    """Returns the table, with what its columns mean."""
    lines = []
    for name, row in rows.items():
        minus = row.get("minus_adamw")
        paper = PAPER.get(name)
        lines.append(
            {
                "method": name,
                **{task: percent(row.get(task)) for task in tasks},
                "average": frames.number(row.get("average") and 100 * row["average"], ".2f"),
                "paper": frames.number(paper, ".1f"),
                "minus AdamW": difference(minus),
                "verdict": _VERDICTS[resolved(minus)] if minus else "-",
                "paper's": "-" if paper is None else f"{paper - PAPER[BASELINE]:+.1f}",
            }
        )
    config = record["config"]
    noise = (
        f", {100 * config['label_noise']:g} % wrong training labels"
        if "label_noise" in config
        else ""
    )
    pairs = max(
        (row["minus_adamw"]["seeds"] for row in rows.values() if "minus_adamw" in row), default=0
    )
    parts = [
        f"# {len(tasks)} few-shot tasks, {config['model']}{noise}",
        f"{config['steps']} iterations, batch {config['batch_size']}, rank {config['rank']}"
        f"{report.setting(config)}; "
        f"{frames.made_on(record, 'jax', 'flax', 'optax')}.",
        frames.markdown(lines),
        *frames.fill(_NOTE.format(pairs=pairs)),
    ]
    return "\n\n".join(parts) + "\n"


@command.main(Configuration, "benchmarks.lora.overview")
def main(arguments: Configuration) -> None:
    """Writes the table and prints it."""
    record, tasks = read(arguments.folders)
    rows = summarize(tasks)
    text = to_markdown(record, tasks, rows)
    frames.write(arguments.out, {"summary.md": text, "summary.json": rows})
    print(text)
