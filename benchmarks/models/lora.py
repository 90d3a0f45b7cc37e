"""Low-rank adapters of a frozen encoder, and the sentence classifier that they adapt.

Two settings of `nnx.LoRA` are not LoRA's usual ones, and both change where norm balancing starts:
its `A` is he_uniform (squared norm 2 r, here 16) where LoRA's code has kaiming_uniform(a=sqrt(5))
(r / 3, here 2.7), and it has no factor alpha / r. Here both are as in LoRA's code.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.models.bert import Bert, Block, LastBlocks, mean_pool
from benchmarks.models.llama import Llama, causal_mask, stacked

# U(-1/sqrt(n), 1/sqrt(n)) for fan-in n, which is what kaiming_uniform(a=sqrt(5)) amounts to.
kaiming_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

TRAINED = nnx.Any(nnx.LoRAParam, nnx.PathContains("classifier"))
"""The filter of what trains. `nnx.Param` alone would match the frozen weights as well."""


class FLoRA(nnx.Module):
    """The three-core adapter `x A G B` (Si et al. 2024, arXiv 2405.14739, for a matrix).

    `A` and `B` start as LoRA's `A` does and the core `G` at zero, so that the adapted model starts
    as the pretrained one.
    """

    def __init__(self, inputs: int, rank: int, outputs: int, *, rngs: nnx.Rngs):
        """Builds cores of shapes (inputs, rank), (rank, rank) and (rank, outputs)."""
        self.lora_a = nnx.LoRAParam(kaiming_uniform(rngs.params(), (inputs, rank)))
        self.lora_g = nnx.LoRAParam(jnp.zeros((rank, rank)))
        self.lora_b = nnx.LoRAParam(kaiming_uniform(rngs.params(), (outputs, rank)).T)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., inputs) to (..., outputs)."""
        return x @ self.lora_a[...] @ self.lora_g[...] @ self.lora_b[...]


class Adapted(nnx.Module):
    """A frozen linear layer plus `scale` times an adapter."""

    def __init__(self, base: nnx.Linear, lora: nnx.Module, scale: float):
        """Wraps `base`."""
        self.base, self.lora, self.scale = base, lora, scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., inputs) to (..., outputs), in the dtype of the frozen layer.

        The adapter computes in float32 also where the encoder does in bfloat16: rounding its
        factors would round SAM's perturbation of them away, and at rank 8 it costs next to nothing.
        """
        y = self.base(x)
        return (y + self.scale * self.lora(x.astype(jnp.float32))).astype(y.dtype)


ADAPTERS = {
    "lora": lambda inputs, rank, outputs, rngs: nnx.LoRA(
        inputs, rank, outputs, a_initializer=kaiming_uniform, rngs=rngs
    ),
    "flora": lambda inputs, rank, outputs, rngs: FLoRA(inputs, rank, outputs, rngs=rngs),
}
"""Adapters by name: builders from (inputs, rank, outputs, rngs)."""


FULL = "full"
"""In an adapter's place: the encoder's own weights train."""


def adapt(
    blocks: Iterable[Block], adapter: str, *, rank: int, alpha: float, rngs: nnx.Rngs
) -> None:
    """Attaches adapters to query and value of blocks, in place."""
    build = ADAPTERS[adapter]
    for block in blocks:
        for name in ("query", "value"):
            base = getattr(block, name)
            lora = build(base.in_features, rank, base.out_features, rngs)
            setattr(block, name, Adapted(base, lora, alpha / rank))


def adapt_stack(stack: nnx.Module, *, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
    """Attaches LoRA to query and value of blocks that are stacked along a leading axis, in place.

    The factors are stacked likewise: groups are found by `samax.lora_groups(..., stacked=True)`.
    """
    for name in ("query", "value"):
        base = getattr(stack, name)
        build = functools.partial(
            nnx.LoRA, base.in_features, rank, base.out_features, a_initializer=kaiming_uniform
        )
        lora = stacked(build, base.kernel.shape[0], rngs)
        setattr(stack, name, Adapted(base, lora, alpha / rank))


class SentenceClassifier(nnx.Module):
    """An encoder, the mean over tokens, and a linear layer.

    The linear layer starts random: from zero every adapter's first gradient would be zero.
    """

    def __init__(self, encoder: Bert | LastBlocks, num_classes: int, *, rngs: nnx.Rngs):
        """Puts a classifier on an encoder, or on its last blocks."""
        self.encoder = encoder
        self.classifier = nnx.Linear(
            encoder.config.hidden_size,
            num_classes,
            kernel_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )

    def __call__(self, inputs: jax.Array, mask: jax.Array, *types: jax.Array) -> jax.Array:
        """Maps what the encoder reads to float32 logits (N, classes).

        An encoder reads ids (N, T), their mask and types; its last blocks the hidden states
        (N, T, size) below them, and the mask.
        """
        return self.classifier(mean_pool(self.encoder(inputs, mask, *types), mask))


def is_adapter(params: Any) -> Any:
    """A mask that is True for the adapters' cores and False for the classifier."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "lora_" in jax.tree_util.keystr(path), params
    )


