"""Tensor completion on real data: Adam, SAM, DAS and oBAR on a Tucker model of serology.

    python -m benchmarks.tensor_completion
    python -m benchmarks.tensor_completion --steps 5000 --splits 1 --out runs/completion

The setting of Cao, Atarashi and Kashima (2025, arXiv 2508.10435): the COVID-19 serology tensor of
TensorLy (438 samples x 6 antigens x 11 receptors), a Tucker model of rank (8, 6, 8) that starts
from TensorLy's random cores, 30 % of the entries observed, the sum of squared errors on them, Adam
at 1e-3 for 50,000 steps, in float64. HOOI is TensorLy's alternating solver for the same model.

Every run leaves a record under `--out`; repeating the command continues after the last one. The
table, the CSV and the figures are made from the records.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from tensorly.datasets import load_covid19_serology
from tensorly.decomposition import tucker

import samax
from benchmarks.core import records
from benchmarks.core.timing import compile_program, interleave, spread
from benchmarks.tensor_completion import report

RANK = (8, 6, 8)
OBSERVED = 0.3
LEARNING_RATE = 1e-3
RHO = 0.01
DAS_ALPHA = 1e-3
OBAR_ALPHA = 0.1  # the paper has no oBAR here; this one ends balanced
RECORDS = 100  # a run's measurements
DIRECTIONS, DISTANCES = 20, np.linspace(-3, 3, 25)

Cores = dict[str, jax.Array]
_STDERR = Console(stderr=True)


class Problem(NamedTuple):
    """A split of the tensor's entries, and where the runs on it start.

    Attributes:
        tensor: The data.
        observed: 1 where an entry is trained on, 0 where it is held out.
        cores: The Tucker core `core_0` and the factors `core_1` to `core_3`.
    """

    tensor: jax.Array
    observed: jax.Array
    cores: Cores


def load(split: int) -> Problem:
    """Returns the problem of a split, whose number draws the observed entries and the start."""
    tensor = np.asarray(load_covid19_serology().tensor)
    observed = np.random.RandomState(split).rand(*tensor.shape) < OBSERVED
    return Problem(
        jnp.asarray(tensor),
        jnp.asarray(observed, jnp.result_type(float)),
        _tucker(tensor, observed, split, iterations=0),
    )


def hooi(problem: Problem, split: int, iterations: int) -> Cores:
    """Returns TensorLy's solution: higher-order orthogonal iteration with imputed entries."""
    observed = np.asarray(problem.observed, bool)
    return _tucker(np.asarray(problem.tensor), observed, split, iterations)


def _tucker(tensor: np.ndarray, observed: np.ndarray, split: int, iterations: int) -> Cores:
    core, factors = tucker(
        tensor,
        rank=RANK,
        init="random",
        n_iter_max=iterations,
        tol=1e-5,
        mask=observed,
        random_state=np.random.RandomState(split),
    )
    return {f"core_{i}": jnp.asarray(part) for i, part in enumerate([core, *factors])}


