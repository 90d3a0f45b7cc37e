"""Image classification as what a `Trainer` is given: images to batches, logits to a loss.

The data are on the device, as one epoch's: its permutation and every augmentation follow from a
key, so that a run which was interrupted repeats what it would have done.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import models
from benchmarks.core.distributed import Cluster
from benchmarks.core.training import Metrics, Trainer, TrainState, mean_scores
from benchmarks.data import Dataset
from benchmarks.data.augment import normalize, random_crop_flip

_EVALUATION_BATCH = 250
BINS = 15
"""Of the confidence, for the calibration error."""


class EpochData(NamedTuple):
    """What the steps of one epoch read."""

    # uint8, (n, height, width, channels); over a cluster in batches: (steps, size, ...).
    images: Any
    labels: Any  # int32, likewise
    order: Any  # the images that each step takes, one after the other
    key: jax.Array  # the augmentations' key, from which each step's is folded


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How images become batches and logits become a loss."""

    batch_size: int  # Images a step; the incomplete batch at the end of an epoch is dropped
    mean: Any  # Per-channel mean of the training images, in [0, 1]
    std: Any  # Per-channel standard deviation of the training images
    flip: bool = True  # Whether training images are mirrored at random
    shift: int = 4  # Training images are shifted at random by up to so many pixels
    label_smoothing: float = 0.0  # Probability mass spread over all classes, in [0, 1)
    dtype: Any = jnp.float32  # The images' dtype, which is that of the model's computation


