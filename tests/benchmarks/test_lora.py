"""The adapters, the optimizers and the training step."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import samax
from benchmarks.core import tunable
from benchmarks.core.adapters import batch_indices
from benchmarks.core.methods import parse_method
from benchmarks.core.training import Trainer, mean_scores
from benchmarks.data.text import Tokens
from benchmarks.lora import inputs
from benchmarks.lora import methods as lora_methods
from benchmarks.lora.experiment import imbalance
from benchmarks.models import bert
from benchmarks.models.lora import (
    TRAINED,
    SentenceClassifier,
    SentenceTask,
    adapt,
    build_classifier,
    is_adapter,
    kaiming_uniform,
)
from tests.benchmarks.tiny_bert import encoder

RANK, ALPHA = 4, 8.0


class Batch(NamedTuple):
    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


BATCH = Batch(
    np.array([[2, 5, 6, 3, 0, 0], [2, 7, 8, 9, 10, 3], [2, 11, 5, 3, 0, 0]], np.int32),
    np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool),
    np.array([0, 1, 0], np.int32),
)

PRETRAINED = encoder()
PRETRAINED_BFLOAT16 = encoder(dtype=jnp.bfloat16)


def classifier(seed=0, adapter="lora", pretrained=PRETRAINED):
    return build_classifier(pretrained, 2, seed, adapter=adapter, rank=RANK, alpha=ALPHA)


def parse(text):
    return parse_method(text, lora_methods.METHODS)


class Training:
    """A trainer with its task, on batches that hold the frozen weights."""

    def __init__(self, label, build=classifier):
        self.task = SentenceTask(build)
        tx = lora_methods.optimizer(parse(label), 250)
        self.trainer = Trainer(self.task.init, self.task.loss, tx)
        self.frozen, self.init = self.task.frozen, self.trainer.init

    def train_step(self, state, batch):
        state, metrics = self.trainer.train(state, (self.frozen, *batch))
        return state, {name: float(values[0]) for name, values in metrics.items()}


def in_bfloat16(seed):
    return classifier(seed, pretrained=PRETRAINED_BFLOAT16)


def loss_fn(graph, params, frozen):
    logits = nnx.merge(graph, params, frozen)(BATCH.ids, BATCH.mask)
    return optax.softmax_cross_entropy_with_integer_labels(logits, BATCH.labels).mean()


grad_fn = jax.jit(jax.grad(loss_fn, argnums=1), static_argnums=0)
hidden_states = nnx.jit(lambda model: model(BATCH.ids, BATCH.mask))


def of_adapters(grads):
    return jax.tree.map(lambda mine, g: g if mine else 0 * g, is_adapter(grads), grads)


class TestAdapters:
    def test_a_starts_as_in_the_papers_code(self):
        a = kaiming_uniform(jax.random.key(0), (384, 8))
        assert float(jnp.sum(a**2)) == pytest.approx(8 / 3, rel=0.05)
        assert float(jnp.abs(a).max()) <= 1 / np.sqrt(384)

    @pytest.mark.parametrize("adapter", ["lora", "flora"])
    def test_the_adapted_model_starts_as_the_pretrained_one(self, adapter):
        adapted = classifier(adapter=adapter).encoder
        np.testing.assert_allclose(
            hidden_states(adapted), hidden_states(PRETRAINED), rtol=1e-6, atol=1e-6
        )

    def test_the_output_is_scaled_by_alpha_over_rank(self):
        layer = classifier().encoder.encoder.layers[1].value
        layer.lora.lora_b[...] = jnp.ones((RANK, 16))
        x = jax.random.normal(jax.random.key(0), (3, 16))
        expected = layer.base(x) + 2.0 * x @ layer.lora.lora_a[...] @ jnp.ones((RANK, 16))
        np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)

    def test_each_layer_has_a_group_at_query_and_one_at_value(self):
        params = nnx.state(classifier(), TRAINED)
        found = samax.balancedness(params, samax.lora_groups)
        assert sorted(name.partition("layers/")[2] for name in found) == [
            f"{layer}/{part}/lora/lora_*" for layer in (0, 1) for part in ("query", "value")
        ]
        assert all(float(value) > 0 for value in found.values())  # B is zero

    def test_flora_has_three_cores_and_its_norm_deviation(self):
        params = nnx.state(classifier(adapter="flora"), TRAINED)
        labels = jax.tree.leaves(samax.lora_groups(params))
        assert len(labels) == 3 * len(set(labels)) == 12
        found = imbalance(params)
        expected = samax.norm_deviation(params, samax.lora_groups)
        assert len(found) == 4
        chex.assert_trees_all_close(found, expected, rtol=1e-5)

    def test_a_zero_classifier_would_stop_every_adapter(self):
        """Why the classifier starts random."""

        def norms(model):
            return float(optax.tree.norm(of_adapters(grad_fn(*nnx.split(model, TRAINED, ...)))))

        model = classifier()
        assert norms(model) > 1e-4
        model.classifier.kernel[...] = jnp.zeros((16, 2))
        assert norms(model) == 0


class TestStep:
    @pytest.mark.parametrize("label", [name for name in lora_methods.METHODS if name != "probe"])
    def test_in_bfloat16_only_adapters_and_classifier_train(self, label):
        """The encoder computes in bfloat16; adapters and classifier stay float32."""
        train = Training(label, build=in_bfloat16)
        state = train.init(0)
        paths, _ = jax.tree_util.tree_flatten_with_path(state.params)
        names = [jax.tree_util.keystr(path) for path, _ in paths]
        assert len(names) == 2 * 2 * 2 + 2
        assert all("lora_" in name or "classifier" in name for name in names)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        assert jnp.dtype("bfloat16") in {leaf.dtype for leaf in jax.tree.leaves(train.frozen)}
        before, frozen = jax.tree.map(np.array, (state.params, train.frozen))
        losses = []
        for _ in range(4):
            state, metrics = train.train_step(state, BATCH)
            losses.append(metrics["train_loss"])
            if label == "sam":  # of the point as it is evaluated: ||fl(w + eps) - w||
                assert metrics["perturbation_norm"] == pytest.approx(0.05, rel=1e-4)
        assert losses[-1] < losses[0]
        for name, old, new in zip(
            names, jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True
        ):
            assert np.any(old != new), name
        chex.assert_trees_all_equal(frozen, train.frozen)

    def test_bfloat16_adapters_would_lose_it(self):
        """Why they stay float32: this is where the paper's SAM fell back to full precision."""
        params = nnx.state(classifier(), TRAINED)
        low = jax.tree.map(lambda leaf: (1e3 * leaf).astype(jnp.bfloat16), params)
        tx = samax.sam(0.05, track=True)
        grads = jax.tree.map(jnp.ones_like, low)
        _, state = tx.update(grads, tx.init(low), low, grad_fn=lambda point: grads)
        assert float(optax.tree.get(state, "perturbation_norm")) < 0.9 * 0.05

    def test_sam_perturbs_the_adapters_alone(self):
        train = Training("sam:rho=0.5")
        state = train.init(0)

        grads = grad_fn(train.task.graph, state.params, train.frozen)
        ascent = of_adapters(grads)
        eps = optax.tree.scale(0.5 / optax.tree.norm(ascent), ascent)
        perturbed = grad_fn(train.task.graph, optax.tree.add(state.params, eps), train.frozen)
        rate = lora_methods.METHODS["sam"].defaults["lr"]
        tx = optax.adamw(rate, weight_decay=lora_methods.WEIGHT_DECAY)
        updates, _ = tx.update(perturbed, tx.init(state.params), state.params)
        expected = optax.apply_updates(state.params, updates)
        found, _ = train.train_step(state, BATCH)
        chex.assert_trees_all_close(found.params, expected, rtol=1e-4, atol=2e-6)


