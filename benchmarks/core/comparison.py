"""Methods and seeds that are compared: what such experiments have in common."""

from typing import Any

from benchmarks.core.methods import MethodSpec
from benchmarks.core.runs import Experiment, History
from benchmarks.core.training import Trainer

Run = tuple[MethodSpec, int]
"""A method and a seed."""


class Comparison(Experiment[Run]):
    """A run is a method with a seed; trainers, and so programs, are shared between seeds."""

    entries: str
    """Where the history keeps what is measured after each part."""
    shared: dict[str, Any]
    """The part of the configuration that all runs have in common."""
    trainers: dict[str, Trainer]
    steps: int
    """Steps of an epoch."""

    def name(self, run: Run) -> str:
        """Returns the method and the seed."""
        return f"{run[0].label}_seed{run[1]}"

    def config(self, run: Run) -> dict[str, Any]:
        """Returns all that decides a run's numbers."""
        spec, seed = run
        own = {"method": spec.label, "hyperparameters": spec.hyperparameters, "seed": seed}
        return {**self.shared, **own}

    def epochs(self, spec: MethodSpec) -> int:
        """Returns how many epochs a method trains."""
        raise NotImplementedError

    def ascending(self, run: Run, part: int) -> list[bool] | None:
        """Returns which steps of an epoch ascend, where that is known beforehand."""
        spec, seed = run
        if spec.method.ascends is None:
            return None
        ascends = spec.method.ascends(spec.hyperparameters, self.epochs(spec) * self.steps, seed)
        return ascends.tolist()[part * self.steps : (part + 1) * self.steps]

    def status(self, history: History) -> str:
        """Returns the loss and the accuracies after the last part."""
        last = history[self.entries][-1]
        return (
            f"loss {last['train_loss']:.3f}, train {100 * last['train_top1']:.1f} %, "
            f"test {100 * last['test_top1']:.1f} %"
        )

    def trainer(self, spec: MethodSpec) -> Trainer:
        """Returns the method's trainer, which is made once for all of one program."""
        key = self.program(spec)
        if key not in self.trainers:
            self.trainers[key] = self.make_trainer(spec)
        return self.trainers[key]

    def program(self, spec: MethodSpec) -> str:
        """Returns what methods share that are trained by one program."""
        return spec.label

    def make_trainer(self, spec: MethodSpec) -> Trainer:
        """Makes the method's trainer."""
        raise NotImplementedError


class EpochComparison(Comparison):
    """A part is an epoch, of which a method trains a multiple."""

    entries = "epochs"

    def config(self, run: Run) -> dict[str, Any]:
        """Returns all that decides a run's numbers."""
        return {**super().config(run), "epoch_factor": run[0].epoch_factor}

    def epochs(self, spec: MethodSpec) -> int:
        """Returns how many epochs a method trains, unless its run ends early."""
        return self.shared["epochs"] * spec.epoch_factor

    def parts(self, run: Run) -> list[float]:
        """Returns the gradients of each epoch."""
        return [run[0].gradients] * self.epochs(run[0])

    def resume(self, history: History) -> None:
        """Notes after which epoch the run goes on."""
        history["resumed_after_epochs"].append(len(history["epochs"]))
