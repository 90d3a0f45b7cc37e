"""What `benchmarks.sharpness` measures at a trained model, and what it costs in gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

import samax
import samax.flatness.spectrum
from benchmarks.core.training import Recipe
from benchmarks.data.augment import normalize
from samax import Estimate
from samax.flatness.operators import mean_loss_and_grad

EIGENVALUES = 5
RHO = 0.05  # SAM's for CIFAR-10
ADAPTIVE_RHO = 0.5  # ASAM's
AVERAGE_RHO = 0.01  # a perturbation of norm 5 for 250,000 parameters
ASCENT_STEPS = 10
DISTANCES = np.linspace(-1, 1, 21)

Batch = tuple[jax.Array, jax.Array]


class Model(NamedTuple):
    """A trained model and the examples that it is measured on.

    Attributes:
        loss_fn: Maps parameters and a batch to the mean training loss, in evaluation mode.
        params: The trained parameters.
        batches: The examples, in batches of the training's size.
    """

    loss_fn: Callable[[nnx.State, Batch], jax.Array]
    params: nnx.State
    batches: Sequence[Batch]


class Budget(NamedTuple):
    """How much is spent on a model.

    Attributes:
        examples: Training images to measure on, without augmentation.
        products: Lanczos steps for eigenvalues and density, each a product with the Hessian.
        samples: Random vectors for the trace and the Frobenius norm, each a product; and of the
            average-case sharpness, each a forward pass.
    """

    examples: int
    products: int
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


def loss_function(
    graph: nnx.GraphDef, model_state: nnx.State, recipe: Recipe
) -> Callable[[nnx.State, Batch], jax.Array]:
    """Returns the loss that the model was trained with, with its statistics and images fixed."""

    def loss_fn(params: nnx.State, batch: Batch) -> jax.Array:
        images, labels = batch
        model = nnx.merge(graph, params, model_state, copy=True)
        logits = model(normalize(images, recipe.mean, recipe.std, recipe.dtype))
        one_hot = jax.nn.one_hot(labels, logits.shape[-1])
        smoothed = optax.smooth_labels(one_hot, recipe.label_smoothing)
        return optax.softmax_cross_entropy(logits, smoothed).mean()

    return loss_fn


def measure(
    model: Model, budget: Budget, key: jax.Array, done: Callable[[str], None] = lambda name: None
) -> dict[str, Any]:
    """Returns every measure of a model as JSON types.

    Args:
        model: Where.
        budget: How much to spend.
        key: All random vectors follow from it: models measured with one key are compared on the
            same ones.
        done: Called with the name of each measure that is done.
    """
    loss_fn, params, batches = model
    keys = iter(jax.random.split(key, 7))
    found: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        found[name] = value
        done(name)

    operator = samax.hessian_operator(loss_fn, params, batches)
    adaptive = samax.scaled_operator(operator, params)
    products, samples = budget.products, budget.samples

    loss, grads = mean_loss_and_grad(loss_fn, batches)(params)
    keep("loss", {"value": float(loss), "grad_norm": float(optax.tree.norm(grads))})
    pairs = samax.flatness.spectrum.top_eigenpairs(
        operator, params, EIGENVALUES, key=next(keys), num_products=products
    )
    keep(
        "top_eigenvalues",
        {"values": pairs.values.tolist(), "residuals": pairs.residuals.tolist()},
    )
    scaled = samax.flatness.spectrum.top_eigenpairs(
        adaptive, params, 1, key=next(keys), num_products=products
    )
    keep(
        "adaptive_top_eigenvalue",
        {"value": float(scaled.values[0]), "residual": float(scaled.residuals[0])},
    )
    keep(
        "trace",
        _numbers(
            samax.flatness.spectrum.trace(operator, params, key=next(keys), num_samples=samples)
        ),
    )
    norm = samax.flatness.spectrum.frobenius_norm(
        operator, params, key=next(keys), num_samples=samples
    )
    keep("frobenius_norm", _numbers(norm))
    density = samax.flatness.spectrum.spectral_density(
        operator, params, num_samples=1, key=next(keys), num_products=products
    )
    keep("density", {"nodes": density.nodes.tolist(), "weights": density.weights.tolist()})
    rise = samax.worst_case_sharpness(loss_fn, params, batches, rho=RHO, steps=ASCENT_STEPS)
    keep("worst_case", {"value": float(rise)})
    rise = samax.worst_case_sharpness(
        loss_fn, params, batches, rho=ADAPTIVE_RHO, adaptive=True, steps=ASCENT_STEPS
    )
    keep("adaptive_worst_case", {"value": float(rise)})
    rise = samax.worst_case_m_sharpness(loss_fn, params, batches, rho=RHO)
    keep("m_sharpness", {"value": float(rise)})
    average = samax.average_case_sharpness(
        loss_fn, params, batches, rho=AVERAGE_RHO, key=next(keys), num_samples=samples
    )
    keep("average_case", _numbers(average))
    top = jax.tree.map(lambda vectors: vectors[0], pairs.vectors)
    directions = {
        "random": samax.random_direction(next(keys), params),
        "top_eigenvector": top,
    }
    lines = {
        name: samax.loss_line(loss_fn, params, direction, DISTANCES, batches).tolist()
        for name, direction in directions.items()
    }
    keep("landscape", {"distances": DISTANCES.tolist(), **lines})
    return found


def _numbers(estimate: Estimate) -> dict[str, float]:
    return {name: float(value) for name, value in estimate._asdict().items()}
