"""SAGM: the ascent less a step of descent, and the mean of the two gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax
from tests.methods import points_of

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
HALF = RNG.normal(size=(5, 5))
CURVATURE = HALF @ HALF.T / 5 + 0.2 * np.eye(5)
W = RNG.normal(size=5)
RHO, ALPHA = 0.3, 0.1


def loss(w):
    return 0.5 * w @ jnp.array(CURVATURE) @ w


def gradient(w):
    return CURVATURE @ w


def seen(method, w=W):
    """The direction, and the perturbation that it was made with."""
    points = []
    w = jnp.array(w)
    grad_fn = lambda p: points.append(p) or jax.grad(loss)(p)
    direction, _ = method.update(jax.grad(loss)(w), method.init(w), w, grad_fn=grad_fn)
    return np.asarray(direction), np.asarray(points[0] - w)


def test_the_perturbation_and_the_direction():
    g = gradient(W)
    direction, eps = seen(samax.sagm(RHO, ALPHA))
    np.testing.assert_allclose(eps, (RHO / np.linalg.norm(g) - ALPHA) * g, rtol=1e-12)
    np.testing.assert_allclose(direction, (g + gradient(W + eps)) / 2, rtol=1e-12)
    # Not the sum, not the perturbed gradient alone, and alpha is not divided by the norm.
    for wrong in (g + gradient(W + eps), gradient(W + eps)):
        assert np.linalg.norm(direction - wrong) > 0.01 * np.linalg.norm(wrong)
    assert np.linalg.norm(eps - (RHO - ALPHA) * g / np.linalg.norm(g)) > 0.01


def test_alpha_0_is_the_mean_of_sams_gradient_and_the_clean_one():
    """GNP with a weight of one half."""
    direction, eps = seen(samax.sagm(RHO, 0.0))
    sam, sam_eps = seen(samax.sam(RHO))
    np.testing.assert_allclose(eps, sam_eps, rtol=1e-12)
    np.testing.assert_allclose(direction, (gradient(W) + sam) / 2, rtol=1e-12)
    gnp, _ = seen(samax.sharpness_aware(samax.scale_to_norm(RHO), samax.weighted(0.5)))
    np.testing.assert_allclose(direction, gnp, rtol=1e-12)


def test_it_looks_downhill_where_gradients_are_long():
    """Above ||g|| = rho / alpha the perturbed loss is the lower one; there it is not perturbed."""
    length = np.linalg.norm(gradient(W))
    for factor, sign in ((0.5, 1), (2.0, -1)):
        w = W * factor * RHO / (ALPHA * length)
        _, eps = seen(samax.sagm(RHO, ALPHA), w)
        assert sign * (eps @ gradient(w)) > 0
    _, eps = seen(samax.sagm(RHO, ALPHA), W * RHO / (ALPHA * length))
    assert np.linalg.norm(eps) < 1e-14


def test_the_scale_of_the_loss_enters_through_alpha_alone():
    scaled = lambda w: 8.0 * loss(w)

    def eps_of(alpha):
        w, tx = jnp.array(W), samax.sagm(RHO, alpha)
        points, _ = points_of(tx, jax.grad(scaled)(w), tx.init(w), w)
        return np.asarray(points[0] - w)

    _, expected = seen(samax.sagm(RHO, ALPHA))
    np.testing.assert_allclose(eps_of(ALPHA / 8), expected, rtol=1e-12)
    assert np.linalg.norm(eps_of(ALPHA) - expected) > 0.1


def test_both_at_0_is_the_base_optimizer():
    direction, eps = seen(samax.sagm(0.0, 0.0))
    np.testing.assert_array_equal(eps, 0.0)
    np.testing.assert_allclose(direction, gradient(W), rtol=1e-14)


def test_schedules_of_both_count_steps():
    tx = samax.sagm(optax.linear_schedule(RHO, 0.0, 4), optax.linear_schedule(ALPHA, 0.0, 2))
    w, state = jnp.array(W), None
    state, g = tx.init(jnp.array(W)), gradient(W)
    for t in range(3):
        points, state = points_of(tx, jnp.array(g), state, w)
        rho, alpha = RHO * (1 - t / 4), ALPHA * max(0.0, 1 - t / 2)
        expected = (rho / np.linalg.norm(g) - alpha) * g
        np.testing.assert_allclose(points[0] - w, expected, rtol=1e-6)
