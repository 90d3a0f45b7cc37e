"""The optimizers that `benchmarks.lora` compares: the papers' settings and spans."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import optax

import samax
from benchmarks.core import tunable
from benchmarks.core.adapters import split_rate
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


def _perturbing(name: str, source: str, **changes: Any) -> Method:
    """A row that perturbs the adapters' cores, and not the classifier."""
    factory = functools.partial(getattr(samax, name), mask=is_adapter)
    defaults = {"lr": 5e-4, "rho": 0.05}
    return select(name, defaults, source, factory=factory, search=_RADII, **changes)


METHODS: dict[str, Method] = {
    PROBE: Method(optax.identity, {}, "logistic regression on the frozen features", gradients=0),
    BASELINE: select("sgd", {"lr": 5e-4}, "arXiv 2410.14802: 1e-4, 3e-4, 5e-4", search=_RATES),
    "sam": _perturbing("sam", "arXiv 2410.14802: rho 0.05, 0.1 or 0.2"),
    "nbar": select("nbar", {"lr": 5e-4, "alpha": 1.0}, _BAR, search=_ALPHAS),
    "obar": select("obar", {"lr": 5e-4, "alpha": 1.0}, _BAR, search=_ALPHAS),
    "das": select(
        "das",
        {"lr": 5e-4, "alpha": 0.1},
        "arXiv 2508.10435: 0.1 for TR-ResNet-32",
        search={**_RATES, "alpha": (0.01, 0.5)},
    ),
    # As SAM's, at one gradient; and with the first of a quarter of the batch.
    "stale_sam": _perturbing("stale_sam", "SAM's"),
    "sam_quarter": _perturbing("sam", "SAM's", gradients=1.25, ascent_share=0.25),
}


def table(adapter: str) -> dict[str, Method]:
    """Returns the rows; of full fine-tuning those that need no adapters, at lower rates."""
    if adapter != FULL:
        return METHODS

    def full(name: str, **changes: Any) -> Method:
        row = METHODS[name]
        defaults, search = {**row.defaults, "lr": 5e-5}, {**row.search, **_FULL_RATES}
        changes = {"defaults": defaults, "source": "chosen here", "search": search, **changes}
        return dataclasses.replace(row, **changes)

    # Everything is perturbed: the mask is of adapters.
    own = {BASELINE: full(BASELINE), "sam": full("sam", factory=samax.sam)}
    return {PROBE: METHODS[PROBE], **own}


def searched(rows: Mapping[str, Method], steps: int) -> dict[str, Method]:
    """Returns the rows with the spans that are searched for so many iterations.

    The papers' are of 1000. AdamW moves a weight by about the rate: to come as far in fewer, rates
    are multiplied by 1000 / steps. Alpha is divided by it, so that the sum of alpha_t eta_t stays.
    """
    factors = {"lr": PAPER_STEPS / steps, "alpha": steps / PAPER_STEPS}

    def scaled(row: Method) -> Method:
        spans = {
            key: (factors.get(key, 1.0) * low, factors.get(key, 1.0) * high)
            for key, (low, high) in row.search.items()
        }
        return dataclasses.replace(row, search=spans)

    return {name: scaled(row) for name, row in rows.items()}


def optimizer(spec: MethodSpec, steps: int) -> optax.GradientTransformationExtraArgs:
    """Builds a row's optimizer: a constant learning rate, and alpha that decays linearly to 0.

    It is told its hyper-parameters when it runs, so that a search compiles one program.

    alpha_0 is that of the papers' 1000 iterations. In fewer it is multiplied by 1000 / steps, so
    that the sum of alpha_t eta_t, by which the cores grow and shrink, is that of 1000 iterations.

    Raises:
        ValueError: A hyper-parameter has an unknown name or an invalid value.
    """
    if not spec.method.defaults:  # the probe, which trains nothing
        return spec.optimizer(optax.identity())
    rate, spec = split_rate(spec)

    def build(lr: Any, rho: Any = None, alpha: Any = None) -> optax.GradientTransformationExtraArgs:
        told = {"rho": rho, "alpha": alpha}
        told = {key: value for key, value in told.items() if value is not None}
        own = dataclasses.replace(spec, hyperparameters={**spec.hyperparameters, **told})
        return own.optimizer(
            optax.adamw(lr, weight_decay=WEIGHT_DECAY),
            learning_rate=lr,
            steps=steps,
            groups=samax.lora_groups,
            alpha_scale=PAPER_STEPS / steps,
        )

    build(rate)  # with numbers, which samax checks
    return optax.inject_hyperparams(build)(lr=rate, **tunable.runtime(spec))
