"""A randomly initialized BERT in the published layout, and a task that it can learn."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.models.bert import Bert, BertConfig, tensor_name

CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=40,
)
WORDS = ("a", "film", "the", "story", "is", "very", "good", "bad", "great", "dull")


def encoder(layers=CONFIG.num_hidden_layers, dtype=jnp.float32):
    """Weights of standard deviation 0.3: at BERT's own 0.02 so small a network is nearly linear."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=layers)
    model = nnx.eval_shape(lambda: Bert(config, dtype=dtype, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        weights = 0.3 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")
        return jnp.asarray(weights, dtype if leaf.ndim > 1 else jnp.float32)

    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(model, jax.tree_util.tree_map_with_path(draw, state))
    return model


def save(folder, model, **changes):
    """Writes what `benchmarks.models.bert.load` reads."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    config = {**dataclasses.asdict(model.config), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    tensors = {}
    for path, leaf in leaves:
        keys = [key.key for key in path]
        array = np.asarray(leaf)
        tensors[tensor_name(keys)] = np.ascontiguousarray(
            array.T if keys[-1] == "kernel" else array
        )
    save_file(tensors, folder / "model.safetensors")
    return tensors


def save_tokenizer(folder):
    """Writes a word-level tokenizer with padding and truncation on, as the published one has."""
    import tokenizers

    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.enable_padding(length=12)
    tokenizer.enable_truncation(12)
    tokenizer.save(str(folder / "tokenizer.json"))


def save_task(folder, count=60):
    """Writes an SST-2 of `count` training and 30 test sentences: is there a word of praise?"""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for file, size in (("train.tsv", count), ("validation.tsv", 30)):
        lines = ["sentence\tlabel"]
        for index in range(size):
            filler = list(rng.choice(WORDS[:6], rng.integers(1, 4)))
            filler.insert(1, rng.choice(["good", "great"] if index % 2 else ["bad", "dull"]))
            lines.append(f"{' '.join(filler)}\t{index % 2}")
        (folder / file).write_text("\n".join(lines) + "\n")
