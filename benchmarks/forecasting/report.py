"""Tables of a forecasting comparison, made from its JSON records alone.

python -m benchmarks.forecasting.report DIR [DIR ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core import command, frames
from benchmarks.core.frames import by_seed, mean_std, paired, spread
from benchmarks.core.methods import parse_method
from benchmarks.core.records import Record, Runs, by_method, read_comparison
from benchmarks.forecasting import figures, flatness
from benchmarks.forecasting.methods import ADAM, ADAM_PUBLISHED, BASELINES, METHODS

PUBLISHED = {
    ("ETTh1", 96): (0.381, 0.509),
    ("ETTh1", 192): (0.409, 0.535),
    ("ETTh1", 336): (0.423, 0.570),
    ("ETTh1", 720): (0.427, 0.601),
    ("ETTh2", 96): (0.295, None),
    ("ETTh2", 192): (0.340, None),
    ("ETTh2", 336): (0.350, None),
    ("ETTh2", 720): (0.391, None),
}
"""Test MSE with SAM and without, by data and horizon, in arXiv 2402.10198."""

_NOTES = (
    "Mean ± standard deviation over seeds; a difference of test MSE is paired by seed, which "
    "decides the initialization and the order of the windows, over those that both have, ± its "
    "standard error, and in percent of the other's mean. The errors are of standardized channels, "
    "over all windows of the test part, at the epoch of the lowest validation error.",
    "The best baseline is, of the rows without a perturbation ({baselines}), that of the lowest "
    "mean test MSE: a choice that favours it. `linear` is the network without attention.",
    "All train with Adam, decoupled weight decay of all parameters, batch {batch_size}, a "
    "cosine that starts again every five epochs, at most {epochs} epochs; a run ends when the "
    "validation error has not fallen for {patience}. Time is the {clock} of the training "
    "steps of whole runs, without compilation and validation, relative to Adam's.",
)
_FLATNESS_NOTE = (
    "Relative rise of test MSE in percent, the mean over seeds, with the trained matrices rounded "
    "to so many bits (symmetric, one scale an output channel) or with Gaussian noise of so much of "
    "each matrix's RMS; the top eigenvalue of the Hessian on training windows, and how far the "
    f"loss on them rises within a ball of radius {flatness.RADIUS:g} around the parameters "
    f"({flatness.STEPS} steps of ascent), mean ± standard deviation."
)


def write(folder: Path) -> str:
    """Writes `summary.md`, `summary.json`, `runs.csv` and `figures/` from `runs/*.json`.

    Returns the text of the summary.
    """
    records = read_comparison(folder)
    runs = by_method(records, METHODS)
    summary = summarize(runs)
    text = to_markdown(records[0], summary, runs)
    lines = frames.csv(map(frames.line, records))
    frames.write(folder, {"summary.md": text, "summary.json": summary, "runs.csv": lines})
    figures.write(folder / "figures", runs, summary, title(records[0]))
    return text


def summarize(runs: Runs) -> dict[str, Any]:
    """Returns the data, the best baseline, and each method's figures over seeds."""
    config = next(iter(next(iter(runs.values())).values()))["config"]
    errors = {label: by_seed(seeds, _final("test_mse")) for label, seeds in runs.items()}
    baselines = [label for label in runs if parse_method(label, METHODS).name in BASELINES]
    best = min(baselines, key=lambda label: errors[label].mean(), default=None)
    seconds = {label: by_seed(seeds, _final("train_seconds")) for label, seeds in runs.items()}
    adam = next((label for label in runs if label.split(":")[0] in (ADAM, ADAM_PUBLISHED)), None)
    methods = {}
    for label, seeds in runs.items():
        row: dict[str, Any] = {}
        for key in ("mse", "mae"):
            found = by_seed(seeds, _final(f"test_{key}"))
            row[key] = {**spread(found), "runs": found.tolist()}
        for key in ("gradients", "epochs", "best_epoch", "validation_mse"):
            row[key] = float(by_seed(seeds, _final(key)).mean())
        row["seconds"] = float(seconds[label].mean())
        if adam is not None:
            common = seconds[label].index.intersection(seconds[adam].index)
            row["relative_seconds"] = float((seconds[label] / seconds[adam])[common].mean())
        for name, other in (("minus_adam", adam), ("minus_best_baseline", best)):
            if other is not None and other != label:
                minus = paired(errors[label], errors[other])
                if minus["mean"] is not None:
                    common = errors[label].index.intersection(errors[other].index)
                    minus["percent"] = 100 * minus["mean"] / float(errors[other][common].mean())
                row[name] = minus
        measured = [record["flatness"] for record in seeds.values() if "flatness" in record]
        if measured:
            row["flatness"] = {
                **{
                    kind: {
                        level: float(np.mean([each[kind][level] for each in measured]))
                        for level in measured[0][kind]
                    }
                    for kind in ("rounded", "noise")
                },
                **{
                    name: spread([each[name] for each in measured])
                    for name in ("top_eigenvalue", "worst_case")
                    if all(name in each for each in measured)
                },
            }
        methods[label] = row
    return {
        "data": config["data"],
        "horizon": config["horizon"],
        "look_back": config["look_back"],
        "stride": config["stride"],
        "adam": adam,
        "best_baseline": best,
        "methods": methods,
    }


