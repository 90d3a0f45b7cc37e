"""Three cores: the law of the norm deviation under SAM, and DAS that mimics it.

Cao, Atarashi and Kashima 2025 (arXiv 2508.10435), on the Tucker-2 toys of
`benchmarks.balance_toys`, whose results have the curves over time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import samax
from benchmarks.core.precision import float64
from benchmarks.models.toys import Cores, Toy, toys, trajectories
from benchmarks.theory.common import Claim, Findings, findings, limit, listed, near, slope
from benchmarks.theory.figures import BLUE, GREEN, GREY, ORANGE, note, panels, predicted
from benchmarks.theory.runs import flow_rate, law_errors, sam_rate

CASES = {"large": "tucker_large_core", "small": "tucker_small_core"}
_REFERENCE = {0.5: 1.373, 1.0: 0.895, 1.5: 0.533, 2.0: 0.282}  # SAM's Q, measured independently
_RHO = 1e-3  # for the law at many points


def law(toy: Toy, cores: Cores, rho: jax.Array | float) -> jax.Array:
    """SAM's dQ/dt to first order: 4 rho u K Cov(||G||^2, gamma)."""
    grads = jax.grad(toy.loss)(cores)
    covariance = samax.gradient_covariance(cores, grads, toy.groups)["cores"]
    return 4 * rho / optax.tree.norm(grads) * len(cores) * covariance


def das_rate(toy: Toy, cores: Cores, rho: jax.Array | float) -> jax.Array:
    """The dQ/dt of DAS with alpha = rho."""
    tx = samax.das(optax.sgd(1.0), learning_rate=1.0, alpha=rho, groups=toy.groups)
    return flow_rate(tx, toy.loss, cores, toy.imbalance)


def random_cores(toy: Toy, count: int) -> tuple[Cores, jax.Array]:
    """Returns Gaussian cores of random norms and noisy samples of the target, as stacks."""

    def draw(key: jax.Array) -> tuple[Cores, jax.Array]:
        norms_key, noise_key, *keys = jax.random.split(key, 2 + len(toy.start))
        norms = jax.random.uniform(norms_key, (len(keys),), minval=0.3, maxval=1.6)
        cores = {}
        for norm, each, (name, core) in zip(norms, keys, toy.start.items(), strict=True):
            direction = jax.random.normal(each, np.shape(core))
            cores[name] = norm * direction / jnp.linalg.norm(direction)
        noise = jax.random.normal(noise_key, toy.target.shape)
        return cores, toy.target + 2 * toy.spread * noise

    return jax.vmap(draw)(jax.random.split(jax.random.key(0), count))


