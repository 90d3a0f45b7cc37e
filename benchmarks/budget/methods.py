"""The ways to spend a budget of gradients that `benchmarks.budget` compares.

A step that ascends costs one gradient more than the base optimizer's, or a quarter of one where its
first gradient is of a quarter of the batch; so with the share s of the steps that ascend a step
costs 1 + s, or 1 + s / 4, and the budget buys the fewer epochs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from benchmarks.budget.tasks import TASKS
from benchmarks.core.methods import METHODS as CORE
from benchmarks.core.methods import Method, select

BASE = "base"
# Of a learning rate, a weight decay, a radius, and MSAM's, which is larger: 0.3 to 3 in its paper.
_SGD = {"lr": (0.02, 0.5), "decay": (1e-4, 3e-2), "rho": (0.01, 1.0), "momentum": (0.05, 5.0)}
_SPANS = {
    "images": _SGD,
    "transformer": {**_SGD, "lr": (2e-4, 5e-3), "decay": (1e-4, 1.0)},
    "forecasts": {**_SGD, "lr": (3e-4, 3e-3), "decay": (1e-2, 30.0), "rho": (0.1, 2.0)},
}
_STARTS: dict[str, dict[str, float]] = {
    "images": {"lr": 0.1, "decay": 5e-4},
    "transformer": {"lr": 1e-3, "decay": 1e-2},
    "forecasts": {"lr": 1e-3, "decay": 1.0},
}


def table(task: str) -> dict[str, Method]:
    """Returns the rows for a task; a search starts at the defaults."""
    warms_up = TASKS[task].warms_up
    kind = "forecasts" if TASKS[task].series else "transformer" if warms_up else "images"
    start, spans = _STARTS[kind], _SPANS[kind]
    fixed = {"rho": 0.5} if kind == "forecasts" else {}  # as arXiv 2402.10198 has it

    def row(name: str, radius: str = "rho", **settings: float) -> Method:
        own = CORE[name].defaults
        defaults: Mapping[str, float] = {**start, **own, **(fixed if own else {}), **settings}
        search = {key: spans[key] for key in start} | ({"rho": spans[radius]} if own else {})
        return select(name, defaults, CORE[name].source, search=search)

    def quartered(method: Method, gradients: float) -> Method:
        return dataclasses.replace(method, ascent_share=0.25, gradients=gradients)

    return {
        BASE: row("sgd"),
        "sam": row("sam"),
        **{f"early_{round(100 * s)}": row("sam_early", share=s) for s in (0.25, 0.5)},
        **{f"late_{round(100 * s)}": row("sam_late", share=1 - s) for s in (0.25, 0.5)},
        **{f"every_{k}": row("sam_every", k=k) for k in (4, 2)},
        **{f"random_{round(100 * p)}": row("sam_random", p=p) for p in (0.25, 0.5)},
        # None while the learning rate warms up: arXiv 2406.09723.
        **({"after_warm_up": row("sam_late", share=WARM_UP)} if warms_up else {}),
        "looksam": row("looksam"),
        "quarter": quartered(row("sam"), 1.25),
        "late_25_quarter": quartered(row("sam_late", share=0.75), 1.0625),
        "stale_plus": row("stale_sam"),
        "stale_minus": row("stale_sam_minus"),
        "momentum_minus": row("msam", "momentum"),
        "momentum_plus": row("msam_plus", "momentum"),
        "friendly_sam": row("friendly_sam"),
        "samar": row("samar"),
    }


WARM_UP = 0.05
"""The share of the steps over which Adam's learning rate rises."""
