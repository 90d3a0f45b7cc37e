"""The sums over a stream of samples from which a universal regularizer's gradient is made."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from samax._core.checks import check_scalar_loss

Psi = Callable[[jax.Array], Any]
Phi = Callable[[Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class LogMeanExp:
    r"""A psi that is an exponential, averaged as its logarithm and so without overflow.

    With `psi=LogMeanExp(exponent)` the function phi receives $\ell = \log \frac{1}{n} \sum_i
    \exp(\mathrm{exponent}(D_i))$ in place of the mean of psi, so that `phi(mean)` is written
    `phi(exp(log_mean))`, and simplified: $1 / t^2$ becomes $\exp(-2 \ell)$.

    Attributes:
      exponent: a differentiable function of the scalar D, to one value or m of them.
    """

    exponent: Psi


class Totals(NamedTuple):
    """What is kept of the samples seen so far, whatever their number."""

    shift: jax.Array  # (m,): the sums below are of psi / exp(shift); zero for a plain psi
    psi: jax.Array  # (m,): sum_i psi(D_i)
    grads: optax.Updates  # leaves (m, ...): sum_i psi'(D_i) (g_i - g)


class Accumulator:
    """Sums psi(D_i) and psi'(D_i) (g_i - g) for the m components of psi."""

    def __init__(self, psi: Psi | LogMeanExp, dtype: jnp.dtype):
        """Takes psi and the dtype of D and of the sums of psi."""
        self._exponential = isinstance(psi, LogMeanExp)
        self._statistics = psi.exponent if isinstance(psi, LogMeanExp) else psi
        self._dtype = dtype
        self._unravel = ravel_pytree(self._statistics(jnp.zeros((), dtype)))[1]

    def start(self, grads: optax.Updates) -> Totals:
        """The sums over no samples, for gradients like `grads`."""
        components = jax.eval_shape(self._flat, jnp.zeros((), self._dtype)).size
        shift = jnp.finfo(self._dtype).min if self._exponential else 0.0
        return Totals(
            shift=jnp.full(components, shift, self._dtype),
            psi=jnp.zeros(components, self._dtype),
            grads=jax.tree.map(lambda g: jnp.zeros((components, *g.shape), g.dtype), grads),
        )

    def add(self, totals: Totals, gaps: jax.Array, differences: optax.Updates) -> Totals:
        """Adds B samples: `gaps` holds D, of shape (B,), `differences` g_i - g, leaves (B, ...)."""
        psi, slope = jax.vmap(self._slope)(gaps)
        shift, rescale = totals.shift, jnp.ones_like(totals.shift)
        if self._exponential:
            shift = jnp.maximum(shift, psi.max(axis=0))
            rescale = jnp.exp(totals.shift - shift)
            psi = jnp.exp(psi - shift)
            slope = psi * slope
        grads = jax.tree.map(
            lambda total, g: _scale(rescale, total) + _combine(slope.T, g),
            totals.grads,
            differences,
        )
        return Totals(shift, rescale * totals.psi + psi.sum(axis=0), grads)

    def regularizer(
        self, phi: Phi, totals: Totals, num_samples: int
    ) -> tuple[jax.Array, optax.Updates]:
        """R and `sum_i c_i (g_i - g)`, the gradient of `rho^2 R`."""

        def sharpness(psi_sum: jax.Array) -> jax.Array:
            mean = psi_sum / num_samples
            value = phi(self._unravel(totals.shift + jnp.log(mean) if self._exponential else mean))
            check_scalar_loss("phi(mean)", value)
            return value

        value, coefficients = jax.value_and_grad(sharpness)(totals.psi)
        slope = jax.tree.map(lambda g: _combine(coefficients[None], g)[0], totals.grads)
        return value, slope

    def _flat(self, gap: jax.Array) -> jax.Array:
        return ravel_pytree(self._statistics(gap))[0].astype(self._dtype)

    def _slope(self, gap: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(self._flat, (gap,), (jnp.ones_like(gap),))


def _scale(factors: jax.Array, stacked: jax.Array) -> jax.Array:
    """Multiplies each of m stacked arrays by its factor."""
    trailing = (1,) * (stacked.ndim - 1)
    return (factors.reshape(-1, *trailing) * stacked).astype(stacked.dtype)


def _combine(weights: jax.Array, stacked: jax.Array) -> jax.Array:
    """`sum_b weights[m, b] stacked[b]` of shape (m, ...), in full precision on every device."""
    weights, precision = weights.astype(stacked.dtype), jax.lax.Precision.HIGHEST
    sharding = getattr(jax.typeof(stacked), "sharding", None)
    if sharding is None or not any(sharding.spec[:1]):
        return jnp.tensordot(weights, stacked, axes=1, precision=precision)
    # Under explicit sharding a sum over devices has to say where its result is to be: on all.
    result = jax.sharding.NamedSharding(
        sharding.mesh, jax.sharding.PartitionSpec(None, *sharding.spec[1:])
    )
    return jnp.tensordot(weights, stacked, axes=1, precision=precision, out_sharding=result)
