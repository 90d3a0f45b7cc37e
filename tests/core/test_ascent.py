"""The ascent parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax


def apply(part, updates, params=None):
    return part.update(updates, part.init(params if params is not None else updates), params)[0]


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1.0, 1e20, 5e37])
def test_the_norm_neither_underflows_nor_overflows(scale):
    unit = apply(samax.normalize(), {"a": jnp.array([3.0]) * scale, "b": jnp.array(-4.0) * scale})
    np.testing.assert_allclose(unit["a"], 0.6, rtol=1e-6)
    np.testing.assert_allclose(unit["b"], -0.8, rtol=1e-6)


def test_the_norm_is_global_and_accumulated_in_float32():
    # 1e6 ones: their sum of squares is no float16, and in bfloat16 the sum stops at 256.
    for dtype in (jnp.float16, jnp.bfloat16):
        unit = apply(samax.normalize(), [jnp.ones(500_000, dtype), jnp.ones(500_000, dtype)])
        np.testing.assert_allclose(unit[0], 1e-3, rtol=1e-5)
        assert unit[1].dtype == jnp.float32


def test_a_zero_gradient_gives_zero():
    unit = apply(samax.normalize(), {"a": jnp.zeros(3), "b": jnp.zeros(2)})
    np.testing.assert_array_equal(unit["a"], 0.0)
    np.testing.assert_array_equal(unit["b"], 0.0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_is_not_covered_up(bad):
    """What a part before it has broken; gradients that come in broken are not perturbed at all."""
    assert np.any(np.isnan(apply(samax.normalize(), jnp.array([1.0, bad, 0.0]))))


def test_the_epsilon_is_added_to_the_norm():
    unit = apply(samax.normalize(5.0), jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(unit, [0.3, 0.4], rtol=1e-6)


def test_no_nan_is_made_on_the_way():
    with jax.debug_nans(True):
        np.testing.assert_array_equal(apply(samax.normalize(), jnp.zeros(3)), 0.0)


def test_rho_follows_its_schedule():
    part = samax.scale_by_rho(optax.linear_schedule(1.0, 0.0, 4))
    state, seen = part.init(jnp.ones(1)), []
    for _ in range(6):
        update, state = part.update(jnp.ones(1), state)
        seen.append(float(update[0]))
    assert seen == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_scaling_by_the_parameters_and_a_mask_for_it():
    updates = {"weight": jnp.ones(2), "bias": jnp.ones(2)}
    params = {"weight": jnp.array([-2.0, 0.0]), "bias": jnp.array([5.0, 5.0])}
    part = samax.scale_by_abs_params(0.5)
    np.testing.assert_allclose(apply(part, updates, params)["weight"], [2.5, 0.5])
    masked = apply(optax.masked(part, samax.weights_only), updates, params)
    np.testing.assert_allclose(masked["weight"], [2.5, 0.5])
    np.testing.assert_allclose(masked["bias"], [1.0, 1.0])


def test_the_moving_average():
    part = samax.gradient_ema(0.25)
    gradients = np.array([[4.0, -8.0], [0.0, 2.0], [1.0, 1.0]])
    state, expected = part.init(jnp.zeros(2)), gradients[0]
    for t, gradient in enumerate(gradients):
        expected = gradient if t == 0 else 0.75 * expected + 0.25 * gradient
        average, state = part.update(jnp.array(gradient), state)
        np.testing.assert_allclose(average, expected, rtol=1e-6)
    assert state.count == 3


def test_the_moving_average_starts_at_the_first_finite_gradient():
    tx = samax.sharpness_aware(samax.gradient_ema(0.25))
    params = jnp.zeros(2)
    state = tx.init(params)
    identity = lambda w: w
    _, state = tx.update(jnp.array([jnp.inf, 1.0]), state, params, grad_fn=identity)
    point, after = tx.update(jnp.array([4.0, -8.0]), state, params, grad_fn=identity)
    np.testing.assert_array_equal(point, [4.0, -8.0])
    _, kept = tx.update(jnp.array([jnp.nan, 1.0]), after, params, grad_fn=identity)
    jax.tree.map(np.testing.assert_array_equal, kept, after)


def test_the_mask_perturbs_some_leaves_with_the_norm_over_them_alone():
    params = {"frozen": jnp.array([1.0, 1.0]), "lora": jnp.array([1.0, 2.0])}
    grads = {"frozen": jnp.array([100.0, 0.0]), "lora": jnp.array([3.0, 4.0])}
    ascent = samax.scale_to_norm(0.5)
    mask = {"frozen": False, "lora": True}
    for form in (mask, lambda tree: {name: name == "lora" for name in tree}):
        eps = apply(samax.perturb_only(ascent, form), grads, params)
        np.testing.assert_array_equal(eps["frozen"], 0.0)
        np.testing.assert_allclose(eps["lora"], [0.3, 0.4], rtol=1e-6)
    # All leaves are trained: the gradient at the perturbed point is whole.
    tx = samax.sharpness_aware(samax.perturb_only(ascent, mask))
    point = {"frozen": params["frozen"], "lora": params["lora"] + jnp.array([0.3, 0.4])}
    loss = lambda p: jnp.sum(p["frozen"] * p["lora"] ** 3)
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=loss)
    jax.tree.map(
        lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-6), updates, jax.grad(loss)(point)
    )


def realized(params, rho, *parts):
    """SAM's displacement `fl(w + eps) - w` relative to `eps`: its norm, and its projection."""
    ascent = optax.chain(samax.scale_to_norm(rho), *parts)
    tx = samax.sharpness_aware(ascent, track=True)
    grads = jax.random.normal(jax.random.key(1), params.shape, params.dtype)
    points = []
    _, state = tx.update(
        grads, tx.init(params), params, grad_fn=lambda point: points.append(point) or point
    )
    eps = rho * np.asarray(apply(samax.normalize(), grads))
    displacement = np.asarray(points[0], np.float64) - np.asarray(params, np.float64)
    norm = np.linalg.norm(displacement) / rho
    assert float(state.metrics.perturbation_norm) / rho == pytest.approx(norm, rel=1e-5, abs=1e-9)
    return norm, displacement @ eps / rho**2


