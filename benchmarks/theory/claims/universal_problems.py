"""The problems of `benchmarks.theory.claims.universal`, and what is measured on each.

Tahmasebi et al. 2024 (arXiv 2406.03682).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

import samax
from benchmarks.core.training import descend
from benchmarks.theory.runs import bisect
from samax.distributions import Distribution

HESSIAN = np.array([[2.0, 0.5], [0.5, 1.5]])
START = np.array([3.0, 1 / 3])  # of the explicit bias: tr H = 18.22 here, 4 at (1, 1)
SHARP, FLAT = 2 * float(START @ START), 4.0
Method = Callable[..., optax.GradientTransformation]


def sharpness(
    tx: optax.GradientTransformationExtraArgs, loss: Callable[[Any], jax.Array], point: Any
) -> jax.Array:
    """Returns the regularizer R of a tracking transformation, at a point."""
    value, grads = jax.value_and_grad(loss)(point)
    _, state = tx.update(grads, tx.init(point), point, value=value, value_fn=loss)
    return optax.tree.get(state, "sharpness")


def quadratic(hessian: ArrayLike) -> Callable[[jax.Array], jax.Array]:
    """A quadratic with its minimum at 0 and this Hessian, a matrix or a multiple of the unit's."""
    if np.ndim(hessian) == 0:
        return lambda w: 0.5 * jnp.asarray(hessian) * jnp.sum(w**2)
    return lambda w: 0.5 * w @ jnp.asarray(hessian) @ w


def product(w: jax.Array) -> jax.Array:
    """(x y - 1)^2, whose minima are a hyperbola with tr H = 2 (x^2 + y^2) on it."""
    return (w[0] * w[1] - 1) ** 2


def trace_on_minima(w: jax.Array) -> jax.Array:
    """The trace of the Hessian at a minimum of `product`."""
    return 2 * jnp.sum(w**2)


def determinant(sampling: samax.Sampling, **options: Any) -> Any:
    """The inverse square of the mean of exp(-t): of the paper's, and not of half the, Hessian."""
    return samax.universal_sam(
        lambda log_mean: jnp.exp(-2 * log_mean), samax.LogMeanExp(lambda t: -t), sampling, **options
    )


