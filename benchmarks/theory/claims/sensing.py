"""Over-parameterized matrix sensing: SAM is stable where USAM is not, and walks to flat minima.

Section 5 of Dai, Ahn and Sra 2023 (arXiv 2305.15287). The constants that the paper does not give
(the loss's factor, a target of norm 1, the seeds) are this library's choice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from benchmarks.core.precision import float64
from benchmarks.core.training import descend
from benchmarks.theory.common import Claim, Findings, findings, limit, spread
from benchmarks.theory.figures import BLUE, COLOURS, GREEN, GREY, SKY, note, panels, predicted
from benchmarks.theory.runs import METHODS

SIZE, MEASUREMENTS = 10, 20
_WALK_ETA = 0.05


class Sensing(NamedTuple):
    """Measurements <A_i, X> of a matrix X of rank 1; a stack of problems has a leading axis."""

    matrices: Any  # The symmetric A_i, of shape (measurements, size, size)
    values: Any  # What they measure
    start: Any  # Where U starts, of shape (size, size), so that the model U U^T can have any rank


def problem(seed: int) -> Sensing:
    """Returns a problem with Gaussian measurements and a start of standard deviation 0.3."""
    rng = np.random.default_rng(seed)
    matrices = rng.standard_normal((MEASUREMENTS, SIZE, SIZE))
    target = rng.standard_normal(SIZE)
    target /= np.linalg.norm(target)
    values = np.einsum("mij,i,j->m", matrices, target, target)
    start = 0.3 * rng.standard_normal((SIZE, SIZE))
    return Sensing((matrices + matrices.transpose(0, 2, 1)) / 2, values, start)


def loss(problem: Sensing, u: jax.Array) -> jax.Array:
    """L(U) = 1 / 4m sum_i (<A_i, U U^T> - b_i)^2."""
    flat = jnp.reshape(problem.matrices, (MEASUREMENTS, -1))
    return jnp.sum((flat @ (u @ u.T).ravel() - problem.values) ** 2) / (4 * MEASUREMENTS)


def hessian(problem: Sensing, u: jax.Array) -> jax.Array:
    """The Hessian of the loss, of shape (size^2, size^2)."""
    return jax.hessian(lambda flat: loss(problem, flat.reshape(SIZE, SIZE)))(u.ravel())


def follow(
    problems: Sensing,
    method: str,
    rho: ArrayLike,
    eta: float,
    steps: int,
    every: int,
    *,
    look: Callable[[Sensing, jax.Array], Any],
) -> Any:
    """Follows a method from where the problems start.

    Returns:
        What `look` finds on the way, of shape (radii, problems, records).
    """

    def run(rho: jax.Array, problem: Sensing) -> Any:
        tx = optax.chain(METHODS[method](rho), optax.sgd(eta))
        own_loss, own_look = partial(loss, problem), partial(look, problem)
        return descend(tx, own_loss, problem.start, steps, every, own_look)[1]

    over_problems = jax.vmap(run, (None, 0))
    found = jax.jit(jax.vmap(over_problems, (0, None)))(jnp.asarray(rho), problems)
    return jax.tree.map(np.asarray, found)


def walk(problem: Sensing, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The distance from where a problem starts, and the trace of the Hessian."""
    return jnp.linalg.norm(u - problem.start), jnp.trace(hessian(problem, u))


