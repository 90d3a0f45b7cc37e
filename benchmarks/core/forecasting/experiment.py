"""Methods and seeds that learn to forecast one series: a part is an epoch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.core import records, tunable
from benchmarks.core.comparison import EpochComparison, Run
from benchmarks.core.forecasting.task import Batches, Task
from benchmarks.core.methods import MethodSpec
from benchmarks.core.runs import History, Tick
from benchmarks.core.timing import compute_clock
from benchmarks.core.training import Trainer, TrainState
from benchmarks.data.series import Series, windows

_ORDER_STREAM = 0x6F72_6465  # keeps the order of the windows apart from the initialization


class State(NamedTuple):
    """What a part changes: the training, and the parameters of the best epoch."""

    train: TrainState
    best: Any


class SeriesComparison(EpochComparison):
    """Methods and seeds on one series; programs are shared between seeds.

    The seed decides the initialization and the order of the windows, so that methods are compared
    in pairs.
    """

    def __init__(self, series: Series, settings: Mapping[str, Any], folder: Path, tuning: bool):
        """Puts the series on the device.

        Args:
            series: The data.
            settings: What all runs have in common, with `look_back`, `horizon`, `stride`,
                `batch_size` and `revin` among it.
            folder: The results'.
            tuning: Whether runs are judged by the validation part, and the test part is not looked
                at.

        Raises:
            ValueError: The series is too short, or the folder holds records of another comparison.
        """
        self.folder, self._tuning = folder, tuning
        values = series.standardized()
        self.shared = {
            "data": series.name,
            "data_crc32": zlib.crc32(np.ascontiguousarray(values).data),
            "channels": len(values),
            "ends": list(series.ends),
            **settings,
            "evaluated_on": "validation" if tuning else "test",
        }
        lengths = (self.shared[name] for name in ("look_back", "horizon", "stride"))
        self.windows = windows(series, *lengths)
        if len(self.windows.train) < settings["batch_size"]:
            raise ValueError(
                f"--batch-size {settings['batch_size']} is more than the "
                f"{len(self.windows.train)} windows to train on."
            )
        self.channels, self.series = series.channels, jnp.asarray(values)
        self.steps = len(self.windows.train) // settings["batch_size"]
        records.check_folder(folder, self.shared)
        self.trainers = {}
        self._tasks: dict[bool, Task] = {}

    def start(self, run: Run) -> tuple[State, History]:
        """Returns a fresh network."""
        state = tunable.told(self.trainer(run[0]).init(run[1]), run[0])
        best = jax.tree.map(jnp.copy, state.params)
        return State(state, best), {"resumed_after_epochs": [], "epochs": []}

    def advance(self, run: Run, part: int, state: State, history: History, tick: Tick) -> State:
        """Trains for an epoch and validates."""
        spec, seed = run
        trainer = self.trainer(spec)
        order = np.random.default_rng((seed, _ORDER_STREAM, part)).permutation(self.windows.train)
        order = order[: self.steps * self.shared["batch_size"]].reshape(self.steps, -1)
        data = Batches(self.series, jnp.asarray(order))
        ascend = self.ascending(run, part)
        trainer.compile(state.train, data, self.steps, ascend)
        start = compute_clock()
        train, metrics = trainer.train(state.train, data, self.steps, tick, ascend)
        seconds = compute_clock() - start
        params = train.evaluated()
        found = self.task(spec).evaluate(params, self.series, self.windows.validation)
        means = {name: float(np.mean(values, dtype=float)) for name, values in metrics.items()}
        entry = {"epoch": part + 1, **means, **{f"validation_{k}": v for k, v in found.items()}}
        history["epochs"].append({**entry, "seconds": seconds})
        if best_epoch(history) < part + 1:
            return State(train, state.best)
        return State(train, jax.tree.map(jnp.copy, params))  # the next epoch takes the others

    def status(self, history: History) -> str:
        """Returns the errors after the last epoch."""
        last = history["epochs"][-1]
        return f"train {last['train_loss']:.3f}, validation {last['validation_mse']:.4f}"

    def final(self, run: Run, state: State, history: History) -> dict[str, Any]:
        """Returns the record's own part: the errors of the best validation epoch."""
        spec, _ = run
        best, epochs = best_epoch(history), history["epochs"]
        shares = [entry["ascended"] for entry in epochs if "ascended" in entry]
        ascents = float(np.mean(shares)) * spec.method.ascent_share if shares else None
        found: dict[str, Any] = {
            "best_epoch": best,
            "epochs": len(epochs),
            "validation_mse": epochs[best - 1]["validation_mse"],
            "train_seconds": sum(entry["seconds"] for entry in epochs),
            "gradients": spec.gradients if ascents is None else 1 + ascents,
        }
        if not self._tuning:
            errors = self.test(spec, state.best)
            found |= {f"test_{name}": value for name, value in errors.items()}
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.best)),
            "steps_per_epoch": self.steps,
            "compile_seconds": self.trainer(spec).compile_seconds,
            **history,
            "final": found,
        }

    def test(self, spec: MethodSpec, params: Any) -> dict[str, Any]:
        """Returns the errors of parameters on the test part."""
        return self.task(spec).evaluate(params, self.series, self.windows.test)

    def program(self, spec: MethodSpec) -> str:
        """Returns what rows share that differ in numbers which programs are told."""
        return tunable.program(spec)

    def attends(self, spec: MethodSpec) -> bool:
        """Returns whether a row's network has its attention; without, it is linear."""
        return True

    def task(self, spec: MethodSpec) -> Task:
        """Returns what a row learns."""
        attention = self.attends(spec)
        if attention not in self._tasks:
            sizes = len(self.channels), self.shared["look_back"], self.shared["horizon"]
            self._tasks[attention] = Task(*sizes, attention=attention, revin=self.shared["revin"])
        return self._tasks[attention]

    def optimizer(self, spec: MethodSpec) -> optax.GradientTransformation:
        """Returns a row's optimizer."""
        raise NotImplementedError

    def make_trainer(self, spec: MethodSpec, scan: bool = True) -> Trainer:
        """Makes the method's trainer, whose epoch is one program: there are no convolutions."""
        task, share = self.task(spec), spec.method.ascent_share
        options: dict[str, Any] = {"batch": task.batch, "ascent_share": share, "scan": scan}
        return Trainer(task.init, task.loss, self.optimizer(spec), **options)


def best_epoch(history: History) -> int:
    """Returns the epoch, from 1, of the lowest validation error; one that is not finite is none."""
    found = [entry["validation_mse"] for entry in history["epochs"]]
    return int(np.argmin([value if np.isfinite(value) else np.inf for value in found])) + 1
