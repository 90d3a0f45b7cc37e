"""Quadratics: where USAM diverges and SAM does not, how far SAM's tail is, and SAMAR's rate.

Section 4 of Dai, Ahn and Sra 2023 (arXiv 2305.15287), and the convergence rate of Zou, Deng and Sun
2024 (arXiv 2412.16854).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

import samax
from benchmarks.core.precision import float64
from benchmarks.theory.common import Claim, Findings, findings, near, slope, spread
from benchmarks.theory.figures import BLUE, GREEN, ORANGE, note, panels, predicted
from benchmarks.theory.runs import bisect, paths

SPECTRUM = np.linspace(1.0, 10.0, 10)
BETA = 10.0
LARGEST = 2 / BETA  # gradient descent's threshold


def loss(w: jax.Array) -> jax.Array:
    """A quadratic with eigenvalues 1 to 10, so that beta = 10."""
    return 0.5 * jnp.sum(SPECTRUM * w**2)


def usam_threshold(rho: ArrayLike) -> np.ndarray:
    """The step size above which USAM diverges: 2 / (beta + rho beta^2)."""
    return 2 / (BETA + np.asarray(rho) * BETA**2)


def tail_radius(rho: ArrayLike, eta: ArrayLike) -> np.ndarray:
    """How far from the minimum SAM jumps to and fro: rho eta beta / (2 - eta beta)."""
    return np.asarray(rho) * np.asarray(eta) * BETA / (2 - np.asarray(eta) * BETA)


def norms(method: str, rho: ArrayLike, eta: ArrayLike, steps: int) -> np.ndarray:
    """Returns ||w|| at the start, halfway and at the end, by pair of rho and eta."""
    every, measure = steps // 2, jnp.linalg.norm
    run = paths(method, loss, np.ones(10), rho, eta, steps=steps, every=every, measure=measure)
    return np.asarray(run)


def threshold(method: str, rho: np.ndarray, steps: int) -> np.ndarray:
    """Measures the step size above which a method diverges, by rho.

    A run is bounded if its norm does not double in the second half: it grows geometrically above
    the threshold; SAM's grows linearly at it.
    """

    def bounded(eta: np.ndarray) -> np.ndarray:
        _, middle, end = norms(method, rho, eta, steps).T
        return end <= 2 * middle

    return bisect(bounded, np.zeros_like(rho), np.full_like(rho, 1.5 * LARGEST), halvings=14)


def mean_squared_gradient(length: int, seeds: int) -> float:
    """The mean of ||grad L||^2 along SAMAR's path of K steps of size 1 / sqrt(K), under noise."""
    eta, curvature = length**-0.5, np.linspace(0.5, 2.0, 20)
    tx = optax.chain(samax.samar(0.1 * eta), optax.sgd(eta))

    def run(key: jax.Array) -> jax.Array:
        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            w, state = carry
            noise = jax.random.normal(key, curvature.shape)

            def sample(w: jax.Array) -> jax.Array:
                return 0.5 * jnp.sum(curvature * w**2) + noise @ w

            value, grads = jax.value_and_grad(sample)(w)
            updates, state = tx.update(grads, state, w, value=value, value_fn=sample)
            return (optax.apply_updates(w, updates), state), jnp.sum((curvature * w) ** 2)

        start = jnp.full(curvature.shape, 3.0)
        keys = jax.random.split(key, length)
        return jax.lax.scan(step, (start, tx.init(start)), keys)[1].mean()

    return float(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), seeds)).mean())


