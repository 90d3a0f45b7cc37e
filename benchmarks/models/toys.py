"""The toys of norm balancing: products of cores under noise, and how they are run.

A toy's loss is `||product(cores) - (target + a * spread * n)||_F^2`, with `n` standard normal,
drawn afresh each step, and `a` the noise level. It sees the cores through their product alone, so
it leaves the ratio of their norms open: that is where the methods differ.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import samax
from benchmarks.core.methods import METHODS
from benchmarks.core.precision import float64

Cores = dict[str, Any]

# The smallest of the paper's initial strengths 0.5, 1 and 2 (Li, Zhang and He 2024). With linear
# decay the strengths sum to alpha_0 eta steps / 2 = 2.5 over the run of its toys, of which
# ln(9) / 4 = 0.55 turn squared norms that differ ninefold into equal ones: more would be idle.
BAR_ALPHA = 0.5


class Toy(NamedTuple):
    """A problem and its settings."""

    title: str  # The loss, in matplotlib's math, for people
    start: Cores  # The cores at the start, by name; together they are one group
    product: Callable[[Cores], jax.Array]  # What the loss sees of the cores
    target: np.ndarray  # What the product should be
    spread: np.ndarray  # The noise's standard deviation at level 1, broadcast against `target`
    levels: tuple[float, ...]  # The noise levels `a`
    rho: float  # SAM's radius, and the alpha of DAS, which is to do the same
    learning_rate: float  # SGD's step size eta
    steps: int  # The number of steps
    methods: tuple[str, ...]  # What is run, of `optimizer`'s names
    # For two cores, the `|B|` at which the noise gives both the same expected squared gradient norm
    # at the minimum, which is where SAM, nBAR and DAS have no drift.
    rest: float | None = None

    def loss(self, cores: Cores) -> jax.Array:
        """The loss without noise: the squared distance of the product from the target."""
        return jnp.sum((self.product(cores) - self.target) ** 2)

    def imbalance(self, cores: Cores) -> jax.Array:
        """The balancedness B of two cores, the norm deviation Q of more."""
        measure = samax.balancedness if len(cores) == 2 else samax.norm_deviation
        return measure(cores, self.groups)["cores"]

    @property
    def groups(self) -> dict[str, str]:
        """Labels that make one group of all cores."""
        return dict.fromkeys(self.start, "cores")


class Trajectory(NamedTuple):
    """What was measured along the runs, of shape (levels, seeds, records), the start included."""

    imbalance: np.ndarray  # `|B|` of two cores; `Q` of more
    # `Cov(||G_k||^2, ||g_k||^2)`, the mean since the last record; NaN at the start.
    covariance: np.ndarray
    distance: np.ndarray  # `||product - target||_F^2`, the loss without noise
    size: np.ndarray  # The sum of the cores' squared norms


def toys() -> dict[str, Toy]:
    """Returns the problems by name."""
    return {
        "nop": nop(),
        "op": op(),
        "tucker_large_core": tucker(g=2.4, a=1.2, b=0.4),
        "tucker_small_core": tucker(g=0.4, a=2.4, b=1.2),
    }


_X = np.array([0.2, -0.1, 0.3])
_BAR: dict[str, Any] = {
    "start": {"x": _X, "y": -3 * _X},
    "levels": (0.0, 0.5, 1.0, 2.0),
    "learning_rate": 1e-4,
    "steps": 100_000,
    "methods": ("SGD", "SAM", "nBAR", "oBAR", "DAS"),
}


def nop() -> Toy:
    """The non-overparametrized toy of Li, Zhang and He 2024 (arXiv 2410.14802).

    At the minimum `x` is along the first axis, so with noise `E` the expected squared gradient
    norms are in the ratio `E||E y||^2 : E||E^T x||^2 = sum_i s_i^2 ||y||^2 : 3 s_1^2 ||x||^2`.
    """
    spread = np.array([[1.0], [0.8], [0.5]])
    ratio = np.sqrt(3 * spread[0, 0] ** 2 / np.sum(spread**2))  # ||y|| / ||x|| for equal norms
    top = 0.5
    return Toy(
        title=r"NOP: $E\,\|x y^T - (A + a N)\|_F^2$",
        product=lambda cores: jnp.outer(cores["x"], cores["y"]),
        target=np.diag([top, 0.0, 0.0]),
        spread=spread,
        rho=0.1,
        rest=float(top * (ratio - 1 / ratio) / 2),
        **_BAR,
    )


def op() -> Toy:
    """The overparametrized toy of Li, Zhang and He 2024.

    The gradients are `f' y` and `f' x`: the core with the larger norm has the smaller gradient, so
    that nBAR and oBAR are the same method here.
    """
    return Toy(
        title=r"OP: $E\,(x^T y - (0.5 + a n))^2$",
        product=lambda cores: cores["x"] @ cores["y"],
        target=np.array(0.5),
        spread=np.array(1.0),
        rho=0.2,
        rest=0.0,
        **_BAR,
    )


def tucker(*, g: float, a: float, b: float, size: int = 10, rank: int = 2, seed: int = 1) -> Toy:
    """A Tucker-2 toy like that of Cao, Atarashi and Kashima 2025 (arXiv 2508.10435).

    The paper's loss; the shapes, the target and the start are this library's choice, for the paper
    gives none: a `rank x rank` core between factors of `size` rows and columns, Gaussian cores
    scaled to the norms asked for, a Gaussian target of the same rank with norm 1, and noise of
    expected squared norm `a^2`. `g`, `a` and `b` are the cores' squared
    norms at the start.
    """
    rng = np.random.default_rng(seed)

    def draw(squared_norm: float, *shape: int) -> np.ndarray:
        values = rng.standard_normal(shape)
        return np.sqrt(squared_norm) * values / np.linalg.norm(values)

    start = {"a": draw(a, size, rank), "b": draw(b, rank, size), "g": draw(g, rank, rank)}
    target = rng.standard_normal((size, rank)) @ rng.standard_normal((rank, size))
    return Toy(
        title=(
            r"Tucker-2: $E\,\|A G B - (T + a N)\|_F^2$, "
            rf"$\|G\|^2, \|A\|^2, \|B\|^2 = {g}, {a}, {b}$ at the start"
        ),
        start=start,
        product=lambda cores: cores["a"] @ cores["g"] @ cores["b"],
        target=target / np.linalg.norm(target),
        spread=np.array(1 / size),
        levels=(0.5, 1.0, 1.5, 2.0),
        rho=0.01,
        learning_rate=1e-3,
        steps=50_000,
        methods=("SGD", "SAM", "DAS"),
    )


def optimizer(toy: Toy, method: str) -> optax.GradientTransformationExtraArgs:
    """Returns a method with a toy's settings."""
    sgd = optax.sgd(toy.learning_rate)
    row = METHODS[method.lower()]
    if not row.balances:
        settings = {"rho": toy.rho} if row.defaults else {}
        return optax.chain(row.factory(**settings), sgd)
    decaying = optax.linear_schedule(BAR_ALPHA, 0.0, toy.steps)
    alpha = toy.rho if method == "DAS" else decaying
    return row.factory(sgd, learning_rate=toy.learning_rate, groups=toy.groups, alpha=alpha)


