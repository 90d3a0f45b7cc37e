"""Muon with the lazy spectral form: perturbed along the last orthogonalized direction, uphill."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax

RATE, RHO = 0.02, 0.3
INPUTS = jax.random.normal(jax.random.key(0), (32, 6))


def loss_fn(params):
    hidden = jnp.tanh(INPUTS @ params["first"] + params["bias"])
    return jnp.mean((hidden @ params["second"] - 1) ** 2)


def initial():
    first, second = jax.random.split(jax.random.key(1))
    return {
        "first": 0.5 * jax.random.normal(first, (6, 6)),
        "second": 0.5 * jax.random.normal(second, (6, 4)),
        "bias": jnp.zeros(6),
    }


def muon():
    return optax.contrib.muon(RATE)


def lazy(rho=RHO, **options):
    ascent = optax.chain(optax.scale(-1.0), samax.scale_to_norm(rho))
    if options:
        ascent = samax.perturb_only(ascent, **options)
    return samax.one_gradient(muon(), ascent, source="update")


def train(tx, steps):
    params = initial()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def written_out(steps):
    """One operation at a time: muon at w with the gradient at w + eps, eps against its step."""
    tx, w, point = muon(), initial(), initial()
    state = tx.init(w)
    for _ in range(steps):
        move, state = tx.update(jax.grad(loss_fn)(point), state, w)
        w = optax.apply_updates(w, move)
        point = optax.apply_updates(w, optax.tree.scale(-RHO / optax.tree.norm(move), move))
    return w, point, move


def test_against_the_step_written_out():
    params, state = train(lazy(), 4)
    w, point, _ = written_out(4)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, params, point)
    jax.tree.map(close, samax.eval_params(state, params), w)


def test_the_perturbation_is_spectral_and_uphill():
    """Its singular values are nearly equal, those of the gradient are not."""
    params, state = train(lazy(), 3)
    clean = samax.eval_params(state, params)
    eps = optax.tree.sub(params, clean)
    assert optax.tree.norm(eps) == pytest.approx(RHO, rel=1e-4)
    assert loss_fn(params) > loss_fn(clean)
    spread = lambda matrix: np.ptp(np.linalg.svd(matrix, compute_uv=False)) / np.linalg.norm(matrix)
    grads = jax.grad(loss_fn)(clean)
    # Muon's Newton-Schulz brings singular values to within about 0.7 and 1.2 of one another.
    for name in ("first", "second"):
        assert spread(np.asarray(eps[name])) < 0.5 * spread(np.asarray(grads[name]))
    # Stale SAM's, along the gradient, is of low rank.
    params, state = train(samax.stale_sam(muon(), RHO), 3)
    stale = optax.tree.sub(params, samax.eval_params(state, params))
    assert spread(np.asarray(eps["first"])) < 0.5 * spread(np.asarray(stale["first"]))


def test_the_sign_decides():
    """Against the update it is uphill; along it, as MSAM's is, downhill."""
    against, state = train(lazy(), 3)
    assert loss_fn(against) > loss_fn(samax.eval_params(state, against))
    ascent = samax.scale_to_norm(RHO)
    along, state = train(samax.one_gradient(muon(), ascent, source="update"), 3)
    assert loss_fn(along) < loss_fn(samax.eval_params(state, along))


def test_matrices_alone():
    mask = {"first": True, "second": True, "bias": False}
    params, state = train(lazy(mask=mask), 2)
    clean = samax.eval_params(state, params)
    np.testing.assert_allclose(params["bias"], clean["bias"], atol=1e-7)
    moved = [float(jnp.sum((params[n] - clean[n]) ** 2)) for n in ("first", "second")]
    assert np.sqrt(sum(moved)) == pytest.approx(RHO, rel=1e-4)


def test_it_trains_and_at_radius_0_it_is_muon():
    params, state = train(lazy(0.1), 60)
    assert loss_fn(samax.eval_params(state, params)) < 0.2 * loss_fn(initial())
    still, _ = train(lazy(0.0), 3)
    base, _ = train(muon(), 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), still, base)


def test_muons_momentum_is_of_the_matrices_alone_so_msam_says_so():
    with pytest.raises(ValueError, match=r"needs one first moment of all parameters.*found 0"):
        samax.msam(muon(), RHO).init(initial())