def measure(quick: bool) -> Findings:
    """Measures the claims."""
    steps = 2_000 if quick else 20_000
    with float64():
        drawn = [problem(seed) for seed in range(2 if quick else 5)]
        problems = Sensing(*(np.stack(parts) for parts in zip(*drawn, strict=True)))
        rho = np.array([0.1, 0.3, 0.5] if quick else [0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5])
        ends = {
            name: follow(problems, name, rho, 0.1, 5_000, 5_000, look=loss)[..., -1]
            for name in METHODS
        }
        curves = {
            name: follow(problems, name, [0.3], 0.1, 1_000, 1, look=loss)[0] for name in METHODS
        }
        ends_of_gd = follow(problems, "GD", [0.0], 0.1, 20_000, 20_000, look=lambda _, u: u)
        found = problems._replace(start=ends_of_gd[0, :, -1])
        radii = np.array([0.1, 0.3] if quick else [0.03, 0.1, 0.3])
        moved, traces = {}, {}
        for name in METHODS:
            walks = follow(found, name, radii, _WALK_ETA, steps, steps // 40, look=walk)
            moved[name], traces[name] = walks
        each = [Sensing(*parts) for parts in zip(*found, strict=True)]
        tops = np.array([np.linalg.eigvalsh(hessian(one, one.start))[-1] for one in each])
        left = follow(found, "USAM", [0.3], 0.1, 20_000, 20_000, look=walk)[0][0, :, -1]
    shown = np.unique(np.geomspace(1, 1_001, 100).round().astype(int)) - 1
    loud = rho >= 0.3
    still = max(np.max(moved[name]) for name in ("GD", "USAM"))
    share = traces["SAM"][..., -1] / traces["SAM"][..., 0]
    unstable = 0.1 * (tops + 0.3 * tops**2) > 2
    others = left[~unstable]
    largest = f"{others.max():.0e}" if len(others) else "none"
    setting = f"d = 10, rank 1, 20 measurements, {len(drawn)} seeds"
    radii_text = ", ".join(f"{radius:g}" for radius in radii)
    claims = [
        Claim(
            "USAM diverges at rho where SAM does not",
            f"{setting}, start 0.3 N(0, 1), eta .1, rho .3 to .5",
            "USAM not finite in all runs",
            f"not finite in {np.sum(~np.isfinite(ends['USAM'][loud]))} of "
            f"{ends['USAM'][loud].size}",
            not np.isfinite(ends["USAM"][loud]).any(),
        ),
        Claim(
            "SAM's loss stays small there",
            "the same, after 5,000 steps",
            "below .02",
            f"at most {np.max(ends['SAM'][loud]):.2g}",
            ends["SAM"][loud] < 0.02,
        ),
        Claim(
            "started at a minimum, gradient descent and USAM stay",
            f"{setting}, GD's minima, eta {_WALK_ETA:g}, rho {radii_text}, {steps:,} steps",
            "moved less than 5e-15",
            f"at most {still:.1g}",
            still < 5e-15,
        ),
        Claim(
            "SAM walks from there to flat minima",
            "the same",
            "tr H below 0.4 of its start",
            spread(share),
            share < 0.4,
        ),
        limit(
            "USAM leaves a minimum that is too sharp for it: eta (h + rho h^2) > 2, h the largest "
            "eigenvalue",
            f"the same minima, eta .1, rho .3, h {spread(tops)}",
            f"leaves {np.sum(unstable)} of {len(tops)}",
            f"leaves {np.sum(left > 1e-6)}, at most {largest} from the others",
            np.array_equal(left > 1e-6, unstable),
        ),
    ]
    return findings(
        claims,
        rho=rho, radii=radii, steps=steps, shown=shown,
        **{f"end_{name}": values for name, values in ends.items()},
        **{f"curve_{name}": values[:, shown] for name, values in curves.items()},
        **{f"trace_{name}": values / values[..., :1] for name, values in traces.items()},
    )  # fmt: skip


def draw(series: dict[str, Any]) -> Figure:
    """Draws what `measure` found."""
    figure, (left, middle, right) = panels(
        "Matrix sensing: SAM is stable where USAM is not, and walks along the minima to flat ones"
    )
    shown = 1 + series["shown"]
    for name, colour in COLOURS.items():
        curves = series[f"curve_{name}"]
        left.plot(shown, np.where(curves < 1e9, curves, np.nan).T, color=colour, lw=1.3)
        left.plot([], color=colour, lw=2, label=name)
    note(left, "USAM\ndiverges", (1.2, 1e3), color=COLOURS["USAM"])
    left.set(xscale="log", yscale="log", ylim=(1e-16, 1e6), xlabel="step", ylabel="loss $L(U)$")
    left.set_title(r"From a random start, $\rho = 0.3$, $\eta = 0.1$")
    left.legend(loc="lower left")

    rho = series["rho"]
    for name, marker in (("SAM", "o"), ("USAM", "s")):
        ends = series[f"end_{name}"]
        gone = ~np.isfinite(ends).all(-1)
        # What is at the floor has converged to rounding.
        middle.plot(rho, np.maximum(ends, 1e-14), marker, color=COLOURS[name], ms=5, alpha=0.8)
        middle.plot(rho[gone], np.full(gone.sum(), 1e3), "X", color=COLOURS["USAM"], ms=8)
    middle.axhline(0.02, color=GREY, lw=1, ls=":")
    note(middle, "USAM diverges", (rho[-1], 1e4), color=COLOURS["USAM"], ha="right")
    note(middle, "USAM converges", (rho[0], 1e-13), color=COLOURS["USAM"])
    note(middle, "SAM, one dot per seed", (rho[-1], 1e-5), color=BLUE, ha="right")
    note(middle, "0.02", (rho[0], 0.04), color=GREY)
    middle.set(xscale="log", yscale="log", ylim=(1e-16, 1e6), xlabel=r"radius $\rho$")
    middle.set_xticks([0.03, 0.1, 0.3], ["0.03", "0.1", "0.3"])
    middle.set(ylabel="loss after 5,000 steps", title=r"The usable radii, $\eta = 0.1$")

    records = series["trace_GD"].shape[-1]
    steps = np.linspace(0, series["steps"], records) / 1000
    predicted(right, steps[[0, -1]], [1, 1])
    right.plot(steps, series["trace_GD"][0].T, color=GREY, lw=1.2)
    right.plot(steps, series["trace_USAM"][-1].T, color=COLOURS["USAM"], lw=1.2)
    for curves, radius, colour in zip(
        series["trace_SAM"], series["radii"], (SKY, GREEN, BLUE), strict=False
    ):
        right.plot(steps, curves.T, color=colour, lw=1.2)
        right.plot([], color=colour, lw=2, label=rf"SAM, $\rho = {radius:g}$")
    note(right, "gradient descent, USAM", (steps[-1], 1.02), ha="right", color=COLOURS["USAM"])
    right.set(xlabel="step (thousands)", ylim=(0, 1.12))
    right.set_ylabel(r"$\mathrm{tr}\,H$, relative to the start")
    right.set_title("From a minimum that gradient descent found")
    right.legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    return figure
