"""Friendly SAM: what only the ascent along the residual with the OLD average does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax
from tests.methods import points_of

pytestmark = pytest.mark.usefixtures("x64")
RHO, DECAY = 0.3, 0.7
RNG = np.random.default_rng(0)
GRADS = RNG.normal(size=(6, 5))
# Any gradient at the perturbed point will do: the perturbation is what is looked at.
START = RNG.normal(size=5)


def perturbations(tx, grads, state=None):
    """What each gradient is perturbed by, at the same parameters."""
    w, state, found = jnp.array(START), tx.init(jnp.array(START)), []
    for g in grads:
        points, state = points_of(tx, jnp.array(g), state, w)
        found.append(np.asarray(points[0] - w))
    return np.array(found)


def unit(x):
    return x / np.linalg.norm(x)


def written_out(grads, sigma=1.0, old=True, of_residual=False):
    """The published rule, or a wrong one: the new average, or an average of the residuals."""
    found, m = [], None
    for g in grads:
        if m is None:
            r, m = g, g
        else:
            new = DECAY * m + (1 - DECAY) * g
            r = g - sigma * (m if old else new)
            m = DECAY * m + (1 - DECAY) * (r if of_residual else g)
        found.append(RHO * unit(r))
    return np.array(found)


@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.0])
def test_the_residual_is_of_the_old_average_of_the_gradients(sigma):
    found = perturbations(samax.friendly_sam(RHO, sigma, DECAY), GRADS)
    np.testing.assert_allclose(found, written_out(GRADS, sigma), rtol=1e-10, atol=1e-12)
    if not sigma:
        return
    # The wrong variants in the wild differ from the third step on at the latest. At sigma 1 the new
    # average turns nothing, since g - m_new = lambda (g - m_old).
    turned = written_out(GRADS, sigma, old=False)
    assert (np.abs(found - turned).max() > 1e-3) == (sigma != 1.0)
    ported = written_out(GRADS, sigma, of_residual=True)
    assert np.abs(found[2:] - ported[2:]).max() > 0.01


def test_sigma_0_is_sam():
    found = perturbations(samax.friendly_sam(RHO, 0.0, DECAY), GRADS)
    np.testing.assert_allclose(found, perturbations(samax.sam(RHO), GRADS), rtol=1e-12)


def test_the_first_step_is_sam():
    (found,) = perturbations(samax.friendly_sam(RHO, 1.0, DECAY), GRADS[:1])
    np.testing.assert_allclose(found, RHO * unit(GRADS[0]), rtol=1e-12)


def test_what_all_batches_share_does_not_perturb():
    """g = c + (-1)^t d with d small: SAM goes along c, Friendly SAM along d, for any large c."""
    shared, special = np.array([10.0, 0, 0, 0, 0]), np.array([0, 0.1, 0, 0, 0])
    grads = [shared + (-1) ** t * special for t in range(40)]
    friendly = perturbations(samax.friendly_sam(RHO, 1.0, 0.9), grads)[-1]
    sam = perturbations(samax.sam(RHO), grads)[-1]
    assert abs(unit(sam) @ unit(shared)) > 0.99
    assert abs(unit(friendly) @ unit(special)) > 0.99
    assert np.sign(friendly[1]) == np.sign(grads[-1][1])


def test_a_constant_gradient_leaves_nothing_to_perturb_along_at_sigma_1():
    """From the second step on r = g - m = 0 exactly: a zero perturbation, never NaN."""
    grads = np.tile(np.array([1.0, -2.0, 0.5, 4.0, 0.25]), (3, 1))
    first, *others = perturbations(samax.friendly_sam(RHO, 1.0, 0.5), grads)
    assert np.linalg.norm(first) == pytest.approx(RHO)
    np.testing.assert_array_equal(others, 0.0)
    # With another sigma the direction is the gradient's: (1 - sigma) g, uphill below 1.
    for sigma, sign in ((0.5, 1), (2.0, -1)):
        found = perturbations(samax.friendly_sam(RHO, sigma, 0.5), grads)[2]
        np.testing.assert_allclose(found, sign * RHO * unit(grads[0]), rtol=1e-12)


def test_the_average_is_of_the_gradients_before():
    """It is in the state, has seen each once, and is one copy of the parameters."""
    tx = samax.subtract_ema(1.0, DECAY)
    state, m = tx.init(jnp.array(START)), None
    for g in GRADS:
        residual, state = tx.update(jnp.array(g), state)
        np.testing.assert_allclose(residual, g if m is None else g - m, rtol=1e-12)
        m = g if m is None else DECAY * m + (1 - DECAY) * g
        np.testing.assert_allclose(state.ema, m, rtol=1e-12)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(samax.friendly_sam().init(jnp.array(START))))
    assert size == START.nbytes + 4


def test_a_plain_step_moves_the_average_too():
    tx = samax.occasionally(samax.friendly_sam(RHO, 1.0, DECAY), samax.every(2))
    state, w = tx.init(jnp.array(START)), jnp.array(START)
    for i, g in enumerate(GRADS[:3]):
        points, state = points_of(tx, jnp.array(g), state, w, ascend=i % 2 == 0)
    expected = written_out(GRADS[:3])[2]
    np.testing.assert_allclose(points[0] - w, expected, rtol=1e-10)
    assert optax.tree.get(state, "ema") is not None
