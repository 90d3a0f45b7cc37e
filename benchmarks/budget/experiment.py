"""Methods that share one budget of gradients, each with a schedule of its own length."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import optax

from benchmarks.budget.methods import WARM_UP
from benchmarks.budget.tasks import TASKS, Task
from benchmarks.core import tunable
from benchmarks.core.classification.experiment import MOMENTUM, ImageComparison, Images
from benchmarks.core.comparison import EpochComparison, Run
from benchmarks.core.forecasting.experiment import SeriesComparison, State
from benchmarks.core.methods import MethodSpec
from benchmarks.core.runs import History
from benchmarks.core.training import Trainer, TrainState
from benchmarks.data import Dataset


@dataclasses.dataclass(frozen=True)
class Training(Images):
    """What a comparison of classifiers is told, with a task and a budget."""

    task: str = "clean"
    budget: int = 30
    shift: int = 1

    def recorded(self) -> dict[str, Any]:
        """Returns what all records state; rate, decay and epochs are a method's own."""
        names = ("task", "budget", "model", "width", "label_smoothing", "bfloat16", "shift")
        return {**{name: getattr(self, name) for name in names}, "warm_up": WARM_UP}


class EqualBudget(EpochComparison):
    """The epochs and the optimizer that a task and its budget give a method."""

    def epochs(self, spec: MethodSpec) -> int:
        """Returns how many epochs the budget buys."""
        return max(1, round(self.shared["budget"] / spec.gradients))

    def schedule(self, spec: MethodSpec) -> optax.Schedule:
        """Returns the learning rate at each step: a cosine, which may follow a linear rise."""
        return self._scheduled(spec, spec.hyperparameters["lr"])

    def _scheduled(self, spec: MethodSpec, rate: Any) -> optax.Schedule:
        steps = self.epochs(spec) * self.steps
        if self._task().warms_up:
            shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, round(WARM_UP * steps), steps)
        else:
            shape = optax.cosine_decay_schedule(1.0, steps)
        return lambda count: rate * shape(count)

    def optimizer(self, spec: MethodSpec) -> optax.GradientTransformation:
        """Returns a method with its base optimizer."""

        def base(rate: Any, decay: Any) -> optax.GradientTransformation:
            schedule = self._scheduled(spec, rate)
            if self._task().optimizer == "adam":
                return optax.adamw(schedule, weight_decay=decay)
            sgd = optax.sgd(schedule, momentum=MOMENTUM)
            return optax.chain(optax.add_decayed_weights(decay), sgd)

        return tunable.optimizer(spec, base, self.epochs(spec) * self.steps)

    def _bought(self, spec: MethodSpec) -> dict[str, float]:
        return {"gradients": spec.gradients, "epochs": self.epochs(spec)}

    def _task(self) -> Task:
        return TASKS[self.shared["task"]]


def _by_the_host(spec: MethodSpec) -> bool:
    """Whether steps must be dispatched one at a time.

    In a scan no step is known not to ascend, and all would have a part of the batch alone.
    """
    return spec.method.ascent_share < 1 and spec.method.ascends is not None


class BudgetedImages(EqualBudget, ImageComparison):
    """Methods and seeds on one task of images; a search is the same on the validation part."""

    def __init__(self, training: Training, dataset: Dataset, folder: Path):
        """Puts the data on the device.

        Raises:
            ValueError: The folder holds records of another comparison.
        """
        task = TASKS[training.task]
        super().__init__(training, dataset, folder, task.label_noise, task.human_labels)

    def start(self, run: Run) -> tuple[TrainState, History]:
        """Returns a fresh model, told the run's hyper-parameters."""
        state, history = super().start(run)
        return tunable.told(state, run[0]), history

    def final(self, run: Run, state: TrainState, history: History) -> dict[str, Any]:
        """Returns the record's own part, with what the budget bought."""
        record = super().final(run, state, history)
        return {**record, "final": {**record["final"], **self._bought(run[0])}}

    def program(self, spec: MethodSpec) -> str:
        """Returns what methods share that differ in numbers which programs are told."""
        return tunable.program(spec)

    def make_trainer(self, spec: MethodSpec) -> Trainer:
        """Makes the method's trainer."""
        scan = False if _by_the_host(spec) else None
        return self.task.trainer(self.optimizer(spec), scan, spec.method.ascent_share)


class BudgetedSeries(EqualBudget, SeriesComparison):
    """Methods and seeds on one series; no run ends early, and the best validation epoch counts."""

    def final(self, run: Run, state: State, history: History) -> dict[str, Any]:
        """Returns the record's own part, with what the budget bought and the last epoch's error."""
        record, spec = super().final(run, state, history), run[0]
        final = {**record["final"], **self._bought(spec)}
        if not self._tuning:
            final["last_test_mse"] = self.test(spec, state.train.evaluated())["mse"]
        return {**record, "final": final}

    def make_trainer(self, spec: MethodSpec, scan: bool = True) -> Trainer:
        """Makes the method's trainer."""
        return super().make_trainer(spec, scan and not _by_the_host(spec))
