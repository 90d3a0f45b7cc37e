"""Tables and figures of a comparison, made from its JSON records alone.

python -m benchmarks.report DIR [DIR ...]
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core.classification import figures
from benchmarks.core.frames import markdown_table, paired, show_difference, show_percent, spread
from benchmarks.core.methods import METHODS, parse_method
from benchmarks.core.records import Record, Runs, by_seed, read_comparison, write_text

BASELINE = "sgd"
DOUBLED = "sgd@2"

_TITLES = {
    "cifar10": "CIFAR-10",
    "cifar10-jpeg": "CIFAR-10 (JPEG)",  # re-encoded, and so a little harder than the original
    "cifar100": "CIFAR-100",
    "cifar100-jpeg": "CIFAR-100 (JPEG)",
    "digits": "8x8 digits",
}
_NOTES = (
    "Mean ± standard deviation over seeds; a difference is paired by seed, ± its standard error.",
    "Top-1 and top-5 are the last epoch's, on the test images; 'last 10' is the mean over the last "
    "ten epochs. Train top-1 is measured in evaluation mode, without augmentation, on as many "
    "training images as there are test images{labels}. The gap is train minus test, last 10.",
    "Time is that of the training steps ({clock}), without compilation and evaluation; an epoch's "
    "time is the median over epochs and seeds. Equal time is {budget}. The accuracy there is that "
    "of the last epoch that had ended by then. A cosine schedule that is cut there still has a "
    "high learning rate, so `sgd@2`, SGD trained for twice the epochs with its schedule over all "
    "of them, is the fair comparison at SAM's cost.",
)


def write(folder: Path) -> str:
    """Writes `summary.md`, `summary.json`, `runs.csv` and `figures/` from `runs/*.json`.

    Returns:
        The text of `summary.md`.

    Raises:
        FileNotFoundError: The folder holds no records.
        ValueError: The records are of different comparisons.
    """
    records = read_comparison(folder)
    runs = by_method(records)
    rows = summarize(runs)
    text = to_markdown(records[0], rows, runs)
    write_text(folder / "summary.md", text)
    write_text(folder / "summary.json", json.dumps(rows, indent=1) + "\n")
    write_text(folder / "runs.csv", to_csv(records))
    figures.write(folder / "figures", runs, "\n".join(title(records[0])), equal_time(runs))
    return text


def by_method(records: Iterable[Record]) -> Runs:
    """Groups records by method and seed, in the order of `METHODS`."""
    names = list(METHODS)

    def position(record: Record) -> tuple[int, int, str, int]:
        config = record["config"]
        name = parse_method(config["method"]).name
        return names.index(name), config["epoch_factor"], config["method"], config["seed"]

    return by_seed(records, position)


def summarize(runs: Runs) -> list[dict[str, Any]]:
    """Returns one row a method: each quantity as its mean and spread over seeds.

    Accuracies are fractions. `{"mean": ..., "std": ..., "seeds": n}` is over seeds, and
    `{"mean": ..., "standard_error": ..., "seeds": n}` over the seeds' differences to a baseline.
    """
    budget = equal_time(runs)

    def at_budget(record: Record) -> float | None:
        return None if budget is None else accuracy_at(record, budget)

    rows = []
    for label, seeds in runs.items():
        row: dict[str, Any] = {"method": label}
        for name in next(iter(seeds.values()))["final"]:
            row[name] = spread([_final(name)(record) for record in seeds.values()])
        row["epochs"] = len(next(iter(seeds.values()))["epochs"])
        row["seconds_per_epoch"] = _epoch_seconds(seeds)
        row["total_seconds"] = spread([total_seconds(record) for record in seeds.values()])
        row["top1_at_equal_time"] = spread([at_budget(record) for record in seeds.values()])
        if BASELINE in runs:
            row["relative_epoch_time"] = _epoch_seconds(seeds) / _epoch_seconds(runs[BASELINE])
            row["relative_total_time"] = row["relative_epoch_time"] * (
                row["epochs"] / len(next(iter(runs[BASELINE].values()))["epochs"])
            )
        for baseline in (BASELINE, DOUBLED):
            if baseline in runs and baseline != label:
                last10 = paired(seeds, runs[baseline], _final("last10_test_top1"))
                row[f"last10_test_top1_minus_{baseline}"] = last10
        if BASELINE in runs and label != BASELINE:
            name = f"top1_at_equal_time_minus_{BASELINE}"
            row[name] = paired(seeds, runs[BASELINE], at_budget)
        rows.append(row)
    return rows


def total_seconds(record: Record) -> float:
    """Returns the time of all of a run's training steps."""
    return sum(entry["compute_seconds"] for entry in record["epochs"])


def equal_time(runs: Runs) -> float | None:
    """Returns the time of the shortest SGD run, or None without one."""
    seeds = runs.get(BASELINE)
    return min(total_seconds(record) for record in seeds.values()) if seeds else None


def accuracy_at(record: Record, seconds: float) -> float | None:
    """Returns the test top-1 after the last epoch that had ended by then, None before the first."""
    ends = np.cumsum([entry["compute_seconds"] for entry in record["epochs"]])
    ended = int(np.sum(ends <= seconds * (1 + 1e-9)))
    return record["epochs"][ended - 1]["test_top1"] if ended else None


