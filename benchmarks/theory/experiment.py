"""The topics, each of which is measured at once and leaves a record."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.core.runs import Experiment, History, Tick
from benchmarks.theory.claims import (
    balancedness,
    deviation,
    factorization,
    neuron,
    sensing,
    thresholds,
    universal,
    universal_figure,
)
from benchmarks.theory.common import Findings


class Topic(NamedTuple):
    """What is measured together and drawn in one figure."""

    title: str  # For people
    measure: Callable[[bool], Findings]  # From whether shortened runs will do to what was found
    draw: Callable[[dict[str, Any]], Figure]  # From the series that were found to the figure


TOPICS = {
    "thresholds": Topic("Quadratics: thresholds", thresholds.measure, thresholds.draw),
    "factorization": Topic("Scalar factorization", factorization.measure, factorization.draw),
    "neuron": Topic("A single neuron", neuron.measure, neuron.draw),
    "sensing": Topic("Matrix sensing", sensing.measure, sensing.draw),
    "balancedness": Topic("Two cores: balancedness", balancedness.measure, balancedness.draw),
    "deviation": Topic("Three cores: norm deviation", deviation.measure, deviation.draw),
    "universal": Topic("Universal sharpness", universal.measure, universal_figure.draw),
}


class Theory(Experiment[str]):
    """The topics, each of which is measured at once."""

    saves = False

    def __init__(self, quick: bool, folder: Path):
        """Takes whether shortened runs will do, and the results' folder."""
        self._quick, self.folder = quick, folder

    def name(self, run: str) -> str:
        """Returns the topic's name."""
        return run

    def path(self, run: str) -> Path:
        """Returns the place of the topic's record, beside its figure."""
        return self.folder / f"{run}.json"

    def config(self, run: str) -> dict[str, Any]:
        """Returns what decides the numbers."""
        return {"topic": run, "quick": self._quick}

    def advance(self, run: str, part: int, state: Any, history: History, tick: Tick) -> Any:
        """Measures the topic's claims."""
        start = time.process_time()
        found = TOPICS[run].measure(self._quick)
        history |= {
            "title": TOPICS[run].title,
            "cpu_seconds": round(time.process_time() - start, 1),
            "claims": [
                {**claim._asdict(), "holds": bool(np.all(claim.holds))} for claim in found.claims
            ],
            "series": found.series,
        }
        return state

    def status(self, history: History) -> str:
        """Returns how many claims hold."""
        held = sum(claim["holds"] for claim in history["claims"])
        seconds = history["cpu_seconds"]
        return f"{held} of {len(history['claims'])} claims hold, {seconds:.0f} s of CPU time"
