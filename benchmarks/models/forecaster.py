"""Forecasters of many channels: the channel-attention network of SAMformer, and a linear one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

WIDTH = 16
_EPS = 1e-5


class InstanceNorm(nnx.Module):
    """Reversible instance normalization (RevIN): of each window and channel, with an affine map."""

    def __init__(self, channels: int):
        """Starts with the identity as the affine map."""
        self.scale = nnx.Param(jnp.ones(channels))
        self.shift = nnx.Param(jnp.zeros(channels))

    def normalize(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns windows of mean 0 and variance 1, mapped; and what `undo` takes."""
        mean = x.mean(axis=-1, keepdims=True)
        deviation = jnp.sqrt(x.var(axis=-1, keepdims=True) + _EPS)
        return (x - mean) / deviation * self.scale[:, None] + self.shift[:, None], (mean, deviation)

    def undo(self, y: jax.Array, statistics: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Returns forecasts in the units of the windows that `normalize` was given."""
        mean, deviation = statistics
        return (y - self.shift[:, None]) / self.scale[:, None] * deviation + mean


class ChannelAttention(nnx.Module):
    """One head of attention between channels, whose tokens are their whole look-backs."""

    def __init__(self, look_back: int, *, rngs: nnx.Rngs):
        """Makes the projections."""
        self.query = nnx.Linear(look_back, WIDTH, rngs=rngs)
        self.key = nnx.Linear(look_back, WIDTH, rngs=rngs)
        self.value = nnx.Linear(look_back, look_back, rngs=rngs)

    def __call__(self, x: jax.Array, head: nnx.Linear) -> jax.Array:
        """Returns `head(x + attention(x))`, from (..., channels, look-back).

        The matrices are multiplied in the order that takes the fewest operations: the values of a
        whole batch are never made where the product of the value's and the head's matrix is less.
        """
        scores = jnp.einsum("...iw,...jw->...ij", self.query(x), self.key(x)) / WIDTH**0.5
        mixed = jax.nn.softmax(scores, axis=-1) @ x
        matrices = self.value.kernel[...], head.kernel[...]
        attended = jnp.einsum("...l,lm,mh->...h", mixed, *matrices, optimize="optimal")
        # The attention's rows have sum 1, so that the value's bias goes through as it is.
        bias: Any = self.value.bias
        return head(x + bias[...]) + attended


class Forecaster(nnx.Module):
    """Maps (..., channels, look-back) to (..., channels, horizon)."""

    def __init__(
        self,
        channels: int,
        look_back: int,
        horizon: int,
        *,
        attention: bool = True,
        revin: bool = True,
        rngs: nnx.Rngs,
    ):
        """Makes the layers.

        Args:
            channels: How many series.
            look_back: Times that are seen.
            horizon: Times that are forecast.
            attention: Whether channels see one another; without it the network is linear.
            revin: Whether windows are normalized.
            rngs: The random stream of the start.
        """
        self.norm = InstanceNorm(channels) if revin else None
        self.attention = ChannelAttention(look_back, rngs=rngs) if attention else None
        self.head = nnx.Linear(look_back, horizon, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Forecasts."""
        if self.norm is None:
            return self._forecast(x)
        normalized, statistics = self.norm.normalize(x)
        return self.norm.undo(self._forecast(normalized), statistics)

    def _forecast(self, x: jax.Array) -> jax.Array:
        return self.head(x) if self.attention is None else self.attention(x, self.head)