class TestLastBlocks:
    """What is below the adapters is computed once: nothing else changes."""

    def test_loss_gradients_and_scores_are_those_without(self):
        below, blocks = bert.cut(PRETRAINED, 1)
        short = SentenceTask(functools.partial(classifier, pretrained=blocks))

        def whole(seed):
            model, rngs = nnx.clone(PRETRAINED), nnx.Rngs(seed)
            adapt(model.blocks[-1:], "lora", rank=RANK, alpha=ALPHA, rngs=rngs)
            return SentenceClassifier(model, 2, rngs=rngs)

        reference = SentenceTask(whole)
        # Away from the start, where B is zero and so is the gradient of A.
        params = jax.tree.map(lambda leaf: leaf + 0.1, short.init(0)[0])
        start = reference.init(0)[0]
        leaves, structure = jax.tree.leaves(params), jax.tree.structure(start)
        assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in jax.tree.leaves(start)]
        same = jax.tree.unflatten(structure, leaves)

        tokens = Tokens(BATCH.ids, BATCH.mask.sum(1).astype(np.int32), np.zeros_like(BATCH.ids))
        rows = np.array([2, 0, 1])
        hidden = inputs.hidden(inputs.compiled(below), tokens)
        found = (short.frozen, *hidden.batch(rows), BATCH.labels[rows])
        expected = (reference.frozen, *tokens.batch(rows), BATCH.labels[rows])
        own = jax.jit(jax.value_and_grad(lambda p, b: short.loss(p, ((), b))[0]))(params, found)
        other = jax.jit(jax.value_and_grad(lambda p, b: reference.loss(p, ((), b))[0]))(
            same, expected
        )
        assert all(float(jnp.abs(leaf).max()) > 1e-4 for leaf in jax.tree.leaves(own[1]))
        chex.assert_trees_all_close(
            jax.tree.leaves(own), jax.tree.leaves(other), rtol=1e-4, atol=1e-6
        )
        chex.assert_trees_all_close(
            short.scores(params, found), reference.scores(same, expected), rtol=1e-4, atol=1e-6
        )

    def test_only_what_is_chosen_is_computed(self):
        tokens = Tokens(BATCH.ids, BATCH.mask.sum(1).astype(np.int32), np.zeros_like(BATCH.ids))
        found = inputs.hidden(inputs.compiled(bert.cut(PRETRAINED, 1)[0]), tokens, np.array([1]))
        assert {index: states.shape for index, states in found.states.items()} == {1: (6, 16)}

    @pytest.mark.parametrize("size", [3, 4])
    def test_batches_of_similar_lengths_hold_the_same_examples(self, size):
        lengths = np.random.default_rng(1).integers(3, 60, 50)
        make = functools.partial(inputs.batches, lengths, size, 0, range(16))
        plain, sorted_ = list(make(by_length=False)), list(make(by_length=True))
        for start in (0, 8):
            first, second = (np.concatenate(x[start : start + 8]) for x in (plain, sorted_))
            np.testing.assert_array_equal(np.sort(first), np.sort(second))
        spreads = [np.mean([np.ptp(lengths[own]) for own in x]) for x in (plain, sorted_)]
        assert spreads[1] < spreads[0] / 2
        np.testing.assert_array_equal(list(make(by_length=True)), sorted_)


