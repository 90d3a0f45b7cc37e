"""Adapters that are trained for some steps: a part is what is trained until an evaluation."""

import dataclasses
from typing import Any

import numpy as np

from benchmarks.core.comparison import Comparison, Run
from benchmarks.core.methods import MethodSpec
from benchmarks.core.runs import History
from benchmarks.core.training import TrainState

TRACE_EVERY = 10


class AdapterComparison(Comparison):
    """Methods and seeds; `steps` and `eval_every` are in `shared`.

    The history has the evaluations, and how balanced the adapters are over the training.
    """

    entries = "evaluations"

    @property
    def ends(self) -> list[int]:
        """The steps at which parts end, after the first's start."""
        steps, every = self.shared["steps"], self.shared["eval_every"]
        return [0, *range(every, steps, every), steps]

    def parts(self, run: Run) -> list[float]:
        """Returns the gradients until each evaluation."""
        return [run[0].gradients * steps for steps in np.diff(self.ends).tolist()]

    def start(self, run: Run) -> tuple[Any, History]:
        """Returns fresh adapters."""
        history: History = {"resumed_after_steps": [], "evaluations": [], "trace": []}
        return self.trainer(run[0]).init(run[1]), history

    def resume(self, history: History) -> None:
        """Notes after which step the run goes on."""
        history["resumed_after_steps"].append(history["evaluations"][-1]["step"])

    def imbalances(self, params: Any) -> dict[str, Any]:
        """Returns how unbalanced each group of adapters is, by name."""
        raise NotImplementedError

    def note(self, state: TrainState, step: int, history: History) -> None:
        """Notes how unbalanced the adapters are after a step."""
        found = self.imbalances(state.evaluated())
        values = {name: np.asarray(value).tolist() for name, value in found.items()}
        history["trace"].append({"step": step, **values})


def mean_imbalance(history: History) -> float:
    """Returns the mean of what was noted last, of its absolute values."""
    last = [values for name, values in history["trace"][-1].items() if name != "step"]
    return float(np.mean(np.abs(last)))


def batch_indices(examples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Returns the examples of a step: epochs are permutations, without the incomplete batch."""
    epoch, position = divmod(step, examples // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(examples)
    return order[position * batch_size : (position + 1) * batch_size]


def split_rate(spec: MethodSpec) -> tuple[float, MethodSpec]:
    """Returns the learning rate `lr`, and the method without it.

    Raises:
        ValueError: The rate is not above 0.
    """
    settings = dict(spec.hyperparameters)
    rate = settings.pop("lr")
    if not rate > 0:
        raise ValueError(f"Method {spec.label!r} cannot be built: lr must be above 0, got {rate}.")
    return rate, dataclasses.replace(spec, hyperparameters=settings)
