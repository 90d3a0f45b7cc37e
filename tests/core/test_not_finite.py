"""Not-a-numbers are seen: bad gradients are not perturbed, and what a part breaks shows."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax

PARAMS = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.3)}
CURVATURE = jnp.array([1.0, 3.0, 10.0])


def loss_fn(params):
    return 0.5 * jnp.sum(CURVATURE * params["w"] ** 2) + params["b"] ** 2


def broken(bad):
    grads = jax.grad(loss_fn)(PARAMS)
    return grads | {"w": grads["w"].at[1].set(bad)}


STATEFUL = {
    "vasso": lambda: samax.vasso(0.1, theta=0.3),
    "samar": lambda: samax.samar(0.1, smoothing=0.0, gamma=0.01),
    "scheduled": lambda: samax.gsam(
        optax.linear_schedule(0.1, 0.0, 9), optax.linear_schedule(0.3, 0.0, 9)
    ),
    "own": lambda: samax.sharpness_aware(optax.scale_by_adam(), optax.trace(0.9)),
}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_bad_gradient_is_not_perturbed_and_moves_no_state(name, bad):
    tx = STATEFUL[name]()
    state, grads = tx.init(PARAMS), jax.grad(loss_fn)(PARAMS)
    _, state = tx.update(grads, state, PARAMS, value_fn=loss_fn)
    points = []
    grad_fn = lambda params: points.append(params) or broken(bad)
    direction, after = jax.jit(
        lambda grads, state: tx.update(grads, state, PARAMS, grad_fn=lambda _: broken(bad))
    )(broken(bad), state)
    chex.assert_trees_all_equal(after, state)
    # The base optimizer sees the gradient at the unperturbed point as it is, whatever the descent.
    chex.assert_trees_all_equal(direction, broken(bad))
    tx.update(broken(bad), state, PARAMS, grad_fn=grad_fn)
    chex.assert_trees_all_equal(points, [PARAMS])


@pytest.mark.parametrize("steps", [1, 3, 9])
def test_an_ascent_that_makes_a_nan_does_not_become_the_base_optimizer(steps):
    faulty = optax.stateless(lambda updates, _: optax.tree.scale(jnp.nan, updates))
    for ascent in (faulty, optax.chain(faulty, samax.scale_to_norm(0.1))):
        tx = samax.sharpness_aware(ascent, steps=steps, track=True)
        direction, state = tx.update(
            jax.grad(loss_fn)(PARAMS), tx.init(PARAMS), PARAMS, value_fn=loss_fn
        )
        assert np.all(np.isnan(direction["w"]))
        assert np.isnan(state.metrics.perturbation_norm)


def test_a_descent_that_makes_a_nan_shows():
    tx = samax.sharpness_aware(
        samax.scale_to_norm(0.1), samax.rule(lambda g, p: optax.tree.scale(jnp.nan, p))
    )
    direction, _ = tx.update(jax.grad(loss_fn)(PARAMS), tx.init(PARAMS), PARAMS, value_fn=loss_fn)
    assert np.all(np.isnan(direction["w"]))


def test_a_perturbed_gradient_that_is_not_finite_shows():
    tx = samax.sam(0.1)
    bad = broken(np.nan)
    direction, _ = tx.update(
        jax.grad(loss_fn)(PARAMS), tx.init(PARAMS), PARAMS, grad_fn=lambda _: bad
    )
    chex.assert_trees_all_equal(direction, bad)


def test_the_universal_class_and_balancing_leave_a_bad_gradient_as_it_is():
    tx = samax.trace_sam(0.1)
    bad = broken(np.inf)
    direction, _ = tx.update(bad, tx.init(PARAMS), PARAMS, value=1.0, value_fn=loss_fn)
    chex.assert_trees_all_equal(direction, bad)
    cores = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3))}
    grads = {"lora_a": jnp.ones((3, 2)).at[0, 0].set(np.nan), "lora_b": 2 * jnp.ones((2, 3))}
    base = optax.sgd(0.1)
    for method in (samax.nbar, samax.obar, samax.das):
        tx = method(base, learning_rate=0.1, alpha=1.0, groups=samax.lora_groups)
        updates, _ = tx.update(grads, tx.init(cores), cores)
        chex.assert_trees_all_equal(updates, base.update(grads, base.init(cores))[0])


def test_a_rule_that_makes_a_nan_of_finite_norms_shows():
    faulty = lambda params_sq, grads_sq: jnp.nan * params_sq
    cores = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3))}
    tx = samax.balanced(
        optax.sgd(0.1), faulty, learning_rate=0.1, alpha=1.0, groups=samax.lora_groups
    )
    updates, _ = tx.update(cores, tx.init(cores), cores)
    assert np.all(np.isnan(updates["lora_a"]))


def test_decoupled_hands_a_bad_gradient_to_its_optimizer():
    base = optax.sgd(0.1, momentum=0.9)
    tx = samax.decoupled_wsam(base, 0.1, rho=0.1)
    bad = broken(np.inf)
    updates, _ = tx.update(bad, tx.init(PARAMS), PARAMS, value_fn=loss_fn)
    chex.assert_trees_all_equal(updates, base.update(bad, base.init(PARAMS))[0])


def test_apply_if_finite_skips_the_step_and_the_next_one_is_as_if_nothing_had_been():
    tx = optax.apply_if_finite(
        optax.chain(samax.samar(0.1), optax.sgd(0.1, momentum=0.9)), max_consecutive_errors=5
    )
    grads = jax.grad(loss_fn)(PARAMS)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=loss_fn)
    updates, skipped = tx.update(broken(np.nan), state, PARAMS, grad_fn=lambda _: broken(np.nan))
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    chex.assert_trees_all_equal(
        tx.update(grads, skipped, PARAMS, value_fn=loss_fn)[0],
        tx.update(grads, state, PARAMS, value_fn=loss_fn)[0],
    )