def title(record: Record) -> str:
    """Returns a comparison's subject and its settings."""
    config = record["config"]
    revin = "" if config["revin"] else ", no instance normalization"
    every = "all windows" if config["stride"] == 1 else f"1 in {config['stride']} windows"
    return (
        f"{config['data']}: {config['channels']} channels, look-back {config['look_back']}, "
        f"horizon {config['horizon']}; trained on {every}{revin}"
    )


def to_markdown(record: Record, summary: dict[str, Any], runs: Runs) -> str:
    """Returns the tables, with what their columns mean."""
    config, methods, best = record["config"], summary["methods"], summary["best_baseline"]
    lines = [
        {
            "method": label,
            "test MSE": mean_std(row["mse"], ".4f", ".4f"),
            f"minus {summary['adam']}": difference(row.get("minus_adam")),
            **(
                {f"minus {best}, the best baseline": difference(row.get("minus_best_baseline"))}
                if best not in (None, summary["adam"])
                else {}
            ),
            "test MAE": mean_std(row["mae"], ".4f", ".4f"),
            "gradients": f"{row['gradients']:.3g}",
            "time / Adam": frames.number(row.get("relative_seconds"), ".2f"),
            "epochs": f"{row['epochs']:.1f}",
            "seeds": f"{len(row['mse']['runs'])}",
        }
        for label, row in methods.items()
    ]
    flat = [
        {
            "method": label,
            **{
                f"{bits} bits": f"{100 * rise:+.2f}"
                for bits, rise in row["flatness"]["rounded"].items()
            },
            **{
                f"noise {100 * float(level):g} %": f"{100 * rise:+.2f}"
                for level, rise in row["flatness"]["noise"].items()
            },
            "top eigenvalue": mean_std(row["flatness"]["top_eigenvalue"], ".3g", ".2g"),
            "worst case": mean_std(row["flatness"].get("worst_case"), ".3g", ".2g"),
        }
        for label, row in methods.items()
        if "flatness" in row
    ]
    settings = [
        {"method": label, **{key: f"{value:g}" for key, value in _settings(seeds).items()}}
        for label, seeds in runs.items()
    ]
    terms = {**config, "baselines": ", ".join(f"`{name}`" for name in BASELINES)}
    on_cpu = record["hardware"]["backend"] == "cpu"
    terms["clock"] = "process's CPU time" if on_cpu else "wall-clock time"
    made_on = frames.made_on(record, "jax", "flax", "optax")
    parts = [
        f"# Forecasting {title(record)}",
        f"Seeds {frames.seeds_of(runs.values())}; {made_on}.",
        frames.markdown(lines),
        *frames.fill(_published(config)),
        *frames.fill(*(note.format(**terms) for note in _NOTES)),
        *(["## Rounded and noisy weights", frames.markdown(flat)] if flat else []),
        *(frames.fill(_FLATNESS_NOTE) if flat else []),
        "## Settings",
        frames.markdown(settings),
    ]
    return "\n\n".join(parts) + "\n"


def _published(config: dict[str, Any]) -> str:
    found = PUBLISHED.get((config["data"], config["horizon"]))
    if found is None:
        return ""
    with_sam, without = found
    text = f"Published (arXiv 2402.10198): with SAM {with_sam:.3f}"
    if without is None:
        return f"{text}."
    return f"{text}; without {without:.3f}, from memory of the paper's table."


def _settings(seeds: dict[int, Record]) -> dict[str, float]:
    return next(iter(seeds.values()))["config"]["hyperparameters"]


def difference(found: dict[str, Any] | None) -> str:
    """Formats a paired difference with its standard error, and in percent."""
    if found is None or found["mean"] is None:
        return "-"
    text = mean_std({**found, "std": found["standard_error"]}, "+.4f", ".4f")
    return f"{text} ({found['percent']:+.1f} %)"


def _final(key: str) -> Callable[[Record], float]:
    return lambda record: record["final"][key]


if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.forecasting.report"))
