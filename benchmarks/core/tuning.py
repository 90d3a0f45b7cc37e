"""Searching a method's hyper-parameters with Optuna, on whatever its runs' records say."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.core.comparison import Comparison
from benchmarks.core.methods import MethodSpec, Table, parse_method
from benchmarks.core.records import Record, read_records
from benchmarks.core.runs import Progress, complete

SEED = 1000
"""The default seed of every trial, which no comparison reports."""


def tune(
    name: str,
    comparison: Comparison,
    trials: int,
    table: Table,
    *,
    error: Callable[[Record], float | None],
    starts: Sequence[Mapping[str, float]] = (),
    seed: int = SEED,
    unit: str = "epoch",
) -> MethodSpec:
    """Searches the spans of a method's `search`, on a logarithmic scale, for the lowest error.

    Trials are kept in `tuning.db` (SQLite) in the comparison's folder, and each one's run as a
    record: a search that was interrupted goes on where it was, one with enough trials only returns
    what it found. Without the database the records say what was tried.

    Args:
        name: The method's, in the table.
        comparison: Makes the runs.
        trials: How many settings are tried.
        table: The methods.
        error: Reads from a record what is to be low; None, of a run that diverged, is the highest.
        starts: The settings of the first trials, the same for every method that has them; the
            others are drawn.
        seed: That of every trial's run.
        unit: What a part of a run is called.

    Returns:
        The settings of the lowest error; of several the first found.
    """
    import optuna
    from optuna.distributions import FloatDistribution

    study = _study(comparison.folder, name)
    spans = {
        key: FloatDistribution(low, high, log=True)
        for key, (low, high) in table[name].search.items()
    }
    if not study.get_trials():
        for record in read_records(comparison.folder).values():
            spec = parse_method(record["config"]["method"], table)
            if (spec.name, record["config"]["seed"]) == (name, seed):
                study.add_trial(_tried(spec, spans, error(record)))
    done = len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
    work = sum(comparison.parts((parse_method(name, table), seed)))
    with Progress(trials * work, min(done, trials) * work, unit) as progress:
        # A seed of its own for each trial: with one seed for all, a search that is resumed would
        # draw its first trials again.
        for index in range(done, trials):
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=3, seed=index)
            if index < len(starts):
                study.enqueue_trial({key: starts[index][key] for key in spans})
            trial = study.ask({**spans})
            # Three digits are in the label, and so they are what runs.
            settings = (f"{key}={value:.3g}" for key, value in trial.params.items())
            spec = parse_method(":".join([name, *settings]), table)
            found = error(complete(comparison, (spec, seed), progress))
            trial.set_user_attr("method", spec.label)
            study.tell(trial, _or_highest(found))
    return parse_method(study.best_trial.user_attrs["method"], table)


def _tried(spec: MethodSpec, spans: Mapping[str, Any], error: float | None) -> Any:
    """Returns a recorded run as a trial, whose settings have the three digits that ran."""
    from optuna.trial import create_trial

    settings = {
        key: min(max(spec.hyperparameters[key], span.low), span.high) for key, span in spans.items()
    }
    return create_trial(
        params=settings,
        distributions=dict(spans),
        value=_or_highest(error),
        user_attrs={"method": spec.label},
    )


def _or_highest(error: float | None) -> float:
    return float("inf") if error is None else error


def found(folder: Path, table: Table) -> dict[str, Any]:
    """Returns what the searches in a folder found, by method: the settings and all trials."""
    import optuna

    names = optuna.get_all_study_names(_storage(folder))
    complete_only = [optuna.trial.TrialState.COMPLETE]
    studies = {name: _study(folder, name) for name in table if name in names}
    # One that was stopped before its first trial's end has found nothing.
    studies = {
        name: study for name, study in studies.items() if study.get_trials(states=complete_only)
    }
    return {
        name: {
            "hyperparameters": {
                key: parse_method(study.best_trial.user_attrs["method"], table).hyperparameters[key]
                for key in table[name].search
            },
            "error": study.best_value,
            "trials": {
                trial.user_attrs["method"]: trial.value
                for trial in study.get_trials(states=complete_only)
            },
        }
        for name, study in studies.items()
    }


def _study(folder: Path, name: str) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    return optuna.create_study(
        study_name=name, storage=_storage(folder), direction="minimize", load_if_exists=True
    )


def _storage(folder: Path) -> str:
    return f"sqlite:///{folder / 'tuning.db'}"
