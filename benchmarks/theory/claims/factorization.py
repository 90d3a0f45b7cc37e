"""Scalar factorization: SAM reaches the origin, USAM stops short of it or diverges.

Section 4 of Dai, Ahn and Sra 2023 (arXiv 2305.15287).
"""

from typing import Any

import jax
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from benchmarks.core.precision import float64
from benchmarks.theory.common import Claim, Findings, findings, limit, near, spread
from benchmarks.theory.figures import BLACK, BLUE, COLOURS, ORANGE, note, panels, predicted
from benchmarks.theory.runs import METHODS, paths

START = np.array([2.0, 2.0**0.5])
ETA = 0.05
_EVERY = 4  # steps between two looks at the distance


def loss(w: jax.Array) -> jax.Array:
    """L = (x y)^2 / 2, whose minima are the axes; the flattest of them is the origin."""
    return 0.5 * (w[0] * w[1]) ** 2


def path(method: str, rho: ArrayLike, eta: ArrayLike, steps: int, every: int) -> np.ndarray:
    """Returns points (x, y) on a method's way from the start, by pair of rho and eta."""
    return np.asarray(paths(method, loss, START, rho, eta, steps=steps, every=every))


def arrival(rho: ArrayLike) -> np.ndarray:
    """The steps after which SAM is within rho of the origin, if rho is small.

    It is soon on the axis, at x^2 = x0^2 - y0^2 = 2, and from there x shrinks by 1 - eta rho^2 a
    step.
    """
    return np.log(2**0.5 / np.asarray(rho)) / (ETA * np.asarray(rho) ** 2)


def measure(quick: bool) -> Findings:
    """Measures the claims."""
    steps = 4_000 if quick else 40_000
    side = 8 if quick else 48
    with float64():
        ways = {name: path(name, 0.5, ETA, 200, 1) for name in METHODS}
        rho = np.geomspace(0.2 if quick else 0.05, 1.0, 5 if quick else 13)
        sam = path("SAM", rho, ETA, steps, _EVERY)
        ends = {name: path(name, 0.5, ETA, 5_000, 5_000)[-1] for name in METHODS}
        grid_rho, grid_eta = np.geomspace(0.02, 2, side), np.geomspace(0.01, 0.5, side)
        bounded = {
            name: np.isfinite(
                path(name, grid_rho, grid_eta[:, None], 2_000, 2_000)[..., -1, :]
            ).all(-1)
            for name in METHODS
        }
    distances = np.linalg.norm(sam, axis=-1)
    steps_to = _EVERY * np.argmax(distances <= rho[:, None], axis=1)
    small = rho <= 0.3
    ratio = steps_to[small] / arrival(rho[small])
    modest = (grid_rho <= 1) & (grid_eta[:, None] <= 0.1)
    final = float(0.5 * np.prod(ends["SAM"]) ** 2)
    setting = f"(xy)^2 / 2 from (2, sqrt 2), eta {ETA:g}"
    claims = [
        Claim(
            "USAM diverges",
            f"{setting}, rho .5, 5,000 steps",
            "not finite",
            f"(x, y) = ({ends['USAM'][0]:.3g}, {ends['USAM'][1]:.3g})",
            not np.isfinite(ends["USAM"]).all(),
        ),
        Claim(
            "SAM reaches the minimum there",
            f"{setting}, rho .5, 5,000 steps",
            "loss below 1e-10",
            f"{final:.3g}",
            final < 1e-10,
        ),
        Claim(
            "SAM comes within rho of the origin, the flattest minimum, for rho up to 1",
            f"{setting}, rho {rho[0]:.2g} to 1",
            "||w|| <= rho in the end",
            f"||w|| / rho at most {np.max(distances[:, -1] / rho):.2g}",
            distances[:, -1] <= rho,
        ),
        Claim(
            "it takes SAM ln(sqrt 2 / rho) / (eta rho^2) steps",
            f"{setting}, rho up to .3",
            "ratio 1 within 25 %",
            f"ratio {spread(ratio)}",
            near(ratio, 1, 0.25),
        ),
        Claim(
            "SAM is stable for rho up to O(1), at step sizes where USAM diverges",
            f"the same start, grid of rho .02 to 1, eta .01 to .1, {np.sum(modest)} points",
            "SAM nowhere diverges, USAM somewhere",
            f"SAM diverges at {np.sum(modest & ~bounded['SAM'])}, "
            f"USAM at {np.sum(modest & ~bounded['USAM'])}",
            not np.any(modest & ~bounded["SAM"]) and np.any(modest & ~bounded["USAM"]),
        ),
        limit(
            "with larger steps and rho SAM diverges too, where gradient descent does not",
            f"the same start, grid of rho .02 to 2, eta .01 to .5, {side**2:,} points",
            "at some points",
            f"at {np.sum(bounded['GD'] & ~bounded['SAM'])}; "
            f"USAM at {np.sum(bounded['GD'] & ~bounded['USAM'])}",
            np.any(bounded["GD"] & ~bounded["SAM"]),
        ),
    ]
    return findings(
        claims,
        rho=rho, steps_to=steps_to, grid_rho=grid_rho, grid_eta=grid_eta,
        **{f"path_{name}": points for name, points in ways.items()},
        **{f"bounded_{name}": values for name, values in bounded.items()},
    )  # fmt: skip


