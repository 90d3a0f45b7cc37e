"""The measuring of trained models: a run is a model, a part is a measure."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import data
from benchmarks.core import records
from benchmarks.core.classification.task import Classification
from benchmarks.core.classification.trained import images_of, restored, training_labels
from benchmarks.core.runs import Experiment, History, Tick
from benchmarks.sharpness.measures import Budget, Model, measure

_KEY_SEED = 0  # one for all models, which are so compared on the same random vectors


class Measurement(Experiment[Path]):
    """The models of a results' folder of `benchmarks.cifar`, each named by its record's path."""

    saves = False

    def __init__(self, trained: Path, dataset: data.Dataset, budget: Budget):
        """Reads the records and takes the images that the models were trained on.

        Raises:
            FileNotFoundError: There are no records.
            ValueError: The records are of different comparisons, or of other images.
        """
        self.folder, self.budget = trained / "sharpness", budget
        self.models = records.read_records(trained)
        self._costs = budget.gradients()
        self._dataset = images_of(trained, dataset)

    def name(self, run: Path) -> str:
        """Returns the name of the model's own record."""
        return run.stem

    def config(self, run: Path) -> dict[str, Any]:
        """Returns the training's configuration and the budget."""
        trained = self.models[run]["config"]
        return {**trained, **self.budget._asdict(), "key_seed": _KEY_SEED}

    def parts(self, run: Path) -> list[float]:
        """Returns the gradients of each measure."""
        return list(self._costs.values())

    def start(self, run: Path) -> tuple[Iterator[tuple[str, Any]], History]:
        """Loads the model; the state is the iterator over its measures."""
        model = self._load(run)
        history = {
            "parameters": self.models[run]["parameters"],
            "examples": sum(len(labels) for _, labels in model.batches),
            "gradients": self._costs,
            "final": self.models[run]["final"],
            "measures": {},
        }
        return measure(model, self.budget, jax.random.key(_KEY_SEED)), history

    def advance(self, run: Path, part: int, state: Any, history: History, tick: Tick) -> Any:
        """Makes the next measure."""
        name, value = next(state)
        history["measures"][name] = value
        return state

    def status(self, history: History) -> str:
        """Returns the last measure's name."""
        return list(history["measures"])[-1]

    def _load(self, path: Path) -> Model:
        """The trained model, and examples in whole batches with the labels it was trained with."""
        config, dataset = self.models[path]["config"], self._dataset
        task = Classification.of(config, dataset)
        state = restored(path, config, task)
        labels = training_labels(dataset, config, config["seed"])
        order = np.random.default_rng(0).permutation(len(labels))[: self.budget.examples]
        size = min(config["batch_size"], len(order))
        starts = range(0, len(order) - size + 1, size)
        chosen = [order[start : start + size] for start in starts]
        batches = [(jnp.asarray(dataset.train_images[i]), jnp.asarray(labels[i])) for i in chosen]
        return Model(task.loss_in_evaluation(state.model_state), state.params, batches)
