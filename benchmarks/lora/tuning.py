"""The search of `--tune`: hyper-parameters by examples held out of the training pool."""

from benchmarks.core import tuning
from benchmarks.core.methods import MethodSpec
from benchmarks.core.records import Record
from benchmarks.lora.experiment import FineTuning
from benchmarks.lora.methods import table

HELD_OUT = 500
"""About how many examples of the pool the search evaluates on, and never trains on."""


def tune(name: str, comparison: FineTuning, trials: int) -> MethodSpec:
    """Returns the settings of the highest accuracy."""

    def error(record: Record) -> float:
        return -record["final"]["test_top1"]

    rows = table(comparison.shared["adapter"])
    return tuning.tune(name, comparison, trials, rows, error=error, seed=0, unit="part")
