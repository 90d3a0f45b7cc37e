"""The tables and targets of `benchmarks.step_time`, from its record alone.

python -m benchmarks.step_time.report DIR [DIR ...]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core import command, frames, records
from benchmarks.core.timing import Compiled, show, spread, verdict
from benchmarks.step_time import figures

_MIB = 2**20
_REFERENCES = ("base", "limit", "optax_opaque", "optax_transparent")

_NOTES = """\
Ratio, time: the method's time over the base optimizer's in the same round; median with its
quartiles. FLOPs: what XLA states, over the base optimizer's. Lower: tracing and lowering in Python.
Compile: XLA. Temp, args: the compiled program's peak temporary and its argument memory. A target
about time compares two methods round by round, in brackets the 95 % confidence interval of the
median; *within noise* means that the median misses the bound and the interval does not.
"""

# Method, the one it is compared with, the bound on the ratio of their times, and the claim.
_UPDATE = (("sam", "base", 3.0, "overhead of sam under 3x AdamW's update"),)
_LORA = (
    ("sam", "base", 2.1, "sam at most 2.1x AdamW"),
    *((name, "base", 1.03, f"{name} at most 1.03x AdamW") for name in ("nbar", "obar", "das")),
)
_TRAINING = (
    ("sam", "limit", 1.02, "sam within 2 % of the hand-written step"),
    ("sam", "optax_opaque", 1.0, "sam not slower than optax.contrib.sam, opaque"),
    ("sam", "optax_transparent", 1.0, "sam not slower than optax.contrib.sam, two calls"),
    ("sam_quarter", "base", 1.3, "clean gradient on a quarter of the batch: at most 1.3x"),
    ("das", "base", 1.05, "das at most 1.05x the base optimizer"),
)
_COSTS = (
    ("stale_sam", "base", 1.03, "stale_sam at most 1.03x the base optimizer"),
    ("msam", "base", 1.03, "msam at most 1.03x the base optimizer"),
    ("sam_every_5", "base", 1.2, "sam_every_5 at most 1.2x the base optimizer, 1 + share"),
    ("before_late_phase", "base", 1.03, "before_late_phase at most 1.03x the base optimizer"),
    ("sam_quarter", "base", 1.3, "sam_quarter at most 1.3x the base optimizer"),
)
_GRADIENTS = {"stale_sam": 1.0, "msam": 1.0, "sam_every_5": 1.2, "before_late_phase": 1.0}
_DECODER = "decoder", "decoder_remat"
_CLAIMS = {"lora": _LORA, "costs": _COSTS, **dict.fromkeys(_DECODER, _LORA)}
# By problem of adapters: memory over AdamW's, at most; SAM's may have the first of these.
_MEMORY = {"lora": 1.1, **dict.fromkeys(_DECODER, 1.01)}
_COPIES = "temporary memory of sam at most one parameter copy above the hand-written step's"


def method_record(
    seconds: Mapping[str, np.ndarray], name: str, program: Compiled | None
) -> dict[str, Any]:
    """Returns one method's results as JSON types."""
    parts = ("lower_seconds", "compile_seconds", "argument_bytes", "temp_bytes", "flops")
    return {
        "seconds": float(np.median(seconds[name])),
        # Over every method that targets compare with, not the base alone: a quotient of two
        # medians would bring the noise back that the rounds are there to cancel.
        "ratio": {
            other: spread(seconds[name] / seconds[other])._asdict()
            for other in _REFERENCES
            if other in seconds
        },
        **{part: getattr(program, part, None) for part in parts},
    }


