"""The decoder: its equations, caches, beams, stacks, loading, and the published weights."""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import samax
from benchmarks.models import llama
from benchmarks.models.llama import Llama, LlamaConfig, causal_mask, generate
from benchmarks.models.lora import TRAINED, adapt_stack

FIXTURE = Path(__file__).parent / "fixtures" / "smollm2.json"
CONFIG = LlamaConfig(
    vocab_size=7,
    hidden_size=16,
    num_layers=3,
    num_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    rope_base=100.0,
)


def make(seed=0, **options):
    """A decoder in general position, whose next tokens are far from uniform."""
    model = Llama(CONFIG, rngs=nnx.Rngs(seed), **options)
    leaves, structure = jax.tree.flatten(nnx.state(model))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        leaf + 0.5 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    nnx.update(model, jax.tree.unflatten(structure, moved))
    return model


@nnx.jit
def _logits(model, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return model(ids, positions, causal_mask(jnp.ones_like(ids)))


def logits(model, ids):
    """Of one text, without a cache."""
    return _logits(model, jnp.asarray(ids)[None])[0]


def numpy_logits(model, ids):
    """The same, written out with loops over positions and heads in float64."""
    state = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model)))
    heads, groups, width = CONFIG.num_heads, CONFIG.num_key_value_heads, CONFIG.head_size

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_epsilon) * scale

    def turn(vector, position):
        turned = np.empty_like(vector)
        for pair in range(width // 2):
            angle = position * CONFIG.rope_base ** (-pair / (width // 2))
            a, b = vector[2 * pair], vector[2 * pair + 1]
            turned[2 * pair] = a * np.cos(angle) - b * np.sin(angle)
            turned[2 * pair + 1] = a * np.sin(angle) + b * np.cos(angle)
        return turned

    table = state["embed"]["embedding"]
    x = table[np.asarray(ids)]
    for stack in state["stacks"].values():
        for layer in range(len(stack["attention_norm"]["scale"])):
            own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stack)
            y = norm(x, own["attention_norm"]["scale"])
            query, key, value = (y @ own[name]["kernel"] for name in ("query", "key", "value"))
            attended = np.zeros_like(query)
            for head in range(heads):
                mine = slice(head * width, (head + 1) * width)
                group = head // (heads // groups)
                shared = slice(group * width, (group + 1) * width)
                for t in range(len(ids)):
                    q = turn(query[t, mine], t)
                    scores = [q @ turn(key[s, shared], s) / np.sqrt(width) for s in range(t + 1)]
                    weights = np.exp(np.array(scores) - max(scores))
                    attended[t, mine] = weights / weights.sum() @ value[: t + 1, shared]
            x = x + attended @ own["attention_output"]["kernel"]
            y = norm(x, own["network_norm"]["scale"])
            gate = y @ own["gate"]["kernel"]
            gated = gate / (1 + np.exp(-gate)) * (y @ own["up"]["kernel"])
            x = x + gated @ own["down"]["kernel"]
    return norm(x, state["norm"]["scale"]) @ table.T


@pytest.mark.parametrize("options", [{}, {"top": 1}, {"top": 3, "remat": True}])
def test_logits_are_those_written_out(options):
    model = make(**options)
    ids = [3, 1, 4, 1, 5, 2]
    np.testing.assert_allclose(logits(model, ids), numpy_logits(model, ids), rtol=1e-3, atol=1e-3)


def test_packed_texts_do_not_see_each_other():
    model, texts = make(), ([3, 1, 4], [1, 5, 2, 6])
    packed = jnp.asarray([[*texts[0], *texts[1], 0]])
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0]])
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 0]])
    found = model(packed, positions, causal_mask(segments))[0]
    np.testing.assert_allclose(found[:3], logits(model, texts[0]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[3:7], logits(model, texts[1]), rtol=1e-4, atol=1e-4)


def continuations(model, prompt, count, end):
    """All continuations of a prompt, with their log-probabilities; one ends at its first end."""
    every = list(itertools.product(range(CONFIG.vocab_size), repeat=count))
    chances = jax.nn.log_softmax(_logits(model, jnp.asarray([[*prompt, *made] for made in every])))
    for made, rows in zip(every, np.asarray(chances)[:, len(prompt) - 1 :], strict=True):
        ended = made.index(end) + 1 if end in made else count
        if all(token == end for token in made[ended:]):
            yield made, ended, float(rows[np.arange(ended), made[:ended]].sum())


def left_padded(prompts):
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    return jnp.asarray(rows), jnp.asarray([len(prompt) for prompt in prompts])


def test_enough_beams_find_the_best_of_all_continuations():
    model, end, count = make(), 6, 3
    prompts = [[3, 1, 4], [2], [5, 5]]
    for penalty in (1.0, 0.0):
        found = generate(
            model,
            *left_padded(prompts),
            end=end,
            new_tokens=count,
            beams=CONFIG.vocab_size**2,
            length_penalty=penalty,
        )
        for row, prompt in enumerate(prompts):
            best = max(
                continuations(model, prompt, count, end),
                key=lambda each: each[2] / each[1] ** penalty,
            )
            assert tuple(found.ids[row].tolist()) == best[0]
            assert float(found.scores[row]) == pytest.approx(best[2] / best[1] ** penalty, rel=1e-3)


def test_one_beam_is_the_greedy_continuation():
    model, prompts = make(1, top=2), [[3, 1, 4], [2], [5, 0, 5, 1]]
    found = generate(model, *left_padded(prompts), end=6, new_tokens=6)
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        while len(text) < len(prompt) + 6 and text[-1] != 6:
            text.append(int(logits(model, text)[-1].argmax()))
        made = text[len(prompt) :]
        assert found.ids[row].tolist() == made + [6] * (6 - len(made))


def loss(graph, frozen, params, ids):
    model = nnx.merge(graph, params, frozen, copy=True)
    chances = jax.nn.log_softmax(logits(model, ids))
    return -chances[jnp.arange(len(ids) - 1), jnp.asarray(ids[1:])].mean()


def test_adapters_are_on_the_last_stack_start_at_zero_and_are_found_by_layer():
    model = make(top=2)
    before = logits(model, [3, 1, 4])
    adapt_stack(model.stacks[-1], rank=2, alpha=4, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(logits(model, [3, 1, 4]), before, rtol=1e-5, atol=1e-5)
    params = nnx.state(model, TRAINED)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    assert shapes == {(2, 16, 2), (2, 2, 16), (2, 2, 8)}
    found = samax.balancedness(params, functools.partial(samax.lora_groups, stacked=True))
    assert {name.split("/")[-3] for name in found} == {"query", "value"}
    assert all(value.shape == (2,) for value in found.values())


def test_blocks_that_are_computed_again_have_the_same_gradients():
    found = []
    for remat in (False, True):
        model = make(top=2, remat=remat)
        adapt_stack(model.stacks[-1], rank=2, alpha=4, rngs=nnx.Rngs(0))
        graph, params, frozen = nnx.split(model, TRAINED, ...)
        grad = jax.jit(jax.grad(functools.partial(loss, graph, frozen)), static_argnums=1)
        found.append(grad(params, (3, 1, 4, 1)))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
        assert one.any() or one.shape[1] == 16  # A has no gradient where B is zero


def test_a_file_is_read_as_it_was_written(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = make(top=1)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, key in llama._FIELDS.items():
        value = getattr(CONFIG, name)
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(
            f"llama.{key}", value
        )
    state = nnx.to_pure_dict(nnx.state(model))
    writer.add_tensor("token_embd.weight", np.asarray(state["embed"]["embedding"]))
    writer.add_tensor("output_norm.weight", np.asarray(state["norm"]["scale"]))
    layers = (
        (stack, i) for stack in state["stacks"].values() for i in range(len(stack["up"]["kernel"]))
    )
    for number, (stack, i) in enumerate(layers):
        for part, leaves in stack.items():
            ((kind, leaf),) = leaves.items()
            array = np.ascontiguousarray(leaf[i].T if kind == "kernel" else leaf[i])
            writer.add_tensor(f"blk.{number}.{llama._BLOCK_NAMES[part]}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config, tensors, _ = llama.read(tmp_path / "tiny.gguf")
    assert config.num_key_value_heads == 2
    again = llama.load(config, tensors, top=2)  # stacks may be cut elsewhere
    np.testing.assert_allclose(logits(again, [3, 1]), logits(model, [3, 1]), rtol=1e-4, atol=1e-4)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="top=4: must be from 0 to the 3 blocks"):
        Llama(CONFIG, top=4, rngs=nnx.Rngs(0))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        llama.read(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="tokenizer"):
        llama.load_tokenizer({"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"})


@pytest.mark.slow
def test_the_published_weights_give_the_reference_logits_and_texts():
    pytest.importorskip("gguf")
    try:
        path = llama.model_file()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    reference = json.loads(FIXTURE.read_text(encoding="utf-8"))
    config, tensors, fields = llama.read(path)
    tokenizer, model = llama.load_tokenizer(fields), llama.load(config, tensors, top=4)
    chosen = np.array(reference["chosen"])
    for text in reference["texts"]:
        assert tokenizer.encode(text["text"]).ids == text["ids"]
        assert tokenizer.decode(text["ids"]) == text["text"]
        found = nnx.jit(logits)(model, jnp.asarray(text["ids"]))
        np.testing.assert_allclose(found[:, chosen], text["logits"], atol=1e-3)
    prompts = left_padded([text["ids"] for text in reference["texts"]])
    for beams in (1, 4):
        made = generate(model, *prompts, end=2, new_tokens=12, beams=beams)
        for row, text in zip(made.ids.tolist(), reference["texts"], strict=True):
            wanted = text[f"beams_{beams}"]
            assert row == wanted + [2] * (12 - len(wanted))
