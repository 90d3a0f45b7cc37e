"""Progress of a series of runs: a rich bar in a terminal, one plain line an epoch elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Iterator
from typing import Any

try:
    import rich.progress
except ImportError:  # an extra: plain lines do without it
    rich = None  # type: ignore[assignment]


class Progress:
    """Shows the run, its epoch, loss and accuracies, and the remaining time of all runs."""

    def __init__(self, work: float, bar: Any = None, unit: str = "epoch"):
        """Starts the clock.

        Args:
            work: All runs' work, in any unit (here: gradient evaluations).
            bar: A `rich.progress.Progress` to draw on, or None to print lines.
            unit: What the parts of a run are called.
        """
        self._work, self._unit = work, unit
        self._done = 0.0
        self._skipped = 0.0
        self._start = time.perf_counter()
        self._label, self._epoch, self._epochs, self._epoch_work = "", 0, 0, 0.0
        self._status = ""
        self._bar = bar
        self._task = None if bar is None else bar.add_task("", total=work, status="")

    def start(self, label: str, epochs: int, epoch_work: float, first_epoch: int = 0) -> None:
        """Begins a run, of which `first_epoch` epochs were done before."""
        self._label, self._epochs, self._epoch_work = label, epochs, epoch_work
        self._epoch = first_epoch
        self.skip(first_epoch * epoch_work)
        self._status = ""
        self._draw(0.0)

    def skip(self, work: float) -> None:
        """Counts work that was done earlier and says nothing about the speed now."""
        self._done += work
        self._skipped += work

    def step(self, done: int, steps: int) -> None:
        """Shows that `done` of an epoch's `steps` are done."""
        self._draw(done / steps)

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Ends an epoch, of which `metrics` are shown."""
        self.part(
            f"loss {metrics['train_loss']:.3f}  train {100 * metrics['train_top1']:.1f} %  "
            f"test {100 * metrics['test_top1']:.1f} %",
            self._epoch_work,
        )

    def part(self, status: str, work: float) -> None:
        """Ends a part of a run, which was this much work."""
        self._epoch += 1
        self._done += work
        self._status = status
        if self._bar is None:
            print(
                f"{self._label}  {self._unit} {self._epoch}/{self._epochs}  {self._status}  "
                f"remaining {self._remaining()}",
                flush=True,
            )
        self._draw(0.0)

    def _remaining(self) -> str:
        here = self._done - self._skipped
        if not here:
            return "unknown"
        seconds = (time.perf_counter() - self._start) * (self._work - self._done) / here
        return str(datetime.timedelta(seconds=round(seconds)))

    def _draw(self, fraction: float) -> None:
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=self._done + fraction * self._epoch_work,
                description=f"{self._label}  {self._unit} {self._epoch}/{self._epochs}",
                status=f"{self._status}  remaining {self._remaining()}",
            )


@contextlib.contextmanager
def show_progress(work: float, unit: str = "epoch") -> Iterator[Progress]:
    """Yields a `Progress` on a rich bar if there is a terminal and rich is installed."""
    if rich is None or not sys.stdout.isatty():
        yield Progress(work, unit=unit)
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[status]}"),
    )
    # Twice a second: drawing counts as this process's CPU time.
    with rich.progress.Progress(*columns, refresh_per_second=2) as bar:
        yield Progress(work, bar, unit)