def targets(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns the targets that the measured problems and methods have something to say about."""
    found = []

    def add(problem: str, claim: str, measured: str, verdict: str) -> None:
        found.append({"problem": problem, "claim": claim, "found": measured, "verdict": verdict})

    for name, problem in results.items():
        claims = _UPDATE if name.startswith("pytree") else _CLAIMS.get(name, _TRAINING)
        methods = problem["methods"]
        for method, other, bound, claim in claims:
            if method in methods and other in methods:
                ratio = methods[method]["ratio"][other]
                add(name, claim, show(ratio), verdict(ratio, bound))
        if name == "costs":
            for method, claim, measured, good in _counted(problem):
                add(name, f"{method}: {claim}", measured, "met" if good else "not met")
        if name in _MEMORY:
            for method, claim, value, bound in _work(methods, _MEMORY[name]):
                met = "met" if value <= bound else "not met"
                add(name, f"{method}: {claim} at most {bound:g}x", f"{value:.6f}", met)
        if "sam" in methods and "limit" in methods and methods["sam"]["temp_bytes"] is not None:
            more = methods["sam"]["temp_bytes"] - methods["limit"]["temp_bytes"]
            copies = more / problem["parameter_bytes"]
            add(name, _COPIES, f"{copies:+.3f} copies", "met" if copies <= 1 else "not met")
    return found


def _counted(problem: Mapping[str, Any]) -> list[tuple[str, str, str, bool]]:
    """Gradients a step, and memory where there is one: what was found, and whether that is met."""
    methods, found = problem["methods"], []
    for name, wanted in _GRADIENTS.items():
        if name not in methods:
            continue
        row, base = methods[name], methods["base"]
        gradients = row["gradients"]
        claim = f"{wanted:.2f} gradients a step"
        found.append((name, claim, f"{gradients:.2f}", abs(gradients - wanted) < 1e-9))
        if wanted == 1 and base["argument_bytes"] is not None:
            more = row["argument_bytes"] - base["argument_bytes"]
            copies = more / problem["parameter_bytes"]
            claim = "state at most one parameter copy above base's"
            # A counter is not a copy.
            found.append((name, claim, f"{copies:+.3f} copies", copies <= 1.001))
    return found


def _work(methods: Mapping[str, Any], most: float) -> list[tuple[str, str, float, float]]:
    """Compiled operations and memory, temporaries and arguments, over AdamW's; their bounds."""
    base = methods["base"]
    found = []
    for name, row in methods.items():
        if name == "base" or not base["flops"]:
            continue
        found.append((name, "FLOPs", row["flops"] / base["flops"], 2 if name == "sam" else 1.001))
        if base["temp_bytes"]:
            memory = [each["temp_bytes"] + each["argument_bytes"] for each in (row, base)]
            found.append(
                (name, "memory", memory[0] / memory[1], _MEMORY["lora"] if name == "sam" else most)
            )
    return found


def write(folder: Path) -> str:
    """Writes `results.csv`, `summary.md` and `step_time.png` from `results.json`.

    Returns the text of the summary.
    """
    record = records.read_record(folder / "results.json")
    results, hardware, versions = record["problems"], record["hardware"], record["versions"]
    software = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax"))
    head = f"Step time on {hardware['device']} (x{hardware['count']}), {software}."
    if "load_average" in record:  # which earlier records do not have
        before, after = record["load_average"]
        head += f" The machine's load average was {before:.1f} before and {after:.1f} after."
    parts = [head, _NOTES.strip()]
    for name, problem in results.items():
        methods = problem["methods"]
        cells = (
            _costs(method, row, methods["base"]) if "gradients" in row else _cells(method, row)
            for method, row in methods.items()
        )
        parts += [
            f"### {name}: {problem['title']}; {problem['rounds']} rounds",
            frames.markdown(cells),
        ]
    if record["targets"]:
        header = ["problem", "target", "measured", ""]
        rows = (target.values() for target in record["targets"])
        parts += ["### Targets", frames.markdown(map(list, rows), header)]
    text = "\n\n".join(parts) + "\n"
    lines = frames.csv(
        _line(name, problem, method, row)
        for name, problem in results.items()
        for method, row in problem["methods"].items()
    )
    frames.write(folder, {"results.csv": lines, "summary.md": text})
    figures.write(folder, results, hardware)
    return text


def _cells(method: str, row: Mapping[str, Any]) -> dict[str, str]:
    ratio = row["ratio"]["base"]
    cells = {
        "method": method,
        "ratio": f"{ratio['median']:.2f}",
        "quartiles": f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}",
        "ms": f"{1e3 * row['seconds']:.4g}",
        "lower s": _number(row["lower_seconds"]),
        "compile s": _number(row["compile_seconds"]),
        "temp MiB": _number(row["temp_bytes"], _MIB),
        "args MiB": _number(row["argument_bytes"], _MIB),
    }
    flops = row.get("flops")  # which earlier records do not have
    return cells | ({"GFLOP": f"{flops / 1e9:.3f}"} if flops else {})


def _costs(method: str, row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, str]:
    ratio = row["ratio"]["base"]
    flops = row["flops"] / base["flops"] if row["flops"] and base["flops"] else None
    return {
        "method": method,
        "gradients": f"{row['gradients']:.2f}",
        "FLOPs": _number(flops),
        "time": f"{ratio['median']:.2f}",
        "quartiles": f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}",
        "ms": f"{1e3 * row['seconds']:.4g}",
        "compile s": _number(row["compile_seconds"]),
        "temp MiB": _number(row["temp_bytes"], _MIB),
        "args MiB": _number(row["argument_bytes"], _MIB),
    }


def _number(value: float | None, unit: float = 1) -> str:
    return "" if value is None else f"{value / unit:.2f}"


def _line(
    name: str, problem: Mapping[str, Any], method: str, row: Mapping[str, Any]
) -> dict[str, Any]:
    ratio = row["ratio"]["base"]
    parts = ("median", "lower_quartile", "upper_quartile", "low", "high")
    measured = ("seconds", "lower_seconds", "compile_seconds", "argument_bytes", "temp_bytes")
    counted = ("flops", "gradients")  # which earlier records do not have
    return {
        "problem": name,
        "method": method,
        "rounds": problem["rounds"],
        **{f"ratio_{part}": f"{ratio[part]:.5f}" for part in parts},
        **{part: row[part] for part in measured},
        **{part: row.get(part) for part in counted},
    }


if __name__ == "__main__":
    sys.exit(command.report(write, "benchmarks.step_time.report"))