def recovered(hessians: np.ndarray, samples: int, half_width: float = 7.0) -> dict[str, np.ndarray]:
    """Measures functions of Hessians (the leading axis) by Monte Carlo, at the minimum."""
    options: dict[str, Any] = {"rho": 0.1, "track": True}
    normal = samax.Sampling(samax.gaussian, samples, batch_size=samples // 10)
    uniform = dataclasses.replace(normal, distribution=samax.cube(half_width))
    d = hessians.shape[-1]
    methods = {
        "trace": (samax.trace_sam(sampling=normal, **options), 2.0),
        "frobenius": (samax.frob_sam(sampling=normal, **options), 4.0),
        "lebesgue": (
            determinant(uniform, **options),
            (2 * np.pi) ** d / (2 * half_width) ** (2 * d),
        ),
        "gaussian": (determinant(normal, **options), 1.0),
    }

    def found(tx: Any) -> np.ndarray:
        one = lambda hessian: sharpness(tx, quadratic(hessian), jnp.zeros(d))  # noqa: E731
        return np.asarray(jax.jit(partial(jax.lax.map, one))(hessians))

    return {name: constant * found(tx) for name, (tx, constant) in methods.items()}


def exact(hessians: np.ndarray) -> dict[str, np.ndarray]:
    """What `recovered` is to find."""
    return {
        "trace": np.trace(hessians, axis1=-2, axis2=-1),
        "frobenius": np.sum(hessians**2, axis=(-2, -1)),
        "lebesgue": np.linalg.det(hessians),
        "gaussian": np.linalg.det(np.eye(2) + hessians),
    }


def limit_errors(method: Method, radii: np.ndarray) -> np.ndarray:
    """Returns |R - S| by rho, at a stationary point of a quartic, the samples held fixed."""

    def value(rho: jax.Array, higher: jax.Array) -> jax.Array:
        def loss(w: jax.Array) -> jax.Array:
            return quadratic(HESSIAN)(w) + higher * (jnp.sum(w**3) / 3 + jnp.sum(w) ** 4 / 4)

        sampling = samax.Sampling(samax.gaussian, 1000, batch_size=1000, antithetic=True)
        return sharpness(method(rho, sampling=sampling, track=True), loss, jnp.zeros(2))

    values = jax.jit(jax.vmap(value, (0, None)))
    return np.abs(np.asarray(values(radii, 1.0)) - np.asarray(values(radii[:1], 0.0)))


def bias(tx: optax.GradientTransformation, eta: float, steps: int, every: int) -> np.ndarray:
    """Returns 2 (x^2 + y^2), tr H on the minima, along a run on `product` from (3, 1/3)."""
    run = jax.jit(
        lambda start: descend(
            optax.chain(tx, optax.sgd(eta)), product, start, steps, every, trace_on_minima
        )[1]
    )
    return np.asarray(run(START))


def det_ends(lam: np.ndarray, seeds: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where Det-SAM ends on `product`, by lambda and seed: 2 (x^2 + y^2) and the loss.

    Both are means over the last fifth of the run.
    """

    def run(lam: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        sampling = samax.Sampling(samax.gaussian, 32, batch_size=32, key=key)
        tx = optax.chain(samax.det_sam(0.3, lam=lam, sampling=sampling), optax.sgd(0.01))

        def look(w: jax.Array) -> tuple[jax.Array, jax.Array]:
            return trace_on_minima(w), product(w)

        _, path = descend(tx, product, START, steps, steps // 100, look)
        return jax.tree.map(lambda values: values[-20:].mean(), path)

    over_seeds = jax.vmap(run, (None, 0))
    keys = jax.random.split(jax.random.key(0), seeds)
    traces, losses = jax.jit(jax.vmap(over_seeds, (0, None)))(lam, keys)
    return np.asarray(traces), np.asarray(losses)


def det_overflows(log: bool) -> bool:
    """Returns whether Det-SAM of lambda 2 with 4 samples ends with what is not finite."""
    tx = samax.det_sam(0.1, lam=2.0, log=log, sampling=samax.Sampling(samax.gaussian, 4))
    return not np.isfinite(bias(tx, 0.01, 10_000, 10_000)[-1])


def det_slope(lam: ArrayLike, curvature: ArrayLike, samples: int = 200_000) -> np.ndarray:
    """Returns Det-SAM's direction beside the gradient, close to the minimum of a parabola.

    Off the minimum D has the term g v / rho, and the mean of R over Gaussian samples is R(0)
    exp(-g^2 / (4 rho^2 (1 + h / 2))) with R(0) = 1 + h / 2: it rewards the gradient. The direction
    is (1 - lambda h / 2) g, which points away from the minimum if lambda > 2 / h.
    """
    sampling = samax.Sampling(samax.gaussian, samples, batch_size=samples // 10, antithetic=True)
    point = jnp.full(1, 0.01)  # times rho

    def one(lam: jax.Array, curvature: jax.Array) -> jax.Array:
        tx, loss = samax.det_sam(1.0, lam=lam, sampling=sampling), quadratic(curvature)
        value, grads = jax.value_and_grad(loss)(point)
        direction, _ = tx.update(grads, tx.init(point), point, value=value, value_fn=loss)
        return (direction / grads)[0]

    return np.asarray(jax.jit(jnp.vectorize(one))(lam, curvature))


def frob_threshold(
    lam: np.ndarray, curvature: np.ndarray, samples: int, halvings: int
) -> np.ndarray:
    """Measures the largest stable step of Frob-SAM on a parabola, by pair."""

    def run(lam: jax.Array, curvature: jax.Array, eta: jax.Array) -> jax.Array:
        sampling = samax.Sampling(samax.gaussian, samples, batch_size=samples)
        tx = optax.chain(samax.frob_sam(0.01, lam=lam, sampling=sampling), optax.sgd(eta))
        return jnp.abs(descend(tx, quadratic(curvature), np.ones(1), 1_000, 1_000)[0][0])

    runs = jax.jit(jnp.vectorize(run))
    law = frob_law(lam, curvature)
    return bisect(lambda eta: np.asarray(runs(lam, curvature, eta)) < 1, 0 * law, 2 * law, halvings)


def frob_law(lam: ArrayLike, curvature: ArrayLike) -> np.ndarray:
    """The step at which eta (h + lambda h^2) = 2."""
    h = np.asarray(curvature)
    return 2 / (h + np.asarray(lam) * h**2)


def on_and_off() -> tuple[np.ndarray, np.ndarray]:
    """Returns det H of `product` at some minima, and at points beside them."""
    x = np.array([0.5, 1.0, 3.0])
    det = jax.vmap(lambda w: jnp.linalg.det(jax.hessian(product)(w)))
    return tuple(np.asarray(det(jnp.stack([x, y], 1))) for y in (1 / x, 2 / x))  # type: ignore[return-value]


def scale_changes(method: Method, distribution: Distribution) -> float:
    """Returns R at (c x, y / c) relative to that at (x, y), for a loss of x y and c = 4."""
    tx = method(0.1, sampling=samax.Sampling(distribution, 64, batch_size=64), track=True)
    here, there = (
        float(sharpness(tx, product, jnp.array(point))) for point in ((1.0, 1.2), (4.0, 0.3))
    )
    return there / here
