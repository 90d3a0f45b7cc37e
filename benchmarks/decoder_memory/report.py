"""The table of `benchmarks.decoder_memory`, from its record alone.

python -m benchmarks.decoder_memory.report DIR [DIR ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.core import command, frames, records

_NOTE = (
    "Temp is the temporary memory that the compiled step asks for at its peak, beside its "
    "arguments (weights, adapters, the optimizer's state and the batch). TFLOP is the work of the "
    "matrix products, with loops as often as they run. Each gradient is of all rows, summed over "
    "micro-batches; with the checkpoint each block is computed again for its gradient. The steps "
    "are compiled and not run. Another backend's compiler needs another amount."
)


def write(folder: Path) -> str:
    """Writes `results.csv` and `summary.md` from `results.json`; returns the summary."""
    record = records.read_record(folder / "results.json")
    text = to_markdown(record)
    frames.write(folder, {"results.csv": frames.csv(record["programs"]), "summary.md": text})
    return text


def to_markdown(record: records.Record) -> str:
    """Returns a line for each way to take a step, AdamW beside SAM."""
    settings, programs = record["settings"], record["programs"]
    lines: dict[Any, dict[str, str]] = {}
    for row in programs:
        line = lines.setdefault(
            (row["checkpoint"], row["parts"]),
            {
                "checkpoint": "yes" if row["checkpoint"] else "no",
                "micro-batches": f"{row['parts']}",
                "rows each": f"{settings['batch_size'] // row['parts']}",
            },
        )
        name = {"adamw": "AdamW", "sam": "SAM"}[row["method"]]
        line[f"{name} temp MiB"] = f"{row['temp_bytes'] / 2**20:.1f}"
        line[f"{name} TFLOP"] = f"{row['flops'] / 1e12:.3f}"
    arguments = max(row["argument_bytes"] for row in programs) / 2**20
    parts = [
        "# A decoder's step: checkpoints and micro-batches",
        *frames.fill(
            f"{settings['model']}, LoRA of rank {settings['rank']} in all blocks, "
            f"{settings['batch_size']} rows of {settings['length']} tokens, float32; arguments "
            f"{arguments:.1f} MiB. {frames.made_on(record, 'jax', 'flax', 'optax')}.",
            _NOTE,
        ),
        frames.markdown(lines.values()),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.decoder_memory.report"))