def measure(quick: bool) -> Findings:
    """Measures the claims."""
    eta, steps, seeds = (1e-2, 5_000, 1) if quick else (1e-3, 50_000, 4)
    levels = (1.0,) if quick else (0.5, 1.0, 1.5, 2.0)
    pace: dict[str, Any] = {"learning_rate": eta, "steps": steps, "levels": levels}
    large = toys()[CASES["large"]]
    with float64():
        radii = np.geomspace(1e-3, 1e-2, 7)
        errors = {
            name: law_errors(large, rate, law, radii)
            for name, rate in (("SAM", sam_rate), ("DAS", das_rate))
        }
        drawn = random_cores(large, 300)

        def both(cores: Cores, target: Any) -> tuple[jax.Array, jax.Array]:
            toy = large._replace(target=target)
            return law(toy, cores, _RHO) / _RHO, sam_rate(toy, cores, _RHO) / _RHO

        expected, rates = (np.asarray(each) for each in jax.jit(jax.vmap(both))(*drawn))
    runs = {
        case: {
            method: trajectories(toys()[name]._replace(**pace), method, seeds)
            for method in ("SGD", "SAM", "DAS")
        }
        for case, name in CASES.items()
    }
    ends = {
        case: {method: run.imbalance[..., -1].mean(1) for method, run in methods.items()}
        for case, methods in runs.items()
    }
    start = float(runs["large"]["SGD"].imbalance[0, 0, 0])
    covariances = {
        # The first steps fit the target; what counts is the long time afterwards.
        case: methods["SAM"].covariance[..., steps // 200 :].mean((1, 2))
        for case, methods in runs.items()
    }
    steep = slope(radii, errors["SAM"])
    off = np.max(np.abs(rates - expected)) / np.ptp(expected)
    clear = np.abs(expected) > 0.02 * np.ptp(expected)
    agree = np.mean(np.sign(rates[clear]) == np.sign(expected[clear]))
    effect = ends["large"]["SGD"] - ends["large"]["SAM"]
    gap = np.abs(ends["large"]["DAS"] - ends["large"]["SAM"])
    raised = [ends["small"][name] for name in ("SAM", "DAS")]
    setting = f"Tucker-2, rho = alpha = .01, eta {eta:g}, {steps:,} steps, {seeds} seeds"
    noise = f"a = {listed(levels)}"
    claims = [
        Claim(
            "SAM: dQ/dt = 4 rho u K Cov(||G||^2, gamma) + O(rho^2)",
            "Tucker-2 with a large core at its start, rho .001 to .01",
            "error of slope 1.95 to 2.05 in rho",
            f"{steep:.3f}",
            1.95 < steep < 2.05,
        ),
        Claim(
            "DAS with alpha = rho has the same dQ/dt, without the O(rho^2)",
            "the same",
            "error below 1e-12",
            f"at most {np.max(errors['DAS']):.0e}",
            errors["DAS"] < 1e-12,
        ),
        Claim(
            "the covariance decides whether SAM raises or lowers Q",
            f"Tucker-2, 300 random triples of cores and noisy samples, rho {_RHO:g}",
            "sign of Cov; dQ/dt within 1 % of its range",
            f"sign agrees in {100 * agree:.0f} %, dQ/dt within {100 * off:.2f} %",
            agree == 1 and off < 0.01,
        ),
        Claim(
            "with a large core the covariance is negative and SAM lowers Q",
            f"{setting}, {noise}",
            "Cov < 0 and Q 0.5 or more below SGD's",
            f"{listed(effect)} below",
            (covariances["large"] < 0).all() and (effect > 0.5).all(),
        ),
        Claim(
            "DAS mimics SAM at the cost of SGD",
            "the same",
            "Q at the end within 6 % of what SAM does to it",
            f"{listed(ends['large']['DAS'])}: {100 * np.max(gap / effect):.1f} % at most",
            (effect > 0) & (gap < 0.06 * effect),
        ),
        limit(
            "with a small core the covariance is positive, and both raise Q",
            f"{setting}, {noise}",
            f"Cov > 0 and Q above {start:.2f}",
            f"SAM {listed(raised[0])}; DAS {listed(raised[1])}",
            (covariances["small"] > 0).all() and np.min(raised) > 1.01 * start,
        ),
    ]
    if not quick:  # where steps are larger Q ends elsewhere
        reference = np.array([_REFERENCE[level] for level in levels])
        claims.insert(
            4,
            Claim(
                "to what was measured independently, for cores of the same norms",
                "the same",
                f"{listed(reference)} within 10 %, from {start:.2f}",
                listed(ends["large"]["SAM"]),
                near(ends["large"]["SAM"], reference, 0.1),
            ),
        )
    return findings(
        claims,
        radii=radii, error_sam=errors["SAM"], expected=expected,
        rates=rates, levels=levels, start=start,
        **{
            f"{case}_{method}": values
            for case, methods in ends.items()
            for method, values in methods.items()
        },
    )  # fmt: skip


def draw(series: dict[str, Any]) -> Figure:
    """Draws what `measure` found."""
    figure, (left, middle, right) = panels(
        "Three cores: gradients' norms decide what SAM does to the cores' norms, and DAS copies it"
    )
    radii, errors = series["radii"], series["error_sam"]
    predicted(left, radii, errors[-1] * (radii / radii[-1]) ** 2)
    left.plot(radii, errors, "o", color=BLUE, ms=6)
    note(left, r"$\propto \rho^2$", (radii[2], 2.4 * errors[2]))
    note(left, "DAS: no error but rounding", (radii[2], 1.3 * errors[0]), color=GREEN)
    left.set(xscale="log", yscale="log", xlabel=r"radius $\rho$")
    left.set_ylabel("SAM's error of the law for $dQ/dt$")
    left.set_title(r"$dQ/dt = 4\rho u K\,\mathrm{Cov}(\|G\|^2, \|g\|^2) + O(\rho^2)$")

    expected, rates = series["expected"], series["rates"]
    ends = np.array([expected.min(), expected.max()])
    middle.axhline(0, color=GREY, lw=0.8)
    middle.axvline(0, color=GREY, lw=0.8)
    middle.plot(expected, rates, "o", color=BLUE, ms=4, alpha=0.35, mew=0)
    predicted(middle, ends, ends)
    note(middle, "$Q$ rises", (0.04, 0.94), xycoords="axes fraction", color=ORANGE)
    note(middle, "$Q$ falls", (0.04, 0.8), xycoords="axes fraction", color=GREEN)
    middle.set_ylim(1.15 * ends[0], -0.15 * ends[0])
    middle.locator_params(nbins=6)
    middle.set(xlabel=r"law: $4uK\,\mathrm{Cov}$", ylabel=r"SAM: $(dQ/dt)\,/\,\rho$")
    middle.set_title("300 random triples of cores, noisy samples")

    levels = series["levels"]
    predicted(right, levels, np.full_like(levels, series["start"]))
    for case in CASES:
        for method, colour, marker, size in (
            ("SGD", GREY, "^", 5), ("SAM", BLUE, "o", 9), ("DAS", GREEN, "s", 4)
        ):  # fmt: skip
            right.plot(
                levels, series[f"{case}_{method}"], marker, ls="-", color=colour, ms=size,
                lw=1.2, label=method if case == "large" else None,
            )  # fmt: skip
    note(right, "small core: both raise $Q$", (levels[0], 2.38), color=ORANGE)
    note(right, "large core:\nboth lower it", (levels[0], 0.75), color=BLUE)
    right.set(xlabel="noise level $a$", ylabel="$Q$ at the end", ylim=(0, 2.6))
    right.set_title("DAS does what SAM does")
    right.legend(loc="lower left")
    return figure
