"""A single neuron: where gradient descent, USAM and SAM stop on ell(x y).

Section 4 of Dai, Ahn and Sra 2023 (arXiv 2305.15287).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from benchmarks.core.precision import float64
from benchmarks.theory.common import Claim, Findings, findings, limit, near, spread
from benchmarks.theory.figures import BLUE, COLOURS, GREY, ORANGE, PINK, note, panels, predicted
from benchmarks.theory.runs import METHODS, paths

START = np.array([4.0, 10.0])
GAP = 84.0  # y0^2 - x0^2, which gradient flow conserves
LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "log cosh": lambda z: jnp.logaddexp(z, -z) - jnp.log(2.0),
    "sqrt": lambda z: jnp.sqrt(1 + z**2) - 1,
}
_LOUD = 0.5  # USAM's rho outside its law
_WINDOW = (1e-6, 1e-1)  # of y^2, where SAM's rate is measured
_EVERY = 100


def squares(loss: str, method: str, rho: ArrayLike, eta: ArrayLike, steps: int) -> np.ndarray:
    """Returns y^2 every hundred steps from (4, 10), by pair of rho and eta."""
    ell = LOSSES[loss]
    run = paths(
        method, lambda w: ell(w[0] * w[1]), START, rho, eta,
        steps=steps, every=_EVERY, measure=lambda w: w[1] ** 2,
    )  # fmt: skip
    return np.asarray(run)


def usam_stop(rho: ArrayLike, eta: ArrayLike) -> np.ndarray:
    """Where USAM stops: y^2 with (1 + rho y^2) y^2 = 2 / eta, or y0^2 - x0^2 if that is less.

    With rho = 0 it is gradient descent's.
    """
    rho, eta = np.broadcast_arrays(np.asarray(rho, float), np.asarray(eta, float))
    # The root of rho s^2 + s - 2 / eta, in the form that allows rho = 0.
    return np.minimum(GAP, (4 / eta) / (1 + np.sqrt(1 + 8 * rho / eta)))


def drift(path: np.ndarray) -> float:
    """Returns -d ln y^2 / dt, a step, once y^2 is small."""
    low, high = _WINDOW
    places = np.flatnonzero((path < high) & (path > low))
    return float(-np.polyfit(_EVERY * places, np.log(path[places]), 1)[0])


def measure(quick: bool) -> Findings:
    """Measures the claims."""
    long, short = (20_000, 10_000) if quick else (100_000, 20_000)
    with float64():
        eta = np.geomspace(0.02, 0.2, 4 if quick else 10)
        tiny = np.geomspace(0.0002, 0.2, 4 if quick else 13)
        rho = np.array([0.07, 0.1, 0.15] if quick else [0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2])
        plain = {name: squares(name, "GD", 0.0, eta, short)[:, -1] for name in LOSSES}
        usam = {name: squares(name, "USAM", eta, eta, short)[:, -1] for name in LOSSES}
        loud = squares("log cosh", "USAM", _LOUD, tiny, short)[:, -1]
        known = {name: float(squares(name, "USAM", 0.05, 0.05, short)[-1]) for name in LOSSES}
        sam = {name: squares(name, "SAM", rho, 0.05, long) for name in LOSSES}
        shown = {name: squares("log cosh", name, 0.05, 0.05, 20_000) for name in METHODS}
    rates = np.array([[drift(path) for path in paths] for paths in sam.values()])
    ratio = rates / (2 * 0.05 * rho**2)
    off = {
        name: np.abs(np.sqrt(list(stops.values())) - np.sqrt(usam_stop(radius, eta))) / eta
        for name, stops, radius in (("GD", plain, 0.0), ("USAM", usam, eta))
    }
    law = usam_stop(_LOUD, tiny)
    claims = [
        Claim(
            "gradient descent stops at y^2 = min(y0^2 - x0^2, 2 / eta)",
            "log cosh(xy) and sqrt(1 + (xy)^2) - 1 from (4, 10), eta .02 to .2",
            "y within 2 eta",
            f"{spread(off['GD'], '.2f')} eta away",
            off["GD"] < 2,
        ),
        Claim(
            "USAM stops at (1 + rho y^2) y^2 = 2 / eta",
            "the same, rho = eta",
            "y within 2 eta",
            f"{spread(off['USAM'], '.2f')} eta away",
            off["USAM"] < 2,
        ),
        Claim(
            "USAM stops near y^2 = 20",
            "the same, eta = rho = .05",
            "y^2 in [19.8, 20.0]",
            spread(list(known.values()), ".4g"),
            all(19.8 < value < 20 for value in known.values()),
        ),
        Claim(
            "SAM does not stop: d ln y^2 / dt = -2 eta rho^2 until y^2 = o(1)",
            f"the same, eta .05, rho {rho[0]:g} to {rho[-1]:g}, y^2 below .1",
            "ratio 1 within 6 %",
            f"ratio {spread(ratio, '.4f')}",
            near(ratio, 1, 0.06),
        ),
        limit(
            "for rho far above eta USAM's law fails: y^2 shrinks before x is 0",
            f"log cosh(xy), rho {_LOUD:g}, eta {tiny[0]:g}",
            "more than 10 % below the law",
            f"y^2 = {loud[0]:.1f}, the law has {law[0]:.1f}",
            loud[0] < 0.9 * law[0],
        ),
    ]
    return findings(
        claims,
        eta=eta, plain=plain["log cosh"], usam=usam["log cosh"], tiny=tiny, loud=loud, rho=rho,
        rates=rates, **{f"shown_{name}": path for name, path in shown.items()},
    )  # fmt: skip


def draw(series: dict[str, Any]) -> Figure:
    """Draws what `measure` found."""
    figure, (left, middle, right) = panels(
        "A single neuron: gradient descent and USAM stop once they are stable, SAM drifts on"
    )
    stops = {"GD": usam_stop(0, 0.05), "USAM": usam_stop(0.05, 0.05), "SAM": None}
    for name, stop in stops.items():
        path = series[f"shown_{name}"]
        steps = _EVERY * np.arange(len(path))
        left.plot(steps / 1000, path, color=COLOURS[name], lw=2, label=name)
        if stop is not None:
            predicted(left, [0, steps[-1] / 1000], [stop, stop])
        else:
            half = len(path) // 2
            slow = path[half] * np.exp(-2 * 0.05**3 * (steps - steps[half]))
            later = slice(len(path) // 5, None)
            predicted(left, steps[later] / 1000, slow[later])
    note(left, r"$2/\eta$", (16.5, 46))
    note(left, r"$(1+\rho y^2)\,y^2 = 2/\eta$", (11, 9))
    note(left, r"$e^{-2\eta\rho^2 t}$", (13, 0.75))
    left.set(yscale="log", xlabel="step (thousands)", ylabel="$y^2$")
    left.set_title(r"$\log\cosh(xy)$ from $(4, 10)$, $\eta = \rho = 0.05$")
    left.legend(loc="lower left")

    eta, tiny = series["eta"], series["tiny"]
    fine = np.geomspace(tiny[0], tiny[-1], 100)
    for radius, text, colour, points, label, marker in (
        (0, eta, GREY, series["plain"], "GD", "o"),
        (eta, eta, ORANGE, series["usam"], r"USAM, $\rho = \eta$", "s"),
        (_LOUD, tiny, PINK, series["loud"], rf"USAM, $\rho = {_LOUD:g}$", "D"),
    ):
        middle.plot(text, points, marker, color=colour, label=label)
        grid = fine if np.ndim(radius) == 0 else fine[fine >= eta[0]]
        predicted(middle, grid, usam_stop(grid if np.ndim(radius) else radius, grid))
    note(middle, "$\\rho \\gg \\eta$:\nthe law fails", (tiny[0], 31), color=PINK)
    note(middle, "$y_0^2 - x_0^2$", (tiny[0], 92))
    middle.set(xscale="log", yscale="log", xlabel=r"step size $\eta$", ylim=(2.5, 130))
    middle.set_ylabel("$y^2$ at the end")
    middle.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
    middle.set_title("Where gradient descent and USAM stop")
    middle.legend(loc="lower left")

    rho = series["rho"]
    predicted(right, rho, 2 * 0.05 * rho**2)
    for rates, marker, label in zip(
        series["rates"], "ox", (r"$\log\cosh(xy)$", r"$\sqrt{1+(xy)^2}-1$"), strict=True
    ):
        right.plot(rho, rates, marker, color=BLUE, ms=7, label=label)
    note(right, r"$2\eta\rho^2$", (rho[2], 0.1 * rho[2] ** 2), xytext=(-8, 14),
         textcoords="offset points", ha="right")  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel=r"radius $\rho$")
    right.set_xticks([0.03, 0.05, 0.1, 0.2], ["0.03", "0.05", "0.1", "0.2"])
    right.set_ylabel(r"$-d\,\ln y^2/dt$ (per step)")
    right.set_title("How fast SAM drifts towards flat minima")
    right.legend(loc="lower right")
    return figure
