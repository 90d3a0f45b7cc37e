"""Tensorized layers: reconstruction, initialization, and the networks made of them."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorly
from flax import nnx

from benchmarks.models import CORE_GROUPS, MODELS, TENSORIZED, build, parameter_count
from benchmarks.models.layers import conv
from benchmarks.models.tensorized import (
    FORMATS,
    TensorizedConv,
    TensorizedLinear,
    TensorProduct,
    factorize,
)

DIMS = (4, 2, 3, 2)
RANK = 3


def rngs(seed=0):
    return nnx.Rngs(jax.random.key(seed, impl="unsafe_rbg"))


def product(format, dims=DIMS, rank=RANK, variance=1.0, seed=0):
    return TensorProduct(dims, format=format, rank=rank, variance=variance, rngs=rngs(seed))


def cores_of(layer):
    return [np.asarray(getattr(layer, f"core_{k}")[...], float) for k in range(len(layer.terms))]


def by_loops(format, cores):
    """The tensor entry by entry, from the formats' definitions."""
    tensor = np.zeros([core.shape[0 if format == "cp" else 1] for core in cores])
    for index in np.ndindex(tensor.shape):
        if format == "cp":
            rows = [core[i] for core, i in zip(cores, index, strict=True)]
            tensor[index] = sum(math.prod(column) for column in zip(*rows, strict=True))
        else:  # the trace of a product of matrices, of size 1 x 1 for a train
            matrix = np.eye(cores[0].shape[0])
            for core, i in zip(cores, index, strict=True):
                matrix = matrix @ core[:, i]
            tensor[index] = np.trace(matrix)
    return tensor


def by_tensorly(format, cores):
    if format == "cp":
        return tensorly.cp_to_tensor((None, cores))
    return {"tr": tensorly.tr_to_tensor, "tt": tensorly.tt_to_tensor}[format](cores)


@pytest.mark.parametrize("format", FORMATS)
class TestReconstruction:
    def test_the_tensor_is_that_of_loops_and_of_tensorly(self, format):
        layer = product(format)
        found = np.asarray(layer())
        assert found.shape == DIMS
        np.testing.assert_allclose(found, by_loops(format, cores_of(layer)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            found, by_tensorly(format, cores_of(layer)), rtol=1e-4, atol=1e-5
        )

    def test_the_axes_come_in_the_order_asked_for(self, format):
        layer = product(format)
        np.testing.assert_allclose(
            layer((2, 0, 1, 3)), np.transpose(layer(), (2, 0, 1, 3)), rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize("stride", [1, 2])
    def test_the_convolution_is_the_dense_one_with_the_reconstructed_kernel(self, format, stride):
        layer = TensorizedConv(
            8, 12, stride=stride, format=format, rank=RANK, dtype=jnp.float32, rngs=rngs()
        )
        dense = conv(8, 12, stride=stride, dtype=jnp.float32, rngs=rngs())
        # In-factors, then the kernel's positions, then out-factors.
        whole = by_loops(format, cores_of(layer.kernel)).reshape(8, 9, 12)
        dense.kernel[...] = jnp.asarray(whole.transpose(1, 0, 2).reshape(3, 3, 8, 12), jnp.float32)
        images = jax.random.normal(jax.random.key(1), (2, 7, 7, 8))
        expected = np.asarray(dense(images))
        np.testing.assert_allclose(
            layer(images), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
        )

    def test_the_linear_layer_is_the_dense_one(self, format):
        layer = TensorizedLinear(8, 10, format=format, rank=RANK, rngs=rngs())
        layer.bias[...] = jnp.arange(10.0)
        weight = by_loops(format, cores_of(layer.kernel)).reshape(8, 10)
        inputs = np.random.default_rng(0).normal(size=(3, 8))
        np.testing.assert_allclose(
            layer(jnp.asarray(inputs, jnp.float32)),
            inputs @ weight + np.arange(10),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("format", FORMATS)
class TestVariance:
    def test_it_is_that_asked_for_exactly(self, format):
        """E of the squared entry: squared cores of variance s^2 contract to n s^2K."""
        layer = product(format, variance=0.3)
        dims, rank = DIMS, RANK
        number = {"cp": rank, "tr": rank ** len(dims), "tt": rank ** (len(dims) - 1)}[format]
        ones = [np.ones_like(core) for core in cores_of(layer)]
        np.testing.assert_allclose(by_loops(format, ones), number)
        std = (0.3 / number) ** (1 / (2 * len(dims)))
        # All cores have one standard deviation, this one.
        seeds = (cores_of(product(format, variance=0.3, seed=seed)) for seed in range(40))
        entries = np.concatenate([core.ravel() for cores in seeds for core in cores])
        np.testing.assert_allclose(entries.std(), std, rtol=4 / math.sqrt(2 * len(entries)))

    def test_it_is_found_in_many_draws(self, format):
        def draw(key):
            return TensorProduct(
                DIMS, format=format, rank=RANK, variance=0.3, rngs=nnx.Rngs(key)
            )().ravel()

        draws = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 20_000)))
        squares = (draws**2).mean(axis=1)  # entries of one draw are dependent, draws are not
        error = squares.std() / math.sqrt(len(squares))
        assert error < 0.02 * 0.3
        assert abs(squares.mean() - 0.3) < 4 * error

    def test_a_layer_asks_for_that_of_the_dense_initializer(self, format):
        layer = TensorizedConv(16, 32, format=format, rank=2, dtype=jnp.float32, rngs=rngs())
        dense = conv(256, 32, dtype=jnp.float32, rngs=rngs()).kernel[...]
        assert wanted_variance(layer.kernel) == pytest.approx(float(dense.var()), rel=0.03)
        layer = TensorizedLinear(64, 10, format=format, rank=2, rngs=rngs())
        dense = nnx.Linear(64, 1000, rngs=rngs()).kernel[...]
        assert wanted_variance(layer.kernel) == pytest.approx(float(dense.var()), rel=0.03)


