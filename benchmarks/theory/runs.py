"""How the topics of `benchmarks.theory` run the methods: trajectories, thresholds and rates."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

import samax
from benchmarks.core.training import descend
from benchmarks.models.toys import Toy

METHODS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "GD": lambda rho: optax.identity(),
    "SAM": samax.sam,
    "USAM": samax.usam,
}
"""What is compared, by the radius rho."""


@functools.partial(jax.jit, static_argnames=("method", "loss", "steps", "every", "measure"))
def paths(
    method: str,
    loss: Callable[[Any], jax.Array],
    start: Any,
    rho: Any,
    eta: Any,
    *,
    steps: int,
    every: int,
    measure: Callable[[Any], jax.Array] = lambda params: params,
) -> jax.Array:
    """Follows a method with SGD from `start`, for each pair of rho and eta, which broadcast.

    Returns:
        What `descend` records; the axes of the pairs lead.
    """

    def follow(rho: jax.Array, eta: jax.Array) -> jax.Array:
        tx = optax.chain(METHODS[method](rho), optax.sgd(eta))
        return descend(tx, loss, start, steps, every, measure)[1]

    rho, eta = jnp.broadcast_arrays(rho, eta)
    found = jax.vmap(follow)(rho.ravel(), eta.ravel())
    return found.reshape(*rho.shape, *found.shape[1:])


def bisect(
    bounded: Callable[[np.ndarray], ArrayLike], low: ArrayLike, high: ArrayLike, halvings: int
) -> np.ndarray:
    """Returns, entry by entry, where a run that is bounded at `low` and not at `high` turns."""
    low, high = np.array(low, float), np.array(high, float)
    for _ in range(halvings):
        middle = (low + high) / 2
        inside = np.asarray(bounded(middle))
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return (low + high) / 2


def flow_rate(
    tx: optax.GradientTransformation,
    loss: Callable[[Any], jax.Array],
    params: Any,
    measure: Callable[[Any], jax.Array],
) -> jax.Array:
    """Returns d measure / dt along an optimizer's flow: per step and learning rate, both small.

    The optimizer is that at learning rate 1; its updates have to be linear in the learning rate, as
    those of SGD are, after SAM and in `samax.balanced`.
    """
    tx = optax.with_extra_args_support(tx)
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
    return jax.jvp(measure, (params,), (updates,))[1]


def sam_rate(toy: Toy, cores: Any, rho: jax.Array | float) -> jax.Array:
    """SAM's dB/dt, or dQ/dt of more than two cores."""
    tx = optax.chain(samax.sam(rho), optax.sgd(1.0))
    return flow_rate(tx, toy.loss, cores, toy.imbalance)


def law_errors(
    toy: Toy,
    rate: Callable[[Toy, Any, jax.Array], jax.Array],
    law: Callable[[Toy, Any, jax.Array], jax.Array],
    rho: np.ndarray,
) -> np.ndarray:
    """Returns |rate - law| at a toy's start, by rho; both are of a toy, its cores and rho."""
    cores = jax.tree.map(jnp.asarray, toy.start)
    errors = jax.vmap(lambda rho: jnp.abs(rate(toy, cores, rho) - law(toy, cores, rho)))
    return np.asarray(jax.jit(errors)(rho))
