"""The descent parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax

CLEAN = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(-1.0)}
PERTURBED = {"a": jnp.array([2.0, 0.0]), "b": jnp.array(3.0)}


def apply(rule, clean=CLEAN, perturbed=PERTURBED, state=None):
    state = rule.init(clean) if state is None else state
    return rule.update(perturbed, state, clean, clean_grad=clean)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_weighted():
    for weight in (0.0, 0.5, 1.0, 9.0):
        direction, _ = apply(samax.weighted(weight))
        expected = flat(CLEAN) + weight * (flat(PERTURBED) - flat(CLEAN))
        np.testing.assert_allclose(flat(direction), expected, rtol=1e-6)
    direction, _ = apply(samax.weighted(0.0))
    np.testing.assert_array_equal(flat(direction), flat(CLEAN))


def test_weighted_with_a_schedule():
    rule = samax.weighted(optax.linear_schedule(0.0, 1.0, 2))
    state = rule.init(CLEAN)
    for weight in (0.0, 0.5, 1.0, 1.0):
        direction, state = apply(rule, state=state)
        expected = flat(CLEAN) + weight * (flat(PERTURBED) - flat(CLEAN))
        np.testing.assert_allclose(flat(direction), expected, rtol=1e-6)


def test_the_surrogate_gap_removes_the_component_orthogonal_to_the_perturbed_gradient():
    direction, _ = apply(samax.surrogate_gap(0.3))
    clean, perturbed = flat(CLEAN), flat(PERTURBED)
    orthogonal = clean - clean @ perturbed / (perturbed @ perturbed) * perturbed
    np.testing.assert_allclose(flat(direction), perturbed - 0.3 * orthogonal, rtol=1e-6)
    # The perturbed loss does not change to first order: what is removed is orthogonal to it.
    assert (flat(direction) - perturbed) @ perturbed == pytest.approx(0.0, abs=1e-5)


def test_the_surrogate_gap_of_a_zero_or_tiny_perturbed_gradient():
    zero = jax.tree.map(jnp.zeros_like, PERTURBED)
    direction, _ = apply(samax.surrogate_gap(0.3), perturbed=zero)
    np.testing.assert_array_equal(flat(direction), 0.0)
    # Its square underflows, its direction does not.
    tiny = jax.tree.map(lambda x: 1e-30 * x, PERTURBED)
    direction, _ = apply(samax.surrogate_gap(0.3), perturbed=tiny)
    clean, perturbed = flat(CLEAN), flat(PERTURBED)
    orthogonal = clean - clean @ perturbed / (perturbed @ perturbed) * perturbed
    np.testing.assert_allclose(flat(direction), -0.3 * orthogonal, rtol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [samax.weighted(2.0), samax.adaptive_weight(), samax.surrogate_gap(0.3)],
    ids=["weighted", "adaptive_weight", "surrogate_gap"],
)
def test_an_infinite_clean_gradient_makes_no_nan(rule):
    tx = samax.sharpness_aware(samax.scale_to_norm(0.1), rule)
    state, params = tx.init(CLEAN), jax.tree.map(jnp.ones_like, CLEAN)
    clean = CLEAN | {"b": jnp.array(jnp.inf)}
    perturbed = PERTURBED | {"b": jnp.array(jnp.inf)}
    direction, after = tx.update(clean, state, params, grad_fn=lambda _: perturbed)
    jax.tree.map(np.testing.assert_array_equal, direction, perturbed)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    direction, _ = tx.update(CLEAN, after, params, grad_fn=lambda _: PERTURBED)
    assert np.all(np.isfinite(flat(direction)))


def test_the_worked_lambda_sequence():
    """METHODS.md 1.1: the raw rule on given gradient norms."""
    rule = samax.threshold_rule(chi=1.5, gamma=0.1, delta=0.1)
    descent = samax.adaptive_weight(1.0, rule, bounds=(0.25, 4.0), smoothing=0.0)
    norms = [1.0, 1.2, 1.25, 1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 1.0]
    weights, ratios, state = [], [], descent.init(jnp.zeros(1))
    for norm in norms:
        _, state = apply(descent, jnp.array([norm]), jnp.array([norm]), state)
        weights.append(float(state.adaptive_weight))
        ratios.append(float(state.sharpness_ratio))
    expected = [1, 1.5, 1.5, 1, 1, 1.5, 2.25, 3.375, 4, 2.6667]
    np.testing.assert_allclose(weights, expected, rtol=1e-4)
    np.testing.assert_allclose(ratios[1:], np.divide(norms[1:], norms[:-1]), rtol=1e-6)
    assert ratios[0] == 1.0


def test_the_direction_uses_the_weight_before_it_moves():
    descent = samax.adaptive_weight(1.0, lambda weight, ratio: weight * ratio, smoothing=0.0)
    state = descent.init(jnp.zeros(1))
    seen = []
    for norm in (1.0, 2.0, 4.0):
        direction, state = apply(descent, jnp.array([norm]), jnp.array([norm + 1]), state)
        seen.append(float(direction[0]) - norm)
    assert seen == [1.0, 1.0, 2.0]


def test_smoothing_is_the_moving_average_of_the_norm():
    descent = samax.adaptive_weight(smoothing=0.9)
    state, average = descent.init(jnp.zeros(2)), None
    for gradient in np.random.default_rng(0).normal(size=(5, 2)):
        norm = np.linalg.norm(gradient)
        previous, average = average, norm if average is None else 0.9 * average + 0.1 * norm
        _, state = apply(descent, jnp.array(gradient), jnp.array(gradient), state)
        np.testing.assert_allclose(state.smoothed_grad_norm, average, rtol=1e-5)
        if previous is not None:
            np.testing.assert_allclose(state.sharpness_ratio, average / previous, rtol=1e-5)


@pytest.mark.parametrize("norm", [0.0, np.nan, np.inf])
def test_a_norm_without_information_is_ratio_one(norm):
    tx = samax.samar(0.1, smoothing=0.0)
    step = lambda gradient, state: tx.update(
        jnp.array([gradient]), state, jnp.zeros(1), grad_fn=lambda _: jnp.array([gradient])
    )[1]
    state = tx.init(jnp.zeros(1))
    if norm != 0:
        state = step(2.0, state)
    previous = state.descent
    state = step(norm, state)
    assert state.descent.sharpness_ratio == 1.0
    assert state.descent.adaptive_weight == previous.adaptive_weight
    assert all(np.isfinite(leaf) for leaf in step(3.0, state).descent)


def test_the_default_threshold_undoes_a_rise_by_the_fall_that_reverses_it():
    rule = samax.threshold_rule(chi=2.0, gamma=0.25)
    assert rule(1.0, 1.25) == 2.0
    assert rule(2.0, 1 / 1.25) == 1.0
    assert rule(1.0, 1.2) == rule(1.0, 1 / 1.2) == 1.0


def test_decoupled_keeps_the_sharpness_out_of_the_momentum():
    optimizer = optax.sgd(0.1, momentum=0.9)
    sharpness = samax.sharpness_aware(samax.scale_to_norm(0.1))

    def apply(rule, state=None):
        state = rule.init(CLEAN) if state is None else state
        return rule.update(CLEAN, state, CLEAN, grad_fn=lambda _: PERTURBED)

    step, state = apply(samax.decoupled(sharpness, optimizer, 0.1, 2.0))
    expected = -0.1 * flat(CLEAN) - 0.1 * 2.0 * (flat(PERTURBED) - flat(CLEAN))
    np.testing.assert_allclose(flat(step), expected, rtol=1e-6)
    np.testing.assert_array_equal(flat(optax.tree.get(state, "trace")), flat(CLEAN))
    scheduled = samax.decoupled(sharpness, optimizer, optax.linear_schedule(0.1, 0.0, 1), 2.0)
    _, state = apply(scheduled)
    step, _ = apply(scheduled, state=state)
    np.testing.assert_allclose(flat(step), -0.1 * 1.9 * flat(CLEAN), rtol=1e-6)


def test_a_step_length_of_the_polyak_kind():
    """The recipe's: the step would take the perturbed loss, to first order, to 0."""
    curvature = jnp.array([1.0, 10.0, 0.1])
    loss_fn = lambda w: 0.5 * jnp.sum(curvature * w**2)
    polyak = samax.rule(
        lambda clean, perturbed, perturbed_value: optax.tree.scale(
            perturbed_value / optax.tree.norm(perturbed, squared=True), perturbed
        )
    )
    tx = optax.chain(samax.sharpness_aware(samax.scale_to_norm(0.05), polyak), optax.scale(-1.0))
    params = jnp.array([1.0, -0.5, 2.0])
    value, grads = jax.value_and_grad(loss_fn)(params)
    step, _ = tx.update(grads, tx.init(params), params, value=value, value_fn=loss_fn)

    w = np.asarray(params, np.float64)
    h = np.asarray(curvature, np.float64)
    g = h * w
    point = w + 0.05 * g / np.sqrt(np.sum(g**2))
    perturbed, perturbed_loss = h * point, 0.5 * np.sum(h * point**2)
    np.testing.assert_allclose(step, -perturbed_loss / np.sum(perturbed**2) * perturbed, rtol=1e-5)
    assert perturbed_loss + np.dot(perturbed, step) == pytest.approx(0.0, abs=1e-5)
