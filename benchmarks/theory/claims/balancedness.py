"""Two cores: SGD conserves their balancedness, SAM moves it by a law, noise makes that fast.

Li, Zhang and He 2024 (arXiv 2410.14802), on the toys of `benchmarks.balance_toys`, whose results
have the curves of all methods.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks.core.precision import float64
from benchmarks.core.training import descend
from benchmarks.models.toys import Cores, Toy, Trajectory, nop, op, steps_to_half, trajectories
from benchmarks.theory.common import Claim, Findings, findings, limit, listed, near, slope, spread
from benchmarks.theory.figures import BLUE, GREEN, GREY, ORANGE, note, panels, predicted
from benchmarks.theory.runs import law_errors, sam_rate

START = 0.56  # |B| at the start of both toys
_SECONDS = 10  # the papers' 1e5 steps of 1e-4


def law(toy: Toy, cores: Cores, rho: jax.Array | float) -> jax.Array:
    """SAM's dB/dt to first order: rho (gamma_x - gamma_y) / sqrt(gamma_x + gamma_y)."""
    grads = jax.grad(toy.loss)(cores)
    gamma_x, gamma_y = (jnp.sum(grads[name] ** 2) for name in "xy")
    return rho * (gamma_x - gamma_y) / jnp.sqrt(gamma_x + gamma_y)


def product_law(toy: Toy, cores: Cores, rho: jax.Array | float) -> jax.Array:
    """The same for OP, a loss of x^T y: -2 rho |f'| B / sqrt(||x||^2 + ||y||^2)."""
    slope = 2 * (cores["x"] @ cores["y"] - toy.target)
    return -2 * rho * jnp.abs(slope) * toy.imbalance(cores) / optax.tree.norm(cores)


def sgd_drift(eta: float) -> float:
    """Returns how far plain gradient descent on NOP moves B in a fixed time."""
    toy = nop()
    steps = round(_SECONDS / eta)
    _, (first, last) = descend(optax.sgd(eta), toy.loss, toy.start, steps, steps, toy.imbalance)
    return abs(float(last - first))


def integrated_law(toy: Toy, run: Trajectory, every: int) -> np.ndarray:
    """Returns |B| by integrating `product_law` along a run on OP.

    There f' is 2 (x^T y - target), the square root of four times the distance.
    """
    rate = 2 * toy.rho * np.sqrt(4 * run.distance / run.size)
    time = toy.learning_rate * every
    passed = np.cumsum((rate[..., 1:] + rate[..., :-1]) / 2 * time, axis=-1)
    return run.imbalance[..., :1] * np.exp(-np.insert(passed, 0, 0.0, axis=-1))


