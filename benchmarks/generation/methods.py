"""The optimizers that `benchmarks.generation` compares, around AdamW on the adapters alone."""

from __future__ import annotations

import functools

import optax

import samax
from benchmarks.core.adapters import split_rate
from benchmarks.core.methods import Method, MethodSpec, select

BASELINE = "adamw"
WEIGHT_DECAY = 0.01
WARM_UP = 0.05
GROUPS = functools.partial(samax.lora_groups, stacked=True)

_RATE = {"lr": 1e-3}
_BAR = "arXiv 2410.14802: 0.5, 1 or 2"
METHODS: dict[str, Method] = {
    BASELINE: select("sgd", _RATE, "chosen here"),
    "sam": select("sam", {**_RATE, "rho": 0.05}, "arXiv 2410.14802: 0.05, 0.1 or 0.2"),
    "nbar": select("nbar", {**_RATE, "alpha": 1.0}, _BAR),
    "obar": select("obar", {**_RATE, "alpha": 1.0}, _BAR),
    "das": select("das", {**_RATE, "alpha": 0.1}, "arXiv 2508.10435: 0.1 for TR-ResNet-32"),
    "stale_sam": select("stale_sam", {**_RATE, "rho": 0.05}, "SAM's rho"),
}


def optimizer(spec: MethodSpec, steps: int) -> optax.GradientTransformationExtraArgs:
    """Builds a row's optimizer: a linear rise of the learning rate, then a linear fall to 0.

    Raises:
        ValueError: A hyper-parameter has an unknown name or an invalid value.
    """
    rate, spec = split_rate(spec)
    rise = max(1, round(WARM_UP * steps))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, rate, rise),
            optax.linear_schedule(rate, 0.0, max(1, steps - rise)),
        ],
        [rise],
    )
    return spec.optimizer(
        optax.adamw(schedule, weight_decay=WEIGHT_DECAY),
        learning_rate=schedule,
        steps=steps,
        groups=GROUPS,
    )
