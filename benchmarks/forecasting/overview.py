"""All data sets and horizons in one table and one figure, from the comparisons' results.

    python -m benchmarks.forecasting.overview DIR [DIR ...]

Each `DIR` is what `benchmarks.forecasting` wrote. The table and the figure go to `--out`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.core import command, frames
from benchmarks.core.command import Summaries
from benchmarks.core.frames import resolved
from benchmarks.core.plotting import COLOURS, legend, save, subplots
from benchmarks.forecasting import report
from benchmarks.forecasting.methods import ADAM, DECAY, LINEAR, TUNED

SHOWN = {
    "adamw": "AdamW, decay tuned",
    LINEAR: "linear network",
    "sam": "SAM",
    "samw": "SAM, decay tuned",
}
"""The rows of the figure, relative to Adam."""

_COLUMNS = ("adam_published", ADAM, "adamw", LINEAR, "sam_published", "sam", "samw")
_NOTE = (
    "Test MSE, mean ± standard deviation over seeds; the last two columns are paired by seed, ± "
    "their standard error. The best baseline is the row without a perturbation of the lowest mean "
    "test MSE: a choice that favours it. Rows named after a method are tuned with the same number "
    "of trials each on the validation part, at horizon 96, and serve all horizons of their data; "
    "where it says so nothing is tuned: Adam and SAM are as published, AdamW has decay "
    f"{DECAY:g}. Those `_published` have the published settings. Published: arXiv 2402.10198, "
    "with SAM; in brackets the same network without it, from memory of the paper's table."
)


@dataclasses.dataclass(frozen=True)
class Configuration(Summaries):
    """The comparisons to put side by side."""

    out: Path = Path("runs/forecasting-overview")  # The folder of the table and the figure.


def read(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Returns the summaries of folders, by data set and horizon.

    Raises:
        ValueError: A folder has no row of Adam with its tuned settings.
    """
    found = [json.loads((folder / "summary.json").read_text("utf-8")) for folder in folders]
    for folder, summary in zip(folders, found, strict=True):
        if summary["adam"] != ADAM:
            raise ValueError(f"{folder} has no row {ADAM!r}, to which the others are compared.")
    return sorted(found, key=lambda summary: (summary["data"].lower(), summary["horizon"]))


def to_markdown(summaries: Sequence[dict[str, Any]]) -> str:
    """Returns the table, and what is left of SAM's gain on average."""
    columns = [name for name in _COLUMNS if any(name in each["methods"] for each in summaries)]
    lines = [
        {
            "data": _name(summary),
            "horizon": f"{summary['horizon']}",
            **{
                name: frames.mean_std(summary["methods"].get(name, {}).get("mse"), ".4f", ".4f")
                for name in columns
            },
            "published": _published(summary),
            **_differences(summary),
        }
        for summary in summaries
    ]
    return "\n\n".join(
        [
            "# Forecasting: all data sets",
            frames.markdown(lines),
            *frames.fill(_average(summaries), _NOTE),
        ]
    )


def _name(summary: dict[str, Any]) -> str:
    """The data set, with what sets its comparison apart."""
    every = "" if summary["stride"] == 1 else f", 1 in {summary['stride']} windows"
    return f"{summary['data']}{every}{'' if _tuned(summary) else ', not tuned'}"


def _tuned(summary: dict[str, Any]) -> bool:
    return (TUNED / f"{summary['data']}.json").exists()


def _published(summary: dict[str, Any]) -> str:
    with_sam, without = report.PUBLISHED.get((summary["data"], summary["horizon"]), (None, None))
    text = frames.number(with_sam, ".3f")
    return text if without is None else f"{text} ({without:.3f})"


def _differences(summary: dict[str, Any]) -> dict[str, str]:
    row = summary["methods"].get("sam", {})
    return {
        "SAM - Adam": report.difference(row.get("minus_adam")),
        "SAM - best baseline": report.difference(row.get("minus_best_baseline")),
        "best baseline": summary["best_baseline"],
    }


def _average(summaries: Sequence[dict[str, Any]]) -> str:
    rows = [each["methods"]["sam"] for each in summaries if "sam" in each["methods"]]
    if not rows:
        return ""
    to_adam = [row["minus_adam"]["percent"] for row in rows]
    to_best = [row["minus_best_baseline"]["percent"] for row in rows]
    signs = [resolved(row["minus_best_baseline"]) for row in rows]
    below, above = signs.count(-1), signs.count(1)
    return (
        f"On average over the {len(rows)} lines SAM's error is {np.mean(to_adam):+.1f} % to Adam's "
        f"and {np.mean(to_best):+.1f} % to the best baseline's. It is below the best baseline's by "
        f"more than two standard errors on {below} of them, and above it on {above}."
    )


def draw(summaries: Sequence[dict[str, Any]]) -> Figure:
    """Test MSE relative to Adam's mean: one dot per seed, a diamond at the mean."""
    figure, axis = subplots((7.5, 1.2 + 0.36 * len(summaries)))
    offsets = np.linspace(-0.22, 0.22, len(SHOWN))
    for offset, colour, (name, label) in zip(offsets, COLOURS, SHOWN.items(), strict=False):
        marks: dict[str, Any] = {"color": colour, "clip_on": False}
        named = label
        for row, summary in enumerate(summaries):
            if name in summary["methods"]:
                adam = summary["methods"][ADAM]["mse"]["mean"]
                values = 100 * (np.array(summary["methods"][name]["mse"]["runs"]) / adam - 1)
                at = np.full(len(values), row + offset)
                axis.plot(values, at, "o", ms=4, alpha=0.35, **marks)
                axis.plot(values.mean(), row + offset, "D", ms=5.5, label=named, **marks)
                named = "_"  # one entry of the legend
    axis.axvline(0, color="0.4", lw=1, ls=":")
    stars = ["" if _tuned(summary) else "*" for summary in summaries]
    labels = [
        f"{summary['data']}{star}, {summary['horizon']}"
        for summary, star in zip(summaries, stars, strict=True)
    ]
    if any(stars):
        axis.set_title("* nothing tuned", fontsize=9, loc="left")
    axis.set_yticks(range(len(summaries)), labels)
    axis.set_ylim(len(summaries) - 0.5, -0.5)
    axis.set_xlabel("test MSE minus Adam's mean, in percent of it (dots: seeds; diamond: mean)")
    legend(figure, axis)
    return figure


@command.main(Configuration, "benchmarks.forecasting.overview")
def main(arguments: Configuration) -> None:
    """Writes the table and the figure, and prints the table."""
    summaries = read(arguments.folders)
    text = to_markdown(summaries) + "\n"
    frames.write(arguments.out, {"summary.md": text})
    save(arguments.out / "figures", {"relative_mse": lambda: draw(summaries)})
    print(text)
