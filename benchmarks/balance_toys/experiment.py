"""What is measured: one row per toy, method and noise level, and the means over time."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.core import records
from benchmarks.models.toys import BAR_ALPHA, Toy, Trajectory, steps_to_half

EVERY = 100  # steps between two records
Results = Mapping[str, Mapping[str, Trajectory]]  # by toy and method

# Measured independently, with other random numbers: by toy and method, the imbalance at the end
# and the steps to half of it, by noise level. The Tucker-2 problem's shapes were not those here.
_ENDS = {
    ("nop", "SGD"): {0.5: 0.559, 1.0: 0.556},
    ("nop", "SAM"): {0.5: 0.112, 1.0: 0.072},
    ("tucker_large_core", "SGD"): {0.5: 2.00, 2.0: 1.68},
    ("tucker_large_core", "SAM"): {0.5: 1.373, 1.0: 0.895, 1.5: 0.533, 2.0: 0.282},
    ("tucker_large_core", "DAS"): {0.5: 1.393, 1.0: 0.904, 1.5: 0.534, 2.0: 0.280},
}
_HALVES = {("nop", "SAM"): {0.5: 25_600, 1.0: 12_200, 2.0: 6_100}}


def make_record(toys: Mapping[str, Toy], results: Results, seeds: int) -> records.Record:
    """Returns what was measured, as JSON types."""
    return {
        "format": records.FORMAT,
        "settings": {"seeds": seeds, "every": EVERY, "bar_alpha": BAR_ALPHA},
        "hardware": records.hardware(),
        "versions": records.versions(),
        "toys": {
            name: {key: getattr(toy, key) for key in ("rho", "learning_rate", "steps", "rest")}
            for name, toy in toys.items()
        },
        "results": [
            row
            for name, runs in results.items()
            for method, run in runs.items()
            for row in _rows(name, toys[name], method, run)
        ],
    }


def _rows(name: str, toy: Toy, method: str, run: Trajectory) -> list[dict[str, Any]]:
    """One row a noise level."""
    rows = []
    halves = steps_to_half(run.imbalance, EVERY)
    for index, level in enumerate(toy.levels):
        end = run.imbalance[index, :, -1]
        # The median of runs of which most never get there is not a number of steps.
        half = float(np.median(np.nan_to_num(halves[index], nan=np.inf)))
        size = run.size[index]
        rows.append(
            {
                "toy": name,
                "method": method,
                "noise": level,
                "start": float(run.imbalance[index, 0, 0]),
                "end": float(end.mean()),
                "end_std": float(end.std(ddof=1)) if len(end) > 1 else None,
                "steps_to_half": half if np.isfinite(half) else None,
                "covariance": float(np.nanmean(run.covariance[index])),
                "distance": float(run.distance[index, :, -1].mean()),
                "size": float(size[:, -1].mean()),
                "collapsed": bool(np.all(size[:, -1] < 0.1 * size[:, 0])),
                "reference_end": _ENDS.get((name, method), {}).get(level),
                "reference_steps_to_half": _HALVES.get((name, method), {}).get(level),
            }
        )
    return rows


def curves(toys: Mapping[str, Toy], results: Results) -> Iterator[dict[str, Any]]:
    """Yields the means over seeds at about fifty steps of each run."""
    for name, runs in results.items():
        for method, run in runs.items():
            count = run.imbalance.shape[-1]
            for index, level in enumerate(toys[name].levels):
                for record in range(0, count, max(1, count // 50)):
                    place = {"toy": name, "method": method, "noise": level, "step": EVERY * record}
                    means = {
                        field: f"{values[index, :, record].mean():.5g}"
                        for field, values in run._asdict().items()
                    }
                    yield place | means
