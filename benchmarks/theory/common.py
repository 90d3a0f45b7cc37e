"""What the topics of `benchmarks.theory` share: claims, trajectories, thresholds and slopes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike


class Claim(NamedTuple):
    """A sentence of a paper beside what was measured."""

    text: str  # What is claimed
    setting: str  # Where
    prediction: str  # What the theory says
    measured: str  # What came out
    holds: bool  # Whether the two agree within the tolerance that `prediction` states
    # Whether the claim is about where a method or a law breaks down: it holds if that does happen.
    outside: bool = False


class Findings(NamedTuple):
    """What a topic's measurement returns."""

    claims: list[Claim]  # In the order in which they are to be read
    series: dict[str, Any]  # What the figure is drawn from, as JSON types


def descend(
    tx: optax.GradientTransformation,
    loss: Callable[[Any], jax.Array],
    start: Any,
    steps: int,
    every: int,
    measure: Callable[[Any], Any] = lambda params: params,
) -> Any:
    """Runs an optimizer on a loss without noise, recording `measure` every so many steps.

    Returns:
        The records, the start's included, stacked: `measure`'s pytree with a leading axis of
        `1 + steps / every`.

    Raises:
        ValueError: `every` does not divide `steps`.
    """
    if steps % every:
        raise ValueError(f"steps must be a multiple of every={every}, and are {steps}.")
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    def record(carry: Any, _: None) -> tuple[Any, Any]:
        carry, _ = jax.lax.scan(step, carry, length=every)
        return carry, measure(carry[0])

    start = jax.tree.map(jnp.asarray, start)
    _, later = jax.lax.scan(record, (start, tx.init(start)), length=steps // every)
    return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), measure(start), later)


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


def slope(x: ArrayLike, y: ArrayLike) -> float:
    """Returns the slope of the line through the points on logarithmic axes."""
    return float(np.polyfit(np.log(np.asarray(x)), np.log(np.asarray(y)), 1)[0])


def spread(values: ArrayLike, form: str = ".3g") -> str:
    """Returns "lowest to highest" of some numbers, or the number if they read the same."""
    low, high = (format(float(f(np.asarray(values))), form) for f in (np.min, np.max))
    return low if low == high else f"{low} to {high}"


def listed(values: Sequence[float] | np.ndarray, form: str = ".3g") -> str:
    """Returns the numbers with commas between them."""
    return ", ".join(format(float(value), form) for value in values)


def as_json(**series: ArrayLike) -> dict[str, Any]:
    """Returns arrays as nested lists of floats with six significant digits."""
    return {
        name: np.vectorize(lambda x: float(f"{x:.6g}"))(np.asarray(values, float)).tolist()
        for name, values in series.items()
    }


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
