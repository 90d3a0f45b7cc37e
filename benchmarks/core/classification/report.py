"""Tables and figures of a comparison of classifiers, made from its JSON records alone."""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core import frames
from benchmarks.core.classification import figures
from benchmarks.core.classification.trained import BITS, NOISES
from benchmarks.core.frames import difference, mean_std, numbers, paired, percent, spread
from benchmarks.core.records import Record, Runs, by_method, read_comparison

BASELINE = "sgd"
DOUBLED = "sgd@2"

DATA = {
    "cifar10": "CIFAR-10",
    "cifar10-jpeg": "CIFAR-10 (JPEG)",  # re-encoded, and so a little harder than the original
    "cifar10-webp": "CIFAR-10 (WebP)",
    "cifar100": "CIFAR-100",
    "cifar100-jpeg": "CIFAR-100 (JPEG)",
    "cifar100-webp": "CIFAR-100 (WebP)",
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

_ROBUST_COLUMNS = {
    "test_ece": "ECE %",
    **{f"top1_{bits}_bits": f"{bits} bits" for bits in BITS},
    **{f"top1_noise_{100 * noise:g}": f"noise {100 * noise:g} %" for noise in NOISES},
}
_ROBUST = textwrap.fill(
    "Negative log-likelihood and expected calibration error (15 bins) of the last epoch's model on "
    "the test images, and its top-1 in percent with its matrices rounded to so many bits "
    "(symmetric, one scale an output channel), or with Gaussian noise of so much of each matrix's "
    "norm, the mean over three draws. Early stopped is the accuracy on one half of the test images "
    "at the epoch that is best on the other half, the mean over both ways.",
    100,
)


def write(folder: Path) -> str:
    """Writes `summary.md`, `summary.json`, `runs.csv` and `figures/` from `runs/*.json`.

    Returns the text of the summary.
    """
    records = read_comparison(folder)
    runs = by_method(records)
    rows = summarize(runs)
    text = to_markdown(records[0], rows, runs)
    lines = map(_line, records)
    frames.write(folder, {"summary.md": text, "summary.json": rows, "runs.csv": frames.csv(lines)})
    figures.write(folder / "figures", runs, "\n".join(title(records[0])), equal_time(runs))
    return text


def summarize(runs: Runs) -> list[dict[str, Any]]:
    """Returns one row a method: each quantity as its mean and spread over seeds.

    Accuracies are fractions. `{"mean": ..., "std": ..., "seeds": n}` is over seeds, and
    `{"mean": ..., "standard_error": ..., "seeds": n}` over the seeds' differences to a baseline.
    """
    budget = equal_time(runs)
    tables = {
        label: numbers(seeds, lambda run: _numbers(run, budget)) for label, seeds in runs.items()
    }
    epochs = {label: len(next(iter(seeds.values()))["epochs"]) for label, seeds in runs.items()}
    rows = []
    for label, seeds in runs.items():
        spreads = {name: spread(values) for name, values in tables[label].items()}
        times = {name: spreads.pop(name) for name in ("total_seconds", "top1_at_equal_time")}
        row: dict[str, Any] = {"method": label, **spreads, "epochs": epochs[label]}
        row |= {"seconds_per_epoch": _epoch_seconds(seeds), **times}
        if BASELINE in runs:
            relative = _epoch_seconds(seeds) / _epoch_seconds(runs[BASELINE])
            row["relative_epoch_time"] = relative
            row["relative_total_time"] = relative * (epochs[label] / epochs[BASELINE])
        for name, baseline in (
            ("last10_test_top1", BASELINE),
            ("last10_test_top1", DOUBLED),
            ("top1_at_equal_time", BASELINE),
        ):
            if baseline in runs and baseline != label:
                minus = paired(tables[label][name], tables[baseline][name])
                row[f"{name}_minus_{baseline}"] = minus
        rows.append(row)
    return rows


def _numbers(record: Record, budget: float | None) -> dict[str, Any]:
    at_budget = None if budget is None else accuracy_at(record, budget)
    times = {"total_seconds": total_seconds(record), "top1_at_equal_time": at_budget}
    return {**record["final"], **times}


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
    name = DATA.get(config["dataset"], config["dataset"])
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
    if "human_labels" in config:
        details.append(f"training labels by people ({config['human_labels']})")
    if config["label_smoothing"]:
        details.append(f"label smoothing {config['label_smoothing']:g}")
    return heading, ", ".join(details)


def head(record: Record, runs: Iterable[dict[int, Record]], *packages: str) -> str:
    """Returns the title with the settings, seeds, hardware and versions under it."""
    heading, details = title(record)
    made_on = frames.made_on(record, *packages)
    return f"# {heading}\n\n{details}. Seeds {frames.seeds_of(runs)}; {made_on}."


def to_markdown(record: Record, rows: list[dict[str, Any]], runs: Runs) -> str:
    """Returns the two tables, of accuracy and of time, with what their columns mean."""
    on_cpu = record["hardware"]["backend"] == "cpu"
    budget = equal_time(runs)
    accuracy, speed, robust = [], [], []
    for row in rows:
        minus = {
            f"last 10 - {baseline}": difference(row.get(f"last10_test_top1_minus_{baseline}"))
            for baseline in (BASELINE, DOUBLED)
            if baseline in runs
        }
        accuracy.append(
            {
                "method": row["method"],
                "top-1 %": percent(row["test_top1"]),
                "top-5 %": percent(row["test_top5"]),
                "test, last 10": percent(row["last10_test_top1"]),
                "train, last 10": percent(row["last10_train_eval_top1"]),
                "gap": percent(row["generalization_gap"]),
                **_known(row, {"early_stopped_top1": "early stopped"}),
                **minus,
            }
        )
        loss = {"NLL": mean_std(row["test_loss"], ".4f", ".4f")} if "test_ece" in row else {}
        robust.append({"method": row["method"], **loss, **_known(row, _ROBUST_COLUMNS)})
        at_equal_time = difference(row.get(f"top1_at_equal_time_minus_{BASELINE}"))
        speed.append(
            {
                "method": row["method"],
                "epochs": str(row["epochs"]),
                f"{'CPU' if on_cpu else 'wall'} s an epoch": f"{row['seconds_per_epoch']:.3g}",
                "epoch / SGD's": frames.number(row.get("relative_epoch_time"), ".2f"),
                "run / SGD's": frames.number(row.get("relative_total_time"), ".2f"),
                "top-1 % at equal time": percent(row["top1_at_equal_time"]),
                **({"at equal time - sgd": at_equal_time} if BASELINE in runs else {}),
            }
        )
    noisy = record["config"]["label_noise"] or "human_labels" in record["config"]
    terms = {
        "clock": "the process's CPU seconds" if on_cpu else "wall-clock seconds",
        "labels": ", with the noisy labels" if noisy else "",
        "budget": f"the {budget:.4g} s of the shortest `{BASELINE}` run"
        if budget
        else f"undefined without `{BASELINE}`",
    }
    settings = frames.all_settings(runs)
    parts = [
        head(record, runs.values(), "jax", "flax", "optax"),
        frames.markdown(accuracy),
        frames.markdown(speed),
        *([frames.markdown(robust), _ROBUST] if any("NLL" in row for row in robust) else []),
        *frames.fill(
            f"Hyper-parameters: {settings}." if settings else "",
            *(note.format(**terms) for note in _NOTES),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _known(row: dict[str, Any], columns: dict[str, str]) -> dict[str, str]:
    """The columns, by key, of what the runs recorded: older ones lack some."""
    return {name: percent(row[key]) for key, name in columns.items() if key in row}


def _line(record: Record) -> dict[str, Any]:
    seconds = {"training_seconds": total_seconds(record)}
    return frames.line(record, **seconds, compile_seconds=record["compile_seconds"])


def _epoch_seconds(seeds: dict[int, Record]) -> float:
    times = [entry["compute_seconds"] for run in seeds.values() for entry in run["epochs"]]
    return float(np.median(times))
