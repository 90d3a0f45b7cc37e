"""Random weight perturbation: filter-wise noise as an ascent."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax
from tests.methods import points_of

GAMMA = 0.01
PARAMS = {
    "conv": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 2, 4)), jnp.float32),
    "dense": jnp.array([[3.0, 0.0, 1.0], [4.0, 0.0, -1.0]]),
    "bias": jnp.array([0.6, -0.8]),
    "temperature": jnp.array(-2.0),
    "zero": jnp.zeros(3),
}


def loss_fn(params):
    return sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(params))


def noise(key=0, axis=-1, rho=GAMMA):
    distribution = samax.scaled_by_filter(samax.gaussian, axis)
    return optax.chain(samax.random_perturbation(distribution, key), samax.scale_by_rho(rho))


def norms_of_filters(w, axis=-1):
    """Each entry's filter norm, in plain loops."""
    w = np.asarray(w, np.float64)
    sizes = np.empty_like(w)
    for place in np.ndindex(w.shape):
        own = w if w.ndim < 2 else np.take(w, place[axis], axis=axis)
        sizes[place] = np.sqrt(np.sum(own**2))
    return sizes


def draws(ascent, params, count, grads=None):
    """Perturbations of consecutive steps, of shape (count, ...)."""
    grads = params if grads is None else grads

    def step(state, _):
        eps, state = ascent.update(grads, state, params)
        return state, eps

    return jax.jit(lambda s: jax.lax.scan(step, s, length=count))(ascent.init(params))


@pytest.mark.parametrize("axis", [-1, 0])
def test_the_scale_is_the_norm_of_the_filter(axis):
    """With signs for draws the size of every entry is known."""
    sample = samax.scaled_by_filter(samax.rademacher, axis)(jax.random.key(0), PARAMS)
    for name, w in PARAMS.items():
        np.testing.assert_allclose(jnp.abs(sample[name]), norms_of_filters(w, axis), rtol=1e-5)


def test_every_entry_is_normal_with_that_scale_and_independent():
    count = 4_000
    _, samples = draws(noise(3), PARAMS, count)
    standard = []
    for name, w in PARAMS.items():
        scale = GAMMA * norms_of_filters(w)
        drawn = np.asarray(samples[name], np.float64).reshape(count, -1)
        np.testing.assert_array_equal(drawn[:, np.ravel(scale == 0)], 0.0)
        standard.append(drawn[:, np.ravel(scale > 0)] / scale[scale > 0])
    z = np.concatenate(standard, axis=1)
    error = np.abs(z.T @ z / count - np.eye(z.shape[1]))
    assert np.all(np.abs(z.mean(axis=0)) < 5 / np.sqrt(count))
    assert np.all(error < 5 * np.sqrt(2 / count))
    # Normal, and not of another shape with that variance: the fourth moment is 3.
    assert np.mean(z**4) == pytest.approx(3.0, abs=5 * np.sqrt(96 / z.size))
    # Consecutive draws are unrelated.
    assert np.abs(np.mean(z[1:] * z[:-1])) < 5 / np.sqrt(z.size)


def test_nothing_is_made_from_the_gradient():
    _, first = draws(noise(), PARAMS, 2)
    _, second = draws(noise(), PARAMS, 2, jax.tree.map(jnp.zeros_like, PARAMS))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_rescaled_filter_is_perturbed_in_proportion():
    larger = PARAMS | {"dense": PARAMS["dense"] * jnp.array([10.0, 1.0, 0.1])}
    _, here = draws(noise(), PARAMS, 1)
    _, there = draws(noise(), larger, 1)
    expected = here["dense"] * jnp.array([10.0, 1.0, 0.1])
    np.testing.assert_allclose(there["dense"], expected, rtol=1e-5)
    np.testing.assert_array_equal(there["conv"], here["conv"])


def test_as_the_ascent_of_sharpness_aware():
    """The direction is the gradient at the noisy point; each step draws anew."""
    tx = samax.sharpness_aware(noise(), track=True)
    state, grads = tx.init(PARAMS), jax.grad(loss_fn)(PARAMS)
    _, expected = draws(noise(), PARAMS, 2)
    for i in range(2):
        direction, state = tx.update(grads, state, PARAMS, value_fn=loss_fn)
        point = {name: w + expected[name][i] for name, w in PARAMS.items()}
        chex.assert_trees_all_close(direction, jax.grad(loss_fn)(point), rtol=1e-6, atol=1e-7)