def wanted_variance(layer):
    """The variance that a layer's cores of rank 2 were scaled to: the same draw's, times s^2K."""
    number = len(layer.terms)
    format = "cp" if layer.core_0.ndim == 2 else "tt" if layer.core_0.shape[0] == 1 else "tr"
    axis = 0 if format == "cp" else 1
    dims = tuple(getattr(layer, f"core_{k}").shape[axis] for k in range(number))
    unit = product(format, dims, rank=2)
    return float((layer.core_1[...] / unit.core_1[...]).mean()) ** (2 * number)


@pytest.mark.parametrize(
    ("features", "factors"),
    [
        (16, (4, 2, 2)),
        (32, (4, 4, 2)),
        (64, (4, 4, 4)),
        (128, (8, 4, 4)),
        (8, (2, 2, 2)),
        (4, (2, 2)),
        (12, (3, 2, 2)),
        (7, (7,)),
        (1, (1,)),
    ],
)
def test_channels_split_into_factors_of_the_least_sum(features, factors):
    assert factorize(features) == factors
    numbers = range(1, features + 1)
    sums = (sum(t) for t in itertools.product(numbers, repeat=3) if math.prod(t) == features)
    if features <= 16:
        assert min(sums) == sum(factors) + 3 - len(factors)


class TestNetworks:
    @pytest.mark.parametrize(
        ("name", "count"),
        [
            ("tr-resnet32", 202_514),
            ("cp-resnet32", 202_514),
            ("tt-resnet32", 201_138),
            ("tr-resnet20", 123_318),
            ("cp-resnet20", 123_318),
            ("tt-resnet20", 121_430),
        ],
    )
    def test_parameters(self, name, count):
        model = nnx.eval_shape(lambda: build(name, num_classes=10, rngs=rngs()))
        assert parameter_count(model) == count
        if name == "tr-resnet32":  # published
            assert round(count / 1e6, 2) == 0.20

    @pytest.mark.slow
    def test_the_tensor_train_rank_is_the_closest_to_the_rings_count(self):
        network = MODELS["tt-resnet32"]

        def count(rank):
            model = nnx.eval_shape(
                lambda: network(
                    inner_conv=partial(TensorizedConv, format="tt", rank=rank),
                    linear=partial(TensorizedLinear, format="tt", rank=rank),
                    num_classes=10,
                    in_channels=3,
                    width=1.0,
                    dtype=jnp.float32,
                    rngs=rngs(),
                )
            )
            return parameter_count(model)

        differences = {rank: abs(count(rank) - 202_514) for rank in (16, 17, 18)}
        assert min(differences, key=differences.get) == 17

    @pytest.mark.parametrize(("name", "layers"), [("cnn", 4), ("resnet20", 19), ("resnet32", 31)])
    @pytest.mark.parametrize("format", FORMATS)
    def test_every_tensorized_layer_is_a_group(self, format, name, layers):
        model = nnx.eval_shape(lambda: build(f"{format}-{name}", num_classes=10, rngs=rngs()))
        params = nnx.state(model, nnx.Param)
        labels = jax.tree.leaves(CORE_GROUPS(params))
        assert len(set(labels)) == layers
        modules = [
            module
            for _, module in nnx.iter_graph(model)
            if isinstance(module, (TensorizedConv, TensorizedLinear))
        ]
        assert len(modules) == layers
        # No core is left out, and nothing else is in.
        cores = [
            path
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
            if "core_" in jax.tree_util.keystr(path)
        ]
        assert len(cores) == len(labels)

    def test_the_first_convolution_is_dense(self):
        model = nnx.eval_shape(lambda: build("tr-resnet20", num_classes=10, rngs=rngs()))
        assert model.conv.kernel.shape == (3, 3, 3, 16)

    def test_width_scales_the_dense_kernels(self):
        def shapes(width):
            model = nnx.eval_shape(
                lambda: build("tr-resnet20", num_classes=10, width=width, rngs=rngs())
            )
            return [
                module.shape[-2:]
                for _, module in nnx.iter_graph(model)
                if isinstance(module, TensorizedConv)
            ]

        assert shapes(0.5) == [(i // 2, o // 2) for i, o in shapes(1.0)]

    def test_every_tensorized_model_is_a_model(self):
        assert set(TENSORIZED) < set(MODELS)
        assert len(TENSORIZED) == 9

    def test_bfloat16_compute_keeps_float32_cores(self):
        layer = TensorizedConv(4, 8, format="tr", rank=2, dtype=jnp.bfloat16, rngs=rngs())
        assert layer(jnp.ones((1, 4, 4, 4))).dtype == jnp.bfloat16
        assert layer.kernel.core_0.dtype == jnp.float32


class TestMisuse:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"format": "tucker"}, r"format='tucker': choose one of cp, tr, tt"),
            ({"rank": 0}, r"rank=0: pass the size of the bonds, 1 or more"),
        ],
    )
    def test_it_is_one_clear_error(self, settings, message):
        settings = {"format": "tr", "rank": 2, **settings}
        with pytest.raises(ValueError, match=message):
            TensorizedConv(16, 32, **settings, dtype=jnp.float32, rngs=rngs())
        with pytest.raises(ValueError, match=message):
            TensorizedLinear(16, 32, **settings, rngs=rngs())
