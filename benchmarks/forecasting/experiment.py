"""Methods and seeds trained to forecast one data set: a part is an epoch."""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.core import records, tunable
from benchmarks.core.comparison import Comparison, Run
from benchmarks.core.methods import MethodSpec
from benchmarks.core.runs import History, Tick
from benchmarks.core.timing import compute_clock
from benchmarks.core.training import Trainer, TrainState
from benchmarks.data.series import Series, windows
from benchmarks.forecasting import flatness
from benchmarks.forecasting.methods import LINEAR, optimizer
from benchmarks.models.forecaster import Forecaster

if TYPE_CHECKING:
    from benchmarks.forecasting.__main__ import Configuration

EVALUATION_BATCH = 128
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
_ORDER_STREAM = 0x6F72_6465  # keeps the order of the windows apart from the initialization


class State(NamedTuple):
    """What a part changes: the training, and the parameters of the best epoch."""

    train: TrainState
    best: Any


class Batches(NamedTuple):
    """Where the windows of batches begin in a series, as a step finds them."""

    series: jax.Array  # of shape (channels, times)
    starts: jax.Array  # of shape (batches, batch size)


class Task:
    """A network on windows of one series, which are gathered on the device as they are needed."""

    def __init__(
        self, channels: int, look_back: int, horizon: int, *, attention: bool, revin: bool
    ):
        """Takes the shapes; the switches are those of `Forecaster`."""
        self._look_back, self._length = look_back, look_back + horizon
        self._build = functools.partial(
            Forecaster, channels, look_back, horizon, attention=attention, revin=revin
        )
        self.graph, _ = nnx.split(nnx.eval_shape(lambda: self._build(rngs=nnx.Rngs(0))))
        self._init = jax.jit(lambda key: nnx.state(self._build(rngs=nnx.Rngs(key))))
        self.errors = jax.jit(self._errors)
        self.forecast = jax.jit(self._forecast)

    def init(self, seed: int) -> tuple[nnx.State, tuple[()]]:
        """Returns fresh parameters; there is no other state."""
        return self._init(jax.random.key(seed)), ()

    def batch(self, data: Batches, index: Any) -> jax.Array:
        """Returns the windows of a step, of shape (batch size, channels, look-back + horizon)."""
        return self._gather(data.series, data.starts[index])

    def loss(
        self, params: nnx.State, inputs: Any
    ) -> tuple[jax.Array, tuple[tuple[()], dict[str, jax.Array]]]:
        """Returns the mean squared error on a batch of windows."""
        return jnp.mean(self._residuals(params, inputs[1]) ** 2), ((), {})

    def _gather(self, series: jax.Array, starts: jax.Array) -> jax.Array:
        def cut(start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(series, start, self._length, axis=1)

        return jax.vmap(cut)(starts)

    def _residuals(self, params: nnx.State, rows: jax.Array) -> jax.Array:
        found = nnx.merge(self.graph, params)(rows[..., : self._look_back])
        return found - rows[..., self._look_back :]

    def _forecast(self, params: nnx.State, look_back: jax.Array) -> jax.Array:
        return nnx.merge(self.graph, params)(look_back)

    def _errors(self, params: nnx.State, data: Batches) -> tuple[jax.Array, jax.Array]:
        """Returns the squared and the absolute error of each window, a batch after another."""

        def of_batch(starts: jax.Array) -> tuple[jax.Array, jax.Array]:
            residuals = self._residuals(params, self._gather(data.series, starts))
            return jnp.mean(residuals**2, (1, 2)), jnp.mean(jnp.abs(residuals), (1, 2))

        return jax.lax.map(of_batch, data.starts)

    def evaluate(self, params: nnx.State, series: jax.Array, starts: np.ndarray) -> dict[str, Any]:
        """Returns the mean squared and the mean absolute error over all windows."""
        size = min(EVALUATION_BATCH, len(starts))
        filled = np.resize(starts, (-(-len(starts) // size), size))
        errors = self.errors(params, Batches(series, jnp.asarray(filled)))
        flat = [np.asarray(each, np.float64).ravel()[: len(starts)] for each in errors]
        return {"mse": float(flat[0].mean()), "mae": float(flat[1].mean())}


class Forecasting(Comparison):
    """Runs methods and seeds on one series; programs are shared between seeds.

    The seed decides the initialization and the order of the windows, so that methods are compared
    in pairs.
    """

    entries = "epochs"

    def __init__(self, series: Series, arguments: Configuration, folder: Path, tuning: bool):
        """Puts the series on the device.

        Args:
            series: The data.
            arguments: The command's.
            folder: The results'.
            tuning: Whether runs are judged by the validation part, and the test part is not looked
                at.

        Raises:
            ValueError: The series is too short, or the folder holds records of another comparison.
        """
        self.folder, self._settings, self._tuning = folder, arguments, tuning
        values = series.standardized()
        self.shared = {
            "data": series.name,
            "data_crc32": zlib.crc32(np.ascontiguousarray(values).data),
            "channels": len(values),
            "ends": list(series.ends),
            **{name: getattr(arguments, name) for name in _DECIDED},
            "evaluated_on": "validation" if tuning else "test",
        }
        lengths = (self.shared[name] for name in ("look_back", "horizon", "stride"))
        self._windows = windows(series, *lengths)
        if len(self._windows.train) < arguments.batch_size:
            raise ValueError(
                f"--batch-size {arguments.batch_size} is more than the "
                f"{len(self._windows.train)} windows to train on."
            )
        self._channels = series.channels
        self._series = jnp.asarray(values)
        self._steps = len(self._windows.train) // arguments.batch_size
        records.check_folder(folder, self.shared)
        self.trainers = {}
        self._tasks: dict[bool, Task] = {}

    def config(self, run: Run) -> dict[str, Any]:
        """Returns all that decides a run's numbers."""
        return {**super().config(run), "epoch_factor": run[0].epoch_factor}

    def parts(self, run: Run) -> list[float]:
        """Returns the gradients of each epoch, of which most runs make a small part."""
        return [run[0].gradients] * (self.shared["epochs"] * run[0].epoch_factor)

    def start(self, run: Run) -> tuple[State, History]:
        """Returns a fresh network."""
        state = tunable.told(self.trainer(run[0]).init(run[1]), run[0])
        best = jax.tree.map(jnp.copy, state.params)
        return State(state, best), {"resumed_after_epochs": [], "epochs": []}

    def resume(self, history: History) -> None:
        """Notes after which epoch the run goes on."""
        history["resumed_after_epochs"].append(len(history["epochs"]))

    def advance(self, run: Run, part: int, state: State, history: History, tick: Tick) -> State:
        """Trains for an epoch and validates."""
        spec, seed = run
        trainer = self.trainer(spec)
        order = np.random.default_rng((seed, _ORDER_STREAM, part)).permutation(self._windows.train)
        order = order[: self._steps * self._settings.batch_size].reshape(self._steps, -1)
        data = Batches(self._series, jnp.asarray(order))
        trainer.compile(state.train, data, self._steps)
        start = compute_clock()
        train, metrics = trainer.train(state.train, data, self._steps)
        seconds = compute_clock() - start
        params = train.evaluated()
        found = self._task(spec).evaluate(params, self._series, self._windows.validation)
        means = {name: float(np.mean(values, dtype=float)) for name, values in metrics.items()}
        entry = {"epoch": part + 1, **means, **{f"validation_{k}": v for k, v in found.items()}}
        history["epochs"].append({**entry, "seconds": seconds})
        if best_epoch(history) < part + 1:
            return State(train, state.best)
        return State(train, jax.tree.map(jnp.copy, params))  # the next epoch takes the others

    def ended(self, run: Run, history: History) -> bool:
        """Returns whether the validation error has not fallen for as long as is waited."""
        epochs = len(history["epochs"])
        patience = self._settings.patience * run[0].epoch_factor
        return epochs > 0 and epochs - best_epoch(history) >= patience

    def status(self, history: History) -> str:
        """Returns the errors after the last epoch."""
        last = history["epochs"][-1]
        return f"train {last['train_loss']:.3f}, validation {last['validation_mse']:.4f}"

    def final(self, run: Run, state: State, history: History) -> dict[str, Any]:
        """Returns the record's own part: the errors of the best validation epoch."""
        spec, _ = run
        best, task = best_epoch(history), self._task(spec)
        epochs = history["epochs"]
        shares = [entry["ascended"] for entry in epochs if "ascended" in entry]
        found: dict[str, Any] = {
            "best_epoch": best,
            "epochs": len(epochs),
            "validation_mse": epochs[best - 1]["validation_mse"],
            "train_seconds": sum(entry["seconds"] for entry in epochs),
            "gradients": 1 + float(np.mean(shares)) if shares else spec.gradients,
        }
        more: dict[str, Any] = {}
        if not self._tuning:
            test = functools.partial(task.evaluate, series=self._series, starts=self._windows.test)
            errors = test(state.best)
            found |= {f"test_{name}": value for name, value in errors.items()}
            more["forecast"] = self._shown(task, state.best)
            if self._settings.flatness:
                more["flatness"] = flatness.measure(
                    state.best,
                    lambda params: test(params)["mse"],
                    lambda params, rows: task.loss(params, ((), rows))[0],
                    self._sample(task),
                )
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.best)),
            "steps_per_epoch": self._steps,
            "compile_seconds": self.trainer(spec).compile_seconds,
            **history,
            **more,
            "final": found,
        }

    def _shown(self, task: Task, params: nnx.State) -> dict[str, Any]:
        """Returns the forecast of the test part's middle window, of evenly chosen channels."""
        start = int(self._windows.test[len(self._windows.test) // 2])
        look_back, horizon = self.shared["look_back"], self.shared["horizon"]
        rows = np.asarray(self._series)[:, start : start + look_back + horizon]
        found = np.asarray(task.forecast(params, rows[:, :look_back]))
        count = len(self._channels)
        chosen = np.unique(np.linspace(0, count - 1, min(SHOWN_CHANNELS, count)).astype(int))
        seen = rows[chosen, max(0, look_back - horizon) : look_back]
        return {
            "channels": [self._channels[channel] for channel in chosen],
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
        places = np.linspace(0, len(self._windows.train) - 1, flatness.WINDOWS).astype(int)
        starts = self._windows.train[places].reshape(-1, flatness.BATCH)
        data = Batches(self._series, jnp.asarray(starts))
        return [task.batch(data, index) for index in range(len(starts))]

    def program(self, spec: MethodSpec) -> str:
        """Returns what rows share that differ in numbers which programs are told."""
        return tunable.program(spec)

    def _task(self, spec: MethodSpec) -> Task:
        attention = spec.name != LINEAR
        if attention not in self._tasks:
            self._tasks[attention] = Task(
                len(self._channels),
                self.shared["look_back"],
                self.shared["horizon"],
                attention=attention,
                revin=self.shared["revin"],
            )
        return self._tasks[attention]

    def make_trainer(self, spec: MethodSpec) -> Trainer:
        """Makes the method's trainer, whose epoch is one program: there are no convolutions."""
        task = self._task(spec)
        tx = optimizer(spec, self._steps)
        share = spec.method.ascent_share
        return Trainer(task.init, task.loss, tx, batch=task.batch, ascent_share=share, scan=True)


def best_epoch(history: History) -> int:
    """Returns the epoch, from 1, of the lowest validation error; one that is not finite is none."""
    found = [entry["validation_mse"] for entry in history["epochs"]]
    return int(np.argmin([value if np.isfinite(value) else np.inf for value in found])) + 1