def measure(quick: bool) -> Findings:
    """Measures the claims."""
    with float64():
        rho = np.geomspace(0.01, 1.0, 7 if quick else 13)
        steps = 3000
        found = {name: threshold(name, rho, steps) for name in ("SAM", "USAM")}
        eta = LARGEST * np.linspace(0.1, 0.99, 7 if quick else 13)
        radii = np.array([0.01, 0.1, 0.5])
        ends = norms("SAM", radii[:, None], eta, steps)[..., -1]
        lengths = np.array([1_000, 3_000, 10_000] + ([] if quick else [30_000, 100_000]))
        rates = [mean_squared_gradient(int(length), seeds=8) for length in lengths]
        at = {
            (name, factor): norms(name, rho, factor * limit, steps)[:, -1]
            for name, limit in (("USAM", usam_threshold(rho)), ("SAM", np.array(LARGEST)))
            for factor in (0.99, 1.01)
        }
    usam, sam = found["USAM"] / usam_threshold(rho), found["SAM"] / LARGEST
    tails = ends / tail_radius(radii[:, None], eta)
    rate = slope(lengths, rates)
    setting = f"quadratic, spectrum 1 to 10, {steps:,} steps, rho .01 to 1"
    claims = [
        Claim(
            "USAM diverges above 2 / (beta + rho beta^2), below it does not",
            setting,
            "bounded at 0.99 of it, diverged at 1.01",
            f"largest step is {spread(usam, '.4f')} of it",
            _turns(at["USAM", 0.99], at["USAM", 1.01]) & near(usam, 1, 0.01),
        ),
        Claim(
            "SAM stays bounded up to gradient descent's 2 / beta, whatever rho",
            setting,
            "bounded at 0.99 of it, diverged at 1.01",
            f"largest step is {spread(sam, '.4f')} of it",
            _turns(at["SAM", 0.99], at["SAM", 1.01]) & near(sam, 1, 0.01),
        ),
        Claim(
            "SAM ends rho eta beta / (2 - eta beta) from the minimum",
            "the same, eta .1 to .99 of 2 / beta, rho .01, .1, .5",
            "ratio 1 within 0.1 %",
            f"ratio {spread(tails, '.5f')}",
            near(tails, 1, 0.001),
        ),
        Claim(
            "SAMAR's mean ||g||^2 falls as 1 / sqrt(K) with eta = 1 / sqrt(K)",
            f"noisy quadratic, 20 dimensions, K to {lengths[-1]:,}, 8 seeds",
            "slope in [-.56, -.44]",
            f"{rate:.3f}",
            -0.56 < rate < -0.44,
        ),
    ]
    return findings(
        claims,
        rho=rho, usam=found["USAM"], sam=found["SAM"], eta=eta, radii=radii, tails=ends,
        lengths=lengths, rates=rates,
    )  # fmt: skip


def draw(series: dict[str, Any]) -> Figure:
    """Draws what `measure` found."""
    figure, (left, middle, right) = panels(
        r"Normalized, SAM is as stable as gradient descent; without, steps must shrink with $\rho$"
    )
    rho = series["rho"]
    predicted(left, rho, np.full_like(rho, LARGEST))
    predicted(left, rho, usam_threshold(rho))
    note(left, r"$2\,/\,\beta$", (rho[0], 1.15 * LARGEST))
    note(left, r"$2\,/\,(\beta+\rho\beta^2)$", (0.85 * rho[-1], 0.013), ha="right")
    left.plot(rho, series["sam"], "o", color=BLUE, label="SAM")
    left.plot(rho, series["usam"], "s", color=ORANGE, label="USAM")
    left.fill_between(rho, usam_threshold(rho), LARGEST, color=ORANGE, alpha=0.1, lw=0)
    note(left, "only USAM\ndiverges", (0.35, 0.08), ha="center", color=ORANGE)
    left.set(xscale="log", yscale="log", xlabel=r"radius $\rho$", ylim=(0.01, 0.4))
    left.set(ylabel=r"largest stable step size $\eta$", title="Quadratic: where divergence begins")
    left.legend(loc="lower left")

    eta, tails = series["eta"], series["tails"]
    for radius, values, marker in zip(series["radii"], tails, "ovs", strict=True):
        predicted(middle, eta / LARGEST, tail_radius(radius, eta))
        middle.plot(eta / LARGEST, values, marker, color=BLUE)
        note(middle, rf"$\rho = {radius:g}$", (0.33, 0.28 * radius), color=BLUE)
    middle.set(yscale="log", xlabel=r"step size $\eta$, in units of $2/\beta$")
    middle.set_ylabel(r"distance from the minimum $\|w_T\|$")
    middle.set_title(r"SAM jumps across: $\rho\,\eta\beta\,/\,(2-\eta\beta)$ away")

    lengths, rates = series["lengths"], series["rates"]
    predicted(right, lengths, rates[0] * (lengths / lengths[0]) ** -0.5)
    note(right, r"$\propto 1/\sqrt{K}$", (lengths[1], 1.1 * rates[1]))
    right.plot(lengths, rates, "o", color=GREEN, ms=7)
    right.set(xscale="log", yscale="log", xlabel="length of the run $K$ (steps)")
    right.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    right.set_ylabel(r"mean of $\|\nabla L\|^2$ along the run")
    right.set_title(r"SAMAR under noise, $\eta = 1/\sqrt{K}$")
    return figure


def _turns(below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Returns whether runs stay bounded below a threshold and do not above it."""
    return (below < 1e3) & ~(above < 1e3)
