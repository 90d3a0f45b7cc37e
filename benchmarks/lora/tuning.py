"""The search of `--tune`: hyper-parameters by examples held out of the training pool."""

from collections.abc import Mapping

from benchmarks.core import tuning
from benchmarks.core.methods import MethodSpec
from benchmarks.core.records import Record
from benchmarks.lora.experiment import FineTuning
from benchmarks.lora.methods import searched, table

HELD_OUT = 500
"""About how many examples of the pool the search evaluates on, and never trains on."""


_SQUARE = ((1.0, 0.5), (0.5, 0.0), (0.0, 1.0))
"""The first trials: how far up their spans the learning rate is, and rho or alpha. Each has its
three values once, as a few random draws may all be near one another."""


def starts(search: Mapping[str, tuple[float, float]]) -> list[dict[str, float]]:
    """Returns the settings of the first trials in some spans."""

    def at(key: str, share: float) -> float:
        low, high = search[key]
        return min(high, low * (high / low) ** share)

    return [
        {key: at(key, rate if key == "lr" else other) for key in search} for rate, other in _SQUARE
    ]


def tune(name: str, comparison: FineTuning, trials: int) -> MethodSpec:
    """Returns the settings of the highest accuracy."""

    def error(record: Record) -> float:
        return -record["final"]["test_top1"]

    rows = searched(table(comparison.shared["adapter"]), comparison.shared["steps"])
    first = starts(rows[name].search)
    return tuning.tune(
        name, comparison, trials, rows, error=error, starts=first, seed=0, unit="part"
    )
