"""Timing programs against one another: compiled ahead, run in turn, compared round by round."""

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Compiled(NamedTuple):
    """A compiled program, what compiling it took, and the memory it says it needs."""

    run: Callable  # The program; the buffers of its first argument are donated
    lower_seconds: float  # Tracing and lowering, in Python
    compile_seconds: float  # XLA's compilation
    argument_bytes: int | None  # Memory of the arguments; None where the backend does not tell
    temp_bytes: int | None  # Peak of the temporary memory; None where the backend does not tell
    flops: float | None  # Floating-point operations that XLA states; None where it does not tell


class Spread(NamedTuple):
    """A median with its quartiles and its 95 % confidence interval."""

    median: float
    lower_quartile: float
    upper_quartile: float
    low: float
    high: float


def compute_clock() -> float:
    """Returns seconds of computing: on CPU of this process, which others do not lengthen."""
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def compile_program(function: Callable, *arguments: Any) -> Compiled:
    """Compiles `function` for `arguments`, of which the first is donated."""
    jax.clear_caches()  # or what an earlier program traced would make this one look quicker
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=0).lower(*arguments)
    middle = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()
    memory = program.memory_analysis()
    return Compiled(
        program,
        middle - start,
        end - middle,
        getattr(memory, "argument_size_in_bytes", None),
        getattr(memory, "temp_size_in_bytes", None),
        dict(program.cost_analysis() or {}).get("flops"),
    )


def interleave(
    runs: Mapping[str, Callable[[], Any]], rounds: Iterable[Any], warmup: int = 1
) -> dict[str, np.ndarray]:
    """Times every run once a round, in an order drawn afresh each round.

    What slows the machine down for a while slows neighbours alike, so that ratios within a round
    are steadier than times; the shuffle keeps one run from always following the same other.

    Args:
        runs: By name, functions that return the arrays to wait for.
        rounds: Iterated over once; each item is a timed round.
        warmup: Untimed rounds before.

    Returns:
        Seconds by name, each of shape (rounds,).
    """
    order = np.random.default_rng(0)
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmup):
        for name in names:
            jax.block_until_ready(runs[name]())
    # A collection would fall on whichever run is going on: collect between the rounds, and only
    # what is newer than this.
    collects = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        for _ in rounds:
            gc.collect()
            for name in order.permutation(names):
                start = time.perf_counter()
                jax.block_until_ready(runs[name]())
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()
    return {name: np.array(values) for name, values in seconds.items()}


def spread(samples: np.ndarray) -> Spread:
    """Returns the median with its quartiles, and its interval from order statistics.

    The interval needs no assumption on the distribution: the number of samples below the true
    median is binomial. With fewer than six samples it is their range.
    """
    ordered = np.sort(samples)
    count = len(ordered)
    rank = max(0, int(np.floor((count - 1.96 * np.sqrt(count)) / 2)))
    lower, median, upper = np.percentile(ordered, [25, 50, 75])
    return Spread(
        float(median), float(lower), float(upper), float(ordered[rank]), float(ordered[-1 - rank])
    )


def show(ratio: Mapping[str, float]) -> str:
    """Formats a spread's median with its confidence interval."""
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def verdict(ratio: Mapping[str, float], bound: float) -> str:
    """Says whether a ratio is at most a bound; `within noise` if its interval reaches it."""
    if ratio["median"] <= bound:
        return "met"
    return "within noise" if ratio["low"] <= bound else "not met"


def going_on(function: Callable[..., Any], carry: Any, *inputs: Any) -> Callable[[], Any]:
    """Returns what calls a step `(carry, *inputs) -> (carry, output)` from where it was."""

    def run() -> Any:
        nonlocal carry
        carry, output = function(carry, *inputs)
        return carry, output

    return run
