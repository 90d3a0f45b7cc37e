"""Training an image classifier as one pure step, with the data on the device.

The step is a function of the training state, the data, a key and the step's index alone: the
epoch's permutation and every augmentation follow from the key, so a run that was interrupted
repeats what it would have done. On accelerators an epoch is one compiled `lax.scan`, which never
waits for Python; on CPU, where XLA runs convolutions inside loops about 22 times slower, the same
step is dispatched once per batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.data.augment import normalize, random_crop_flip

TRACKED = (
    "clean_loss",
    "perturbed_loss",
    "loss_gap",
    "clean_grad_norm",
    "perturbed_grad_norm",
    "grad_cosine",
    "perturbation_norm",
    "adaptive_weight",
    "sharpness_ratio",
    "sharpness",
    "sharpness_grad_norm",
)
"""Scalars that sharpness-aware transformations keep in their state."""

_EVALUATION_BATCH = 250
_PERTURBATION_STREAM = 0x7065_7274  # keeps their keys apart from those of the data


class TrainState(NamedTuple):
    """What a step changes."""

    params: nnx.State
    model_state: nnx.State  # batch statistics, and whatever else is not a parameter
    opt_state: optax.OptState


class EpochData(NamedTuple):
    """What the steps of one epoch read."""

    images: jax.Array  # uint8, (n, height, width, channels)
    labels: jax.Array  # int32, (n,)
    order: jax.Array  # the images that each step takes, one after the other
    key: jax.Array  # the augmentations' key, from which each step's is folded


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How images become batches and logits become a loss.

    Attributes:
        batch_size: Images a step; the incomplete batch at the end of an epoch is dropped.
        mean: Per-channel mean of the training images, in [0, 1].
        std: Per-channel standard deviation of the training images.
        flip: Whether training images are mirrored at random.
        label_smoothing: Probability mass spread over all classes, in [0, 1).
        dtype: The images' dtype, which is that of the model's computation.
    """

    batch_size: int
    mean: Any
    std: Any
    flip: bool = True
    label_smoothing: float = 0.0
    dtype: Any = jnp.float32


