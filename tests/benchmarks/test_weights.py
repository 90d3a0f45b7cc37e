"""Rounded and noisy weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.core import weights


@pytest.mark.parametrize("bits", [8, 3, 2])
def test_rounding_is_numpys(bits):
    matrix = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    matrix[:, 3] = 0
    bias = np.array([0.123, 4.0], np.float32)
    found = weights.quantize({"kernel": jnp.asarray(matrix), "bias": jnp.asarray(bias)}, bits)
    levels = 2 ** (bits - 1) - 1
    expected = matrix.copy()
    for column in range(3):
        scale = np.abs(matrix[:, column]).max() / levels
        expected[:, column] = np.round(matrix[:, column] / scale) * scale
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert all(len(np.unique(column)) <= 2 * levels + 1 for column in np.asarray(found["kernel"]).T)
    np.testing.assert_array_equal(found["bias"], bias)


def test_noise_is_relative_to_each_matrix():
    params = {"large": 5 * jnp.ones((200, 200)), "small": jnp.ones((200, 200)), "b": jnp.ones(3)}
    found = weights.add_noise(params, 0.1, jax.random.key(0))
    for name, size in (("large", 5), ("small", 1)):
        assert float(jnp.std(found[name] - params[name])) == pytest.approx(0.1 * size, rel=0.02)
    np.testing.assert_array_equal(found["b"], params["b"])


def test_the_channels_of_a_convolution_have_scales_of_their_own():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 5)) * 10.0 ** np.arange(5)
    found = np.asarray(weights.quantize(jnp.asarray(kernel, jnp.float32), 4))
    for channel in range(5):
        levels = np.unique(found[..., channel])
        assert len(levels) > 4  # with one scale for all, those of the small ones would be 0
        assert np.abs(levels).max() == pytest.approx(np.abs(kernel[..., channel]).max(), rel=1e-5)
