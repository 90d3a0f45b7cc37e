"""Training the adapters and the classifier of a frozen encoder, as one pure compiled step.

The frozen weights are an argument of the step, never differentiated. There is no dropout: a step
is a function of the state and the batch, and a batch follows from the seed and the step's number.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import samax
from benchmarks.data.text import Tokens
from benchmarks.models.lora import TRAINED


class TrainState(NamedTuple):
    """What a step changes."""

    params: nnx.State  # adapters and classifier
    opt_state: optax.OptState


class Batch(NamedTuple):
    """What a step reads."""

    ids: Any  # int32, (n, length)
    mask: Any  # bool, (n, length): False on padding
    labels: Any  # int32, (n,)


class Trainer:
    """Compiled training and evaluation of one model with one optimizer, for every seed."""

    def __init__(
        self, build_model: Callable[[int], nnx.Module], tx: optax.GradientTransformationExtraArgs
    ):
        """Builds the model once for its structure and its frozen weights.

        Args:
            build_model: Maps a seed to a model of ids and mask; the frozen weights do not depend on
                the seed.
            tx: The optimizer; its `update` receives `value` and `value_fn`.
        """
        self._build_model = build_model
        self._tx = tx
        self.graph: nnx.GraphDef
        self.graph, *states = nnx.split(build_model(0), TRAINED, ...)
        self.frozen: nnx.State = states[1]
        self._programs: dict[tuple[int, ...], Callable] = {}
        self.compile_seconds = 0.0

    def init(self, seed: int) -> TrainState:
        """Returns freshly initialized adapters and classifier, and the optimizer's state."""
        params = nnx.state(self._build_model(seed), TRAINED)
        # Under jit no two leaves share a buffer, as equal constants may: steps donate each once.
        return TrainState(params, jax.jit(self._tx.init)(params))

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, float]]:
        """Takes one step; the buffers of `state` are donated.

        The program is compiled at the first batch of a shape, timed in `compile_seconds`.

        Returns:
            The new state, and loss and accuracy on the batch before the step.
        """
        program = self._programs.get(batch.ids.shape)
        if program is None:
            start = time.perf_counter()
            jitted = jax.jit(self.step, donate_argnums=0)
            program = jitted.lower(state, self.frozen, batch).compile()
            self._programs[batch.ids.shape] = program
            self.compile_seconds += time.perf_counter() - start
        state, metrics = program(state, self.frozen, batch)
        return state, {name: float(value) for name, value in metrics.items()}

    def step(
        self, state: TrainState, frozen: nnx.State, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The step as a pure function, for compiling."""

        def loss_fn(params: nnx.State) -> tuple[jax.Array, jax.Array]:
            logits = nnx.merge(self.graph, params, frozen, copy=True)(batch.ids, batch.mask)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return losses.mean(), logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = self._tx.update(
            grads,
            state.opt_state,
            state.params,
            value=loss,
            value_fn=lambda params: loss_fn(params)[0],
        )
        metrics = {"loss": loss, "top1": jnp.mean(logits.argmax(-1) == batch.labels)}
        perturbation = optax.tree.get(opt_state, "perturbation_norm")
        if perturbation is not None:
            metrics["perturbation_norm"] = perturbation
        return TrainState(optax.apply_updates(state.params, updates), opt_state), metrics

    def evaluate(self, state: TrainState, tokens: Tokens, labels: np.ndarray) -> dict[str, float]:
        """Returns the mean loss and the accuracy on a data set."""
        sums = {"loss": 0.0, "top1": 0.0}
        for chosen, filled in tokens.chunks():
            batch = Batch(*tokens.batch(filled), labels[filled])
            found = _scores(self.graph, state.params, self.frozen, batch)
            for name in sums:
                sums[name] += float(np.asarray(found[name], np.float64)[: len(chosen)].sum())
        return {name: value / len(labels) for name, value in sums.items()}


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    graph: nnx.GraphDef, params: nnx.State, frozen: nnx.State, batch: Batch
) -> dict[str, jax.Array]:
    logits = nnx.merge(graph, params, frozen, copy=True)(batch.ids, batch.mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return {"loss": losses, "top1": logits.argmax(-1) == batch.labels}


@jax.jit
def imbalance(params: nnx.State) -> dict[str, jax.Array]:
    """Returns each adapter's balancedness; of three cores (FLoRA) its norm deviation."""
    cores = jax.tree.leaves(samax.lora_groups(params))
    if len(cores) == 2 * len(set(cores)):
        return samax.balancedness(params, samax.lora_groups)
    return samax.norm_deviation(params, samax.lora_groups)


def batch_indices(examples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Returns the examples of a step: an epoch is a permutation, its incomplete batch is dropped.

    Args:
        examples: How many there are.
        batch_size: How many a step reads, at most `examples`.
        seed: The run's.
        step: The step's number from 0.
    """
    epoch, position = divmod(step, examples // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(examples)
    return order[position * batch_size : (position + 1) * batch_size]
