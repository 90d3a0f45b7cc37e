"""The tables of a comparison of generated texts, from its JSON records alone.

python -m benchmarks.generation.report DIR [DIR ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.core import command, frames
from benchmarks.core.frames import mean_std, numbers, paired, spread
from benchmarks.core.records import Record, Runs, by_method, read_comparison
from benchmarks.generation.methods import BASELINE, METHODS

_SCORES = {"bleu": "BLEU", "chrf": "chrF++", "ter": "TER"}
_NOTES = (
    "The decoder starts from weights that were dequantized from 4 bits (embeddings 8): no number "
    "compares with one of the published weights. Adapters are on query and value of the last "
    "{layers} blocks; what is below them is computed once for all runs and is not in the times. "
    "Logits are computed of the tokens to learn alone.",
    "Mean ± standard deviation over seeds. The loss is of the texts' tokens, in nats, on "
    "{dev_rows} development rows. Scores are sacrebleu's, over {test_sets} sets of triples of the "
    "test part with all their references; unseen are categories without a training example. "
    "Generated with {beams} beam(s) and at most {new_tokens} tokens. Abs B is the mean of the "
    "adapters' absolute balancedness (||A||^2 - ||B||^2) / 2 at the end. Time is a step's CPU "
    "seconds over AdamW's; tokens are counted with those of prompts.",
)


def write(folder: Path) -> str:
    """Writes `summary.md`, `summary.json` and `runs.csv` from `runs/*.json`.

    Returns the text of the summary.
    """
    records = read_comparison(folder)
    runs = by_method(records, METHODS)
    rows = summarize(runs)
    text = to_markdown(records[0], rows, runs)
    lines = frames.csv(map(frames.line, records))
    frames.write(folder, {"summary.md": text, "summary.json": rows, "runs.csv": lines})
    return text


def summarize(runs: Runs) -> dict[str, Any]:
    """Returns each method's numbers as spreads over seeds, and its differences to AdamW's."""
    tables = {
        label: numbers(seeds, lambda record: record["final"]) for label, seeds in runs.items()
    }
    rows = {}
    for label, columns in tables.items():
        row: dict[str, Any] = {name: spread(values) for name, values in columns.items()}
        if BASELINE in tables:
            base = tables[BASELINE]
            time = columns["seconds_per_step"] / base["seconds_per_step"]
            row["relative_seconds"] = float(time.mean())
            if label != BASELINE:
                row["dev_loss_minus_adamw"] = paired(columns["dev_loss"], base["dev_loss"])
                row["bleu_all_minus_adamw"] = paired(columns["bleu_all"], base["bleu_all"])
        rows[label] = row
    return rows


def to_markdown(record: Record, rows: dict[str, Any], runs: Runs) -> str:
    """Returns the table, with what its columns mean."""
    config = record["config"]
    lines = []
    for label, row in rows.items():
        minus = row.get("dev_loss_minus_adamw")
        lines.append(
            {
                "method": label,
                "dev loss": mean_std(row["dev_loss"], ".4f", ".4f"),
                "minus AdamW": mean_std(
                    minus and {"mean": minus["mean"], "std": minus["standard_error"]},
                    "+.4f",
                    ".4f",
                ),
                **{
                    f"{title} {part}": mean_std(row.get(f"{score}_{part}"), ".2f", ".2f")
                    for score, title in _SCORES.items()
                    for part in ("seen", "unseen")
                },
                "abs B": mean_std(row["imbalance"], ".3g", ".2g"),
                "time": frames.number(row.get("relative_seconds"), ".2f"),
                "tokens/s": frames.number(row["tokens_per_second"]["mean"], ".0f"),
            }
        )
    parts = [
        f"# WebNLG: {config['model']}, LoRA of rank {config['rank']}",
        *frames.fill(
            f"{config['steps']} iterations of {config['batch_size']} rows of {config['length']} "
            f"tokens, from {config['train_rows']:,} training rows "
            f"({config['left_out']:,} of all training examples are longer than a row), "
            f"{record['parameters']:,} trained parameters. The loss at the start is "
            f"{record['start_dev_loss']:.4f}. Seeds {frames.seeds_of(runs.values())}; "
            f"{frames.made_on(record, 'jax', 'flax', 'optax', 'sacrebleu')}."
        ),
        frames.markdown(lines),
        *frames.fill(f"Hyper-parameters: {frames.all_settings(runs)}."),
        *frames.fill(*(note.format(**config) for note in _NOTES)),
    ]
    return "\n\n".join([*parts, *texts(runs)]) + "\n"


def texts(runs: Runs) -> list[str]:
    """Returns the first sets of triples, with what the first seed of each method says of them."""
    firsts = {label: seeds[min(seeds)] for label, seeds in runs.items()}
    parts = ["## Generated texts"]
    for index, example in enumerate(next(iter(firsts.values()))["examples"]):
        said = {label: record["texts"][index] for label, record in firsts.items()}
        rows = [{"": "reference", "text": example["references"][0]}]
        rows += [{"": label, "text": text} for label, text in said.items()]
        parts += [f"### {example['prompt']}", frames.markdown(rows)]
    return parts


if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.generation.report"))
