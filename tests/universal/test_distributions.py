"""The distributions mu: their moments, their dependence on the parameters, their shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 4.0]]), "b": jnp.array(3.0), "zero": jnp.zeros(2)}
DISTRIBUTIONS = {
    "gaussian": samax.gaussian,
    "sphere": samax.sphere,
    "rademacher": samax.rademacher,
    "cube": samax.cube(0.5),
    "by params": samax.scaled_by_params(samax.gaussian),
    "by layer": samax.scaled_by_layer(samax.gaussian),
}
# The second moments of one entry w, in a tree of 7 entries.
VARIANCES = {
    "gaussian": lambda w, leaf: 1.0,
    "sphere": lambda w, leaf: 1 / 7,
    "rademacher": lambda w, leaf: 1.0,
    "cube": lambda w, leaf: 0.5**2 / 3,
    "by params": lambda w, leaf: w**2,
    "by layer": lambda w, leaf: np.mean(np.square(leaf)),
}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_moments(name):
    """Mean zero, independent entries, and the variances of the definition: within 5 sigma."""
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    samples = jax.jit(jax.vmap(DISTRIBUTIONS[name], (0, None)))(keys, PARAMS)
    samples = np.concatenate(
        [np.reshape(leaf, (count, -1)) for leaf in jax.tree.leaves(samples)], axis=1
    )
    variances = flat(
        jax.tree.map(
            lambda leaf: np.vectorize(lambda w: VARIANCES[name](w, leaf))(np.asarray(leaf)), PARAMS
        )
    )
    scale = np.sqrt(np.outer(variances, variances))
    error = np.abs(samples.T @ samples / count - np.diag(variances))
    assert np.all(error <= 5 * np.sqrt(2 / count) * scale)
    assert np.all(np.abs(samples.mean(axis=0)) <= 5 * np.sqrt(variances / count))


def test_the_sphere_is_normalized_over_all_leaves_and_the_cube_is_bounded():
    keys = jax.random.split(jax.random.key(1), 50)
    norms = jax.jit(jax.vmap(lambda key: optax.tree.norm(samax.sphere(key, PARAMS))))(keys)
    np.testing.assert_allclose(norms, 1.0, rtol=1e-6)
    largest = jnp.max(jax.vmap(lambda key: samax.cube(0.5)(key, PARAMS)["w"])(keys))
    assert 0.48 < largest <= 0.5
    signs = samax.rademacher(keys[0], PARAMS)["w"]
    np.testing.assert_array_equal(jnp.abs(signs), 1.0)


def test_scaled_distributions_follow_the_parameters():
    """The same key gives the same perturbation relative to rescaled parameters."""
    key, rescaled = jax.random.key(2), jax.tree.map(lambda w: -8.0 * w, PARAMS)
    for wrap in (samax.scaled_by_params, samax.scaled_by_layer):
        distribution = wrap(samax.gaussian)
        here, there = distribution(key, PARAMS), distribution(key, rescaled)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(8 * a, b, rtol=1e-6), here, there)
        np.testing.assert_array_equal(here["zero"], 0.0)
    lifted = samax.scaled_by_params(samax.rademacher, t0=0.25)(key, PARAMS)
    np.testing.assert_array_equal(jnp.abs(lifted["zero"]), 0.25)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_samples_are_pytrees_like_the_parameters_in_float32_or_wider(name):
    params = {"half": jnp.ones(3, jnp.bfloat16), "rest": [jnp.ones((2, 0)), jnp.ones(())]}
    sample = DISTRIBUTIONS[name](jax.random.key(0), params)
    assert jax.tree.structure(sample) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, sample) == jax.tree.map(jnp.shape, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(sample)} == {jnp.dtype(jnp.float32)}
    with jax.debug_nans(True):
        DISTRIBUTIONS[name](jax.random.key(0), {})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_float64_stays(name):
    sample = DISTRIBUTIONS[name](jax.random.key(0), {"w": jnp.ones(3, jnp.float64)})
    assert sample["w"].dtype == jnp.float64


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"half_width must be finite and lie in \(0, inf\)"):
        samax.cube(0.0)
    with pytest.raises(ValueError, match="t0 must be finite"):
        samax.scaled_by_params(samax.gaussian, t0=-1.0)
    with pytest.raises(TypeError, match="distribution must be a function"):
        samax.scaled_by_layer(1.0)
