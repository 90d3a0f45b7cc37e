"""Tables of a fine-tuning comparison, made from its JSON records alone.

python -m benchmarks.lora.report DIR [DIR ...]
"""

import sys
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.core import command, frames
from benchmarks.core.frames import difference, mean_std, numbers, paired, percent, spread
from benchmarks.core.methods import parse_method
from benchmarks.core.records import Record, Runs, by_method, read_comparison
from benchmarks.data.text import TASKS
from benchmarks.lora import figures
from benchmarks.lora.methods import BASELINE, METHODS, PAPER_STEPS, table
from benchmarks.models.lora import FULL

_OBAR_BELOW = 0.6

_NOTES = (
    "Mean ± standard deviation over seeds; a difference is paired by seed, which decides the "
    "training examples, the initialization and the batches, ± its standard error, in points. It is "
    "resolved where its 95 % interval (Student's t) excludes 0. Accuracy is the last iteration's, "
    "on {evaluated}.",
    "`probe`: logistic regression on the mean-pooled features of the frozen encoder, the same "
    "examples. The others train {trained} with AdamW (weight decay {weight_decay:g}, constant "
    "learning rate) and no dropout.{balancing} What a step costs is measured by "
    "`benchmarks.step_time`.",
)
_TRAINED = {
    "lora": "LoRA (rank {rank}, alpha {lora_alpha:g}) of query and value{where} and the classifier",
    "flora": "adapters of three cores (FLoRA, rank {rank}, alpha {lora_alpha:g}) of query and "
    "value{where} and the classifier",
    FULL: "the classifier and all weights{where}",
}
_BALANCING = (
    " Alpha decays linearly to 0. Iterations are {steps} where the papers have {paper}: alpha is "
    "multiplied by {factor:g}, so that the sum of alpha_t eta_t is the papers'. SAM perturbs the "
    "adapters and not the classifier. {measure}."
)
_MEASURES = {
    "lora": "Balancedness is (||A||^2 - ||B||^2) / 2 of an adapter; abs B is the mean of its "
    "absolute value over all adapters at the end; the ratio to AdamW's is the mean over seeds",
    "flora": "The norm deviation is Q = sum (||G_k||^2 - mean)^2 of an adapter's three cores, its "
    "mean over all adapters at the end; the ratio to AdamW's is the mean over seeds",
}
_NAMES = {"lora": "LoRA", "flora": "FLoRA", FULL: "full fine-tuning"}
_COLUMNS = {"lora": "end abs B", "flora": "end Q"}


def write(folder: Path) -> str:
    """Writes `summary.md`, `summary.json`, `runs.csv` and `figures/` from `runs/*.json`.

    Returns the text of the summary.
    """
    records = read_comparison(folder)
    runs = by_method(records, table(records[0]["config"]["adapter"]))
    rows = summarize(runs)
    text = to_markdown(records[0], rows, runs)
    lines = frames.csv(map(frames.line, records))
    frames.write(folder, {"summary.md": text, "summary.json": rows, "runs.csv": lines})
    figures.write(folder / "figures", runs, "\n".join(title(records[0])))
    return text


def summarize(runs: Runs) -> list[dict[str, Any]]:
    """Returns one row a method: each quantity as its mean and spread over seeds.

    Accuracies are fractions. Differences and ratios are to the first row of AdamW.
    """
    names = {label: parse_method(label, METHODS).name for label in runs}
    finals = {
        label: numbers(seeds, lambda record: record["final"]) for label, seeds in runs.items()
    }
    baseline = next((finals[label] for label in runs if names[label] == BASELINE), None)
    rows = []
    for label, own in finals.items():
        row: dict[str, Any] = {"method": label, "name": names[label]}
        row |= {key: spread(values) for key, values in own.items()}
        if baseline is not None and own is not baseline:
            minus = paired(own["test_top1"], baseline["test_top1"])
            row["test_top1_minus_adamw"] = {**minus, "resolved": _resolved(minus)}
            if "imbalance" in row:
                ratios = (own["imbalance"] / baseline["imbalance"]).dropna()
                largest = float(ratios.max()) if len(ratios) else None
                row["imbalance_ratio"] = {**spread(ratios), "max": largest}
        rows.append(row)
    return rows


