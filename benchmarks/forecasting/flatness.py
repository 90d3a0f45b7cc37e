"""What flatness buys: the test error of rounded and noisy weights; and two measures of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks.core.weights import add_noise, quantize
from samax import flatness

BITS = (8, 4, 3, 2)
NOISES = (0.02, 0.05, 0.1, 0.2)
DRAWS = 3
WINDOWS, BATCH = 256, 32
PRODUCTS = 20
RADIUS, STEPS = 0.5, 10
"""Of the worst case: the rho that arXiv 2402.10198 trains with, and the steps of ascent."""


def measure(
    params: Any,
    test_mse: Callable[[Any], float],
    loss_fn: Callable[[Any, jax.Array], jax.Array],
    batches: Sequence[jax.Array],
) -> dict[str, Any]:
    """Returns the relative rises of the test error, the top eigenvalue and the worst case.

    Args:
        params: The trained parameters.
        test_mse: Maps parameters to the test error.
        loss_fn: Maps parameters and a batch to the training loss.
        batches: Of training windows, on which the last two are measured.
    """
    error = test_mse(params)

    def rise(changed: Any) -> float:
        return test_mse(changed) / error - 1

    noises = {}
    for noise in NOISES:
        rises = [rise(add_noise(params, noise, jax.random.key(draw))) for draw in range(DRAWS)]
        noises[f"{noise:g}"] = sum(rises) / DRAWS
    operator = flatness.hessian_operator(loss_fn, params, batches)
    pairs = flatness.top_eigenpairs(operator, params, 1, num_products=PRODUCTS)
    return {
        "rounded": {str(bits): rise(quantize(params, bits)) for bits in BITS},
        "noise": noises,
        "top_eigenvalue": float(pairs.values[0]),
        "residual": float(pairs.residuals[0]),
        "worst_case": float(
            flatness.worst_case_sharpness(loss_fn, params, batches, rho=RADIUS, steps=STEPS)
        ),
    }