def trajectories(toy: Toy, method: str, seeds: int, every: int = 100) -> Trajectory:
    """Runs a method at all noise levels, in float64.

    A seed's noise is the same for all methods and, scaled, for all levels.

    Raises:
        ValueError: `every` does not divide the steps.
    """
    if toy.steps % every:
        raise ValueError(f"steps must be a multiple of every={every}, and are {toy.steps}.")
    with float64():
        tx, groups = optimizer(toy, method), toy.groups

        def measure(cores: Cores, covariance: jax.Array) -> dict[str, jax.Array]:
            return {
                "imbalance": jnp.abs(toy.imbalance(cores)),
                "covariance": covariance,
                "distance": toy.loss(cores),
                "size": optax.tree.norm(cores, squared=True),
            }

        def run(level: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
            def step(carry: Any, normal: jax.Array) -> tuple[Any, jax.Array]:
                cores, state = carry
                sample = toy.target + level * toy.spread * normal

                def loss(cores: Cores) -> jax.Array:
                    return jnp.sum((toy.product(cores) - sample) ** 2)

                grads = jax.grad(loss)(cores)
                covariance = samax.gradient_covariance(cores, grads, groups)["cores"]
                updates, state = tx.update(grads, state, cores, value_fn=loss)
                return (optax.apply_updates(cores, updates), state), covariance

            def record(carry: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
                normals = jax.random.normal(key, (every, *toy.target.shape))
                carry, covariances = jax.lax.scan(step, carry, normals)
                return carry, measure(carry[0], covariances.mean())

            start = jax.tree.map(jnp.asarray, toy.start)
            first = measure(start, jnp.array(jnp.nan))
            keys = jax.random.split(key, toy.steps // every)
            _, later = jax.lax.scan(record, (start, tx.init(start)), keys)
            return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, later)

        run_all = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))
        found = run_all(jnp.array(toy.levels), jax.random.split(jax.random.key(0), seeds))
        return Trajectory(**jax.tree.map(np.asarray, found))


def steps_to_half(imbalance: np.ndarray, every: int) -> np.ndarray:
    """Returns the step at which each run first has half of its imbalance at the start.

    Returns:
        One number a run; NaN for those that never get there.
    """
    reached = imbalance <= imbalance[..., :1] / 2
    return np.where(reached.any(-1), every * reached.argmax(-1).astype(float), np.nan)
