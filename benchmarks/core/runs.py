"""The loop of all experiments: a run is read from its record, or restored, advanced and saved.

A run is what leaves one record: a method with a seed, a topic, a trained model that is measured. It
goes forward in parts, such as epochs. After each part the state and the history are saved, so that
a run which is killed at any moment ends with the numbers that it would have had.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import tqdm

from benchmarks.core import records
from benchmarks.core.checkpoints import Checkpoints
from benchmarks.core.distributed import Cluster

History = dict[str, Any]
Tick = Callable[[float], None]
"""Called with the share of a part that is done."""
R = TypeVar("R")


class Experiment(Generic[R]):
    """What an experiment tells the loop. `folder` is where its records and checkpoints go."""

    folder: Path
    cluster: Cluster | None = None
    packages: tuple[str, ...] = ()
    """Whose versions records state beside JAX's, Flax's and Optax's."""
    saves = True
    """Whether the state is saved after each part; a run of one part has no use for it."""

    def name(self, run: R) -> str:
        """Returns the name of the run's record, and what progress calls it."""
        raise NotImplementedError

    def config(self, run: R) -> dict[str, Any]:
        """Returns all that decides the run's numbers."""
        raise NotImplementedError

    def parts(self, run: R) -> Sequence[float]:
        """Returns the work of each part, in any unit that is the same for all runs."""
        return (1.0,)

    def start(self, run: R) -> tuple[Any, History]:
        """Returns the state and the history at the start."""
        return None, {}

    def resume(self, history: History) -> None:
        """Notes in the history that the run goes on from what it says."""

    def advance(self, run: R, part: int, state: Any, history: History, tick: Tick) -> Any:
        """Makes a part, notes in the history what came of it, and returns the new state."""
        raise NotImplementedError

    def ended(self, run: R, history: History) -> bool:
        """Returns whether the run ends before its last part."""
        return False

    def status(self, history: History) -> str:
        """Returns what progress says after a part."""
        return ""

    def final(self, run: R, state: Any, history: History) -> dict[str, Any]:
        """Returns what the record holds beside the configuration, versions and hardware."""
        return history

    def path(self, run: R) -> Path:
        """Returns the place of the run's record."""
        return self.folder / "runs" / f"{self.name(run).replace(':', '_')}.json"


class Progress(tqdm.tqdm):
    """A bar over all runs; where there is no terminal, a line after each part."""

    def __init__(self, total: float, done: float = 0.0, unit: str = "epoch"):
        """Draws the bar; as a context manager it is closed at the end."""
        self._at, self._plain = done, not sys.stderr.isatty()
        super().__init__(
            total=total,
            initial=done,
            unit=unit,
            file=io.StringIO() if self._plain else sys.stderr,
            smoothing=0,
            mininterval=0.5,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}",
        )

    def skip(self, work: float) -> None:
        """Counts work that was done earlier."""
        self.initial += work
        self.add(work)

    def add(self, work: float) -> None:
        """Counts work that is done."""
        self._at += work
        self.update(self._at - self.n)

    def tick(self, work: float) -> Tick:
        """Returns what shows the share of a part that is done, without counting it."""

        def show(share: float) -> None:
            self.update(self._at + share * work - self.n)

        return show

    def say(self, name: str, part: int, parts: int, status: str) -> None:
        """Shows which part of which run is done, and what came of it."""
        self.set_description_str(f"{name} {self.unit} {part}/{parts}", refresh=False)
        self.set_postfix_str(status)
        if self._plain and part:
            print(self, flush=True)


def complete_all(
    runs: Iterable[tuple[Experiment[R], R]], unit: str = "epoch"
) -> list[records.Record]:
    """Completes runs in the order given, and returns their records.

    Raises:
        ValueError: A folder holds one of the runs with another configuration.
    """
    listed = [(experiment, run, sum(experiment.parts(run))) for experiment, run in runs]
    done = sum(work for experiment, run, work in listed if _finished(experiment, run))
    with Progress(sum(work for *_, work in listed), done, unit) as progress:
        return [complete(experiment, run, progress) for experiment, run, _ in listed]


def complete(experiment: Experiment[R], run: R, progress: Progress) -> records.Record:
    """Returns a run's record: that of a finished one, else it is made, from its last checkpoint.

    Raises:
        ValueError: The folder holds this run with another configuration.
    """
    config = _config(experiment, run)
    finished = _finished(experiment, run)
    if experiment.cluster is not None:
        what = [config, finished is not None]
        experiment.cluster.check_agreement(what, "what is to be trained")
    return finished or _make(experiment, run, config, progress)


def _config(experiment: Experiment[R], run: R) -> dict[str, Any]:
    return json.loads(json.dumps(experiment.config(run)))  # as it is read again


def _finished(experiment: Experiment[R], run: R) -> records.Record | None:
    path = experiment.path(run)
    if not path.exists():
        return None
    record = records.read_record(path)
    records.check_config(record["config"], _config(experiment, run), path)
    return record


def _make(
    experiment: Experiment[R], run: R, config: dict[str, Any], progress: Progress
) -> records.Record:
    parts, name, path = experiment.parts(run), experiment.name(run), experiment.path(run)
    state, history = experiment.start(run)
    with contextlib.ExitStack() as stack:
        first, checkpoints = 0, None
        if experiment.saves:
            checkpoints = Checkpoints(experiment.folder / "checkpoints" / path.stem, config)
            stack.callback(checkpoints.close)
            restored = checkpoints.restore(state)
            if restored is not None:
                first, state, history = restored
                experiment.resume(history)
                progress.skip(sum(parts[:first]))
        if experiment.cluster is not None:
            experiment.cluster.check_agreement(first, "the last checkpoint")
        progress.say(name, first, len(parts), "")
        for part in range(first, len(parts)):
            if experiment.ended(run, history):
                progress.skip(sum(parts[part:]))
                break
            state = experiment.advance(run, part, state, history, progress.tick(parts[part]))
            if checkpoints is not None:
                checkpoints.save(part + 1, state, history)
            progress.add(parts[part])
            progress.say(name, part + 1, len(parts), experiment.status(history))
        record = {
            "format": records.FORMAT,
            "config": config,
            "versions": records.versions(*experiment.packages),
            "hardware": records.hardware(),
            **experiment.final(run, state, history),
        }
        if experiment.cluster is None or experiment.cluster.writes:
            records.write_record(path, record)
            if checkpoints is not None:
                checkpoints.delete()
    return records.read_record(path) if path.exists() else record
