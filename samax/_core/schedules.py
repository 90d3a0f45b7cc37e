"""Hyper-parameters that are a number or a schedule: only a schedule needs a state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import ScalarOrSchedule, check_schedule, probe_schedule


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