def test_bfloat16_loses_the_perturbation_and_stochastic_rounding_keeps_it():
    rounding = samax.stochastic_rounding(0)
    ones = jnp.ones(1_000_000)
    assert realized(ones, 0.05) == pytest.approx((1.0, 1.0), rel=1e-3)
    # Every entry of eps is below half a unit in the last place of 1: nothing moves at all.
    ones = ones.astype(jnp.bfloat16)
    assert realized(ones, 0.05) == (0.0, 0.0)
    norm, along = realized(ones, 0.05, rounding)
    assert norm > 5.0  # moves are rare, but whole units
    assert along == pytest.approx(1.0, abs=0.05)
    # Weights of an order of 0.1 lose most of it.
    weights = (0.1 * jax.random.normal(jax.random.key(0), (1_000_000,))).astype(jnp.bfloat16)
    _, along = realized(weights, 0.01)
    assert along < 0.5
    _, along = realized(weights, 0.01, rounding)
    assert along == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_rounding_is_right_on_average(dtype):
    params = jnp.array([1.0, -1.0, 0.3, 0.0, 100.0, 1.0, 2.0**-20], dtype)
    eps = jnp.array([1e-3, 1e-3, -1e-4, 1e-9, 0.01, 0.0, 1e-7], jnp.float32)
    part = samax.stochastic_rounding(3)
    draws = 4_000
    keys = jax.random.key_data(jax.random.split(jax.random.key(5), draws))
    states = part.init(params)._replace(rng_key=keys)
    rounded, _ = jax.vmap(lambda state: part.update(eps, state, params))(states)
    rounded = np.asarray(rounded, np.float64)
    points = np.asarray(params, np.float64) + rounded
    # Every draw is representable, and one of the two neighbours of the target.
    np.testing.assert_array_equal(points, np.asarray(jnp.asarray(points, dtype), np.float64))
    assert all(len(np.unique(column)) <= 2 for column in points.T)
    error = np.abs(rounded.mean(axis=0) - np.asarray(eps))
    # eps is known to float32: 1e-7 of 100.
    assert np.all(error <= 5 * rounded.std(axis=0) / np.sqrt(draws) + 1e-5 * np.abs(eps))
    assert rounded.std(axis=0)[0] > 0


def test_stochastic_rounding_leaves_wide_parameters_and_draws_anew():
    eps = jnp.array([1e-9, 1e-3])
    np.testing.assert_array_equal(apply(samax.stochastic_rounding(0), eps, jnp.ones(2)), eps)
    part, params = samax.stochastic_rounding(jax.random.key(0)), jnp.ones(1000, jnp.bfloat16)
    first, state = part.update(jnp.full(1000, 1e-3), part.init(params), params)
    second, _ = part.update(jnp.full(1000, 1e-3), state, params)
    assert not np.array_equal(first, second)
    raw = samax.stochastic_rounding(jax.random.key_data(jax.random.key(0)))
    np.testing.assert_array_equal(first, apply(raw, jnp.full(1000, 1e-3), params))


def test_weights_only_tells_biases_by_their_path():
    params = {"layer": {"kernel": 0.0, "bias": 0.0}, "norm": {"scale": 0.0}}
    assert samax.weights_only(params) == {
        "layer": {"kernel": True, "bias": False},
        "norm": {"scale": True},
    }
