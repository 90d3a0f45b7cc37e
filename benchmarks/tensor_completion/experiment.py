"""Tucker completion of the serology tensor: the problem, its measures, and the runs on it."""

import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from tensorly.datasets import load_covid19_serology
from tensorly.decomposition import tucker

import samax
from benchmarks.core import records
from benchmarks.core.methods import parse_methods, select
from benchmarks.core.runs import Experiment, History, Tick
from benchmarks.core.timing import compile_program, interleave, spread
from benchmarks.core.training import descend

RANK = (8, 6, 8)
OBSERVED = 0.3
LEARNING_RATE = 1e-3
RHO = 0.01
DAS_ALPHA = 1e-3
OBAR_ALPHA = 0.1  # the paper has no oBAR here; this one ends balanced
RECORDS = 100  # a run's measurements
DIRECTIONS, DISTANCES = 20, np.linspace(-3, 3, 25)

METHODS = {
    "adam": select("sgd", {}, "the base optimizer alone"),
    "sam": select("sam", {"rho": RHO}, "arXiv 2508.10435"),
    "das": select("das", {"alpha": DAS_ALPHA}, "arXiv 2508.10435"),
    "obar": select("obar", {"alpha": OBAR_ALPHA}, "chosen here"),
}
Cores = dict[str, jax.Array]


class Problem(NamedTuple):
    """A split of the tensor's entries, and where the runs on it start."""

    tensor: jax.Array  # The data
    observed: jax.Array  # 1 where an entry is trained on, 0 where it is held out
    cores: Cores  # The Tucker core `core_0` and the factors `core_1` to `core_3`


def load(split: int) -> Problem:
    """Returns the problem of a split, whose number draws the observed entries and the start."""
    tensor = np.asarray(load_covid19_serology().tensor)
    observed = np.random.RandomState(split).rand(*tensor.shape) < OBSERVED
    return Problem(
        jnp.asarray(tensor),
        jnp.asarray(observed, jnp.result_type(float)),
        hooi(tensor, observed, split, iterations=0),
    )


def hooi(tensor: Any, observed: Any, split: int, iterations: int) -> Cores:
    """Returns TensorLy's solution: higher-order orthogonal iteration with imputed entries.

    After 0 iterations it is where all methods start.
    """
    core, factors = tucker(
        np.asarray(tensor),
        rank=RANK,
        init="random",
        n_iter_max=iterations,
        tol=1e-5,
        mask=np.asarray(observed, bool),
        random_state=np.random.RandomState(split),
    )
    return {f"core_{i}": jnp.asarray(part) for i, part in enumerate([core, *factors])}


def methods(steps: int) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizers by name; DAS's and oBAR's strength decays linearly to 0."""
    return {
        spec.name: spec.optimizer(
            optax.adam(LEARNING_RATE),
            learning_rate=LEARNING_RATE,
            steps=steps,
            groups=samax.groups_by_path(r"(?P<group>core)_\d"),
            track=False,
        )
        for spec in parse_methods(METHODS, METHODS)
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
    loss, look = partial(loss_fn, problem=problem), partial(measure, problem=problem)
    cores, curves = descend(tx, loss, cores, steps, steps // records_made, look)
    return cores, jax.tree.map(lambda values: values[1:], curves)  # without the start's


@jax.jit
def landscape(cores: Cores, problem: Problem) -> jax.Array:
    """The loss along random directions of norm 1, of shape (directions, distances)."""

    def along(key: jax.Array) -> jax.Array:
        noise = optax.tree.random_like(key, cores)
        unit = optax.tree.scale(1 / optax.tree.norm(noise), noise)
        at = jax.vmap(lambda d: loss_fn(optax.tree.add_scale(cores, d, unit), problem))
        return at(jnp.asarray(DISTANCES))

    return jax.lax.map(along, jax.random.split(jax.random.key(0), DIRECTIONS))


class Completion(Experiment[tuple[str, int]]):
    """The runs of methods, HOOI among them, on splits: each is made at once."""

    saves = False

    def __init__(self, steps: int, folder: Path):
        """Takes the number of steps and the results' folder."""
        self._steps, self.folder = steps, folder

    def name(self, run: tuple[str, int]) -> str:
        """Returns the method and the split."""
        return f"{run[0]}_split{run[1]}"

    def config(self, run: tuple[str, int]) -> dict[str, Any]:
        """Returns all that decides the run's numbers."""
        return {
            "method": run[0],
            "split": run[1],
            "steps": self._steps,
            "dtype": str(jnp.result_type(float)),
            "rank": list(RANK),
            "observed": OBSERVED,
            "learning_rate": LEARNING_RATE,
            "rho": RHO,
            "das_alpha": DAS_ALPHA,
            "obar_alpha": OBAR_ALPHA,
        }

    def advance(
        self, run: tuple[str, int], part: int, state: Any, history: History, tick: Tick
    ) -> Any:
        """Completes the tensor and measures what came of it."""
        name, split = run
        problem = load(split)
        compile_seconds, curves = None, {}
        start = time.perf_counter()
        if name == "hooi":
            cores = hooi(problem.tensor, problem.observed, split, self._steps)
        else:
            tx = methods(self._steps)[name]
            function = partial(train, tx=tx, steps=self._steps)
            start_cores = jax.tree.map(jnp.copy, problem.cores)  # the program takes its cores
            program = compile_program(function, start_cores, problem)
            compile_seconds = program.compile_seconds
            start = time.perf_counter()
            cores, curves = jax.block_until_ready(program.run(start_cores, problem))
        history |= {
            "seconds": time.perf_counter() - start,
            "compile_seconds": compile_seconds,
            "final": jax.tree.map(float, measure(cores, problem)),
            "loss": float(loss_fn(cores, problem)),
            "curves": {key: np.asarray(values).tolist() for key, values in curves.items()},
            "distances": DISTANCES.tolist(),
            "loss_along_directions": np.asarray(landscape(cores, problem)).tolist(),
        }
        return state


def overhead(steps: int, rounds: int) -> dict[str, Any]:
    """Times every method's steps against Adam's, in turn in one process."""
    problem = load(split=0)

    def start() -> Cores:  # a copy, for the program takes its cores
        return jax.tree.map(jnp.copy, problem.cores)

    programs = {
        name: compile_program(partial(train, tx=tx, steps=steps, records_made=1), start(), problem)
        for name, tx in methods(steps).items()
    }
    runs = {
        name: lambda run=program.run: run(start(), problem) for name, program in programs.items()
    }
    seconds = interleave(runs, tqdm.trange(rounds, desc="time"))
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
                "compile_seconds": program.compile_seconds,
                "temp_bytes": program.temp_bytes,
            }
            for name, program in programs.items()
        },
    }
