"""Tables over the noise levels of `benchmarks.tensorized`, from its records alone.

python -m benchmarks.tensorized.report DIR [DIR ...]
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.core import command, frames
from benchmarks.core.classification import report
from benchmarks.core.records import (
    Record,
    Runs,
    by_method,
    check_config,
    read_records,
    shared_config,
)
from benchmarks.tensorized import figures

DIFFERENCE = f"last10_test_top1_minus_{report.BASELINE}"

_NOTES = (
    "Mean ± standard deviation over seeds; a difference is paired by seed, ± its standard error. "
    "Accuracy is test top-1 with the right labels, the mean over the last ten epochs; train "
    "accuracy is measured in evaluation mode on the labels trained with, wrong ones included.",
    "The norm deviation Q of a layer is the sum over its cores of the squared deviation of "
    "||G_k||^2 from the layer's mean; here its mean over layers, after training. Weight decay and "
    "the data shrink and grow the cores under every method, so compare down a column.",
    "Time is that of the training steps relative to SGD's, the median over epochs and seeds; "
    "`benchmarks.step_time` measures it better.",
)
_TABLES = {
    "Test accuracy (%)": lambda row: frames.percent(row["last10_test_top1"]),
    "Test accuracy minus SGD's (points)": lambda row: frames.difference(row.get(DIFFERENCE)),
    "Train accuracy (%)": lambda row: frames.percent(row["last10_train_eval_top1"]),
    "Norm deviation Q": lambda row: frames.mean_std(row["norm_deviation"]),
    "Time relative to SGD": lambda row: frames.number(row.get("relative_epoch_time"), ".2f"),
}
_CSV = (
    *("label_noise", "method", "seeds", "last10_test_top1_mean", "last10_test_top1_std"),
    *(f"{DIFFERENCE}_mean", f"{DIFFERENCE}_standard_error"),
    *("last10_train_eval_top1_mean", "last10_train_eval_top1_std"),
    *("norm_deviation_mean", "norm_deviation_std"),
)


def write(folder: Path) -> str:
    """Writes `summary.md`, `summary.json`, `summary.csv` and `accuracy.png` over `noise*/`.

    Returns the text of the summary.
    """
    found = {
        path: record
        for level in sorted(folder.glob("noise*"))
        for path, record in read_records(level).items()
    }
    if not found:
        raise FileNotFoundError(f"{folder} holds no noise*/runs/*.json of a finished run.")
    shared = [{**shared_config(run["config"]), "label_noise": 0.0} for run in found.values()]
    for path, config in zip(found, shared, strict=True):
        check_config(config, shared[0], path)
    noises = sorted({run["config"]["label_noise"] for run in found.values()})
    levels = {
        noise: by_method(r for r in found.values() if r["config"]["label_noise"] == noise)
        for noise in noises
    }
    rows = summarize(levels)
    # The settings that all noise levels share.
    record = next(iter(next(iter(levels[noises[0]].values())).values()))
    record = {**record, "config": {**record["config"], "label_noise": 0.0}}
    text = to_markdown(record, levels, rows)
    flat = pd.json_normalize(rows, sep="_").rename(columns={"last10_test_top1_seeds": "seeds"})
    lines = frames.csv(flat.reindex(columns=_CSV).to_dict("records"))
    frames.write(folder, {"summary.md": text, "summary.json": rows, "summary.csv": lines})
    figures.write(folder, rows, "\n".join(report.title(record)))
    return text


def summarize(levels: dict[float, Runs]) -> list[dict[str, Any]]:
    """Returns one row a noise level and method: `report.summarize`'s, and the norm deviation."""
    rows = []
    for level, runs in levels.items():
        for row in report.summarize(runs):
            values = [
                float(np.mean(list(record["norm_deviation"]["end"].values())))
                for record in runs[row["method"]].values()
                if "norm_deviation" in record
            ]
            deviation = frames.spread(values) if values else None
            rows.append({"label_noise": level, **row, "norm_deviation": deviation})
    return rows


def to_markdown(record: Record, levels: dict[float, Runs], rows: list[dict[str, Any]]) -> str:
    """Returns the tables, a row a method and a column a noise level."""
    every = [seeds for runs in levels.values() for seeds in runs.values()]
    parts = [report.head(record, every, "jax", "flax", "optax")]
    for title, cell in _TABLES.items():
        table = frames.cross(rows, lambda r: f"{100 * r['label_noise']:g} % wrong labels", cell)
        parts.append(f"## {title}\n\n{table}")
    return "\n\n".join([*parts, *frames.fill(*_NOTES)]) + "\n"


if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.tensorized.report"))