class Classification:
    """A classifier with its recipe; one serves every seed and every optimizer."""

    def __init__(
        self,
        build_model: Callable[[int], nnx.Module],
        recipe: Recipe,
        cluster: Cluster | None = None,
    ):
        """Builds the model once for its structure."""
        self._build_model, self.recipe, self._cluster = build_model, recipe, cluster
        model = build_model(0)
        model.train()
        self._train_graph = nnx.graphdef(model)
        model.eval()
        self._eval_graph = nnx.graphdef(model)
        self._permutation = jax.jit(jax.random.permutation, static_argnums=1)
        replicated = None if cluster is None else cluster.replicated
        self._scores = jax.jit(self._batch_scores, out_shardings=replicated)

    @classmethod
    def of(
        cls, config: Mapping[str, Any], dataset: Dataset, cluster: Cluster | None = None
    ) -> "Classification":
        """Returns the task of a run, from its record's configuration."""
        dtype = jnp.bfloat16 if config["bfloat16"] else jnp.float32
        build = functools.partial(
            models.build,
            config["model"],
            num_classes=dataset.num_classes,
            in_channels=dataset.train_images.shape[-1],
            width=config["width"],
            dtype=dtype,
        )
        looks = dataset.mean, dataset.std, config["flip"]
        shift = config.get("shift", Recipe.shift)
        recipe = Recipe(config["batch_size"], *looks, shift, config["label_smoothing"], dtype)
        return cls(lambda seed: build(rngs=nnx.Rngs(seed)), recipe, cluster)

    def trainer(
        self,
        tx: optax.GradientTransformation,
        scan: bool | None = None,
        ascent_share: float = 1.0,
    ) -> Trainer:
        """Returns the trainer with an optimizer; over a cluster its state is on every device."""
        cluster: dict[str, Any] = {}
        if self._cluster is not None:
            cluster["out_shardings"] = self._cluster.replicated
            cluster["place"] = self._cluster.replicate
        options = {"batch": self.batch, "scan": scan, "ascent_share": ascent_share, **cluster}
        return Trainer(self.init, self.loss, tx, **options)

    def init(self, seed: int) -> tuple[nnx.State, nnx.State]:
        """Returns fresh parameters and batch statistics."""
        return split(self._build_model(seed))

    def loss(
        self, params: nnx.State, inputs: tuple[nnx.State, tuple[jax.Array, jax.Array]]
    ) -> tuple[jax.Array, tuple[nnx.State, Metrics]]:
        """Returns a batch's training loss, the new batch statistics and the accuracy."""
        model_state, (images, labels) = inputs
        model = nnx.merge(self._train_graph, params, model_state, copy=True)
        logits = model(images)
        accuracy = jnp.mean(logits.argmax(-1) == labels)
        return self._mean_loss(logits, labels), (split(model)[1], {"train_top1": accuracy})

    def loss_in_evaluation(
        self, model_state: nnx.State
    ) -> Callable[[nnx.State, tuple[jax.Array, jax.Array]], jax.Array]:
        """Returns the training loss without augmentation, with batch statistics that are fixed."""

        def loss_fn(params: nnx.State, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            return self._mean_loss(self._logits(params, model_state, batch[0]), batch[1])

        return loss_fn

    def _mean_loss(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        one_hot = jax.nn.one_hot(labels, logits.shape[-1])
        smoothed = optax.smooth_labels(one_hot, self.recipe.label_smoothing)
        return optax.softmax_cross_entropy(logits, smoothed).mean()

    def epoch(self, images: Any, labels: Any, key: jax.Array) -> EpochData:
        """Returns what the steps of an epoch read, in an order drawn from its key."""
        order_key, key = jax.random.split(key)
        order = self._permutation(order_key, len(images))
        if self._cluster is None:
            return EpochData(images, labels, order, key)
        size = self.recipe.batch_size
        steps = len(order) // size
        batches = np.asarray(order)[: steps * size].reshape(steps, size)
        return EpochData(
            self._cluster.batches(images, batches),
            self._cluster.batches(labels, batches),
            self._cluster.replicate(batches),
            key,
        )

    def batch(self, data: EpochData, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the augmented images of a step, and their labels."""
        if self._cluster is None:
            size = self.recipe.batch_size
            chosen = jax.lax.dynamic_slice_in_dim(data.order, index * size, size)
        else:
            chosen = index
        key = jax.random.fold_in(data.key, index)
        images = random_crop_flip(key, data.images[chosen], self.recipe.shift, self.recipe.flip)
        return self._normalized(images), data.labels[chosen]

    def evaluate(self, state: TrainState, images: Any, labels: Any) -> dict[str, Any]:
        r"""Returns mean loss, accuracies and calibration error in evaluation mode.

        Returns:
            `loss`: the negative log-likelihood, without label smoothing, in nats.
            `top1`, `top5`: the shares of labels that are the largest logit, or among the five
            largest, which is 1 for five classes or fewer.
            `ece`: the expected calibration error in [0, 1],
            $\sum_b (n_b / n) \, |\mathrm{acc}_b - \mathrm{conf}_b|$, over 15 equal bins of the
            confidence, the largest probability (Guo et al. 2017, arXiv 1706.04599).
            `top1_halves`: the accuracy on every second image from the first, and from the second.
        """
        arguments = state.evaluated(), state.model_state, images, labels
        starts = range(0, len(images), _EVALUATION_BATCH)
        found = mean_scores(
            lambda start: self._scores(*arguments, start),
            ((np.int32(start), min(_EVALUATION_BATCH, len(images) - start)) for start in starts),
        )
        gaps, hits = found.pop("bin_gaps"), found.pop("half_hits")
        sizes = [-(-len(images) // 2), len(images) // 2]
        halves = [hit * len(images) / max(size, 1) for hit, size in zip(hits, sizes, strict=True)]
        return {**found, "ece": float(np.abs(gaps).sum()), "top1_halves": halves}

    def _batch_scores(
        self, params: Any, model_state: Any, images: jax.Array, labels: jax.Array, start: jax.Array
    ) -> dict[str, jax.Array]:
        positions = start + jnp.arange(_EVALUATION_BATCH)
        if self._cluster is not None:
            positions = self._cluster.spread(positions)
        # The last batch is filled up with the last image.
        chosen = jnp.minimum(positions, len(images) - 1)
        logits, targets = self._logits(params, model_state, images[chosen]), labels[chosen]
        top5 = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
        top1 = top5[:, 0] == targets
        confidence = jax.nn.softmax(logits).max(-1)
        bins = jnp.minimum((confidence * BINS).astype(int), BINS - 1)
        return {
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, targets),
            "top1": top1,
            "top5": (top5 == targets[:, None]).any(-1),
            "bin_gaps": jax.nn.one_hot(bins, BINS) * (top1 - confidence)[:, None],
            "half_hits": jax.nn.one_hot(positions % 2, 2) * top1[:, None],
        }

    def _logits(self, params: Any, model_state: Any, images: jax.Array) -> jax.Array:
        model = nnx.merge(self._eval_graph, params, model_state, copy=True)
        return model(self._normalized(images))

    def _normalized(self, images: jax.Array) -> jax.Array:
        return normalize(images, self.recipe.mean, self.recipe.std, self.recipe.dtype)


def split(model: nnx.Module) -> tuple[nnx.State, nnx.State]:
    """Returns the parameters and everything else that a step may change."""
    parts: Any = nnx.split(model, nnx.Param, ...)
    return parts[1], parts[2]
