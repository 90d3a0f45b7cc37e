"""The search of `--tune`: learning rate, weight decay and rho, by the validation error alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.core import frames, tuning
from benchmarks.core.methods import MethodSpec
from benchmarks.forecasting.experiment import Forecasting
from benchmarks.forecasting.methods import DECAY, LEARNING_RATE, METHODS, RHO

START = {"lr": LEARNING_RATE, "decay": DECAY, "rho": RHO}


def tune(spec: MethodSpec, search: Forecasting, trials: int) -> MethodSpec:
    """Returns the settings of the lowest validation error; a row without a span stays as it is."""
    if not spec.method.search:
        return spec
    error = lambda record: record["final"]["validation_mse"]  # noqa: E731
    found = tuning.tune(spec.name, search, trials, METHODS, error=error, starts=(START,))
    chosen = {key: found.hyperparameters[key] for key in spec.method.search}
    return dataclasses.replace(spec, hyperparameters={**spec.hyperparameters, **chosen})


def write(search: Forecasting) -> Path:
    """Writes `DATA.json` to the search's folder: what was found, as `tuned/` here has it."""
    name = f"{search.shared['data']}.json"
    content = {**search.shared, "methods": tuning.found(search.folder, METHODS)}
    frames.write(search.folder, {name: content})
    return search.folder / name