def measure(quick: bool) -> Findings:
    """Measures the claims."""
    eta = 1e-3 if quick else 1e-4
    steps = round(_SECONDS / eta)
    every = steps // 1000
    seeds = 4
    pace: dict[str, Any] = {"learning_rate": eta, "steps": steps}
    levels = (0.0, 0.5, 1.0, 2.0) if quick else (0.0, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 1.5, 2.0)
    nop_toy = nop()._replace(levels=levels, **pace)
    op_toy = op()._replace(levels=(0.0,), **pace)
    silent = nop()._replace(levels=(0.0,), **pace)
    short = silent._replace(steps=steps // 10)
    with float64():
        radii = np.geomspace(1e-3, 1e-2, 7)
        errors = [
            law_errors(nop(), sam_rate, law, radii),
            law_errors(op(), sam_rate, product_law, radii),
        ]
        etas = np.array([1e-2, 3e-3, 1e-3])
        drifts = [sgd_drift(float(each)) for each in etas]
    runs = {name: trajectories(nop_toy, name, seeds, every) for name in ("SGD", "SAM")}
    quiet = trajectories(silent, "nBAR", 1, every)
    decayed = trajectories(short, "nBAR", 1, every)
    path = trajectories(op_toy, "SAM", 1, every)
    follows = integrated_law(op_toy, path, every)[0, 0]

    noise = np.array(levels)
    ends = {name: run.imbalance[..., -1].mean(1) for name, run in runs.items()}
    sizes = runs["SAM"].size[..., -1].mean(1)
    halves = np.median(steps_to_half(runs["SAM"].imbalance, every), axis=1) * eta / 1e-4
    at = [levels.index(level) for level in (0.5, 1.0, 2.0)]
    loud = noise >= 1.5
    slopes = [slope(radii, error) for error in errors]
    shrinks = slope(etas, drifts)
    half_slope = slope(noise[1:], halves[1:])
    kept = START - eta / 1e-4 * np.array([0.001, 0.004])
    setting = f"NOP, eta {eta:g}, {steps:,} steps, {seeds} seeds"
    claims = [
        *(
            Claim(
                f"SAM: dB/dt = {formula} + O(rho^2)",
                f"{name} at its start, rho .001 to .01",
                "error of slope 1.95 to 2.05 in rho",
                f"{each:.3f}",
                1.95 < each < 2.05,
            )
            for name, formula, each in (
                ("NOP", "rho (gamma_x - gamma_y) / sqrt(gamma_x + gamma_y)", slopes[0]),
                ("OP", "-2 rho |f'| B / sqrt(||x||^2 + ||y||^2)", slopes[1]),
            )
        ),
        Claim(
            "gradient flow conserves B",
            "NOP without noise, time 10, eta .01, .003, .001",
            "gradient descent's drift vanishes with slope 0.9 to 1.1 in eta",
            f"{shrinks:.3f}; {drifts[-1]:.1g} at eta .001",
            0.9 < shrinks < 1.1,
        ),
        Claim(
            "so SGD keeps |B|, noise or not",
            f"{setting}, a = .5, 1",
            f"{listed(kept)} within 0.5 %, from {START}",
            listed(ends["SGD"][at[:2]], ".4f"),
            near(ends["SGD"][at[:2]], kept, 0.005),
        ),
        Claim(
            "SAM cuts |B|",
            f"{setting}, a = .5, 1, rho .1",
            "0.112, 0.072 within 5 %",
            listed(ends["SAM"][at[:2]], ".4f"),
            near(ends["SAM"][at[:2]], [0.112, 0.072], 0.05),
        ),
        Claim(
            "noise speeds it up: steps to half",
            f"{setting}, a = .5, 1, 2, in steps of 1e-4",
            "25,600, 12,200, 6,100 within 3 %",
            listed(halves[at], ",.0f"),
            near(halves[at], [25_600, 12_200, 6_100], 0.03),
        ),
        Claim(
            "the steps to half are as 1 / a",
            f"{setting}, a {spread(noise[1:])}",
            "slope -1.1 to -0.9",
            f"{half_slope:.3f}",
            -1.1 < half_slope < -0.9,
        ),
        limit(
            "at the minimum, nearer than rho, the law fails: it stops with f', SAM goes on",
            f"OP without noise, rho {op_toy.rho:g}, eta {eta:g}, {steps:,} steps",
            "|B| below half of the law's integral",
            f"{path.imbalance[0, 0, -1]:.3g}, the law has {follows[-1]:.3g}",
            path.imbalance[0, 0, -1] < follows[-1] / 2,
        ),
        limit(
            "under loud noise SAM shrinks both cores to 0, which is no balance",
            f"{setting}, a >= 1.5",
            f"||x||^2 + ||y||^2 below 1e-4, from {runs['SAM'].size[0, 0, 0]:.2f}",
            f"at most {np.max(sizes[loud]):.0e}",
            sizes[loud] < 1e-4,
        ),
        limit(
            "without noise SAM raises |B|",
            f"{setting}, a = 0",
            f"above {START}",
            f"{ends['SAM'][0]:.4f}",
            ends["SAM"][0] > 1.05 * START,
        ),
        limit(
            "so does nBAR, if its alpha is not soon 0",
            "the same, alpha from .5 to 0 over the run",
            f"above {START}",
            f"{quiet.imbalance[0, 0, -1]:.3g}",
            quiet.imbalance[0, 0, -1] > 1.05 * START,
        ),
        Claim(
            "with an alpha that decays in time nBAR balances",
            "the same, alpha from .5 to 0 over a tenth of the run, which then ends",
            f"below {START}",
            f"{decayed.imbalance[0, 0, -1]:.3g}",
            decayed.imbalance[0, 0, -1] < START,
        ),
    ]
    thin = slice(None, None, 10)
    return findings(
        claims,
        radii=radii, errors=errors, noise=noise, halves=halves,
        end_sam=ends["SAM"], end_sgd=ends["SGD"], sizes=sizes,
        time=eta * every * np.arange(path.imbalance.shape[-1])[thin],
        op=path.imbalance[0, 0, thin], law=follows[thin],
        drift=runs["SGD"].imbalance[levels.index(0.5), 0, thin],
    )  # fmt: skip


def draw(series: dict[str, Any]) -> Figure:
    """Draws what `measure` found."""
    figure, (first, second, third, fourth) = panels(
        "Two cores: SGD conserves their balance, SAM moves it, the faster the louder the noise",
        rows=2,
        columns=2,
    )
    radii = series["radii"]
    for name, errors, style in zip(
        ("NOP", "OP"), series["errors"], ({"ms": 9, "mfc": "none", "mew": 1.6}, {}), strict=True
    ):
        predicted(first, radii, errors[-1] * (radii / radii[-1]) ** 2)
        first.plot(radii, errors, "o", color=BLUE if style else GREEN, label=name, **style)
    note(first, r"$\propto \rho^2$", (radii[2], 2.2 * errors[2]))
    first.set(xscale="log", yscale="log", xlabel=r"radius $\rho$")
    first.set_ylabel(r"error of the law for $dB/dt$")
    first.set_title(
        r"$dB/dt = \rho\,(\gamma_x-\gamma_y)\,/\sqrt{\gamma_x+\gamma_y} + O(\rho^2)$ for SAM"
    )
    first.legend(loc="lower right")

    thousands = series["time"] / 0.1  # in steps of 1e-4
    predicted(second, thousands[[0, -1]], [START, START])
    second.plot(thousands, series["drift"], color=GREY, lw=2, label="SGD (NOP, $a = 0.5$)")
    second.plot(thousands, series["op"], color=BLUE, lw=2, label="SAM (OP, no noise)")
    predicted(second, thousands, series["law"])
    second.set(xlabel=r"step (thousands, $\eta = 10^{-4}$)", ylabel="$|B|$", ylim=(0, 0.62))
    note(second, "the law stops at the minimum", (thousands[-1], 0.47), ha="right")
    second.set_title("SGD conserves $|B|$; SAM goes on where its law stops")
    second.legend(loc="upper right", bbox_to_anchor=(1, 0.72))

    noise = series["noise"]
    halves = series["halves"] / 1000
    one = halves[noise == 1][0]
    predicted(third, noise[1:], one / noise[1:])
    third.plot(noise[1:], halves[1:], "o", color=BLUE, ms=6)
    note(third, r"$\propto 1/a$", (0.55, 1.15 * one / 0.55))
    third.set(xscale="log", yscale="log", xlabel="noise level $a$ (NOP)")
    third.set_ylabel("steps until $|B|$ is halved (thousands)")
    third.set_xticks([0.25, 0.5, 1, 2], ["0.25", "0.5", "1", "2"])
    third.set_yticks([10, 20, 50], ["10", "20", "50"])
    third.set_title("Noise makes SAM balance sooner")

    predicted(fourth, noise, np.full_like(noise, START))
    note(fourth, "$|B|$ at the start", (noise[-1], START + 0.03), ha="right")
    fourth.plot(noise, series["end_sgd"], "s", color=GREY, ms=5, label="$|B|$, SGD")
    fourth.plot(noise, series["end_sam"], "o-", color=BLUE, lw=1.4, label="$|B|$, SAM")
    fourth.plot(
        noise, series["sizes"], "D-", color=ORANGE, lw=1.4, label=r"$\|x\|^2 + \|y\|^2$, SAM"
    )
    fourth.axvspan(1.2, noise[-1] + 0.1, color=ORANGE, alpha=0.1, lw=0)
    note(fourth, "SAM shrinks\nboth to 0", (1.63, 0.25), color=ORANGE, ha="center")
    note(fourth, "no noise:\nSAM raises $|B|$", (0.02, 0.72), color=BLUE)
    fourth.set(xlabel="noise level $a$ (NOP)", ylim=(-0.05, 1.7), xlim=(-0.1, noise[-1] + 0.1))
    fourth.set(ylabel="at the end of the run", title="Where it fails: no noise, and too much of it")
    fourth.legend(loc="upper right")
    return figure
