"""Optimizers that are told their hyper-parameters when they run: a search compiles one program."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from benchmarks.core.methods import MethodSpec
from benchmarks.core.training import TrainState

RUNTIME = ("lr", "decay", "rho")
"""What is told: the base optimizer's learning rate and weight decay, and the radius; and, of those
that balance, alpha."""


def optimizer(
    spec: MethodSpec,
    make_base: Callable[[Any, Any], optax.GradientTransformation],
    steps: int,
) -> optax.GradientTransformationExtraArgs:
    """Builds a method with its base optimizer.

    Args:
        spec: The method, with `lr` and `decay` among its hyper-parameters.
        make_base: Maps these two to the base optimizer.
        steps: The steps over which the method's own schedules go.

    Returns:
        The optimizer, which keeps the numbers of `RUNTIME` in its state.

    Raises:
        ValueError: A hyper-parameter has an unknown name or an invalid value.
    """
    rate, decay = spec.hyperparameters["lr"], spec.hyperparameters["decay"]
    if not 0 < rate < math.inf:
        raise ValueError(f"Method {spec.label!r} cannot be built: lr must be above 0, got {rate}.")
    if not 0 <= decay < math.inf:
        raise ValueError(
            f"Method {spec.label!r} cannot be built: decay must be at least 0, got {decay}."
        )

    def build(lr: Any, decay: Any, rho: Any = None) -> optax.GradientTransformationExtraArgs:
        settings = {k: v for k, v in spec.hyperparameters.items() if k not in ("lr", "decay")}
        if rho is not None:
            settings["rho"] = rho
        own = dataclasses.replace(spec, hyperparameters=settings)
        return own.optimizer(make_base(lr, decay), steps=steps)

    build(**runtime(spec))  # with numbers, which samax checks
    return optax.inject_hyperparams(build)(**runtime(spec))


def runtime(spec: MethodSpec) -> dict[str, float]:
    """Returns the hyper-parameters that programs are told when they run."""
    names = (*RUNTIME, "alpha") if spec.method.balances else RUNTIME
    return {
        name: float(spec.hyperparameters[name]) for name in names if name in spec.hyperparameters
    }


def program(spec: MethodSpec) -> str:
    """Names what methods have in common that differ in nothing but what programs are told."""
    fixed = {k: v for k, v in spec.hyperparameters.items() if k not in runtime(spec)}
    return f"{spec.name} {fixed} {spec.epoch_factor}"


def told(state: TrainState, spec: MethodSpec) -> TrainState:
    """Returns the state of a trainer, which may be another method's by `program`, for this one."""
    numbers = {name: jnp.asarray(value) for name, value in runtime(spec).items()}
    settings = {**optax.tree.get(state.opt_state, "hyperparams"), **numbers}
    return state._replace(opt_state=optax.tree.set(state.opt_state, hyperparams=settings))
