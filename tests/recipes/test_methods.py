"""What every method does: transformations of JAX, dtypes, a radius of zero, bad gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import samax
from tests.marks import slow_unless
from tests.methods import (
    METHODS,
    SHAPES,
    batch_of,
    initial,
    loss_fn,
    points_of,
    sgd,
    train_step,
    where,
)

assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-9, atol=1e-12)


def all_but(reason, names=tuple(METHODS)):
    return [name for name in names if reason not in METHODS[name].except_for]


def eager(fn):
    return fn


def train(tx, params, steps=3, transform=eager):
    """Without `jit` unless asked: operations compile once for all tests, a program for each."""
    step, carry = transform(functools.partial(train_step, tx)), (params, tx.init(params))
    for number in range(steps):
        carry = step(*carry, batch_of(number))
    return carry


@pytest.mark.usefixtures("x64")
class Variants(chex.TestCase):
    def check(self, name):
        tx, params = METHODS[name].optimizer(track=True), initial(jnp.float64)
        assert_close(train(tx, params, 1, self.variant), train(tx, params, 1))


class TestVariants(Variants):
    @chex.variants(with_jit=True)
    @parameterized.named_parameters((name, name) for name in SHAPES)
    def test_under_jit(self, name):
        self.check(name)

    @chex.variants(with_pmap=True)
    @parameterized.named_parameters((name, name) for name in SHAPES)
    def test_on_every_device(self, name):
        self.check(name)


@pytest.mark.slow
class TestVariantsOfOthers(Variants):
    @chex.variants(with_jit=True)
    @parameterized.named_parameters((name, name) for name in METHODS if name not in SHAPES)
    def test_under_jit(self, name):
        self.check(name)


@pytest.mark.parametrize("name", slow_unless(SHAPES, METHODS))
@pytest.mark.usefixtures("x64")
def test_scan_and_vmap_give_the_eager_result(name):
    """Over seeds and radii at once, three steps in a loop."""

    def trained(rho, params):
        tx = METHODS[name].optimizer(rho)
        body = lambda carry, number: (train_step(tx, *carry, batch_of(number)), None)
        return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(3))[0]

    starts, radii = [initial(jnp.float64, seed) for seed in range(3)], [0.0, 0.05, 0.3]
    stack = lambda *leaves: jnp.stack(leaves)
    together = jax.vmap(trained)(jnp.array(radii), jax.tree.map(stack, *starts))
    alone = [
        train(METHODS[name].optimizer(rho), params)
        for rho, params in zip(radii, starts, strict=True)
    ]
    assert_close(together, jax.tree.map(stack, *alone))


@pytest.mark.parametrize("name", slow_unless(SHAPES, all_but("low precision")))
def test_low_precision_approximates_float32(name):
    tx, params = METHODS[name].optimizer(), initial(jnp.bfloat16)
    wide = lambda params: optax.tree.cast(params, jnp.float32)
    trained, expected = train(tx, params, 2)[0], train(tx, wide(params), 2)[0]
    assert_close(wide(trained), expected, rtol=0.01, atol=0.01)
    moved = optax.tree.sub(expected, wide(params))
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(moved)) > 0.015


@functools.cache
def updates_with_zero_rho(name, transform):
    """The updates of three steps: the base optimizer's, if `name` is none."""
    tx = optax.with_extra_args_support(sgd()) if name is None else METHODS[name].optimizer(0.0)

    @transform
    def update(params, state, batch):
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        return tx.update(grads, state, params, value=value, value_fn=loss_fn, batch=batch)

    params, seen = initial(), []
    state = tx.init(params)
    for number in range(3):
        for _ in range(METHODS[name].calls if name else 1):
            updates, state = update(params, state, batch_of(number))
            params = optax.apply_updates(params, updates)
        seen.append(updates)
    return seen


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "transform"),
    [
        pytest.param(name, jax.jit, marks=[] if name in SHAPES else [pytest.mark.slow])
        for name in METHODS
    ]
    + [(name, eager) for name in all_but("eager at zero", SHAPES)],
)
def test_zero_rho_is_the_base_optimizer_bit_for_bit(name, transform):
    result = updates_with_zero_rho(name, transform)
    base = updates_with_zero_rho(None, transform)
    if "zero rho" in METHODS[name].except_for:
        chex.assert_trees_all_close(result, base, rtol=1e-5, atol=1e-7)
    else:
        chex.assert_trees_all_equal(result, base)


@pytest.mark.parametrize("name", slow_unless(SHAPES, all_but("zero gradient")))
def test_a_zero_gradient_gives_a_zero_update(name):
    tx = METHODS[name].optimizer(track="finite metrics" not in METHODS[name].except_for)
    params = jax.tree.map(jnp.zeros_like, initial())
    loss = lambda params, batch: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    state = tx.init(params)
    for _ in range(2):
        after, state = train_step(tx, params, state, batch_of(), loss)
        chex.assert_trees_all_equal(after, params)
    chex.assert_tree_all_finite(state)


