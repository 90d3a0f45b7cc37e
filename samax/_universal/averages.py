"""The average over a stream of samples from which a universal regularizer's gradient is made.

R = phi(average of psi(D_i)) has the gradient sum_i c_i (g_i - g), in which c_i is phi' times
psi'(D_i) / n. phi' is known only after the last sample, so two sums are kept: of psi(D_i), and of
psi'(D_i) (g_i - g) for each of the m components of psi. `Mean` keeps them as they are; `LogMean`,
for a psi that is an exponential, keeps them divided by the largest exponential so far. Both have
`start`, `add` and `mean`, and `regularizer` ends either.
"""

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

    psi: jax.Array  # (m,): sum_i psi(D_i)
    grads: optax.Updates  # leaves (m, ...): sum_i psi'(D_i) (g_i - g)


class Mean:
    """The mean of psi."""

    def __init__(self, psi: Psi, dtype: jnp.dtype):
        """Takes psi and the dtype of D and of the sums of psi."""
        self._psi = _Vector(psi, dtype)

    def start(self, grads: optax.Updates) -> Totals:
        """The sums over no samples, for gradients like `grads`."""
        return Totals(self._psi.full(0.0), self._psi.stacked_zeros(grads))

    def add(self, totals: Totals, gaps: jax.Array, differences: optax.Updates) -> Totals:
        """Adds B samples: `gaps` holds D, of shape (B,), `differences` g_i - g, leaves (B, ...)."""
        psi, slopes = self._psi.with_slopes(gaps)
        return Totals(
            totals.psi + psi.sum(axis=0),
            jax.tree.map(lambda t, g: t + _combine(slopes.T, g), totals.grads, differences),
        )

    def mean(self, totals: Totals, num_samples: int) -> Any:
        """What phi receives, a differentiable function of `totals.psi`."""
        return self._psi.restored(totals.psi / num_samples)


class ShiftedTotals(NamedTuple):
    """The `Totals` of exponentials divided by exp(shift), the largest of them being 1."""

    psi: jax.Array  # (m,)
    grads: optax.Updates  # leaves (m, ...)
    shift: jax.Array  # (m,): the largest exponent so far


class LogMean:
    """The logarithm of the mean of exp(exponent)."""

    def __init__(self, exponent: Psi, dtype: jnp.dtype):
        """Takes the exponent and the dtype of D and of the sums."""
        self._exponent = _Vector(exponent, dtype)

    def start(self, grads: optax.Updates) -> ShiftedTotals:
        """The sums over no samples, for gradients like `grads`."""
        lowest = jnp.finfo(self._exponent.dtype).min
        zeros = self._exponent.stacked_zeros(grads)
        return ShiftedTotals(self._exponent.full(0.0), zeros, self._exponent.full(lowest))

    def add(
        self, totals: ShiftedTotals, gaps: jax.Array, differences: optax.Updates
    ) -> ShiftedTotals:
        """Adds B samples, as `Mean.add` does."""
        exponents, slopes = self._exponent.with_slopes(gaps)
        shift = jnp.maximum(totals.shift, exponents.max(axis=0))
        rescale, psi = jnp.exp(totals.shift - shift), jnp.exp(exponents - shift)
        slopes = psi * slopes
        grads = jax.tree.map(
            lambda t, g: _scale(rescale, t) + _combine(slopes.T, g), totals.grads, differences
        )
        return ShiftedTotals(rescale * totals.psi + psi.sum(axis=0), grads, shift)

    def mean(self, totals: ShiftedTotals, num_samples: int) -> Any:
        """What phi receives, a differentiable function of `totals.psi`."""
        return self._exponent.restored(totals.shift + jnp.log(totals.psi / num_samples))


def average_of(psi: Psi | LogMeanExp, dtype: jnp.dtype) -> Mean | LogMean:
    """The average that a psi asks for."""
    return LogMean(psi.exponent, dtype) if isinstance(psi, LogMeanExp) else Mean(psi, dtype)


def regularizer(
    phi: Phi, average: Mean | LogMean, totals: Any, num_samples: int
) -> tuple[jax.Array, optax.Updates]:
    """R and `sum_i c_i (g_i - g)`, the gradient of `rho^2 R`."""

    def sharpness(psi: jax.Array) -> jax.Array:
        value = phi(average.mean(totals._replace(psi=psi), num_samples))
        check_scalar_loss("phi(mean)", value)
        return value

    value, coefficients = jax.value_and_grad(sharpness)(totals.psi)
    slope = jax.tree.map(lambda g: _combine(coefficients[None], g)[0], totals.grads)
    return value, slope


class _Vector:
    """A function of D as one to vectors of m components, whatever it returns."""

    def __init__(self, function: Psi, dtype: jnp.dtype):
        self.dtype = dtype
        self._function = function
        self.restored = ravel_pytree(function(jnp.zeros((), dtype)))[1]
        self._components = jax.eval_shape(self._flat, jnp.zeros((), dtype)).size

    def full(self, value: jax.typing.ArrayLike) -> jax.Array:
        """`value` for each component."""
        return jnp.full(self._components, value, self.dtype)

    def stacked_zeros(self, grads: optax.Updates) -> optax.Updates:
        """A zero gradient for each component."""
        return jax.tree.map(lambda g: jnp.zeros((self._components, *g.shape), g.dtype), grads)

    def with_slopes(self, gaps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The values at B numbers and the derivatives there, both of shape (B, m)."""
        return jax.vmap(lambda gap: jax.jvp(self._flat, (gap,), (jnp.ones_like(gap),)))(gaps)

    def _flat(self, gap: jax.Array) -> jax.Array:
        return ravel_pytree(self._function(gap))[0].astype(self.dtype)


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
