"""Tables of a fine-tuning comparison, made from its JSON records alone.

python -m benchmarks.lora_report DIR [DIR ...]
"""

from __future__ import annotations

import csv
import io
import json
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.core.classification import report
from benchmarks.core.frames import markdown_table, paired, show_difference, show_percent, spread
from benchmarks.core.records import Record, Runs, by_seed, read_comparison, write_text
from benchmarks.data.text import TASKS
from benchmarks.lora import figures as lora_figures
from benchmarks.lora.methods import BASELINE, METHODS, PAPER_STEPS, PROBE, parse

_OBAR_BELOW = 0.6

_NOTES = (
    "Mean ± standard deviation over seeds; a difference is paired by seed, which decides the "
    "training examples, the initialization and the batches, ± its standard error, in points. It is "
    "resolved where its 95 % interval (Student's t) excludes 0. Accuracy is the last iteration's, "
    "on {evaluated}.",
    "`probe`: logistic regression on the mean-pooled features of the frozen encoder, the same "
    "examples. The others train {adapter} (rank {rank}, alpha {lora_alpha:g}) of query and value "
    "and the classifier with AdamW (weight decay {weight_decay:g}, constant learning rate) and no "
    "dropout; alpha decays linearly to 0. Iterations are {steps} where the papers have {paper}: "
    "alpha is multiplied by {factor:g}, so that the sum of alpha_t eta_t is the papers'. SAM "
    "perturbs the adapters and not the classifier.",
    "{measure}. What a step costs is measured side by side by `--time`.",
)
_MEASURES = {
    "lora": "Balancedness is (||A||^2 - ||B||^2) / 2 of an adapter; abs B is the mean of its "
    "absolute value over all adapters at the end; the ratio to AdamW's is the mean over seeds",
    "flora": "The norm deviation is Q = sum (||G_k||^2 - mean)^2 of an adapter's three cores, its "
    "mean over all adapters at the end; the ratio to AdamW's is the mean over seeds",
}
_COLUMNS = {"lora": "end abs B", "flora": "end Q"}


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
    lora_figures.write(folder / "figures", runs, "\n".join(title(records[0])))
    return text


def by_method(records: Iterable[Record]) -> Runs:
    """Groups records by method and seed, in the order of `METHODS` with the probe first."""
    names = [PROBE, *METHODS]

    def position(record: Record) -> tuple[int, str, int]:
        config = record["config"]
        return names.index(parse(config["method"]).name), config["method"], config["seed"]

    return by_seed(records, position)


def summarize(runs: Runs) -> list[dict[str, Any]]:
    """Returns one row a method: each quantity as its mean and spread over seeds.

    Accuracies are fractions. Differences and ratios are to the first row of AdamW.
    """
    baseline = next((runs[label] for label in runs if parse(label).name == BASELINE), None)
    rows = []
    for label, seeds in runs.items():
        row: dict[str, Any] = {"method": label, "name": parse(label).name}
        for key in next(iter(seeds.values()))["final"]:
            row[key] = spread([_final(key)(record) for record in seeds.values()])
        if baseline is not None and seeds is not baseline:
            minus = paired(seeds, baseline, _final("test_top1"))
            row["test_top1_minus_adamw"] = {**minus, "resolved": _resolved(minus)}
            if "imbalance" in row:
                ratios = _ratios(seeds, baseline, "imbalance")
                row["imbalance_ratio"] = {**spread(ratios), "max": max(ratios, default=None)}
        rows.append(row)
    return rows