def draw(series: dict[str, Any]) -> Figure:
    """Draws what `measure` found."""
    figure, (left, middle, right) = panels(
        "Two numbers to multiply to zero: SAM goes to the origin, USAM stops short or diverges"
    )
    limits = (-2.6, 2.6)
    x, y = np.meshgrid(np.linspace(*limits, 200), np.linspace(*limits, 200))
    left.contour(x, y, 0.5 * (x * y) ** 2, np.geomspace(0.05, 20, 7), colors="0.85", linewidths=0.8)
    for name in ("USAM", "GD", "SAM"):
        points = series[f"path_{name}"]
        left.plot(*points.T, ".-", color=COLOURS[name], label=name, lw=1.1, ms=4)
    left.plot(*START, "o", color=BLACK, ms=6)
    note(left, "start", tuple(START), xytext=(6, 4), textcoords="offset points")
    note(left, "USAM diverges", (-0.9, -2.3), color=ORANGE)
    left.plot(0, 0, "*", color=BLACK, ms=11, zorder=5)
    left.set(xlim=limits, ylim=limits, xlabel="$x$", ylabel="$y$")
    left.set_title(r"200 steps on $(xy)^2/2$, $\rho = 0.5$")
    left.grid(False)
    left.legend(loc="upper left")

    rho = series["rho"]
    predicted(middle, rho, arrival(rho))
    middle.plot(rho, series["steps_to"], "o", color=BLUE, ms=6)
    note(middle, r"$\ln(\sqrt{2}/\rho)\,/\,(\eta\rho^2)$", (rho[2], 1.4 * arrival(rho[2])))
    middle.set(xscale="log", yscale="log", xlabel=r"radius $\rho$")
    middle.set_ylabel(r"steps until $\|(x, y)\| \leq \rho$")
    middle.set_title(r"How soon SAM is within $\rho$ of the origin")

    alone = series["bounded_SAM"] + series["bounded_USAM"]
    shades = ListedColormap(["0.55", "#F6C9A8", "#E4EEF6"])
    right.pcolormesh(
        series["grid_rho"], series["grid_eta"], alone, cmap=shades, vmin=-0.5, vmax=2.5
    )
    right.set(xscale="log", yscale="log", xlabel=r"radius $\rho$", ylabel=r"step size $\eta$")
    for text, place, colour in (
        ("both stable", (0.08, 0.03), BLUE),
        ("only SAM\nstable", (0.75, 0.1), ORANGE),
        ("both\ndiverge", (1.2, 0.36), "white"),
    ):
        note(right, text, place, color=colour, ha="center", va="center", fontsize=10.5)
    right.set_title("Stable pairs of step size and radius")
    right.grid(False)
    return figure