def title(record: Record) -> tuple[str, str]:
    """Returns a comparison's subject and its settings."""
    config = record["config"]
    name = _TITLES.get(config["dataset"], config["dataset"])
    heading = (
        f"{name}: {config['model']} x{config['width']:g} ({record['parameters']:,} parameters)"
    )
    details = [
        f"{config['train_images']:,} training and {config['test_images']:,} test images",
        f"{config['epochs']} epochs",
        f"batch {config['batch_size']}",
    ]
    if config["label_noise"]:
        details.append(f"{100 * config['label_noise']:g} % wrong training labels")
    if config["label_smoothing"]:
        details.append(f"label smoothing {config['label_smoothing']:g}")
    return heading, ", ".join(details)


def to_markdown(record: Record, rows: list[dict[str, Any]], runs: Runs) -> str:
    """Returns the two tables, of accuracy and of time, with what their columns mean."""
    hardware = record["hardware"]
    on_cpu = hardware["backend"] == "cpu"
    clock = "the process's CPU seconds" if on_cpu else "wall-clock seconds"
    budget = equal_time(runs)
    accuracy = [["method", "top-1 %", "top-5 %", "test, last 10", "train, last 10", "gap"]]
    speed = [
        [
            "method",
            "epochs",
            f"{'CPU' if on_cpu else 'wall'} s an epoch",
            "epoch / SGD's",
            "run / SGD's",
            "top-1 % at equal time",
        ]
    ]
    if BASELINE in runs:
        accuracy[0].append("last 10 - sgd")
        speed[0].append("at equal time - sgd")
    if DOUBLED in runs:
        accuracy[0].append(f"last 10 - {DOUBLED}")
    for row in rows:
        percents = ("test_top1", "test_top5", "last10_test_top1", "last10_train_eval_top1")
        line = [row["method"], *(show_percent(row[name]) for name in percents)]
        line.append(show_percent(row["generalization_gap"]))
        for baseline in (BASELINE, DOUBLED):
            if baseline in runs:
                line.append(show_difference(row.get(f"last10_test_top1_minus_{baseline}")))
        accuracy.append(line)
        line = [row["method"], str(row["epochs"]), f"{row['seconds_per_epoch']:.3g}"]
        for name in ("relative_epoch_time", "relative_total_time"):
            line.append(f"{row[name]:.2f}" if name in row else "-")
        line.append(show_percent(row["top1_at_equal_time"]))
        if BASELINE in runs:
            line.append(show_difference(row.get(f"top1_at_equal_time_minus_{BASELINE}")))
        speed.append(line)
    terms = {
        "clock": clock,
        "labels": ", with the noisy labels" if record["config"]["label_noise"] else "",
        "budget": f"the {budget:.4g} s of the shortest `{BASELINE}` run"
        if budget
        else f"undefined without `{BASELINE}`",
    }
    chosen = (next(iter(seeds.values()))["config"] for seeds in runs.values())
    settings = "; ".join(
        f"{config['method']}: {_settings(config)}" for config in chosen if config["hyperparameters"]
    )
    notes = [f"Hyper-parameters: {settings}." if settings else ""]
    notes = [textwrap.fill(note.format(**terms), 100) for note in (*notes, *_NOTES) if note]
    seeds = sorted({seed for method in runs.values() for seed in method})
    where = f"{hardware['device']}, {hardware['count']} {'core(s)' if on_cpu else 'device(s)'}"
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("jax", "flax", "optax"))
    heading, details = title(record)
    head = f"# {heading}\n\n{details}. Seeds {', '.join(map(str, seeds))}; {where}; {versions}.\n"
    return "\n".join(
        [head, markdown_table(accuracy), "", markdown_table(speed), "", "\n\n".join(notes), ""]
    )


def to_csv(records: Iterable[Record]) -> str:
    """Returns one line a run: its configuration, final metrics and times."""
    lines = []
    for record in records:
        lines.append(
            {
                **record["config"],
                "hyperparameters": _settings(record["config"]),
                **record["final"],
                "training_seconds": total_seconds(record),
                "compile_seconds": record["compile_seconds"],
                **{key: record["hardware"][key] for key in ("backend", "device", "count")},
            }
        )
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _settings(config: dict[str, Any]) -> str:
    return " ".join(f"{key}={value:g}" for key, value in config["hyperparameters"].items())


def _final(name: str) -> Callable[[Record], float | None]:
    return lambda record: record["final"][name]


def _epoch_seconds(seeds: dict[int, Record]) -> float:
    times = [entry["compute_seconds"] for run in seeds.values() for entry in run["epochs"]]
    return float(np.median(times))


def run_command(
    module: str, description: str | None, write: Callable[[Path], str], argv: list[str] | None
) -> int:
    """Regenerates the reports of the folders named on the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="with runs/*.json")
    try:
        for folder in parser.parse_args(argv).folders:
            print(write(folder))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command("benchmarks.report", __doc__, write, argv)


if __name__ == "__main__":
    sys.exit(main())
