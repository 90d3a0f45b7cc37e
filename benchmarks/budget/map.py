"""The map of all tasks, and the verdicts on what was expected before anything was run.

    python -m benchmarks.budget.map DIR [DIR ...]

Each `DIR` is what `benchmarks.budget` wrote for a task. The tables and the figure go to `--out`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.budget.methods import BASE, table
from benchmarks.budget.report import TOP1, gain
from benchmarks.budget.tasks import TASKS
from benchmarks.core import command, frames
from benchmarks.core.command import Summaries
from benchmarks.core.frames import difference, resolved
from benchmarks.core.plotting import save, subplots

MARGIN = 0.005
"""Less than this below counts as equal: half a point of accuracy, or percent of error."""

Tasks = dict[str, dict[str, Any]]  # by task: each method's numbers


@dataclasses.dataclass(frozen=True)
class Configuration(Summaries):
    """The tasks to put side by side."""

    out: Path = Path("runs/budget-map")  # The folder of the tables and the figure.


def read(folders: Sequence[Path]) -> Tasks:
    """Returns the methods' numbers by task, in the tasks' order.

    Raises:
        ValueError: Two folders are of one task.
    """
    found: Tasks = {}
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        if summary["task"] in found:
            raise ValueError(f"{folder}: another folder has the task {summary['task']!r} too.")
        found[summary["task"]] = summary["methods"]
    return {task: found[task] for task in TASKS if task in found}


def hypotheses(tasks: Tasks) -> list[dict[str, str]]:
    """Returns what was expected, what was found, and whether the seeds resolve it.

    A difference is resolved where it is more than two standard errors from 0.
    """
    rows: list[dict[str, str]] = []

    def add(number: str, claim: str, where: str, found: dict[str, Any] | None, says: str) -> None:
        if found is not None:
            task = where.partition(":")[0]
            forecasts = task in TASKS and TASKS[task].series is not None
            text = f"{difference(found)} {'%' if forecasts else 'points'}"
            row = {"": number, "expected": claim, "where": where, "found": text, "verdict": says}
            rows.append(row)

    def positive(number: str, claim: str, task: str, one: str, other: str) -> None:
        found = gain(tasks.get(task, {}), one, other)
        add(number, claim, f"{task}: {one} - {other}", found, _sign(found))

    images = [task for task in tasks if TASKS[task].series is None]
    wrong = [task for task in images if TASKS[task].label_noise or TASKS[task].human_labels]
    for task in (task for task in images if task not in wrong):
        for share, every in (("25", "every_4"), ("50", "every_2")):
            for uniform in (every, f"random_{share}"):
                claim = "with correct labels late beats uniform"
                positive("i", claim, task, f"late_{share}", uniform)
    for task in wrong:
        for share in ("25", "50"):
            claim = "with wrong labels early beats late"
            positive("ii", claim, task, f"early_{share}", f"late_{share}")
    for task, methods in tasks.items():
        found = gain(methods, "late_25_quarter", "sam")
        where = f"{task}: late_25_quarter - sam"
        claim = f"late with a quarter-batch ascent is at most {100 * MARGIN:g} below SAM"
        add("iii", claim, where, found, _within(found))
    for task in tasks:
        for kind, one, other in (
            ("stale", "stale_plus", "stale_minus"),
            ("momentum", "momentum_minus", "momentum_plus"),
        ):
            claim = f"the published sign of the {kind} form is the one that helps"
            positive("iv", claim, task, one, other)
    gains = [gain(tasks.get(task, {}), "sam", BASE) for task in ("human", "symmetric")]
    if gains[0] is not None and gains[1] is not None:
        errors = [each["standard_error"] for each in gains if each is not None]
        error = None if None in errors else float(np.hypot(*errors))
        between = {"mean": gains[0]["mean"] - gains[1]["mean"], "standard_error": error}
        claim = "SAM gains by people's wrong labels what it gains by random ones"
        verdict = "no difference found" if _sign(between) == "not resolved" else "**fails**"
        add("v", claim, "gain on human - gain on symmetric", between, verdict)
    for task in tasks:
        positive("vi", "SAM's gain survives a tuned base", task, "sam", BASE)
    return rows


def _sign(found: dict[str, Any] | None) -> str:
    """Whether a difference is above 0, as was expected."""
    sign = 0 if found is None else resolved(found)
    return {0: "not resolved", 1: "holds", -1: "**fails**"}[sign]


def _within(found: dict[str, Any] | None) -> str:
    """Whether a difference is above minus the margin."""
    if found is None:
        return "not resolved"
    return _sign({**found, "mean": found["mean"] + MARGIN})


def to_markdown(tasks: Tasks) -> str:
    """Returns the map and the verdicts."""
    names = _rows(tasks)
    lines = [
        {
            "method": name,
            "gradients": _gradients(tasks, name),
            **{task: _cell(methods, name) for task, methods in tasks.items()},
        }
        for name in names
    ]
    titles = "; ".join(f"`{task}`: {TASKS[task].title}" for task in tasks)
    parts = [
        "# Where does the budget of gradients belong?",
        frames.markdown(lines),
        *frames.fill(
            f"Test accuracy in percent; under the first line the difference to `{BASE}` in points, "
            "paired by seed, ± its standard error. Of forecasts, the percent by which the test "
            f"error is less. All of one task have the same budget. {titles}."
        ),
        "## What was expected",
        frames.markdown(hypotheses(tasks)),
        *frames.fill(
            "These were written down before anything was run. A difference is resolved where it is "
            "more than two standard errors from 0."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _rows(tasks: Tasks) -> list[str]:
    known = dict.fromkeys([*table("vit"), *table("clean")])
    return [name for name in known if any(name in methods for methods in tasks.values())]


def _gradients(tasks: Tasks, name: str) -> str:
    found = next(methods[name] for methods in tasks.values() if name in methods)
    return f"{found['gradients']['mean']:.3g}"


def _cell(methods: dict[str, Any], name: str) -> str:
    if name not in methods:
        return "-"
    row = methods[name]
    if "minus_base" in row:
        return difference(row["minus_base"])
    if "test_mse" in row:
        return f"MSE {row['test_mse']['mean']:.4f}"
    return f"{100 * row[TOP1]['mean']:.2f}"


def draw(tasks: Tasks) -> Figure:
    """The differences to the base optimizer: a column a task, a row a method."""
    names = [name for name in _rows(tasks) if name != BASE]
    found = [[gain(each, name, BASE) for each in tasks.values()] for name in names]
    points = np.array([[np.nan if g is None else 100 * g["mean"] for g in row] for row in found])
    figure, axis = subplots((3.2 + 1.25 * len(tasks), 1.4 + 0.3 * len(names)))
    largest = max(1.0, float(np.nanmax(np.abs(points))))
    image = axis.imshow(points, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    for (row, column), value in np.ndenumerate(points):
        each = found[row][column]
        if each is not None:
            star = "*" if _sign(each) != "not resolved" else ""
            dark = abs(value) > 0.6 * largest
            place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5}
            axis.text(column, row, f"{value:+.1f}{star}", color="w" if dark else "k", **place)
    axis.set_xticks(range(len(tasks)), [TASKS[task].title.replace(", ", ",\n") for task in tasks])
    axis.tick_params(axis="x", labelsize=8, rotation=20)
    axis.set_yticks(range(len(names)), names)
    axis.grid(visible=False)
    axis.set_title(
        f"test accuracy minus {BASE}'s at the same budget, points; of forecasts, the percent by\n"
        "which the test error is less; * more than two standard errors; blank: not run",
        fontsize=9,
        loc="left",
    )
    figure.colorbar(image, ax=axis, shrink=0.6)
    return figure


@command.main(Configuration, "benchmarks.budget.map")
def main(arguments: Configuration) -> None:
    """Writes the tables and the figure, and prints the tables."""
    tasks = read(arguments.folders)
    text = to_markdown(tasks)
    frames.write(arguments.out, {"summary.md": text})
    save(arguments.out / "figures", {"map": lambda: draw(tasks)})
    print(text)
