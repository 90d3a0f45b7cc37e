"""The tables and targets of `benchmarks.step_time`, from its record alone.

python -m benchmarks.step_time.report DIR [DIR ...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.core import command, frames, records
from benchmarks.core.timing import show, verdict
from benchmarks.step_time import figures

_MIB = 2**20

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


def targets(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns the targets that the measured problems and methods have something to say about."""
    return [
        {"problem": name, "claim": claim, "found": found, "verdict": verdict}
        for name, problem in results.items()
        for claim, found, verdict in _targets(name, problem)
    ]


def _targets(name: str, problem: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """A problem's targets: the claim, what was found, and whether that meets it."""
    methods = problem["methods"]
    claims = _UPDATE if name.startswith("pytree") else _CLAIMS.get(name, _TRAINING)
    for method, other, bound, claim in claims:
        if method in methods and other in methods:
            ratio = methods[method]["ratio"][other]
            yield claim, show(ratio), verdict(ratio, bound)
    if name == "costs":
        yield from _counted(problem)
    if name in _MEMORY:
        yield from _work(methods, _MEMORY[name])
    if "sam" in methods and "limit" in methods and methods["sam"]["temp_bytes"] is not None:
        copies = _copies("temp_bytes", "sam", "limit", problem)
        yield _COPIES, f"{copies:+.3f} copies", _met(copies <= 1)


def _counted(problem: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Gradients a step, and the memory of the state of what has one gradient."""
    methods = problem["methods"]
    for name, wanted in _GRADIENTS.items():
        if name not in methods:
            continue
        gradients = methods[name]["gradients"]
        met = _met(abs(gradients - wanted) < 1e-9)
        yield f"{name}: {wanted:.2f} gradients a step", f"{gradients:.2f}", met
        if wanted == 1 and methods["base"]["argument_bytes"] is not None:
            copies = _copies("argument_bytes", name, "base", problem)
            claim = f"{name}: state at most one parameter copy above base's"
            yield claim, f"{copies:+.3f} copies", _met(copies <= 1.001)  # a counter is not a copy


def _work(methods: Mapping[str, Any], most: float) -> Iterator[tuple[str, str, str]]:
    """Compiled operations and memory, temporaries and arguments, over AdamW's."""
    base = methods["base"]
    for name, row in methods.items():
        if name == "base" or not base["flops"]:
            continue
        work = [("FLOPs", row["flops"] / base["flops"], 2 if name == "sam" else 1.001)]
        if base["temp_bytes"]:
            memory = [each["temp_bytes"] + each["argument_bytes"] for each in (row, base)]
            bound = _MEMORY["lora"] if name == "sam" else most
            work.append(("memory", memory[0] / memory[1], bound))
        for kind, value, bound in work:
            yield f"{name}: {kind} at most {bound:g}x", f"{value:.6f}", _met(value <= bound)


def _copies(part: str, method: str, other: str, problem: Mapping[str, Any]) -> float:
    """How many copies of the parameters a method's memory is above another's."""
    more = problem["methods"][method][part] - problem["methods"][other][part]
    return more / problem["parameter_bytes"]


def _met(good: bool) -> str:
    return "met" if good else "not met"


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
        cells = (_cells(method, row, methods["base"]) for method, row in methods.items())
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


def _cells(method: str, row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, str]:
    """A method's line; where gradients are counted, the work stands first, and relative to base."""
    ratio, flops = row["ratio"]["base"], row.get("flops")  # which earlier records do not have
    median = f"{ratio['median']:.2f}"
    time = {
        "quartiles": f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}",
        "ms": f"{1e3 * row['seconds']:.4g}",
    }
    program = {
        "compile s": _number(row["compile_seconds"]),
        "temp MiB": _number(row["temp_bytes"], _MIB),
        "args MiB": _number(row["argument_bytes"], _MIB),
    }
    if "gradients" in row:
        relative = flops / base["flops"] if flops and base["flops"] else None
        work = {"gradients": f"{row['gradients']:.2f}", "FLOPs": _number(relative)}
        return {"method": method, **work, "time": median, **time, **program}
    lower = {"lower s": _number(row["lower_seconds"])}
    work = {"GFLOP": f"{flops / 1e9:.3f}"} if flops else {}
    return {"method": method, "ratio": median, **time, **lower, **program, **work}


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