class Trainer:
    """Compiled training and evaluation of one model with one optimizer.

    The programs take seeds, images and labels as arguments: one trainer serves every seed.
    """

    def __init__(
        self,
        build_model: Callable[[int], nnx.Module],
        tx: optax.GradientTransformation,
        recipe: Recipe,
        scan: bool | None = None,
        out_shardings: Any = None,
    ):
        """Builds the model once for its structure; programs are compiled when first needed.

        Args:
            build_model: Maps a seed to a Flax NNX model.
            tx: The optimizer; its `update` receives `value` and `value_fn`.
            recipe: Batching, augmentation and loss.
            scan: Whether an epoch is one program; by default everywhere but on CPU.
            out_shardings: Where what the programs return lies; None leaves it to JAX.
        """
        self._build_model = build_model
        self._tx = optax.with_extra_args_support(tx)
        self._recipe = recipe
        self._scan = jax.default_backend() != "cpu" if scan is None else scan
        model = build_model(0)
        model.train()
        self._train_graph = nnx.graphdef(model)
        model.eval()
        self._eval_graph = nnx.graphdef(model)
        self._permutation = jax.jit(jax.random.permutation, static_argnums=1)
        self._out_shardings = out_shardings
        self._evaluate_jit = jax.jit(
            self._evaluate_all if self._scan else self._evaluate_batch, out_shardings=out_shardings
        )
        self._program: Callable | None = None
        self.compile_seconds = 0.0

    def init(self, seed: int) -> TrainState:
        """Returns freshly initialized parameters, batch statistics and optimizer state."""
        params, model_state = split(self._build_model(seed))
        # Under jit no two leaves share a buffer, as equal constants may: steps donate each once.
        opt_state = jax.jit(self._tx.init)(params)
        if optax.tree.get(opt_state, "rng_key") is not None:  # random perturbations differ by seed
            key = jax.random.fold_in(jax.random.key(seed), _PERTURBATION_STREAM)
            opt_state = optax.tree.set(opt_state, rng_key=jax.random.key_data(key))
        return TrainState(params, model_state, opt_state)

    def train_epoch(
        self,
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
        on_step: Callable[[int, int], None] = lambda done, steps: None,
    ) -> tuple[TrainState, dict[str, np.ndarray]]:
        """Trains on every image once, in an order drawn from `key`.

        Args:
            state: Its buffers are donated: use the returned one from here on.
            images: Training images, uint8, shape (n, height, width, channels).
            labels: Their labels, int32, shape (n,).
            key: The epoch's key.
            on_step: Called with the number of steps done and the epoch's number of steps.

        Returns:
            The new state, and each step's metrics as arrays of shape (steps,).
        """
        program = self.compile(state, images, labels)
        steps = len(images) // self._recipe.batch_size
        order_key, key = jax.random.split(key)
        order = self._permutation(order_key, len(images))
        data = self._epoch_data(images, labels, order, key)
        if self._scan:
            state, metrics = program(state, data)
            metrics = jax.device_get(metrics)
            on_step(steps, steps)
            return state, metrics
        history = []
        for index in range(steps):
            state, values = program(state, data, np.int32(index))
            history.append(jax.device_get(values))
            on_step(index + 1, steps)
        return state, {name: np.stack([step[name] for step in history]) for name in history[0]}

    def evaluate(self, state: TrainState, images: jax.Array, labels: jax.Array) -> dict[str, float]:
        """Returns the mean loss, top-1 and top-5 accuracy in evaluation mode.

        Top-5 counts the labels among the five largest logits, so it is 1 for five classes or
        fewer. The loss has no label smoothing.
        """
        arguments = (state.params, state.model_state, images, labels)
        starts = np.arange(0, len(images), _EVALUATION_BATCH, dtype=np.int32)
        if self._scan:
            sums = self._evaluate_jit(*arguments, starts)
        else:
            parts = [self._evaluate_jit(*arguments, start) for start in starts]
            sums = jax.tree.map(lambda *values: sum(values), *parts)
        return {name: float(value) / len(images) for name, value in sums.items()}

    def compile(self, state: TrainState, images: jax.Array, labels: jax.Array) -> Callable:
        """Returns the training program, made at the first call and timed in `compile_seconds`.

        Calling it ahead of the first epoch keeps compilation out of that epoch's time.
        """
        if self._program is None:
            start = time.perf_counter()
            _, key = jax.random.split(jax.random.key(0))
            data = self._epoch_data(images, labels, self._permutation(key, len(images)), key)
            function, index = (self._epoch, ()) if self._scan else (self._step, (np.int32(0),))
            program = jax.jit(function, donate_argnums=0, out_shardings=self._out_shardings)
            self._program = program.lower(state, data, *index).compile()
            self.compile_seconds = time.perf_counter() - start
        return self._program

    def _epoch(self, state: TrainState, data: EpochData) -> tuple[TrainState, dict[str, jax.Array]]:
        def body(state: TrainState, index: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
            return self._step(state, data, index)

        return jax.lax.scan(body, state, jnp.arange(data.order.size // self._recipe.batch_size))

    def _epoch_data(self, images: Any, labels: Any, order: jax.Array, key: jax.Array) -> EpochData:
        return EpochData(images, labels, order, key)

    def _batch(self, data: EpochData, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = self._recipe.batch_size
        chosen = jax.lax.dynamic_slice_in_dim(data.order, index * size, size)
        return data.images[chosen], data.labels[chosen]

    def _spread(self, rows: jax.Array) -> jax.Array:
        return rows

    def _step(
        self, state: TrainState, data: EpochData, index: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        recipe = self._recipe
        images, targets = self._batch(data, index)
        key = jax.random.fold_in(data.key, index)
        batch = random_crop_flip(key, images, flip=recipe.flip)
        batch = normalize(batch, recipe.mean, recipe.std, recipe.dtype)

        def loss_fn(params: nnx.State) -> tuple[jax.Array, tuple[nnx.State, jax.Array]]:
            model = nnx.merge(self._train_graph, params, state.model_state, copy=True)
            logits = model(batch)
            one_hot = jax.nn.one_hot(targets, logits.shape[-1])
            smoothed = optax.smooth_labels(one_hot, recipe.label_smoothing)
            loss = optax.softmax_cross_entropy(logits, smoothed).mean()
            return loss, (split(model)[1], logits)

        # Only the clean pass keeps its batch statistics; the perturbed one starts from the same.
        (loss, (model_state, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        updates, opt_state = self._tx.update(
            grads,
            state.opt_state,
            state.params,
            value=loss,
            value_fn=lambda params: loss_fn(params)[0],
        )
        tracked = {name: optax.tree.get(opt_state, name) for name in TRACKED}
        metrics = {
            "train_loss": loss,
            "train_top1": jnp.mean(logits.argmax(-1) == targets),
            **{name: value for name, value in tracked.items() if value is not None},
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, model_state, opt_state), metrics

    def _evaluate_batch(
        self,
        params: nnx.State,
        model_state: nnx.State,
        images: jax.Array,
        labels: jax.Array,
        start: jax.Array,
    ) -> dict[str, jax.Array]:
        positions = self._spread(start + jnp.arange(_EVALUATION_BATCH))
        counts = positions < len(images)  # the last batch is filled up with the last image
        chosen = jnp.minimum(positions, len(images) - 1)
        model = nnx.merge(self._eval_graph, params, model_state, copy=True)
        recipe = self._recipe
        logits = model(normalize(images[chosen], recipe.mean, recipe.std, recipe.dtype))
        targets = labels[chosen]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        top5 = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
        return {
            "loss": jnp.sum(losses * counts),
            "top1": jnp.sum((top5[:, 0] == targets) & counts),
            "top5": jnp.sum((top5 == targets[:, None]).any(-1) & counts),
        }

    def _evaluate_all(
        self,
        params: nnx.State,
        model_state: nnx.State,
        images: jax.Array,
        labels: jax.Array,
        starts: jax.Array,
    ) -> dict[str, jax.Array]:
        def body(_: None, start: jax.Array) -> tuple[None, dict[str, jax.Array]]:
            return None, self._evaluate_batch(params, model_state, images, labels, start)

        parts = jax.lax.scan(body, None, starts)[1]
        return jax.tree.map(lambda values: values.sum(0), parts)


def split(model: nnx.Module) -> tuple[nnx.State, nnx.State]:
    """Returns the parameters and everything else that a step may change."""
    parts: Any = nnx.split(model, nnx.Param, ...)
    return parts[1], parts[2]
