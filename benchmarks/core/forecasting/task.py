"""Forecasting as what a `Trainer` is given: windows of one series to batches, and their loss."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.models.forecaster import Forecaster

EVALUATION_BATCH = 128


class Batches(NamedTuple):
    """Where the windows of batches begin in a series, as a step finds them."""

    series: jax.Array  # of shape (channels, times)
    starts: jax.Array  # of shape (batches, batch size)


class Task:
    """A network on windows of one series, which are gathered on the device as they are needed."""

    def __init__(
        self, channels: int, look_back: int, horizon: int, *, attention: bool, revin: bool
    ):
        """Takes the shapes; the switches are those of `Forecaster`."""
        self._look_back, self._length = look_back, look_back + horizon
        self._build = functools.partial(
            Forecaster, channels, look_back, horizon, attention=attention, revin=revin
        )
        self.graph, _ = nnx.split(nnx.eval_shape(lambda: self._build(rngs=nnx.Rngs(0))))
        self._init = jax.jit(lambda key: nnx.state(self._build(rngs=nnx.Rngs(key))))
        self.errors = jax.jit(self._errors)
        self.forecast = jax.jit(self._forecast)

    def init(self, seed: int) -> tuple[nnx.State, tuple[()]]:
        """Returns fresh parameters; there is no other state."""
        return self._init(jax.random.key(seed)), ()

    def batch(self, data: Batches, index: Any) -> jax.Array:
        """Returns the windows of a step, of shape (batch size, channels, look-back + horizon)."""
        return self._gather(data.series, data.starts[index])

    def loss(
        self, params: nnx.State, inputs: Any
    ) -> tuple[jax.Array, tuple[tuple[()], dict[str, jax.Array]]]:
        """Returns the mean squared error on a batch of windows."""
        return jnp.mean(self._residuals(params, inputs[1]) ** 2), ((), {})

    def _gather(self, series: jax.Array, starts: jax.Array) -> jax.Array:
        def cut(start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(series, start, self._length, axis=1)

        return jax.vmap(cut)(starts)

    def _residuals(self, params: nnx.State, rows: jax.Array) -> jax.Array:
        found = nnx.merge(self.graph, params)(rows[..., : self._look_back])
        return found - rows[..., self._look_back :]

    def _forecast(self, params: nnx.State, look_back: jax.Array) -> jax.Array:
        return nnx.merge(self.graph, params)(look_back)

    def _errors(self, params: nnx.State, data: Batches) -> tuple[jax.Array, jax.Array]:
        """Returns the squared and the absolute error of each window, a batch after another."""

        def of_batch(starts: jax.Array) -> tuple[jax.Array, jax.Array]:
            residuals = self._residuals(params, self._gather(data.series, starts))
            return jnp.mean(residuals**2, (1, 2)), jnp.mean(jnp.abs(residuals), (1, 2))

        return jax.lax.map(of_batch, data.starts)

    def evaluate(self, params: nnx.State, series: jax.Array, starts: np.ndarray) -> dict[str, Any]:
        """Returns the mean squared and the mean absolute error over all windows."""
        size = min(EVALUATION_BATCH, len(starts))
        filled = np.resize(starts, (-(-len(starts) // size), size))
        errors = self.errors(params, Batches(series, jnp.asarray(filled)))
        flat = [np.asarray(each, np.float64).ravel()[: len(starts)] for each in errors]
        return {"mse": float(flat[0].mean()), "mae": float(flat[1].mean())}
