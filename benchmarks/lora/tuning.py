"""Searching a method's hyper-parameters with Optuna, on examples held out of the training pool."""

from benchmarks.core.methods import MethodSpec, parse_method
from benchmarks.core.runs import Progress, complete
from benchmarks.lora.experiment import FineTuning
from benchmarks.lora.methods import METHODS

HELD_OUT = 500
"""About how many examples of the pool the search evaluates on, and never trains on."""


def tune(name: str, comparison: FineTuning, trials: int) -> MethodSpec:
    """Searches the spans of a method's `search`, on a logarithmic scale.

    Trials are kept in `tuning.db` (SQLite) in the comparison's folder, and each one's run as a
    record: a search that was interrupted goes on where it was, one with enough trials only returns
    what it found.

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
    work = sum(comparison.parts((parse_method(name, METHODS), 0)))
    with Progress(trials * work, min(done, trials) * work, unit="part") as progress:
        # A seed of its own for each trial: with one seed for all, a search that is resumed would
        # draw its first trials again.
        for index in range(done, trials):
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=3, seed=index)
            trial = study.ask()
            drawn = {
                key: trial.suggest_float(key, low, high, log=True)
                for key, (low, high) in METHODS[name].search.items()
            }
            # Three digits are in the label, and so they are what runs.
            settings = (f"{key}={value:.3g}" for key, value in drawn.items())
            spec = parse_method(":".join([name, *settings]), METHODS)
            record = complete(comparison, (spec, 0), progress)
            trial.set_user_attr("method", spec.label)
            study.tell(trial, record["final"]["test_top1"])
    return parse_method(study.best_trial.user_attrs["method"], METHODS)