def methods(steps: int) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizers by name; DAS's and oBAR's strength decays linearly to 0."""

    def balanced(method: Callable[..., Any], alpha: float) -> optax.GradientTransformation:
        return method(
            optax.adam(LEARNING_RATE),
            learning_rate=LEARNING_RATE,
            alpha=optax.linear_schedule(alpha, 0.0, steps),
            groups=samax.groups_by_path(r"(?P<group>core)_\d"),
        )

    return {
        "adam": optax.with_extra_args_support(optax.adam(LEARNING_RATE)),
        "sam": optax.chain(samax.sam(RHO), optax.adam(LEARNING_RATE)),
        "das": balanced(samax.das, DAS_ALPHA),
        "obar": balanced(samax.obar, OBAR_ALPHA),
    }


def reconstruct(cores: Cores) -> jax.Array:
    """Returns the tensor of a Tucker model."""
    return jnp.einsum("abc,ia,jb,kc->ijk", *(cores[f"core_{i}"] for i in range(4)))


def loss_fn(cores: Cores, problem: Problem) -> jax.Array:
    """The sum of squared errors on the observed entries."""
    return jnp.sum(problem.observed * (reconstruct(cores) - problem.tensor) ** 2)


def measure(cores: Cores, problem: Problem) -> dict[str, jax.Array]:
    """Returns R^2 on the observed and on the held-out entries, and the cores' norm deviation.

    R^2 is `1 - ||error||^2 / ||data||^2`, as the paper's; the data's mean is 0.
    """
    errors, squares = (reconstruct(cores) - problem.tensor) ** 2, problem.tensor**2

    def r2(weights: jax.Array) -> jax.Array:
        return 1 - jnp.sum(weights * errors) / jnp.sum(weights * squares)

    return {
        "r2_observed": r2(problem.observed),
        "r2_held_out": r2(1 - problem.observed),
        "norm_deviation": samax.norm_deviation(cores, dict.fromkeys(cores, "core"))["core"],
    }


def train(
    cores: Cores,
    problem: Problem,
    tx: optax.GradientTransformation,
    steps: int,
    records_made: int = RECORDS,
) -> tuple[Cores, dict[str, jax.Array]]:
    """Runs an optimizer from given cores as one scan.

    Returns:
        The last cores, and what `measure` gives at the end of each of `records_made` equal parts.
    """
    loss = functools.partial(loss_fn, problem=problem)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        cores, state = carry
        value, grads = jax.value_and_grad(loss)(cores)
        updates, state = tx.update(grads, state, cores, value=value, value_fn=loss)
        return (optax.apply_updates(cores, updates), state), None

    def part(carry: Any, _: None) -> tuple[Any, dict[str, jax.Array]]:
        carry, _ = jax.lax.scan(step, carry, length=steps // records_made)
        return carry, measure(carry[0], problem)

    carry = cores, tx.init(cores)
    (cores, _), curves = jax.lax.scan(part, carry, length=records_made)
    return cores, curves


@jax.jit
def landscape(cores: Cores, problem: Problem) -> jax.Array:
    """The loss along random directions of norm 1, of shape (directions, distances)."""

    def along(key: jax.Array) -> jax.Array:
        noise = optax.tree.random_like(key, cores)
        unit = optax.tree.scale(1 / optax.tree.norm(noise), noise)
        at = jax.vmap(lambda d: loss_fn(optax.tree.add_scale(cores, d, unit), problem))
        return at(jnp.asarray(DISTANCES))

    return jax.lax.map(along, jax.random.split(jax.random.key(0), DIRECTIONS))


def run(name: str, split: int, steps: int, folder: Path) -> None:
    """Makes the record of a method on a split, unless there is one."""
    path = folder / "runs" / f"{name}_split{split}.json"
    problem = load(split)
    config = {
        "method": name,
        "split": split,
        "steps": steps,
        "dtype": str(problem.tensor.dtype),
        "rank": list(RANK),
        "observed": OBSERVED,
        "learning_rate": LEARNING_RATE,
        "rho": RHO,
        "das_alpha": DAS_ALPHA,
        "obar_alpha": OBAR_ALPHA,
    }
    if records.read_finished(path, config) is not None:
        return
    compile_seconds, curves = None, {}
    start = time.perf_counter()
    if name == "hooi":
        cores = hooi(problem, split, steps)
    else:
        tx = methods(steps)[name]
        start_cores = jax.tree.map(jnp.copy, problem.cores)
        program = compile_program(
            functools.partial(train, tx=tx, steps=steps), start_cores, problem
        )
        compile_seconds = program.compile_seconds
        start = time.perf_counter()
        cores, curves = jax.block_until_ready(program.run(start_cores, problem))
    seconds = time.perf_counter() - start
    records.write_record(
        path,
        {
            "format": records.FORMAT,
            "config": config,
            "versions": records.versions(),
            "hardware": records.hardware(),
            "seconds": seconds,
            "compile_seconds": compile_seconds,
            "final": jax.tree.map(float, measure(cores, problem)),
            "loss": float(loss_fn(cores, problem)),
            "curves": {key: np.asarray(values).tolist() for key, values in curves.items()},
            "distances": DISTANCES.tolist(),
            "loss_along_directions": np.asarray(landscape(cores, problem)).tolist(),
        },
    )


def overhead(steps: int, rounds: int) -> dict[str, Any]:
    """Times every method's steps against Adam's, in turn in one process."""
    problem = load(split=0)
    runs, programs = {}, {}
    for name, tx in methods(steps).items():
        function = functools.partial(train, tx=tx, steps=steps, records_made=1)
        programs[name] = compile_program(function, jax.tree.map(jnp.copy, problem.cores), problem)
        runs[name] = functools.partial(_run_copy, programs[name].run, problem)
    seconds = interleave(runs, track(range(rounds), "time", console=_STDERR))
    return {
        "format": records.FORMAT,
        "steps": steps,
        "rounds": rounds,
        "hardware": records.hardware(),
        "versions": records.versions(),
        "methods": {
            name: {
                "seconds_a_step": float(np.median(seconds[name])) / steps,
                "ratio": spread(seconds[name] / seconds["adam"])._asdict(),
                "compile_seconds": programs[name].compile_seconds,
                "temp_bytes": programs[name].temp_bytes,
            }
            for name in runs
        },
    }


def _run_copy(program: Callable[..., Any], problem: Problem) -> Any:
    return program(jax.tree.map(jnp.copy, problem.cores), problem)  # the program takes its cores


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tensor_completion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=50_000, help=f"a multiple of {RECORDS}; default: %(default)s")
    add("--splits", type=int, default=3, help="splits of the entries; default: %(default)s")
    add("--rounds", type=int, default=60, help="timed rounds; default: %(default)s")
    add(
        "--out",
        type=Path,
        default=Path("benchmarks/results/tensor_completion"),
        help="the results' folder; default: %(default)s",
    )
    arguments = parser.parse_args(argv)
    for name, value in (("steps", arguments.steps), ("splits", arguments.splits)):
        if value < 1:
            parser.error(f"--{name} must be 1 or more, got {value}.")
    if arguments.steps % RECORDS:
        parser.error(f"--steps must be a multiple of {RECORDS}, got {arguments.steps}.")
    return arguments


def compare(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Makes the records that are missing and returns the steps' times."""
    names = ["hooi", *methods(arguments.steps)]
    pairs = [(name, split) for split in range(arguments.splits) for name in names]
    for name, split in track(pairs, "train", console=_STDERR):
        run(name, split, arguments.steps, arguments.out)
    path = arguments.out / "overhead.json"
    if not path.exists():
        records.write_record(path, overhead(min(1_000, arguments.steps), arguments.rounds))
    return records.read_record(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    arguments = parse_arguments(argv)
    try:
        times = compare(arguments)
    except KeyboardInterrupt:
        print("\nStopped. Repeat the command to continue after the last run.", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.write(arguments.out, times))
    print(f"Results and figures: {arguments.out}")
    return 0


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)  # as the authors' code
    sys.exit(main())
