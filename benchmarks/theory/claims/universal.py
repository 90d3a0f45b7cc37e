"""The universal class: what it measures, what it minimizes, what it is blind to, where it fails.

Tahmasebi et al. 2024 (arXiv 2406.03682).
"""

import numpy as np
import optax

import samax
from benchmarks.core.precision import float64
from benchmarks.theory.claims import universal_problems as problems
from benchmarks.theory.claims.universal_problems import FLAT, HESSIAN, SHARP, exact, recovered
from benchmarks.theory.common import Claim, Findings, findings, limit, listed, near, slope, spread

METHODS = {"Trace": samax.trace_sam, "Frob": samax.frob_sam, "Det": samax.det_sam}


def measure(quick: bool) -> Findings:
    """Measures the claims."""
    samples = 1_000_000 if quick else 4_000_000
    stretch = np.array([1.0, 2.0]) if quick else np.geomspace(0.5, 2, 9)
    zeros = np.zeros_like(stretch)
    maps = np.moveaxis(np.array([[stretch, zeros], [zeros, 1 / stretch]]), -1, 0)
    steps = 10_000 if quick else 20_000
    runs = {
        "GD": (optax.identity(), 0.01),
        "SAM": (samax.sam(0.1), 0.01),
        "Trace-SAM": (
            samax.trace_sam(0.1, sampling=samax.Sampling(samax.gaussian, 2, antithetic=True)),
            0.03,
        ),
        "Frob-SAM": (
            samax.frob_sam(0.05, lam=1.0, sampling=samax.Sampling(samax.gaussian, 4)),
            0.008,
        ),
    }
    with float64():
        hessians = maps.transpose(0, 2, 1) @ HESSIAN @ maps
        found, wanted = recovered(hessians, samples), exact(hessians)
        scale = np.array([1.0] if quick else [0.25, 0.5, 1.0, 2.0, 4.0])
        scaled = scale[:, None, None] * HESSIAN
        which, which_exact = recovered(scaled, samples), exact(scaled)
        larger = recovered(1.5**2 * HESSIAN[None], samples)["lebesgue"][0] / np.linalg.det(HESSIAN)
        radii = np.geomspace(0.01, 0.08, 4 if quick else 7)
        errors = {name: problems.limit_errors(method, radii) for name, method in METHODS.items()}
        every = steps // 200
        paths = {name: problems.bias(tx, eta, steps, every) for name, (tx, eta) in runs.items()}
        lam = np.array([0.3, 0.45, 0.8] if quick else [0.2, 0.3, 0.4, 0.45, 0.6, 0.8, 1.0, 1.5])
        dets, det_losses = problems.det_ends(lam, 2 if quick else 4, 5_000)
        h = np.array([1.0, 4.0])
        det_slopes = problems.det_slope(2 / h * np.array([[0.5], [1.5]]), h)
        weights = np.array([0.3, 3.0] if quick else [0.1, 0.3, 1.0, 3.0, 10.0])[:, None]
        lams, curvatures = np.broadcast_arrays(weights, np.array([2.0, 4.0]))
        effort = (64, 8) if quick else (256, 10)  # samples, halvings
        steps_found = problems.frob_threshold(lams, curvatures, *effort)
        overflows = (problems.det_overflows(log=False), problems.det_overflows(log=True))
        on, off = problems.on_and_off()
        blind, seeing = (
            np.array([problems.scale_changes(method, mu) for method in METHODS.values()])
            for mu in (samax.scaled_by_params(samax.gaussian), samax.gaussian)
        )
    unit = int(np.argmin(np.abs(stretch - 1)))
    unity = {name: found[name][unit] / wanted[name][unit] for name in found}
    slopes = {name: slope(radii, error) for name, error in errors.items()}
    ends = {name: float(path[-20:].mean()) for name, path in paths.items()}
    ratio = steps_found / problems.frob_law(lams, curvatures)
    det_ratio = found["lebesgue"] / wanted["lebesgue"][unit]
    small, large = lam < 0.5, lam > 0.5
    claims = [
        *(
            Claim(
                f"{name} of the Hessian is recovered",
                f"quadratic, 2 dimensions, {samples:,} samples",
                "ratio 1 within 2 %",
                f"{unity[key]:.4f}",
                near(unity[key], 1, 0.02),
            )
            for key, name in (
                ("trace", "trace (Gaussian mu)"),
                ("frobenius", "squared Frobenius norm (Gaussian mu)"),
                ("lebesgue", "determinant (Lebesgue mu)"),
            )
        ),
        Claim(
            "R -> S as rho^2 at a stationary point",
            f"quartic, rho {spread(radii)}, Gaussian pairs v, -v; {', '.join(slopes)}",
            "slope 1.95 to 2.05",
            listed(list(slopes.values()), ".3f"),
            all(1.95 < each < 2.05 for each in slopes.values()),
        ),
        Claim(
            "gradient descent stays at the minimum it starts from",
            "(xy - 1)^2 from (3, 1/3), eta .01",
            f"tr H = {SHARP:.2f} within .01",
            f"{ends['GD']:.4g}",
            abs(ends["GD"] - SHARP) < 0.01,
        ),
        *(
            Claim(
                f"{name} goes to the flattest minimum",
                f"the same, eta {runs[name][1]:g}, {steps:,} steps",
                "tr H = 4 within .1",
                f"{ends[name]:.3f}",
                abs(ends[name] - FLAT) < 0.1,
            )
            for name in ("SAM", "Trace-SAM", "Frob-SAM")
        ),
        Claim(
            "so does Det-SAM with a lambda below .5",
            f"the same, Gaussian mu, rho .3, 32 samples, lambda {spread(lam[small])}",
            "tr H = 4 within .25",
            spread(dets[small].mean(1)),
            np.abs(dets[small].mean(1) - FLAT) < 0.25,
        ),
        Claim(
            "the determinant does not see maps that preserve volume",
            f"L(A w), A = diag(c, 1 / c), c {spread(stretch)}",
            "ratio 1 within 5 %, while tr H changes",
            f"{spread(det_ratio, '.3f')}; tr H {spread(found['trace'] / found['trace'][unit])}",
            near(det_ratio, 1, 0.05) & (np.max(found["trace"]) > 1.5 * found["trace"][unit]),
        ),
        Claim(
            "with v = w z no sharpness sees (x, y) -> (c x, y / c)",
            f"(xy - 1)^2 at (1, 1.2), c = 4; {', '.join(METHODS)}",
            "ratio 1 within 1e-9; without w more than 1.5",
            f"off by {np.max(np.abs(blind - 1)):.0e}; without {listed(seeing)}",
            near(blind, 1, 1e-9) & (seeing > 1.5),
        ),
        limit(
            "with a Gaussian mu it is not det H but det(I + H)",
            f"H times {listed(scale)}",
            "ratio to det(I + H) 1 within 2 %",
            f"{spread(which['gaussian'] / which_exact['gaussian'], '.4f')}; to det H "
            f"{spread(which['gaussian'] / which_exact['lebesgue'])}",
            near(which["gaussian"], which_exact["gaussian"], 0.02),
        ),
        limit(
            "a map that does not preserve volume changes the determinant",
            "A = 1.5 I",
            f"ratio {1.5**4:.4f} within 5 %",
            f"{larger:.4f}",
            near(larger, 1.5**4, 0.05),
        ),
        limit(
            "the determinant tells no minimum of (xy - 1)^2 from another: it is 0 on all of them",
            "x = .5, 1, 3; beside them y is doubled",
            "|det H| below 1e-9; above 1 beside them",
            f"{np.max(np.abs(on)):.0e}; {listed(off)}",
            (np.abs(on) < 1e-9) & (np.abs(off) > 1),
        ),
        limit(
            "Frob-SAM needs eta (h + lambda h^2) < 2",
            f"parabola, h = 2, 4, lambda {spread(weights)}",
            "largest step: ratio 1 within 3 %",
            f"{spread(ratio, '.4f')}",
            near(ratio, 1, 0.03),
        ),
        limit(
            "Det-SAM's direction is (1 - lambda h / 2) g near a minimum: it leads away for "
            "lambda > 2 / h",
            "parabola, h = 1, 4, lambda half of and one and a half times 2 / h, 200,000 samples",
            "0.5 and -0.5 times g, within .03",
            listed(det_slopes.ravel(), ".3f"),
            np.abs(det_slopes - [[0.5], [-0.5]]) < 0.03,
        ),
        limit(
            "so that it leaves the flattest minimum, h = 4, for lambda above .5",
            f"(xy - 1)^2 from (3, 1/3), lambda {spread(lam[large])}; below {spread(lam[small])}",
            "loss above .01; below .5 under .005",
            f"{spread(det_losses[large], '.2g')}; {spread(det_losses[small], '.1g')}",
            (det_losses[large] > 0.01).all() and (det_losses[small] < 0.005).all(),
        ),
        limit(
            "with few samples Det-SAM overflows, its log form does not",
            "the same, rho .1, 4 samples, lambda 2",
            "not finite; finite",
            f"{'not finite' if overflows[0] else 'finite'}; "
            f"{'not finite' if overflows[1] else 'finite'}",
            overflows == (True, False),
        ),
    ]
    return findings(
        claims,
        stretch=stretch, scale=scale, radii=radii, lam=lam, dets=dets, weights=weights[:, 0],
        frob=steps_found, steps=steps,
        **{f"found_{name}": values for name, values in found.items()},
        **{f"wanted_{name}": values for name, values in wanted.items()},
        **{f"which_{name}": which[name] for name in ("lebesgue", "gaussian")},
        **{f"error_{name}": values for name, values in errors.items()},
        **{f"path_{name}": path for name, path in paths.items()},
    )  # fmt: skip
