"""The optimizers that `benchmarks.lora` compares: the papers' settings and spans."""

import dataclasses
import functools

import optax

import samax
from benchmarks.core.methods import Method, MethodSpec, select
from benchmarks.models.lora import FULL, is_adapter

PAPER_STEPS = 1000
"""Iterations in the papers, over which alpha decays from alpha_0 to 0."""

WEIGHT_DECAY = 0.01
PROBE = "probe"
BASELINE = "adamw"

_BAR = "arXiv 2410.14802: 0.5, 1 or 2"
_RATES = {"lr": (1e-4, 5e-4)}
_ALPHAS = {**_RATES, "alpha": (0.5, 2.0)}
_RADII = {**_RATES, "rho": (0.05, 0.2)}
_FULL_RATES = {"lr": (1e-5, 2e-4)}
METHODS: dict[str, Method] = {
    PROBE: Method(optax.identity, {}, "logistic regression on the frozen features", gradients=0),
    BASELINE: select("sgd", {"lr": 5e-4}, "arXiv 2410.14802: 1e-4, 3e-4, 5e-4", search=_RATES),
    # Its cores are perturbed, the classifier is not.
    "sam": select(
        "sam",
        {"lr": 5e-4, "rho": 0.05},
        "arXiv 2410.14802: rho 0.05, 0.1 or 0.2",
        factory=functools.partial(samax.sam, mask=is_adapter),
        search=_RADII,
    ),
    "nbar": select("nbar", {"lr": 5e-4, "alpha": 1.0}, _BAR, search=_ALPHAS),
    "obar": select("obar", {"lr": 5e-4, "alpha": 1.0}, _BAR, search=_ALPHAS),
    "das": select(
        "das",
        {"lr": 5e-4, "alpha": 0.1},
        "arXiv 2508.10435: 0.1 for TR-ResNet-32",
        search={**_RATES, "alpha": (0.01, 0.5)},
    ),
    # As SAM's, at one gradient; and with the first of a quarter of the batch.
    "stale_sam": select(
        "stale_sam",
        {"lr": 5e-4, "rho": 0.05},
        "SAM's",
        factory=functools.partial(samax.stale_sam, mask=is_adapter),
        search=_RADII,
    ),
    "sam_quarter": select(
        "sam",
        {"lr": 5e-4, "rho": 0.05},
        "SAM's",
        factory=functools.partial(samax.sam, mask=is_adapter),
        gradients=1.25,
        ascent_share=0.25,
        search=_RADII,
    ),
}


def table(adapter: str) -> dict[str, Method]:
    """Returns the rows; of full fine-tuning those that need no adapters, at lower rates."""
    if adapter != FULL:
        return METHODS
    # The factory's mask is of adapters: everything is perturbed here.
    rows = {name: METHODS[name] for name in (PROBE, BASELINE)}
    for name in (BASELINE, "sam"):
        row = METHODS[name]
        search = {**row.search, **_FULL_RATES}
        rows[name] = dataclasses.replace(
            row, defaults={**row.defaults, "lr": 5e-5}, source="chosen here", search=search
        )
    return {**rows, "sam": dataclasses.replace(rows["sam"], factory=samax.sam)}


def optimizer(spec: MethodSpec, steps: int) -> optax.GradientTransformationExtraArgs:
    """Builds a row's optimizer: a constant learning rate, and alpha that decays linearly to 0.

    alpha_0 is that of the papers' 1000 iterations. In fewer it is multiplied by 1000 / steps, so
    that the sum of alpha_t eta_t, by which the cores grow and shrink, is that of 1000 iterations.

    Raises:
        ValueError: A hyper-parameter has an unknown name or an invalid value.
    """
    settings = dict(spec.hyperparameters)
    rate = settings.pop("lr") if spec.method.defaults else 0.0  # the probe has none
    if spec.method.defaults and not rate > 0:
        raise ValueError(f"Method {spec.label!r} cannot be built: lr must be above 0, got {rate}.")
    return dataclasses.replace(spec, hyperparameters=settings).optimizer(
        optax.adamw(rate, weight_decay=WEIGHT_DECAY),
        learning_rate=rate,
        steps=steps,
        groups=samax.lora_groups,
        alpha_scale=PAPER_STEPS / steps,
    )
