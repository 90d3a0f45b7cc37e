"""What `benchmarks.sharpness` measures at a trained model, and what it costs in gradients."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from samax import flatness
from samax.flatness.operators import mean_loss_and_grad

EIGENVALUES = 5
RHO = 0.05  # SAM's for CIFAR-10
ADAPTIVE_RHO = 0.5  # ASAM's
AVERAGE_RHO = 0.01  # a perturbation of norm 5 for 250,000 parameters
ASCENT_STEPS = 10
DISTANCES = np.linspace(-1, 1, 21)

Batch = tuple[jax.Array, jax.Array]


class Model(NamedTuple):
    """A trained model and the examples that it is measured on."""

    # Maps parameters and a batch to the mean training loss, in evaluation mode.
    loss_fn: Callable[[nnx.State, Batch], jax.Array]
    params: nnx.State  # The trained parameters
    batches: Sequence[Batch]  # The examples, in batches of the training's size


class Budget(NamedTuple):
    """How much is spent on a model."""

    examples: int  # Training images to measure on, without augmentation
    products: int  # Lanczos steps for eigenvalues and density, each a product with the Hessian
    # Random vectors for the trace and the Frobenius norm, each a product; and of the average-case
    # sharpness, each a forward pass.
    samples: int

    def gradients(self) -> dict[str, float]:
        """Returns each measure's cost in gradients over the examples.

        A product with the Hessian counts as two gradients, a forward pass as a third of one.
        """
        return {
            "loss": 1.0,
            "top_eigenvalues": 2.0 * self.products,
            "adaptive_top_eigenvalue": 2.0 * self.products,
            "trace": 2.0 * self.samples,
            "frobenius_norm": 2.0 * self.samples,
            "density": 2.0 * self.products,
            "worst_case": ASCENT_STEPS + 1.0,
            "adaptive_worst_case": ASCENT_STEPS + 1.0,
            "m_sharpness": 2.0,
            "average_case": (self.samples + 1) / 3,
            "landscape": 2 * len(DISTANCES) / 3,
        }


def measure(model: Model, budget: Budget, key: jax.Array) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every measure of a model by name, as JSON types, in the order of its budget.

    Args:
        model: Where.
        budget: How much to spend.
        key: All random vectors follow from it: models measured with one key are compared on the
            same ones.
    """
    loss_fn, params, batches = model
    keys = iter(jax.random.split(key, 7))
    operator = flatness.hessian_operator(loss_fn, params, batches)
    adaptive = flatness.scaled_operator(operator, params)
    lanczos: dict[str, Any] = {"num_products": budget.products}
    sampled: dict[str, Any] = {"num_samples": budget.samples}

    loss, grads = mean_loss_and_grad(loss_fn, batches)(params)
    yield "loss", {"value": float(loss), "grad_norm": float(optax.tree.norm(grads))}
    pairs = flatness.top_eigenpairs(operator, params, EIGENVALUES, key=next(keys), **lanczos)
    values, residuals = pairs.values.tolist(), pairs.residuals.tolist()
    yield "top_eigenvalues", {"values": values, "residuals": residuals}
    scaled = flatness.top_eigenpairs(adaptive, params, 1, key=next(keys), **lanczos)
    value, residual = float(scaled.values[0]), float(scaled.residuals[0])
    yield "adaptive_top_eigenvalue", {"value": value, "residual": residual}
    trace = flatness.trace(operator, params, key=next(keys), **sampled)
    yield "trace", _numbers(trace)
    norm = flatness.frobenius_norm(operator, params, key=next(keys), **sampled)
    yield "frobenius_norm", _numbers(norm)
    density = flatness.spectral_density(operator, params, num_samples=1, key=next(keys), **lanczos)
    yield "density", {"nodes": density.nodes.tolist(), "weights": density.weights.tolist()}
    rise = flatness.worst_case_sharpness(loss_fn, params, batches, rho=RHO, steps=ASCENT_STEPS)
    yield "worst_case", {"value": float(rise)}
    rise = flatness.worst_case_sharpness(
        loss_fn, params, batches, rho=ADAPTIVE_RHO, adaptive=True, steps=ASCENT_STEPS
    )
    yield "adaptive_worst_case", {"value": float(rise)}
    rise = flatness.worst_case_m_sharpness(loss_fn, params, batches, rho=RHO)
    yield "m_sharpness", {"value": float(rise)}
    average = flatness.average_case_sharpness(
        loss_fn, params, batches, rho=AVERAGE_RHO, key=next(keys), **sampled
    )
    yield "average_case", _numbers(average)
    directions = {
        "random": flatness.random_direction(next(keys), params),
        "top_eigenvector": jax.tree.map(lambda vectors: vectors[0], pairs.vectors),
    }
    lines = {
        name: flatness.loss_line(loss_fn, params, direction, DISTANCES, batches).tolist()
        for name, direction in directions.items()
    }
    yield "landscape", {"distances": DISTANCES.tolist(), **lines}


def _numbers(estimate: flatness.Estimate) -> dict[str, float]:
    return {name: float(value) for name, value in estimate._asdict().items()}


class Column(NamedTuple):
    """A number of a record: what tables call it, what figures call it, and how to read it."""

    name: str
    title: str
    read: Callable[[dict[str, Any]], float]

    def of(self, record: dict[str, Any]) -> float:
        """Reads the number from a record."""
        return self.read(record["measures"])


def _value(measure: str) -> Callable[[dict[str, Any]], float]:
    return lambda measures: measures[measure]["value"]


COLUMNS = (
    Column("top eigenvalue", r"top eigenvalue $\lambda_1$", lambda m: _eigenvalue(m, 0)),
    Column(
        "1st / 5th", r"$\lambda_1 / \lambda_5$", lambda m: _eigenvalue(m, 0) / _eigenvalue(m, 4)
    ),
    Column("trace", r"trace", _value("trace")),
    Column("Frobenius", r"Frobenius norm", _value("frobenius_norm")),
    Column(
        "adaptive top",
        r"adaptive: top eigenvalue of $|w| H |w|$",
        _value("adaptive_top_eigenvalue"),
    ),
    Column("worst case", f"worst case, rho {RHO:g} (nats)", _value("worst_case")),
    Column(
        "adaptive worst case",
        f"adaptive worst case, rho {ADAPTIVE_RHO:g} (nats)",
        _value("adaptive_worst_case"),
    ),
    Column("m-sharpness", f"m-sharpness, rho {RHO:g} (nats)", _value("m_sharpness")),
    Column("average case", f"average case, N(0, {AVERAGE_RHO:g}²) (nats)", _value("average_case")),
)


def _eigenvalue(measures: dict[str, Any], index: int) -> float:
    return measures["top_eigenvalues"]["values"][index]
