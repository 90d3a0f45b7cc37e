"""Hyper-parameters, a number or a schedule: their checks, and a state where there is a schedule."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

Scalar: TypeAlias = jax.typing.ArrayLike
ScalarOrSchedule: TypeAlias = jax.typing.ArrayLike | optax.Schedule

# Where `init` looks at a schedule: every one of the first steps, where warm-ups live, and then ever
# sparser ones.
_PROBED_STEPS = np.unique(
    np.concatenate([np.arange(2_000), np.geomspace(2_000, 1e7, 200)]).astype(np.int32)
)


def check_scalar(
    name: str,
    value: Scalar,
    *,
    low: float = 0.0,
    high: float = np.inf,
    include_low: bool = True,
    include_high: bool = True,
) -> Scalar:
    """Returns `value` if it is one finite real number in the interval, which may be half open.

    Traced values (a vmap over rho, `optax.inject_hyperparams`) have no value to check and pass.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    closed_high = include_high and np.isfinite(high)
    interval = f"{'[' if include_low else '('}{low:g}, {high:g}{']' if closed_high else ')'}"
    number = np.asarray(value)
    if not (
        jnp.issubdtype(number.dtype, jnp.floating) or jnp.issubdtype(number.dtype, jnp.integer)
    ):
        raise TypeError(
            f"{name} must be a number in {interval}, got {value!r} of type {type(value).__name__}."
        )
    if number.ndim:
        raise TypeError(
            f"{name} must be one number, got an array of shape {number.shape}; "
            "use jax.vmap to train with several values at once."
        )
    above = number >= low if include_low else number > low
    below = number <= high if include_high else number < high
    if not (np.isfinite(number) and above and below):
        raise ValueError(f"{name} must be finite and lie in {interval}, got {value}.")
    return value


def check_schedule(name: str, value: ScalarOrSchedule) -> ScalarOrSchedule:
    """Returns a non-negative finite number, or a schedule, as it is.

    A schedule runs JAX, so that its values are looked at in `init`: see `probe_schedule`.
    """
    return value if callable(value) else check_scalar(name, value)


def probe_schedule(name: str, value: ScalarOrSchedule) -> None:
    """Looks at a schedule where warm-ups live and beyond, and at a number not at all.

    Raises:
      ValueError: if the schedule is negative or not finite at a probed step.
      TypeError: if it is not a schedule of scalars.
    """
    if not callable(value):
        return
    with jax.ensure_compile_time_eval():
        values = jax.vmap(value)(jnp.asarray(_PROBED_STEPS))
    if isinstance(values, jax.core.Tracer):
        return
    if values.shape != _PROBED_STEPS.shape:
        raise TypeError(
            f"The schedule {name} must map a step to one number, got an array of shape "
            f"{values.shape[1:]}."
        )
    wrong = ~np.isfinite(values) | (np.asarray(values) < 0)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(
            f"The schedule {name} must stay finite and non-negative, got {values[first]} at step "
            f"{_PROBED_STEPS[first]}; clip it, as in lambda step: jnp.maximum(0, schedule(step))."
        )


def at(value: ScalarOrSchedule, count: jax.Array) -> jax.Array:
    """The value of a number or a schedule at an update; a negative one counts as 0."""
    return jnp.maximum(value(count), 0.0) if callable(value) else jnp.asarray(value)


def scheduled(
    name: str,
    value: ScalarOrSchedule,
    apply: Callable[..., optax.Updates],
) -> optax.GradientTransformationExtraArgs:
    """A transformation with one hyper-parameter: `apply(value, updates, **extra) -> updates`.

    With a number it keeps no state, with a schedule the number of its updates.
    """
    check_schedule(name, value)

    def init(params: optax.Params) -> optax.EmptyState | optax.ScaleByScheduleState:
        del params
        if not callable(value):
            return optax.EmptyState()
        probe_schedule(name, value)
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        if not callable(value):
            return apply(value, updates, **extra_args), state
        updates = apply(at(value, state.count), updates, **extra_args)
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)
