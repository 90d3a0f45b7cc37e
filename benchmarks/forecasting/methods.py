"""The optimizers that `benchmarks.forecasting` compares, and the settings that tuning found.

Rows named after a method have, where there is a file `tuned/DATA.json`, the settings that
`--tune` found there on the validation part; `adam_published` and `sam_published` are the published
recipe on all data.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import optax

from benchmarks.core import tunable
from benchmarks.core.methods import METHODS as CORE
from benchmarks.core.methods import Method, MethodSpec, select

LINEAR = "linear"
ADAM, ADAM_PUBLISHED = "adam", "adam_published"
BASELINES = (ADAM, ADAM_PUBLISHED, "adamw", LINEAR)
"""The rows without a perturbation, as hard tuned as the others."""

TUNED = Path(__file__).parent / "tuned"
LEARNING_RATE, DECAY, RHO = 1e-3, 10.0, 0.5
CYCLE = 5
"""Epochs after which the cosine of the learning rate starts again."""

_RATES = {"lr": (3e-4, 3e-3)}
_DECAYED = {**_RATES, "decay": (0.1, 30.0)}
_SAM = {**_RATES, "rho": (0.1, 2.0)}
_PAPER = "arXiv 2402.10198"
_COMMON = {"lr": LEARNING_RATE, "decay": 0.0}


def _row(name: str, **settings: float) -> Method:
    """A sharpness-aware row: rho as the paper's, its own settings as the core table's."""
    own = {key: value for key, value in CORE[name].defaults.items() if key != "rho"}
    return select(name, {**_COMMON, **own, "rho": RHO, **settings}, _PAPER, search=_SAM)


def _base(decay: float, source: str, search: dict[str, tuple[float, float]]) -> Method:
    return select("sgd", {**_COMMON, "decay": decay}, source, search=search)


METHODS: dict[str, Method] = {
    ADAM: _base(0.0, _PAPER, _RATES),
    ADAM_PUBLISHED: _base(0.0, _PAPER, {}),
    "adamw": _base(DECAY, "of .1, 1, 3, 10 and 30 on these kinds of data", _DECAYED),
    LINEAR: _base(0.0, "as Adam's", _DECAYED),
    "sam": _row("sam"),
    "sam_published": dataclasses.replace(_row("sam"), search={}),
    # SAM around AdamW.
    "samw": dataclasses.replace(_row("sam", decay=DECAY), search={**_DECAYED, **_SAM}),
    "usam": _row("usam", rho=1.0),
    "asam": _row("asam", rho=1.0),
    **{name: _row(name) for name in ("vasso", "wsam", "gsam", "samar")},
    **{name: _row(name) for name in ("friendly_sam", "stable_sam", "looksam", "sam_every")},
    # Until, or from, the end of the first cycle.
    "sam_early": _row("sam_early", share=1.0),
    "sam_late": _row("sam_late", share=1.0),
    "sam_quarter": dataclasses.replace(_row("sam"), gradients=1.25, ascent_share=0.25),
    "stale_sam": _row("stale_sam"),
    "msam": _row("msam"),
}


@functools.cache
def table(data: str) -> dict[str, Method]:
    """Returns the rows with the settings that were found for the data.

    A row that was not searched there, and whose rho means what SAM's does, has SAM's.
    """
    path = TUNED / f"{data}.json"
    found = json.loads(path.read_text(encoding="utf-8"))["methods"] if path.exists() else {}
    rows = dict(METHODS)
    for name, row in METHODS.items():
        chosen, source = found.get(name), f"tuned on the validation part of {data}"
        if chosen is None and row.search == _SAM and row.defaults["rho"] == RHO:
            chosen, source = found.get("sam"), f"SAM's, {source}"
        if chosen is not None:
            defaults = {**row.defaults, **chosen["hyperparameters"]}
            rows[name] = dataclasses.replace(row, defaults=defaults, source=source)
    return rows


def optimizer(spec: MethodSpec, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """Builds a row's optimizer: Adam with decoupled decay of all parameters, cosine restarts.

    Args:
        spec: The row.
        steps_per_epoch: Steps of an epoch.

    Raises:
        ValueError: A hyper-parameter has an unknown name or an invalid value.
    """
    cycle = CYCLE * spec.epoch_factor * steps_per_epoch
    cosine = optax.cosine_decay_schedule(1.0, cycle)

    def base(lr: Any, decay: Any) -> optax.GradientTransformation:
        return optax.adamw(lambda count: lr * cosine(count % cycle), weight_decay=decay)

    return tunable.optimizer(spec, base, cycle)
