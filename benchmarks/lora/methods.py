"""The optimizers that `benchmarks.lora` compares, and the papers' settings of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import optax

import samax
from benchmarks.core.methods import MethodSpec, parse_settings
from benchmarks.models.lora import is_adapter

PAPER_STEPS = 1000
"""Iterations in the papers, over which alpha decays from alpha_0 to 0."""

WEIGHT_DECAY = 0.01
PROBE = "probe"
BASELINE = "adamw"


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer by the name of its row.

    Attributes:
        build: Makes it from the learning rate, alpha's linear decay from 1 to 0 and the other
            hyper-parameters.
        defaults: The hyper-parameters used where the user names none.
        search: The span of each hyper-parameter, from the papers' grids, that tuning searches.
        source: Where defaults and spans come from.
        gradients: Gradient evaluations a step, by which remaining time is estimated.
    """

    build: Callable[..., optax.GradientTransformation]
    defaults: Mapping[str, float]
    search: Mapping[str, tuple[float, float]]
    source: str
    gradients: int = 1


def _adamw(rate: float, decay: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=WEIGHT_DECAY)


def _sam(rate: float, decay: optax.Schedule, *, rho: float) -> optax.GradientTransformation:
    """SAM of the adapters: their cores are perturbed, the classifier is not."""
    ascent = optax.chain(samax.normalize(), samax.scale_by_rho(rho))
    sam = samax.sharpness_aware(samax.perturb_only(ascent, is_adapter), track=True)
    return optax.chain(sam, _adamw(rate, decay))


def _balanced(method: Callable[..., optax.GradientTransformation]) -> Callable:
    def build(rate: float, decay: optax.Schedule, *, alpha: float) -> optax.GradientTransformation:
        return method(
            _adamw(rate, decay),
            learning_rate=rate,
            alpha=lambda step: alpha * decay(step),
            groups=samax.lora_groups,
        )

    return build


_RATES = {"lr": (1e-4, 5e-4)}
_BAR = {**_RATES, "alpha": (0.5, 2.0)}
METHODS: dict[str, Method] = {
    "adamw": Method(_adamw, {"lr": 5e-4}, _RATES, "arXiv 2410.14802: 1e-4, 3e-4 or 5e-4"),
    "sam": Method(
        _sam,
        {"lr": 5e-4, "rho": 0.05},
        {**_RATES, "rho": (0.05, 0.2)},
        "arXiv 2410.14802: rho 0.05, 0.1 or 0.2",
        gradients=2,
    ),
    "nbar": Method(
        _balanced(samax.nbar), {"lr": 5e-4, "alpha": 1.0}, _BAR, "arXiv 2410.14802: 0.5, 1 or 2"
    ),
    "obar": Method(
        _balanced(samax.obar), {"lr": 5e-4, "alpha": 1.0}, _BAR, "arXiv 2410.14802: 0.5, 1 or 2"
    ),
    "das": Method(
        _balanced(samax.das),
        {"lr": 5e-4, "alpha": 0.1},
        {**_RATES, "alpha": (0.01, 0.5)},
        "arXiv 2508.10435: 0.1 for TR-ResNet-32",
    ),
}


def parse(text: str) -> MethodSpec:
    """Reads one row in the notation ``name[:key=value...]``, such as ``sam:rho=0.1:lr=3e-4``.

    `probe`, the linear probe, has no settings.

    Raises:
        ValueError: The name is unknown, or a setting is not one of its hyper-parameters.
    """
    label = "".join(text.split())
    name, *settings = label.split(":")
    if name != PROBE and name not in METHODS:
        raise ValueError(f"Unknown method {name!r}; the methods are {PROBE}, {', '.join(METHODS)}.")
    defaults = {} if name == PROBE else METHODS[name].defaults
    found = {**defaults, **parse_settings(label, settings)}
    unknown = sorted(set(found) - set(defaults))
    if unknown:
        raise ValueError(
            f"Method {label!r}: {unknown[0]!r} is none of its settings "
            f"({', '.join(defaults) or 'it has none'})."
        )
    return MethodSpec(label, name, found)


def parse_all(text: str) -> list[MethodSpec]:
    """Reads a comma-separated list of rows, in the order given.

    Raises:
        ValueError: As `parse`; also for an empty list or a row named twice.
    """
    specs = [parse(part) for part in text.split(",") if part.strip()]
    if not specs or len({spec.label for spec in specs}) < len(specs):
        raise ValueError(f"--methods {text!r} must name at least one method, and none twice.")
    return specs


def optimizer(spec: MethodSpec, steps: int) -> optax.GradientTransformationExtraArgs:
    """Builds a row's optimizer: a constant learning rate, and alpha that decays linearly to 0.

    alpha_0 is that of the papers' 1000 iterations. In fewer it is multiplied by 1000 / steps, so
    that the sum of alpha_t eta_t, by which the cores grow and shrink, is that of 1000 iterations.

    Raises:
        ValueError: A hyper-parameter has an invalid value.
    """
    settings = dict(spec.hyperparameters)
    decay = optax.linear_schedule(1.0, 0.0, steps)
    rate = settings.pop("lr")
    if "alpha" in settings:
        settings["alpha"] *= PAPER_STEPS / steps
    try:
        if not rate > 0:
            raise ValueError(f"lr must be above 0, got {rate}.")
        tx = METHODS[spec.name].build(rate, decay, **settings)
    except ValueError as error:
        raise ValueError(f"Method {spec.label!r} cannot be built: {error}") from error
    return optax.with_extra_args_support(tx)
