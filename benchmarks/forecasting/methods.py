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

import jax
import optax

from benchmarks.core.methods import METHODS as CORE
from benchmarks.core.methods import Method, MethodSpec, select

LINEAR = "linear"
BASELINES = ("adam", "adamw", LINEAR)
"""The rows without a perturbation, as hard tuned as the others."""
ADAM = "adam"

TUNED = Path(__file__).parent / "tuned"
LEARNING_RATE, DECAY, RHO = 1e-3, 3.0, 0.5
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
    "adam_published": _base(0.0, _PAPER, {}),
    "adamw": _base(DECAY, "the middle of the span", _DECAYED),
    LINEAR: _base(0.0, "as Adam's", _DECAYED),
    "sam": _row("sam"),
    "sam_published": dataclasses.replace(_row("sam"), search={}),
    # SAM around AdamW.
    "samw": dataclasses.replace(_row("sam", decay=DECAY), search={**_DECAYED, **_SAM}),
    "usam": _row("usam", rho=1.0),
    "asam": _row("asam", rho=1.0),
    **{name: _row(name) for name in ("vasso", "wsam", "gsam", "samar")},
    **{name: _row(name) for name in ("friendly_sam", "stable_sam", "looksam", "sam_every")},
    # Until, or from, the fifth of at most a hundred epochs: most runs end before the thirtieth.
    "sam_early": _row("sam_early", share=0.05),
    "sam_late": _row("sam_late", share=0.05),
    "sam_quarter": dataclasses.replace(_row("sam"), gradients=1.25, ascent_share=0.25),
    "stale_sam": _row("stale_sam"),
    "msam": _row("msam"),
}


@functools.cache
def table(data: str) -> dict[str, Method]:
    """Returns the rows with the settings that were found for the data."""
    path = TUNED / f"{data}.json"
    found = json.loads(path.read_text(encoding="utf-8"))["methods"] if path.exists() else {}
    rows = dict(METHODS)
    for name, chosen in found.items():
        defaults = {**rows[name].defaults, **chosen["hyperparameters"]}
        source = f"tuned on the validation part of {data}"
        rows[name] = dataclasses.replace(rows[name], defaults=defaults, source=source)
    return rows


def optimizer(
    spec: MethodSpec, steps_per_epoch: int, epochs: int
) -> optax.GradientTransformationExtraArgs:
    """Builds a row's optimizer: Adam with decoupled decay of the matrices, cosine restarts.

    Args:
        spec: The row.
        steps_per_epoch: Steps of an epoch.
        epochs: The most epochs of a training.

    Raises:
        ValueError: A hyper-parameter has an unknown name or an invalid value.
    """
    settings: dict[str, Any] = dict(spec.hyperparameters)
    rate, decay = settings.pop("lr"), settings.pop("decay")
    for name, value, valid in (("lr", rate, rate > 0), ("decay", decay, decay >= 0)):
        if not valid:
            bound = "above 0" if name == "lr" else "at least 0"
            raise ValueError(
                f"Method {spec.label!r} cannot be built: {name} must be {bound}, got {value}."
            )
    cycle = CYCLE * spec.epoch_factor * steps_per_epoch
    cosine = optax.cosine_decay_schedule(rate, cycle)
    schedule = lambda count: cosine(count % cycle)  # noqa: E731
    base = optax.adamw(schedule, weight_decay=decay, mask=_matrices)
    own = dataclasses.replace(spec, hyperparameters=settings)
    return own.optimizer(base, steps=steps_per_epoch * epochs * spec.epoch_factor)


def _matrices(params: Any) -> Any:
    """A mask of the layers' matrices: biases and the normalization's affine map are not decayed."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