@pytest.mark.parametrize("name", slow_unless(SHAPES, METHODS))
def test_a_gradient_that_is_not_finite_does_not_outlive_its_step(name):
    """As with dynamic loss scaling: a step overflows and is thrown away by `apply_if_finite`."""
    tx, params = METHODS[name].optimizer(track=True), initial()
    state = tx.init(params)
    for _ in range(METHODS[name].calls):
        params, state = train_step(tx, params, state, batch_of())
    value, grads = jax.value_and_grad(loss_fn)(params, batch_of(1))
    broken = grads | {"bias": grads["bias"].at[0].set(np.inf)}
    extra = {"value": value, "value_fn": loss_fn, "batch": batch_of(1)}
    updates, after = tx.update(broken, state, params, **extra)
    # No entry turns NaN that was not, and no perturbation is made from a bad gradient.
    assert not any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(updates))
    if METHODS[name].normalized:
        assert optax.tree.get(after, "perturbation_norm") == 0.0
    # The parts' own state is as finite as before.
    for kept in ("ema", "adaptive_weight", "sharpness_ratio", "smoothed_grad_norm"):
        for _, leaf in optax.tree.get_all_with_path(after, kept):
            chex.assert_tree_all_finite(leaf)


@pytest.mark.parametrize("name", where(normalized=True))
def test_loss_scaled_float16_gradients_give_the_same_perturbation(name):
    params, tx = initial(jnp.float16), METHODS[name].before(0.1)
    grads = jax.grad(loss_fn)(initial(), batch_of())

    def perturbed(factor):
        scaled = jax.tree.map(lambda g: (g * factor).astype(jnp.float16), grads)
        chex.assert_tree_all_finite(scaled)
        points, _ = points_of(tx, scaled, tx.init(params), params)
        return optax.tree.cast(points[0], jnp.float32)

    plain = perturbed(1.0)
    assert_close(perturbed(2.0**12), plain, rtol=0, atol=5e-4)
    moved = optax.tree.sub(plain, optax.tree.cast(params, jnp.float32))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(moved)) > 0.01


def test_a_float16_gradient_whose_norm_overflows():
    params = jnp.ones(1_000_000, jnp.float16)
    tx = samax.sam(100.0, track=True)
    _, state = tx.update(params * 1_000, tx.init(params), params, grad_fn=lambda p: p)
    assert float(state.metrics.clean_grad_norm) == pytest.approx(1e6, rel=1e-4)
    assert float(state.metrics.perturbation_norm) == pytest.approx(100.0, rel=0.05)


@pytest.mark.usefixtures("x64")
def test_relations_between_the_methods():
    def trained(method):
        return train(optax.chain(method, sgd()), initial(jnp.float64))[0]

    plain, sam = trained(optax.with_extra_args_support(optax.identity())), trained(samax.sam(0.1))
    assert_close(trained(samax.vasso(0.1, theta=1.0)), sam)
    assert_close(trained(samax.wsam(0.1, gamma=0.5)), sam)
    assert_close(trained(samax.wsam(0.1, gamma=0.0)), plain)
    assert_close(trained(samax.gsam(0.1, alpha=0.0)), sam)
    assert_close(trained(samax.samar(0.1, chi=1.0)), sam)
    assert_close(trained(samax.samar(0.1, initial_weight=0.0)), plain)
    with pytest.raises(AssertionError):
        assert_close(sam, plain, rtol=1e-3)


def test_asam_does_not_see_a_rescaling_of_the_weights_and_sam_does():
    """L(w) and L(A w) with A = diag: the perturbed losses agree for ASAM with t0 = 0 alone."""
    scales = jnp.array([0.1, 1.0, 10.0])
    w = jnp.array([1.0, -2.0, 0.5])
    loss = lambda w: jnp.sum(jnp.cosh(w))
    rescaled = lambda w: loss(scales * w)

    def perturbed_loss(method, loss, w):
        _, state = method.update(jax.grad(loss)(w), method.init(w), w, value_fn=loss)
        return float(optax.tree.get(state, "perturbed_loss"))

    asam, sam = samax.asam(0.5, t0=0.0, track=True), samax.sam(0.5, track=True)
    assert perturbed_loss(asam, rescaled, w / scales) == pytest.approx(
        perturbed_loss(asam, loss, w), rel=1e-5
    )
    assert perturbed_loss(sam, rescaled, w / scales) > 1.2 * perturbed_loss(sam, loss, w)


def test_vasso_perturbs_along_a_steadier_direction_than_sam():
    """Its perturbation varies less from batch to batch: the point of variance suppression."""
    params = initial()
    gradients = [jax.grad(loss_fn)(params, batch_of(step)) for step in range(30)]

    def variance(tx):
        state, flat = tx.init(params), []
        for grads in gradients:
            points, state = points_of(tx, grads, state, params)
            flat.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(points)]))
        return np.var(flat[10:], axis=0).sum()

    assert variance(samax.vasso(0.1, theta=0.2)) < 0.3 * variance(samax.sam(0.1))
