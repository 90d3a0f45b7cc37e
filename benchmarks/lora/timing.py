"""What a step of each method costs beside AdamW's: time, compiled work and memory.

All methods run in one process on the same batch of full length, in turn, and are compared within
each round.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.core import records
from benchmarks.core.frames import markdown_table
from benchmarks.core.methods import MethodSpec
from benchmarks.core.plotting import COLOURS, STYLE
from benchmarks.core.timing import compile_program, interleave, spread
from benchmarks.lora.experiment import Pretrained, Settings, build_model
from benchmarks.lora.methods import BASELINE, METHODS, optimizer
from benchmarks.lora.training import Batch, Trainer

_CLASSES = 6
_MIB = 2**20

# Bounds on the ratio to AdamW: of time, of compiled floating-point operations, of memory.
_BOUNDS = {1: (1.03, 1.001, 1.1), 2: (2.1, 2.0, 1.1)}

_NOTES = """\
Ratios are to AdamW's step. Time: the median over {rounds} rounds with its 95 % confidence interval,
all methods in one process and compared within each round; *within noise* means that the median
misses the bound and the interval does not. FLOPs and temporary memory are those that XLA states of
the compiled step; memory is temporaries and arguments. Batch {batch_size}, {length} tokens, no
padding; the papers measured 1.39 for BAR and 2.5 for SAM on RoBERTa-large.
"""


def write(
    folder: Path,
    pretrained: Pretrained,
    settings: Settings,
    specs: list[MethodSpec],
    rounds: int,
) -> str:
    """Measures the methods, and AdamW in any case, and writes the report.

    Returns:
        The text of `summary.md`.
    """
    specs = [MethodSpec(BASELINE, BASELINE, dict(METHODS[BASELINE].defaults))] + [
        spec for spec in specs if spec.label != BASELINE
    ]
    results = measure(pretrained, settings, specs, rounds)
    record = {
        "format": records.FORMAT,
        "settings": {**settings._asdict(), "model": pretrained.name, "rounds": rounds},
        "hardware": records.hardware(),
        "versions": records.versions(),
        "methods": results,
        "targets": targets(results),
    }
    text = to_markdown(record)
    records.write_record(folder / "results.json", record)
    records.write_text(folder / "results.csv", to_csv(results))
    records.write_text(folder / "summary.md", text)
    _figure(record).savefig(folder / "lora_time.png", bbox_inches="tight", facecolor="white")
    return text


def measure(
    pretrained: Pretrained, settings: Settings, specs: list[MethodSpec], rounds: int
) -> dict[str, Any]:
    """Compiles and times the steps of methods, of which the first is AdamW.

    Returns:
        By label the seconds, FLOPs, bytes and their ratios to AdamW's, as JSON types.
    """
    rng = np.random.default_rng(0)
    shape = (settings.batch_size, settings.length)
    ids = rng.integers(0, pretrained.encoder.config.vocab_size, shape, dtype=np.int32)
    labels = rng.integers(0, _CLASSES, len(ids), dtype=np.int32)
    batch = jax.device_put(Batch(ids, np.ones(shape, bool), labels))
    runs: dict[str, Callable[[], Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for spec in specs:
        trainer = Trainer(
            lambda seed: build_model(pretrained.encoder, settings, _CLASSES, seed),
            optimizer(spec, settings.steps),
        )
        state = trainer.init(0)
        program = compile_program(trainer.step, state, trainer.frozen, batch)
        compiled: Any = program.run
        runs[spec.label] = _runner(program.run, state, trainer.frozen, batch)
        found[spec.label] = {
            "gradients": METHODS[spec.name].gradients,
            "flops": compiled.cost_analysis()["flops"],
            "bytes": (program.temp_bytes or 0) + (program.argument_bytes or 0),
            "temp_bytes": program.temp_bytes,
            "compile_seconds": program.compile_seconds,
        }
    seconds = interleave(runs, range(rounds))
    base = found[specs[0].label]
    for label, row in found.items():
        row["seconds"] = float(np.median(seconds[label]))
        row["time_ratio"] = spread(seconds[label] / seconds[specs[0].label])._asdict()
        row["flops_ratio"] = row["flops"] / base["flops"]
        row["memory_ratio"] = row["bytes"] / base["bytes"] if base["bytes"] else None
    return found


def _runner(program: Callable, state: Any, frozen: Any, batch: Batch) -> Callable[[], Any]:
    def run() -> Any:
        nonlocal state
        state, metrics = program(state, frozen, batch)
        return state, metrics

    return run


def targets(results: dict[str, Any]) -> list[list[str]]:
    """Returns a line for each bound: the method, the claim, what was found, a verdict."""
    lines = []
    for label, row in results.items():
        if label == BASELINE:
            continue
        time, flops, memory = _BOUNDS[row["gradients"]]
        ratio = row["time_ratio"]
        late = "within noise" if ratio["low"] <= time else "not met"
        lines += [
            [
                label,
                f"time at most {time:g}x",
                f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
                "met" if ratio["median"] <= time else late,
            ],
            _bound(label, "FLOPs", row["flops_ratio"], flops),
        ]
        if row["memory_ratio"] is not None:
            lines.append(_bound(label, "memory", row["memory_ratio"], memory))
    return lines


def _bound(label: str, name: str, value: float, bound: float) -> list[str]:
    verdict = "met" if value <= bound else "not met"
    return [label, f"{name} at most {bound:g}x", f"{value:.6f}", verdict]


def to_markdown(record: dict[str, Any]) -> str:
    """Returns the table of methods and that of the targets."""
    settings, hardware, versions = record["settings"], record["hardware"], record["versions"]
    software = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax"))
    lines = [
        ["method", "time", "95 % interval", "s a step", "GFLOP", "FLOPs", "temp MiB", "memory"]
    ]
    for label, row in record["methods"].items():
        ratio = row["time_ratio"]
        lines.append(
            [
                label,
                f"{ratio['median']:.3f}",
                f"{ratio['low']:.3f} to {ratio['high']:.3f}",
                f"{row['seconds']:.4f}",
                f"{row['flops'] / 1e9:.3f}",
                f"{row['flops_ratio']:.6f}",
                "-" if row["temp_bytes"] is None else f"{row['temp_bytes'] / _MIB:.1f}",
                "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.4f}",
            ]
        )
    head = f"# A step of {settings['model']} with LoRA (rank {settings['rank']})\n\n"
    head += f"{hardware['device']} (x{hardware['count']}); {software}.\n"
    parts = [head, markdown_table(lines), "", _NOTES.format(**settings)]
    return "\n".join(
        [*parts, markdown_table([["method", "target", "found", ""], *record["targets"]]), ""]
    )


def to_csv(results: dict[str, Any]) -> str:
    """Returns one line a method."""
    rows = [
        {
            "method": label,
            **{key: value for key, value in row.items() if key != "time_ratio"},
            **{f"time_ratio_{key}": value for key, value in row["time_ratio"].items()},
        }
        for label, row in results.items()
    ]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _figure(record: dict[str, Any]) -> Figure:
    methods = record["methods"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 1.2 + 0.45 * len(methods)), layout="constrained")
        axis = figure.subplots()
        for position, (label, row) in enumerate(methods.items()):
            ratio = row["time_ratio"]
            error = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
            colour = "0.6" if label == BASELINE else COLOURS[0]
            axis.barh(position, ratio["median"], color=colour, height=0.65)
            axis.errorbar(
                ratio["median"], position, xerr=error, fmt="none", ecolor="0.2", capsize=3
            )
            axis.text(ratio["high"] + 0.03, position, f"{ratio['median']:.3f}", va="center")
        axis.set_yticks(range(len(methods)), list(methods))
        axis.invert_yaxis()
        axis.set_xlim(0, 1.15 * max(row["time_ratio"]["high"] for row in methods.values()))
        axis.set_xlabel("time of a step over AdamW's (median, 95 % interval)")
        settings = record["settings"]
        axis.set_title(
            f"{settings['model']}, LoRA rank {settings['rank']}, batch {settings['batch_size']}, "
            f"{settings['length']} tokens",
            fontsize=9.5,
            loc="left",
        )
    return figure
