"""The networks: published sizes, training and evaluation modes, and compute dtypes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.models import MODELS, TENSORIZED, build, parameter_count
from benchmarks.models.layers import conv
from benchmarks.models.resnet import PadShortcut

# With 10 classes: He et al. 2016 (option A), kuangliu/pytorch-cifar, Zagoruyko and Komodakis 2016.
PUBLISHED_PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "wrn28-10": 36_479_194,
    "wrn34-10": 46_160_474,
}


def quick_rngs(seed=0):
    """Random streams that compile ten times faster than the default ones, a second a shape."""
    return nnx.Rngs(jax.random.key(seed, impl="unsafe_rbg"))


def batch(channels=3, size=16, count=8):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(count, size, size, channels)).astype(np.float32)
    return jnp.asarray(images), jnp.arange(count) % 10


def cross_entropy(model, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@pytest.mark.parametrize(("name", "count"), PUBLISHED_PARAMETERS.items())
def test_parameter_count_is_the_published_one(name, count):
    model = nnx.eval_shape(lambda: build(name, num_classes=10, rngs=quick_rngs()))
    assert parameter_count(model) == count


def test_all_models_have_their_size_checked():
    assert set(MODELS) == {*PUBLISHED_PARAMETERS, *TENSORIZED, "cnn", "vit"}


def test_the_vision_transformers_size():
    """Patches, places, four blocks of attention (4 d^2) and two layers (4 d^2), the classifier."""
    d = 64
    block = 4 * (d * d + d) + (2 * d * d + 2 * d) + (2 * d * d + d) + 4 * d
    model = nnx.eval_shape(lambda: build("vit", num_classes=10, rngs=quick_rngs()))
    whole = (64 * 3 * d + d) + 16 * d + 4 * block + 2 * d + (10 * d + 10)
    assert parameter_count(model) == whole


def test_the_vision_transformer_sees_where_a_patch_is():
    model = build("vit", num_classes=10, rngs=quick_rngs())
    images, _ = batch(size=32)
    moved = jnp.roll(images, 8, axis=1)
    assert not np.allclose(model(images), model(moved), atol=1e-4)
    model.places[...] = jnp.zeros_like(model.places[...])
    np.testing.assert_allclose(model(images), model(moved), atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_logits_have_one_value_a_class(name):
    def logits():
        model = build(name, num_classes=7, in_channels=1, rngs=quick_rngs())
        return model(jnp.zeros((2, 32, 32, 1)))

    shape = nnx.eval_shape(logits)
    assert shape.shape == (2, 7)
    assert shape.dtype == jnp.float32


@pytest.mark.parametrize(("name", "stages"), [("resnet18", 4), ("resnet20", 3), ("wrn28-10", 3)])
def test_every_stage_but_the_first_halves_the_image(name, stages):
    def features():
        model = build(name, num_classes=10, width=0.25, rngs=quick_rngs())
        return model.blocks(model.conv(jnp.zeros((1, 32, 32, 3))))

    assert nnx.eval_shape(features).shape[1:3] == (32 // 2 ** (stages - 1),) * 2


@pytest.mark.parametrize("name", ["cnn", "resnet20", "wrn28-10"])
def test_width_scales_the_parameters_about_quadratically(name):
    def count(width):
        return parameter_count(
            nnx.eval_shape(lambda: build(name, num_classes=10, width=width, rngs=quick_rngs()))
        )

    assert 3.3 < count(2.0) / count(1.0) < 4.1
    assert 3.0 < count(1.0) / count(0.5) < 4.1


@pytest.mark.parametrize("name", ["cnn", "resnet18", "wrn28-10"])
def test_parameters_have_the_standard_names(name):
    model = nnx.eval_shape(lambda: build(name, num_classes=10, rngs=quick_rngs()))
    names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert names == {"kernel", "bias", "scale"}


def test_convolutions_start_with_kaiming_variance():
    kernel = conv(64, 128, dtype=jnp.float32, rngs=quick_rngs()).kernel[...]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 128)), rtol=0.02)
    np.testing.assert_allclose(kernel.mean(), 0, atol=1e-3)


def test_pad_shortcut_subsamples_and_pads_the_channels():
    shortcut = PadShortcut(16, 32, 2, dtype=jnp.float32, rngs=quick_rngs())
    inputs, _ = batch(channels=16, size=8, count=2)
    outputs = shortcut(inputs)
    assert outputs.shape == (2, 4, 4, 32)
    np.testing.assert_array_equal(outputs[..., 8:24], inputs[:, ::2, ::2])
    assert not outputs[..., :8].any()
    assert not outputs[..., 24:].any()


@pytest.mark.parametrize(
    "name",
    ["cnn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet20", "tr-cnn"))],
)
class TestTraining:
    def test_one_gradient_step_lowers_the_loss(self, name):
        model = build(name, num_classes=10, width=0.25, rngs=quick_rngs())
        images, labels = batch()

        @nnx.jit
        def step(model):
            loss, grads = nnx.value_and_grad(cross_entropy)(model, images, labels)
            params = nnx.state(model, nnx.Param)
            nnx.update(model, jax.tree.map(lambda w, g: w - 0.01 * g, params, grads))
            return loss

        first, second = step(model), step(model)
        assert second < first - 1e-3

    def test_only_training_changes_the_batch_statistics(self, name):
        model = build(name, num_classes=10, width=0.25, rngs=quick_rngs())
        images, _ = batch()
        forward = nnx.jit(lambda model, images: model(images))

        def statistics():
            return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

        before = statistics()
        model.eval()
        single = forward(model, images[:1])
        whole = forward(model, images)
        after_evaluation = statistics()
        chex.assert_trees_all_equal(before, after_evaluation)
        # An image's logits do not depend on the rest of the batch.
        np.testing.assert_allclose(single, whole[:1], rtol=1e-4, atol=1e-5)

        model.train()
        forward(model, images)
        changed = jax.tree.map(lambda old, new: not np.array_equal(old, new), before, statistics())
        assert jax.tree.all(changed)

    def test_bfloat16_compute_keeps_float32_parameters_and_logits(self, name):
        full, half = (
            build(name, num_classes=10, width=0.25, dtype=dtype, rngs=quick_rngs())
            for dtype in (jnp.float32, jnp.bfloat16)
        )
        images, _ = batch()
        logits = nnx.jit(lambda model: model(images))
        full_logits, half_logits = logits(full), logits(half)
        assert half_logits.dtype == jnp.float32
        leaves = jax.tree.leaves(nnx.state(half, (nnx.Param, nnx.BatchStat)))
        assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
        # It does compute in bfloat16: close to float32, yet not equal.
        error = np.abs(full_logits - half_logits).max() / np.abs(full_logits).max()
        assert 1e-4 < error < 0.1


def test_the_same_seed_gives_the_same_parameters():
    first, second, other = (
        nnx.state(build("cnn", num_classes=10, width=0.25, rngs=quick_rngs(seed)), nnx.Param)
        for seed in (0, 0, 1)
    )
    chex.assert_trees_all_equal(first, second)
    assert not jax.tree.all(jax.tree.map(np.array_equal, first, other))


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"name='resnet50'.*cnn, resnet20.*wrn34-10"):
        build("resnet50", num_classes=10, rngs=quick_rngs())


@pytest.mark.parametrize("width", [0, -1, float("nan")])
def test_a_width_that_is_not_positive_is_refused(width):
    with pytest.raises(ValueError, match="width="):
        build("cnn", num_classes=10, width=width, rngs=quick_rngs())
