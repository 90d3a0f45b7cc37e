"""The published recipe: restarts of the cosine, and an end when validation does not improve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from benchmarks.core.comparison import Run
from benchmarks.core.forecasting.experiment import SeriesComparison, State, best_epoch
from benchmarks.core.forecasting.task import Batches, Task
from benchmarks.core.methods import MethodSpec
from benchmarks.core.runs import History
from benchmarks.data.series import Series
from benchmarks.forecasting import flatness
from benchmarks.forecasting.methods import LINEAR, optimizer

if TYPE_CHECKING:
    from benchmarks.forecasting.__main__ import Configuration

SHOWN_CHANNELS = 3
_DECIDED = (
    "look_back",
    "horizon",
    "stride",
    "epochs",
    "patience",
    "batch_size",
    "revin",
    "flatness",
)


class Forecasting(SeriesComparison):
    """Runs methods and seeds on one series."""

    def __init__(self, series: Series, arguments: Configuration, folder: Path, tuning: bool):
        """As `SeriesComparison`, with the command's arguments."""
        settings = {name: getattr(arguments, name) for name in _DECIDED}
        super().__init__(series, settings, folder, tuning)

    def ended(self, run: Run, history: History) -> bool:
        """Returns whether the validation error has not fallen for as long as is waited."""
        epochs = len(history["epochs"])
        patience = self.shared["patience"] * run[0].epoch_factor
        return epochs > 0 and epochs - best_epoch(history) >= patience

    def attends(self, spec: MethodSpec) -> bool:
        """Returns whether a row's network has its attention."""
        return spec.name != LINEAR

    def optimizer(self, spec: MethodSpec) -> optax.GradientTransformation:
        """Returns a row's optimizer."""
        return optimizer(spec, self.steps)

    def final(self, run: Run, state: State, history: History) -> dict[str, Any]:
        """Returns the record's own part, with a forecast and, where asked for, the flatness."""
        record = super().final(run, state, history)
        if self._tuning:
            return record
        spec, task = run[0], self.task(run[0])
        record["forecast"] = self._shown(task, state.best)
        if self.shared["flatness"]:
            record["flatness"] = flatness.measure(
                state.best,
                lambda params: self.test(spec, params)["mse"],
                lambda params, rows: task.loss(params, ((), rows))[0],
                self._sample(task),
            )
        return record

    def _shown(self, task: Task, params: Any) -> dict[str, Any]:
        """Returns the forecast of the test part's middle window, of evenly chosen channels."""
        start = int(self.windows.test[len(self.windows.test) // 2])
        look_back, horizon = self.shared["look_back"], self.shared["horizon"]
        rows = np.asarray(self.series)[:, start : start + look_back + horizon]
        found = np.asarray(task.forecast(params, rows[:, :look_back]))
        count = len(self.channels)
        chosen = np.unique(np.linspace(0, count - 1, min(SHOWN_CHANNELS, count)).astype(int))
        seen = rows[chosen, max(0, look_back - horizon) : look_back]
        return {
            "channels": [self.channels[channel] for channel in chosen],
            **{
                name: np.round(values.astype(float), 5).tolist()
                for name, values in (
                    ("seen", seen),
                    ("truth", rows[chosen, look_back:]),
                    ("forecast", found[chosen]),
                )
            },
        }

    def _sample(self, task: Task) -> list[jax.Array]:
        """Returns training windows, evenly spaced, in batches of the training's size."""
        places = np.linspace(0, len(self.windows.train) - 1, flatness.WINDOWS).astype(int)
        starts = self.windows.train[places].reshape(-1, flatness.BATCH)
        data = Batches(self.series, jax.numpy.asarray(starts))
        return [task.batch(data, index) for index in range(len(starts))]