def test_as_the_ascent_of_one_gradient():
    """At one gradient a step, and around the new unperturbed parameters."""
    tx = samax.one_gradient(optax.sgd(0.1), noise())
    params, state, w = PARAMS, tx.init(PARAMS), PARAMS
    ascent = noise()
    ascent_state = ascent.init(PARAMS)
    for _ in range(3):
        grads = jax.grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        w = jax.tree.map(lambda w, g: w - 0.1 * g, w, grads)
        eps, ascent_state = ascent.update(grads, ascent_state, w)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, samax.eval_params(state, params), w)
        jax.tree.map(close, params, optax.apply_updates(w, eps))


def test_the_key_is_in_the_state():
    for key, typed in ((0, False), (jax.random.PRNGKey(0), False), (jax.random.key(0), True)):
        state = noise(key).init(PARAMS)
        kept = optax.tree.get(state, "rng_key")
        assert jnp.issubdtype(kept.dtype, jax.dtypes.prng_key) == typed
        after, _ = draws(noise(key), PARAMS, 1)
        data = [
            jax.random.key_data(key) if typed else key
            for key in (kept, optax.tree.get(after, "rng_key"))
        ]
        assert not np.array_equal(*data)
    _, left = draws(noise(0), PARAMS, 1)
    _, right = draws(noise(jax.random.key(0)), PARAMS, 1)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def step(tx, carry, _=None):
    params, state = carry
    updates, state = tx.update(jax.grad(loss_fn)(params), state, params, value_fn=loss_fn)
    return (optax.apply_updates(params, updates), state), None


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda key: optax.chain(samax.sharpness_aware(noise(key)), optax.sgd(0.1)),
            marks=pytest.mark.slow,
            id="sharpness_aware",
        ),
        pytest.param(lambda key: samax.one_gradient(optax.sgd(0.1), noise(key)), id="one_gradient"),
    ],
)
def test_under_jit_scan_and_vmap(make):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    tx = make(7)
    one, start = functools.partial(step, tx), (PARAMS, tx.init(PARAMS))
    jitted = jax.jit(one)
    carry = expected = start
    for _ in range(3):
        expected, _ = one(expected)
        carry, _ = jitted(carry)
    jax.tree.map(close, carry, expected)
    scanned, _ = jax.lax.scan(one, start, length=3)
    jax.tree.map(close, scanned, expected)

    def trained(key):
        return step(make(key), step(make(key), (PARAMS, make(key).init(PARAMS)))[0])[0][0]

    keys = jax.random.split(jax.random.key(1), 3)
    together = jax.vmap(trained)(keys)
    jax.tree.map(close, together, jax.tree.map(lambda *x: jnp.stack(x), *map(trained, keys)))
    assert np.any(together["dense"][0] != together["dense"][1])


@pytest.mark.parametrize(
    "dtype",
    [
        jnp.bfloat16,
        pytest.param(jnp.float16, marks=pytest.mark.slow),
        pytest.param(jnp.float32, marks=pytest.mark.slow),
        jnp.float64,
    ],
)
def test_dtypes(dtype, request):
    if dtype == jnp.float64:
        request.getfixturevalue("x64")
    params = jax.tree.map(lambda w: jnp.asarray(w, dtype), PARAMS)
    wide = jnp.promote_types(dtype, jnp.float32)
    sample = samax.scaled_by_filter(samax.gaussian)(jax.random.key(0), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(sample)} == {wide}
    tx = samax.sharpness_aware(noise(rho=0.1))
    direction, _ = tx.update(params, tx.init(params), params, value_fn=loss_fn)
    assert {leaf.dtype for leaf in jax.tree.leaves(direction)} == {jnp.dtype(dtype)}
    assert all(np.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(direction))


def test_zero_weights_stay_and_a_subset_may_be_perturbed():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    with jax.debug_nans(True):
        _, eps = draws(noise(), zero, 1, PARAMS)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(eps))
    mask = {name: name == "dense" for name in PARAMS}
    some = samax.sharpness_aware(samax.perturb_only(noise(), mask))
    points, _ = points_of(some, PARAMS, some.init(PARAMS), PARAMS)
    moved = {name: bool(np.any(points[0][name] != PARAMS[name])) for name in PARAMS}
    assert moved == mask


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"axis must be -1, outputs last.*got 1"):
        samax.scaled_by_filter(samax.gaussian, 1)
    with pytest.raises(TypeError, match="distribution must be a function"):
        samax.random_perturbation(samax.Sampling(samax.gaussian))
    with pytest.raises(TypeError, match="key must be an integer seed or a key"):
        samax.random_perturbation(samax.gaussian, "0")
    part = samax.random_perturbation(samax.gaussian)
    with pytest.raises(ValueError, match="random_perturbation needs params"):
        part.update(PARAMS, part.init(PARAMS))
    wrong = samax.random_perturbation(lambda key, params: params["dense"])
    with pytest.raises(ValueError, match="the distribution's sample must be the same pytree"):
        wrong.update(PARAMS, wrong.init(PARAMS), PARAMS)