class TestMethods:
    @pytest.mark.parametrize("label", ["sam:lr=1e-3:rho=0.2", "obar:lr=1e-3:alpha=2"])
    def test_a_trainer_is_told_the_hyper_parameters(self, label):
        spec = parse(label)
        own, other = Training(label), Training(spec.name)
        assert tunable.program(spec) == tunable.program(parse(spec.name))
        expected, _ = own.train_step(own.init(0), BATCH)
        found, _ = other.train_step(tunable.told(other.init(0), spec), BATCH)
        chex.assert_trees_all_equal(found, expected)

    def test_a_search_for_fewer_iterations_has_higher_rates(self):
        rows = lora_methods.searched(lora_methods.METHODS, 250)
        assert rows["sam"].search["lr"] == pytest.approx((4e-4, 2e-3))
        assert rows["sam"].search["rho"] == lora_methods.METHODS["sam"].search["rho"]
        assert rows["nbar"].search["alpha"] == pytest.approx((0.125, 0.5))
        assert rows["probe"] == lora_methods.METHODS["probe"]

    def test_alpha_is_scaled_to_the_papers_iterations(self):
        """The sum of alpha_t eta_t, which is the logarithm of obar's growth, is that of 1000."""
        logs = {}
        for steps in (100, 1000):
            # No gradient to speak of, and so no update but the scaling: ||A|| shrinks by it alone.
            spec = parse("obar:lr=1e-4:alpha=2")
            tx = lora_methods.optimizer(spec, steps)
            params = {"lora_a": jnp.full((4, 2), 10.0), "lora_b": jnp.full((2, 4), 1e-3)}
            grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-18), params)

            def step(_, carry, tx=tx, grads=grads):
                params, state = carry
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state

            end, _ = jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))
            logs[steps] = float(jnp.log(end["lora_a"][0, 0] / 10))
        decay = lora_methods.WEIGHT_DECAY
        assert logs[1000] == pytest.approx(-1e-4 * (1001 + decay * 1000), rel=2e-3)
        assert logs[100] == pytest.approx(-1e-4 * (1010 + decay * 100), rel=2e-3)

    def test_an_unknown_row_is_told(self):
        with pytest.raises(ValueError, match="'adam'; the methods are probe, adamw, sam"):
            parse("adam")

    @pytest.mark.parametrize(
        "text", ["sam:rho=-1", "adamw:lr=0", "das:alpha=-1", "adamw:rho=0.1", "probe:lr=1"]
    )
    def test_what_cannot_be_built_is_told(self, text):
        with pytest.raises(ValueError, match=f"Method '{text}' cannot be built"):
            lora_methods.optimizer(parse(text), 10)


def test_an_epoch_is_a_permutation_and_the_next_another():
    epochs = [[batch_indices(10, 3, 0, 3 * e + step) for step in range(3)] for e in range(2)]
    assert all(len(set(np.concatenate(epoch).tolist())) == 9 for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(epochs[0][1], batch_indices(10, 3, 0, 1))
    assert not np.array_equal(epochs[0][1], batch_indices(10, 3, 1, 1))


def test_evaluation_counts_every_sentence_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 30, 70).astype(np.int32)
    ids = np.where(np.arange(32) < lengths[:, None], rng.integers(4, 14, (70, 32)), 0)
    labels = rng.integers(0, 2, 70).astype(np.int32)
    tokens = Tokens(ids.astype(np.int32), lengths, rng.integers(0, 2, ids.shape, np.int32))
    train = Training("adamw")
    state = train.init(0)
    found = mean_scores(
        lambda batch: train.task.scores(state.params, (train.frozen, *batch)),
        [((*tokens.batch(rows), labels[rows]), len(own)) for own, rows in tokens.chunks()],
    )
    logits = nnx.jit(lambda model, *batch: model(*batch))(
        classifier(), *tokens.batch(np.arange(70))
    )
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    assert found["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert found["top1"] == pytest.approx(float(np.mean(logits.argmax(-1) == labels)))
