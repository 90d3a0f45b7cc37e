"""What is trained: models as shapes alone, how they are laid out over chips, and their losses.

Nothing here has values: a model of 7 billion parameters takes no memory before it is on its chips.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from benchmarks.models.imagenet import ResNet50, VisionTransformerB
from benchmarks.models.llama import Llama, LlamaConfig
from benchmarks.models.lora import TRAINED, adapt_stack

DATA, MODEL = "data", "model"
"""The names of the mesh's axes: the batch is split along the first."""
LAYOUTS = {
    "data": "data parallel: parameters on every chip, the batch split",
    "sharded": "fully sharded: parameters and batch split over all chips",
    "tensor": "tensor parallel: layers split over one axis, the batch over the other",
    "mixed": "both: layers split over one axis, and over the other as the batch is",
}
TOKENS = 512
"""The length of a row of text."""
_RANK = 8


Split = Callable[[jax.Array], jax.Array]
"""Says of activations that they are split as the batch is: XLA may choose otherwise."""


class Workload(NamedTuple):
    """A model as shapes, and its loss."""

    params: Any  # What trains
    rest: Any  # What a step changes beside it (batch statistics), and what is frozen
    # (params, rest, batch) -> (loss, the new rest)
    loss: Callable[[Any, Any, Any], tuple[jax.Array, Any]]
    batch: Callable[[int], Any]  # Of so many rows
    place: Callable[[str, Any], Any]  # Of a layout and a tree, how each leaf is split


def mesh_shape(layout: str, chips: int) -> tuple[int, int]:
    """Returns how many chips the axes `data` and `model` have."""
    if layout in ("data", "sharded"):
        return chips, 1
    ways = 2 ** (int(math.log2(chips)) // 2)
    return chips // ways, ways


def _llama(width: int, layers: int, heads: int, hidden: int, words: int = 32_000) -> LlamaConfig:
    return LlamaConfig(words, width, layers, heads, heads, hidden)


DECODERS = {
    "decoder_tiny": _llama(64, 2, 4, 128, 256),
    "decoder_100m": _llama(768, 12, 16, 2048),
    "decoder_1b": _llama(2048, 16, 16, 8192),
    "decoder_7b": _llama(4096, 32, 32, 11_008),
}
LORA = {"lora_tiny": "decoder_tiny", "lora_7b": "decoder_7b"}
"""Adapters of decoders, whose own weights are frozen and in bfloat16."""


def decoder(split: Split, config: LlamaConfig, adapted: bool = False) -> Workload:
    """Returns a decoder, computed in bfloat16, whose blocks are computed again for gradients."""
    frozen_dtype = jnp.bfloat16 if adapted else jnp.float32

    def build() -> Llama:
        model = Llama(
            config, remat=True, dtype=jnp.bfloat16, param_dtype=frozen_dtype, rngs=nnx.Rngs(0)
        )
        if adapted:
            adapt_stack(model.stacks[0], rank=_RANK, alpha=2.0 * _RANK, rngs=nnx.Rngs(0))
        return model

    trained = TRAINED if adapted else nnx.Param
    graph, *states = nnx.split(nnx.eval_shape(build), trained, ...)
    params, rest = states

    def loss(params: Any, rest: Any, batch: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, rest, copy=True)
        length = batch.shape[1]
        positions = jnp.arange(length)[None]
        mask = jnp.tril(jnp.ones((1, length, length), bool))
        logits = model.logits(model.above(split(model.embed(batch)), positions, mask))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:])
        return losses.mean(), rest

    def batch(rows: int) -> Any:
        return jax.ShapeDtypeStruct((rows, TOKENS), jnp.int32)

    return Workload(params, rest, loss, batch, _place_decoder)


def _place_decoder(layout: str, tree: Any) -> Any:
    """Along `model` go heads and hidden features, along `data` the other axis of each matrix."""
    across = MODEL if layout in ("tensor", "mixed") else None
    along = DATA if layout in ("sharded", "mixed") else None
    into, out_of = PartitionSpec(None, along, across), PartitionSpec(None, across, along)
    specs = {
        **dict.fromkeys(("query", "key", "value", "gate", "up"), into),
        **dict.fromkeys(("attention_output", "down"), out_of),
    }

    def place(path: Any, leaf: Any) -> PartitionSpec:
        keys = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        if "embedding" in keys:
            return PartitionSpec(across, along)
        if "lora_a" in keys:
            return PartitionSpec(None, along, None)
        if "lora_b" in keys:
            return PartitionSpec(None, None, across or along)
        layer = next((key for key in keys if key in specs), None)
        return specs[layer] if layer and len(leaf.shape) == 3 else PartitionSpec()

    return jax.tree_util.tree_map_with_path(place, tree)


def classifier(split: Split, build: Callable[..., nnx.Module]) -> Workload:
    """Returns a network for ImageNet, computed in bfloat16, with its batch statistics."""
    model = nnx.eval_shape(lambda: build(dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graph, *states = nnx.split(model, nnx.Param, ...)
    params, rest = states

    del split  # which the images' own layout decides

    # A program of its own, so that two gradients take twice the time to trace and not four times:
    # Flax asks each new batch statistic for its sharding, which a traced value does not have, and
    # JAX searches the whole program around it for words to say so.
    @jax.jit
    def loss(params: Any, rest: Any, batch: Any) -> tuple[jax.Array, Any]:
        images, labels = batch
        model = nnx.merge(graph, params, rest, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return losses.mean(), nnx.state(model, nnx.Not(nnx.Param))

    def batch(rows: int) -> Any:
        images = jax.ShapeDtypeStruct((rows, 224, 224, 3), jnp.bfloat16)
        return images, jax.ShapeDtypeStruct((rows,), jnp.int32)

    return Workload(params, rest, loss, batch, _everywhere)


def many_leaves(split: Split, count: int) -> Workload:
    """Returns a model of so many small arrays, whose programs are long and have nothing to do."""
    del split
    shape = 8, 128
    params = {f"leaf{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i in range(count)}

    def loss(params: Any, rest: Any, batch: Any) -> tuple[jax.Array, Any]:
        total = sum(jnp.sum(leaf * leaf) for leaf in params.values())
        return total * batch.mean(), rest

    def batch(rows: int) -> Any:
        return jax.ShapeDtypeStruct((rows,), jnp.float32)

    return Workload(params, (), loss, batch, _everywhere)


def _everywhere(layout: str, tree: Any) -> Any:
    return jax.tree.map(lambda _: PartitionSpec(), tree)


WORKLOADS: dict[str, Callable[[Split], Workload]] = {
    **{name: functools.partial(decoder, config=config) for name, config in DECODERS.items()},
    **{
        name: functools.partial(decoder, config=DECODERS[base], adapted=True)
        for name, base in LORA.items()
    },
    "resnet50": functools.partial(classifier, build=ResNet50),
    "vit_b": functools.partial(classifier, build=VisionTransformerB),
    "leaves_1k": functools.partial(many_leaves, count=1_000),
    "leaves_10k": functools.partial(many_leaves, count=10_000),
}
ROWS = {
    **dict.fromkeys([*DECODERS, *LORA], 4),
    "resnet50": 64,
    "vit_b": 64,
    "leaves_1k": 1,
    "leaves_10k": 1,
}
"""Rows of the batch on each chip."""