def targets(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
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
            found = f"{key} over seeds {value:.3f}"
            lines.append(
                {"method": row["method"], "target": claim, "found": found, "verdict": verdict}
            )
    return lines


def title(record: Record) -> tuple[str, str]:
    """Returns a comparison's subject and its settings."""
    config = record["config"]
    heading = f"{TASKS[config['task']].title}: {config['model']}, {_NAMES[config['adapter']]}"
    precision = ", the encoder in bfloat16" if config["bfloat16"] else ""
    rare = "".join(f", fewer of {label}" for label in TASKS[config["task"]].rare)
    wrong = f", {100 * config['label_noise']:g} % wrong" if "label_noise" in config else ""
    details = (
        f"{config['shots']} examples a class{rare}{wrong} ({config['train_examples']:,} in all), "
        f"{config['test_examples']:,} to evaluate on; {config['steps']} iterations, "
        f"batch {config['batch_size']}{precision}{setting(config)}"
    )
    return heading, details


def setting(config: dict[str, Any]) -> str:
    """Returns which blocks train, and how batches are made, where that is not the default."""
    blocks = f", {last_blocks(config['layers'])} alone" if "layers" in config else ""
    return blocks + (", batches of similar lengths" if "by_length" in config else "")


def last_blocks(count: int) -> str:
    """Returns what to call an encoder's last so many blocks."""
    return "the last block" if count == 1 else f"the last {count} blocks"


def to_markdown(record: Record, rows: list[dict[str, Any]], runs: Runs) -> str:
    """Returns the table of methods and that of the targets, with what their columns mean."""
    config = record["config"]
    column = _COLUMNS.get(config["adapter"], "")
    lines = []
    for row in rows:
        minus = row.get("test_top1_minus_adamw")
        resolved = {None: "-", True: "yes", False: "no"}[minus and minus["resolved"]]
        lines.append(
            {
                "method": row["method"],
                "accuracy %": percent(row["test_top1"]),
                "minus AdamW": difference(minus),
                "resolved": resolved,
                "train loss": _mean(row.get("train_loss"), ".3f"),
                **(_imbalances(column, row) if column else {}),
            }
        )
    terms = {
        **config,
        "evaluated": f"the {config['evaluated_on']} set",
        "paper": PAPER_STEPS,
        "factor": PAPER_STEPS / config["steps"],
        "where": f" of {last_blocks(config['layers'])}" if "layers" in config else "",
        "measure": _MEASURES.get(config["adapter"], ""),
    }
    terms["trained"] = _TRAINED[config["adapter"]].format(**terms)
    terms["balancing"] = _BALANCING.format(**terms) if column else ""
    heading, details = title(record)
    made_on = frames.made_on(record, "jax", "flax", "optax")
    claims = targets(rows)
    parts = [
        f"# {heading}",
        f"{details}. Seeds {frames.seeds_of(runs.values())}; {made_on}.",
        frames.markdown(lines),
        *([frames.markdown(claims)] if claims else []),
        *frames.fill(f"Hyper-parameters: {frames.all_settings(runs)}."),
        *frames.fill(*(note.format(**terms) for note in _NOTES)),
    ]
    return "\n\n".join(parts) + "\n"


def _imbalances(column: str, row: dict[str, Any]) -> dict[str, str]:
    return {
        column: _mean(row.get("imbalance"), ".3g"),
        f"{column} / AdamW's": _mean(row.get("imbalance_ratio"), ".2f"),
    }


def _resolved(minus: dict[str, Any]) -> bool | None:
    if not minus["standard_error"]:
        return None
    width = stats.t.ppf(0.975, minus["seeds"] - 1) * minus["standard_error"]
    return bool(abs(minus["mean"]) > width)


def _mean(found: dict[str, Any] | None, form: str) -> str:
    return mean_std(found and {**found, "std": None}, form)


if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.lora.report"))
