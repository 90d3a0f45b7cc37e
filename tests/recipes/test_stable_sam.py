"""StableSAM: the perturbed gradient's direction, and the clean one's length."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax

INPUTS = jax.random.normal(jax.random.key(0), (16, 4))


def loss_fn(params):
    return jnp.mean((jnp.tanh(INPUTS @ params["w"]) @ params["v"] - 1) ** 2)


def initial(dtype=jnp.float32):
    first, second = jax.random.split(jax.random.key(1))
    return {
        "w": jax.random.normal(first, (4, 3)).astype(dtype),
        "v": jax.random.normal(second, (3,)).astype(dtype),
    }


def direction(method, params):
    grads = jax.grad(loss_fn)(params)
    return method.update(grads, method.init(params), params, value_fn=loss_fn)[0]


def cosine(left, right):
    return optax.tree.vdot(left, right) / (optax.tree.norm(left) * optax.tree.norm(right))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rho", [0.05, 0.5, 2.0])
def test_direction_and_length(rho):
    params = initial(jnp.float64)
    stable, sam = direction(samax.stable_sam(rho), params), direction(samax.sam(rho), params)
    clean = jax.grad(loss_fn)(params)
    assert optax.tree.norm(stable) == pytest.approx(float(optax.tree.norm(clean)), rel=1e-13)
    assert cosine(stable, sam) == pytest.approx(1.0, abs=1e-14)
    # Neither gradient has both, and the one ratio is over all leaves.
    assert abs(optax.tree.norm(sam) / optax.tree.norm(clean) - 1) > 1e-3
    assert cosine(stable, clean) < 1 - 1e-5
    ratios = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a) / jnp.linalg.norm(b)), stable, sam)
    assert ratios["w"] == pytest.approx(ratios["v"], rel=1e-12)
    each = jax.tree.map(lambda g, p: p * jnp.linalg.norm(g) / jnp.linalg.norm(p), clean, sam)
    assert abs(cosine(each, sam) - 1) > 1e-7


@pytest.mark.usefixtures("x64")
def test_the_ratio_is_not_clipped():
    """It lengthens where the perturbed gradient is the shorter one, and shortens elsewhere."""
    stable = lambda loss, w: direction_of(samax.stable_sam(0.5), loss, w)
    concave, convex = (lambda w: jnp.sin(w).sum()), (lambda w: (w**4).sum())
    for loss, longer in ((concave, True), (convex, False)):
        w = jnp.array([0.9])
        clean, perturbed = jax.grad(loss)(w), direction_of(samax.sam(0.5), loss, w)
        assert (jnp.linalg.norm(stable(loss, w)) > jnp.linalg.norm(perturbed)) == longer
        np.testing.assert_allclose(stable(loss, w), clean, rtol=1e-12)  # in one dimension


def direction_of(method, loss, w):
    return method.update(jax.grad(loss)(w), method.init(w), w, value_fn=loss)[0]


@pytest.mark.usefixtures("x64")
def test_its_stability_is_the_base_optimizers():
    """L = beta w^2 / 2: gradient descent to the minimum, where SAM stays at a distance."""
    loss = lambda w: 2.0 * jnp.sum(w**2)

    def trained(method, rate, steps=300):
        tx, w = optax.chain(method, optax.sgd(rate)), jnp.array([1.0, -0.5])
        state = tx.init(w)

        @jax.jit
        def step(w, state):
            updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
            return optax.apply_updates(w, updates), state

        for _ in range(steps):
            w, state = step(w, state)
        return float(jnp.linalg.norm(w))

    assert trained(samax.stable_sam(0.1), 0.45) < 1e-12  # 2 / beta is 0.5
    assert trained(samax.sam(0.1), 0.45) > 0.1
    assert not trained(samax.stable_sam(0.1), 0.51) < 10


def step(tx, params, state):
    updates, state = tx.update(jax.grad(loss_fn)(params), state, params, value_fn=loss_fn)
    return optax.apply_updates(params, updates), state


@pytest.mark.optimized
@pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_at_radius_0_it_is_the_base_optimizer_bit_for_bit(transform, momentum):
    """The norms of the two gradients are compiled apart, and their ratio may be an ulp off 1."""
    base = optax.with_extra_args_support(optax.sgd(0.05, momentum=momentum))
    paths = []
    for tx in (base, optax.chain(samax.stable_sam(0.0), base)):
        run = transform(lambda p, s, tx=tx: step(tx, p, s))
        params, path = initial(), []
        state = tx.init(params)
        for _ in range(5):
            params, state = run(params, state)
            path.append(params)
        paths.append(path)
    jax.tree.map(np.testing.assert_array_equal, *paths)


def test_as_a_rule_of_its_own_it_needs_no_perturbation():
    """`match_clean_norm` outside the combinator: the two gradients alone."""
    rule = samax.match_clean_norm()
    clean, perturbed = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([0.0, 2.0])}
    found, _ = rule.update(perturbed, rule.init(clean), clean, clean_grad=clean)
    np.testing.assert_allclose(found["w"], [0.0, 5.0], rtol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, perturbed)
    found, _ = rule.update(zero, rule.init(clean), clean, clean_grad=clean)
    np.testing.assert_array_equal(found["w"], 0.0)
    with pytest.raises(ValueError, match="eps must be finite"):
        samax.match_clean_norm(-1.0)
