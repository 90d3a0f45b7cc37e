"""Searching a method's hyper-parameters with Optuna, on examples held out of the training pool."""

from __future__ import annotations

from typing import Any

from benchmarks.core.methods import MethodSpec
from benchmarks.core.progress import Progress
from benchmarks.lora.experiment import Comparison
from benchmarks.lora.methods import METHODS, parse

HELD_OUT = 500
"""About how many examples of the pool the search evaluates on, and never trains on."""


def tune(name: str, comparison: Comparison, trials: int, progress: Progress) -> MethodSpec:
    """Searches the spans of a method's `search`, on a logarithmic scale.

    Trials are kept in `tuning.db` (SQLite) in the comparison's folder, and each one's run as a
    record: a search that was interrupted goes on where it was, one with enough trials only returns
    what it found.

    Args:
        name: A key of `METHODS`.
        comparison: Runs the trials, with seed 0, on the held-out examples.
        trials: How many to have in all.
        progress: Shows the runs.

    Returns:
        The settings of the highest accuracy; of several the first found.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    comparison.folder.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{comparison.folder / 'tuning.db'}"
    study = optuna.create_study(
        study_name=name, storage=storage, direction="maximize", load_if_exists=True
    )
    done = len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
    # A seed of its own for each trial: with one seed for all, a search that is resumed would
    # draw its first trials again.
    for index in range(done, trials):
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=3, seed=index)
        trial = study.ask()
        spec = _spec(name, trial)
        accuracy = comparison.run(spec, 0, progress)["final"]["test_top1"]
        trial.set_user_attr("method", spec.label)
        study.tell(trial, accuracy)
    return parse(study.best_trial.user_attrs["method"])


def _spec(name: str, trial: Any) -> MethodSpec:
    drawn = {
        key: trial.suggest_float(key, low, high, log=True)
        for key, (low, high) in METHODS[name].search.items()
    }
    # Three digits are in the label, and so they are what runs.
    return parse(":".join([name, *(f"{key}={value:.3g}" for key, value in drawn.items())]))