class SentenceTask:
    """What a `Trainer` is given: the frozen weights are part of each batch, never differentiated.

    There is no dropout: a step is a function of the state and the batch.
    """

    def __init__(self, build_model: Callable[[int], nnx.Module], trained: Any = TRAINED):
        """Builds the model once for its structure and its frozen weights, kept as `frozen`.

        `build_model` maps a seed to a model of a batch without its labels, whose frozen weights do
        not depend on the seed; `trained` is the filter of the others.
        """
        self._build_model, self._trained = build_model, trained
        self.graph: nnx.GraphDef
        self.graph, *states = nnx.split(build_model(0), trained, ...)
        self.frozen: nnx.State = states[1]
        self.scores = jax.jit(self._scores)

    def init(self, seed: int) -> tuple[nnx.State, tuple[()]]:
        """Returns fresh weights of those that train; no step changes anything else."""
        # Copies: pretrained ones are every seed's start, and steps donate what they are given.
        return jax.tree.map(jnp.copy, nnx.state(self._build_model(seed), self._trained)), ()

    def loss(
        self, params: nnx.State, inputs: Any
    ) -> tuple[jax.Array, tuple[tuple[()], dict[str, jax.Array]]]:
        """Returns the mean loss and the accuracy on a batch: frozen weights, inputs, labels."""
        found = self._scores(params, inputs[1])
        return found["loss"].mean(), ((), {"train_top1": jnp.mean(found["top1"])})

    def _scores(self, params: nnx.State, batch: Any) -> dict[str, jax.Array]:
        """Returns each sentence's loss, and whether it is told right."""
        frozen, *inputs, labels = batch
        logits = nnx.merge(self.graph, params, frozen, copy=True)(*inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return {"loss": losses, "top1": logits.argmax(-1) == labels}


class DecoderTask:
    """What a `Trainer` is given: the frozen weights are part of each batch, never differentiated.

    What the last stack sees is computed before the first gradient, once for a step or once for all:
    no adapter changes it.
    """

    def __init__(self, model: Llama, *, rank: int, alpha: float, most: int | None = None):
        """Takes the decoder, whose last stack gets the adapters.

        Args:
            model: The decoder.
            rank: The adapters' rank.
            alpha: Their output is scaled by this / rank.
            most: No row has more tokens to learn. So many logits are computed of each row and not
                those of all its tokens, which with a large vocabulary are most of a step.
        """
        self._model, self._rank, self._alpha, self._most = model, rank, alpha, most
        self._graph: nnx.GraphDef
        self._graph, *states = nnx.split(self._adapted(0), TRAINED, ...)
        # Adapters of no matter which values: nothing below them changes with them.
        self._any, self.frozen = states

    def _adapted(self, seed: int) -> Llama:
        model = nnx.clone(self._model)
        adapt_stack(model.stacks[-1], rank=self._rank, alpha=self._alpha, rngs=nnx.Rngs(seed))
        return model

    def init(self, seed: int) -> tuple[nnx.State, tuple[()]]:
        """Returns fresh adapters; no step changes anything else."""
        return jax.tree.map(jnp.copy, nnx.state(self._adapted(seed), TRAINED)), ()

    def model(self, params: nnx.State, frozen: nnx.State) -> Llama:
        """Returns the decoder with its adapters."""
        return nnx.merge(self._graph, params, frozen, copy=True)

    def batch(self, data: tuple[nnx.State, Any], index: Any) -> Any:
        """Returns a step's batch, with what the last stack sees of it.

        Args:
            data: The frozen weights; and rows, with `ids`, `segments`, `positions` and `learned`,
                each of shape (rows, length), of which the last marks the tokens to learn.
            index: Unused: the rows are those of one step.
        """
        frozen, rows = data
        return frozen, self.below(frozen, rows), rows

    def below(self, frozen: nnx.State, rows: Any) -> jax.Array:
        """Returns what the last stack sees of rows."""
        mask = causal_mask(rows.segments)
        return self.model(self._any, frozen).below(rows.ids, rows.positions, mask)

    def loss(self, params: nnx.State, inputs: Any) -> tuple[jax.Array, tuple[tuple[()], Any]]:
        """Returns the mean loss of the texts' tokens, in nats."""
        frozen, below, rows = inputs[1]
        model = self.model(params, frozen)
        hidden = model.above(below, rows.positions, causal_mask(rows.segments))[:, :-1]
        targets, learned = rows.ids[:, 1:], rows.learned[:, 1:]
        if self._most is not None:
            places = jnp.argsort(~learned, stable=True)[:, : self._most]  # these come first
            hidden = jnp.take_along_axis(hidden, places[..., None], 1)
            targets, learned = (jnp.take_along_axis(x, places, 1) for x in (targets, learned))
        logits = model.logits(hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses * learned) / jnp.maximum(learned.sum(), 1), ((), {})


def build_classifier(
    encoder: Bert | LastBlocks,
    num_classes: int,
    seed: int,
    *,
    adapter: str = "lora",
    rank: int = 8,
    alpha: float = 16.0,
) -> SentenceClassifier:
    """Puts adapters, or with `FULL` none, and a classifier on a copy that shares the arrays."""
    model, rngs = nnx.clone(encoder), nnx.Rngs(seed)
    if adapter != FULL:
        adapt(model.blocks, adapter, rank=rank, alpha=alpha, rngs=rngs)
    return SentenceClassifier(model, num_classes, rngs=rngs)
