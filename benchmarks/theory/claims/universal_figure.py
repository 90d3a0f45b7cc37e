"""The figure of `benchmarks.theory.claims.universal`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.theory.claims.universal_problems import FLAT, HESSIAN, SHARP, exact, frob_law
from benchmarks.theory.figures import AMBER, COLOURS, GREEN, ORANGE, PINK, note, panels, predicted

_COLOURS = {**COLOURS, "Trace": GREEN, "Frob": PINK, "Det": ORANGE}


def draw(series: dict[str, Any]) -> Figure:
    """Draws what `universal.measure` found."""
    figure, axes = panels(
        "Universal sharpness: choose what to flatten, and mind the limits", rows=2
    )
    _draw_measures(axes[:3], series)
    _draw_minimization(axes[3:], series)
    return figure


def _draw_measures(axes: Sequence[Axes], data: dict[str, np.ndarray]) -> None:
    stretch = data["stretch"]
    for key, label, colour, marker in (
        ("frobenius", r"$\|H\|_F^2$", PINK, "s"),
        ("trace", r"$\mathrm{tr}\,H$", GREEN, "o"),
        ("lebesgue", r"$\det H$", ORANGE, "D"),
    ):
        predicted(axes[0], stretch, data[f"wanted_{key}"])
        axes[0].plot(stretch, data[f"found_{key}"], marker, color=colour, label=label)
    axes[0].set(xscale="log", yscale="log", ylim=(1.5, 400), xlabel="stretch $c$")
    axes[0].set_xticks([0.5, 1, 2], ["0.5", "1", "2"])
    axes[0].set_ylabel("sharpness of $L(cx, y/c)$")
    axes[0].set_title("Monte Carlo finds them; det is blind to $c$")
    axes[0].legend(loc="upper center", ncols=3, columnspacing=1.0, handletextpad=0.2)

    radii = data["radii"]
    for name, marker in zip(("Trace", "Frob", "Det"), "osD", strict=True):
        errors = data[f"error_{name}"]
        predicted(axes[1], radii, errors[0] * (radii / radii[0]) ** 2)
        axes[1].plot(radii, errors, marker, color=_COLOURS[name], label=f"{name}-SAM")
    note(axes[1], r"$\propto \rho^2$", (0.3, 0.75), xycoords="axes fraction")
    axes[1].set(xscale="log", yscale="log", xlabel=r"radius $\rho$", ylabel="$|R - S|$")
    axes[1].set_title(r"The regularizer tends to the sharpness")
    axes[1].legend(loc="lower right")

    scale = data["scale"]
    for key, label, colour, marker in (
        ("lebesgue", r"Lebesgue $\mu$: $\det sH$", ORANGE, "D"),
        ("gaussian", r"Gaussian $\mu$: $\det(I + sH)$", AMBER, "^"),
    ):
        fine = np.geomspace(scale[0], scale[-1], 50)
        predicted(axes[2], fine, exact(fine[:, None, None] * HESSIAN)[key])
        axes[2].plot(scale, data[f"which_{key}"], marker, color=colour, ms=7, label=label)
    axes[2].set(xscale="log", yscale="log", xlabel="scale $s$ of the Hessian")
    axes[2].set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
    axes[2].set(ylabel="measured determinant", title="Which determinant depends on $\\mu$")
    axes[2].legend(loc="upper left")


def _draw_minimization(axes: Sequence[Axes], data: dict[str, np.ndarray]) -> None:
    for name in ("GD", "SAM", "Trace-SAM", "Frob-SAM"):
        path = data[f"path_{name}"]
        thousands = np.linspace(0, float(data["steps"]) / 1000, len(path))
        colour = _COLOURS[name if name == "SAM" else name.removesuffix("-SAM")]
        axes[0].plot(thousands, path, color=colour, lw=2, label=name)
    for level in (SHARP, FLAT):
        predicted(axes[0], [0, thousands[-1]], [level, level])
    note(axes[0], "flattest minimum: 4", (thousands[-1], 2.3), ha="right")
    axes[0].set(xlabel="step (thousands)", ylabel=r"$\mathrm{tr}\,H$", ylim=(0, 20))
    axes[0].set_title("$(xy-1)^2$ from the sharp end of its minima")
    axes[0].legend(loc="center right")

    weights = data["weights"]
    fine = np.geomspace(weights[0], weights[-1], 50)
    for column, (h, marker) in enumerate(((2, "o"), (4, "s"))):
        predicted(axes[1], fine, frob_law(fine, h))
        axes[1].plot(weights, data["frob"][:, column], marker, color=PINK, label=f"$h = {h}$")
    note(axes[1], r"$2\,/\,(h + \lambda h^2)$", (0.62, 0.82), xycoords="axes fraction")
    axes[1].set(xscale="log", yscale="log", xlabel=r"weight $\lambda$")
    axes[1].set(ylabel=r"largest stable step size $\eta$", title="Frob-SAM's limit: its step size")
    axes[1].legend(loc="lower left")

    lam, dets = data["lam"], data["dets"]
    axes[2].axvline(0.5, color="0.1", ls=(0, (4, 2.5)), lw=1.3)
    predicted(axes[2], [lam[0], 0.5], [FLAT, FLAT])
    axes[2].plot(lam, dets, "D", color=ORANGE, alpha=0.6, ms=5)
    note(axes[2], r"$\lambda = 2/h$", (0.53, 0.93), xycoords=("data", "axes fraction"))
    note(axes[2], "leaves the\nminimum", (1.0, 4.0), color=ORANGE, ha="center")
    axes[2].set(xlabel=r"weight $\lambda$ (one dot per seed)", ylim=(2.5, 6.5))
    axes[2].set(ylabel="$2\\,(x^2 + y^2)$ at the end", title="Det-SAM's limit: its weight, $h = 4$")