def targets(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Returns a line for each claim about balancedness: the claim, what was found, a verdict."""
    claims: dict[str, tuple[str, str, float]] = {
        "obar": (f"oBAR's abs B ends below {_OBAR_BELOW:g} of AdamW's", "mean", _OBAR_BELOW),
        "sam": ("SAM's abs B ends below AdamW's with every seed", "max", 1.0),
    }
    lines = []
    for row in rows:
        claim, key, bound = claims.get(row["name"], ("", "", 0.0))
        value = row.get("imbalance_ratio", {}).get(key) if claim else None
        if value is not None:
            verdict = "met" if value < bound else "not met"
            lines.append([row["method"], claim, f"{key} over seeds {value:.3f}", verdict])
    return lines


def title(record: Record) -> tuple[str, str]:
    """Returns a comparison's subject and its settings."""
    config = record["config"]
    heading = (
        f"{TASKS[config['task']].title}: {config['model']}, "
        f"{'FLoRA' if config['adapter'] == 'flora' else 'LoRA'}"
    )
    precision = ", the encoder in bfloat16" if config["bfloat16"] else ""
    rare = "".join(f", fewer of {label}" for label in TASKS[config["task"]].rare)
    details = (
        f"{config['shots']} examples a class{rare} ({config['train_examples']:,} in all), "
        f"{config['test_examples']:,} to evaluate on; {config['steps']} iterations, "
        f"batch {config['batch_size']}{precision}"
    )
    return heading, details


def to_markdown(record: Record, rows: list[dict[str, Any]], runs: Runs) -> str:
    """Returns the table of methods and that of the targets, with what their columns mean."""
    config, hardware = record["config"], record["hardware"]
    column = _COLUMNS[config["adapter"]]
    header = "method|accuracy %|minus AdamW|resolved|train loss"
    lines = [[*header.split("|"), column, f"{column} / AdamW's"]]
    for row in rows:
        minus = row.get("test_top1_minus_adamw")
        lines.append(
            [
                row["method"],
                show_percent(row["test_top1"]),
                show_difference(minus),
                "-" if minus is None or minus["resolved"] is None else _yes(minus["resolved"]),
                _mean(row.get("train_loss"), "{:.3f}"),
                _mean(row.get("imbalance"), "{:.3g}"),
                _mean(row.get("imbalance_ratio"), "{:.2f}"),
            ]
        )
    terms = {
        **config,
        "evaluated": f"the {config['evaluated_on']} set",
        "adapter": "adapters of three cores (FLoRA)" if config["adapter"] == "flora" else "LoRA",
        "paper": PAPER_STEPS,
        "factor": PAPER_STEPS / config["steps"],
        "measure": _MEASURES[config["adapter"]],
    }
    chosen = (next(iter(seeds.values()))["config"] for seeds in runs.values())
    values = "; ".join(
        f"{config['method']}: {_settings(config)}" for config in chosen if config["hyperparameters"]
    )
    notes = [f"Hyper-parameters: {values}.", *(note.format(**terms) for note in _NOTES)]
    seeds = sorted({seed for method in runs.values() for seed in method})
    where = f"{hardware['device']}, {hardware['count']} " + (
        "core(s)" if hardware["backend"] == "cpu" else "device(s)"
    )
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("jax", "flax", "optax"))
    heading, details = title(record)
    head = f"# {heading}\n\n{details}. Seeds {', '.join(map(str, seeds))}; {where}; {versions}.\n"
    parts = [head, markdown_table(lines), ""]
    claims = targets(rows)
    if claims:
        parts += [markdown_table([["method", "target", "found", "verdict"], *claims]), ""]
    return "\n".join([*parts, "\n\n".join(textwrap.fill(note, 100) for note in notes), ""])


def to_csv(records: Iterable[Record]) -> str:
    """Returns one line a run: its configuration and final metrics."""
    lines = [
        {
            **record["config"],
            "hyperparameters": _settings(record["config"]),
            **record["final"],
            **{key: record["hardware"][key] for key in ("backend", "device", "count")},
        }
        for record in records
    ]
    buffer = io.StringIO()
    names = dict.fromkeys(name for line in lines for name in line)
    writer = csv.DictWriter(buffer, fieldnames=list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _resolved(minus: dict[str, Any]) -> bool | None:
    if not minus["standard_error"]:
        return None
    width = stats.t.ppf(0.975, minus["seeds"] - 1) * minus["standard_error"]
    return bool(abs(minus["mean"]) > width)


def _ratios(seeds: dict[int, Record], baseline: dict[int, Record], key: str) -> list[float]:
    value = _final(key)
    return [value(seeds[seed]) / value(baseline[seed]) for seed in seeds if seed in baseline]


def _final(key: str) -> Callable[[Record], float]:
    return lambda record: record["final"][key]


def _mean(found: dict[str, Any] | None, form: str) -> str:
    return "-" if found is None or found["mean"] is None else form.format(found["mean"])


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _settings(config: dict[str, Any]) -> str:
    return " ".join(f"{key}={value:g}" for key, value in config["hyperparameters"].items())


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return report.run_command("benchmarks.lora_report", __doc__, write, argv)


if __name__ == "__main__":
    sys.exit(main())
