"""What every recipe must do: transformations of JAX, dtypes, zero radius, bad gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax

METHODS = {
    "sam": samax.sam,
    "usam": samax.usam,
    "asam": samax.asam,
    "asam_weights": functools.partial(samax.asam, scaled=samax.weights_only),
    "vasso": functools.partial(samax.vasso, theta=0.4),
    "wsam": samax.wsam,
    "gsam": samax.gsam,
    "samar": samax.samar,
    "friendly_sam": samax.friendly_sam,
    "stable_sam": samax.stable_sam,
    "sagm": functools.partial(samax.sagm, alpha=0.0),
    "looksam": functools.partial(samax.looksam, k=2),
    "samar_raw": functools.partial(samax.samar, smoothing=0.0, gamma=0.01),
}
RATE = 0.05


def build(name, rho, **options):
    return optax.chain(METHODS[name](rho, **options), optax.sgd(RATE, momentum=0.9))


def decoupled(rho, **options):
    return samax.decoupled_wsam(optax.sgd(RATE, momentum=0.9), RATE, rho=rho, **options)


every_method = pytest.mark.parametrize(
    "make",
    [*(functools.partial(build, name) for name in METHODS), decoupled],
    ids=[*METHODS, "decoupled_wsam"],
)


def of_looksam(make):
    return make is not decoupled and make.args[0] == "looksam"


def initial(dtype=jnp.float32, seed=0):
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "dense": {
            "kernel": 0.5 * jax.random.normal(first, (4, 6), dtype),
            "bias": jnp.zeros(6, dtype),
        },
        "out": 0.5 * jax.random.normal(second, (6,), dtype),
    }


def batch(step=0):
    inputs = jax.random.normal(jax.random.fold_in(jax.random.key(7), step), (16, 4))
    return inputs, jnp.sin(inputs).sum(axis=1)


def loss_fn(params, inputs, targets):
    dtype = params["out"].dtype
    hidden = jnp.tanh(inputs.astype(dtype) @ params["dense"]["kernel"] + params["dense"]["bias"])
    return jnp.mean((hidden @ params["out"] - targets.astype(dtype)) ** 2)


def train_step(tx, carry, step):
    params, state = carry
    fn = functools.partial(_loss_of_step, step=step)
    value, grads = jax.value_and_grad(fn)(params)
    updates, state = tx.update(grads, state, params, value=value, value_fn=fn)
    return (optax.apply_updates(params, updates), state), value


def _loss_of_step(params, step):
    return loss_fn(params, *batch(step))


def eager(fn):
    """In place of `jax.jit`: operations are compiled once for all tests, a program for each."""
    return fn


def train(tx, params, steps=4, transform=jax.jit):
    step_fn = transform(functools.partial(train_step, tx))
    carry = (params, tx.init(params))
    for step in range(steps):
        carry, _ = step_fn(carry, step)
    return carry


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def assert_close(left, right, rtol=1e-9, atol=1e-12):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol
        ),
        left,
        right,
    )


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@every_method
@pytest.mark.usefixtures("x64")
def test_jit_and_scan_give_the_eager_result(make):
    tx, params = make(0.1, track=True), initial(jnp.float64)
    expected = train(tx, params, 3, transform=eager)
    assert_close(train(tx, params, 3), expected)
    scanned, values = jax.lax.scan(
        functools.partial(train_step, tx), (params, tx.init(params)), jnp.arange(3)
    )
    assert_close(scanned, expected)
    assert values.shape == (3,)


@every_method
@pytest.mark.usefixtures("x64")
def test_vmap_over_seeds_and_over_rho(make):
    def trained(rho, params):
        return train(make(rho), params, 2, transform=eager)[0]

    starts, radii = [initial(jnp.float64, seed) for seed in range(3)], [0.0, 0.05, 0.3]
    together = jax.vmap(trained, (None, 0))(0.1, stack(starts))
    assert_close(together, stack([trained(0.1, params) for params in starts]))
    together = jax.vmap(trained, (0, None))(jnp.array(radii), starts[0])
    assert_close(together, stack([trained(rho, starts[0]) for rho in radii]))


@every_method
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_structure_and_dtypes_are_constant(make, dtype, request):
    if dtype == jnp.float64:
        request.getfixturevalue("x64")
    tx, params = make(0.1, track=True), initial(dtype)
    carry = (params, tx.init(params))
    after, _ = jax.eval_shape(functools.partial(train_step, tx), carry, 0)
    layout = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert layout(after) == layout(carry)


@every_method
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float16, 0.02), (jnp.bfloat16, 0.15)])
def test_low_precision_approximates_float32(make, dtype, tolerance):
    tx, params = make(0.1), initial(dtype)
    trained, _ = train(tx, params)
    wide, _ = train(tx, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    assert_close(trained, wide, rtol=tolerance, atol=tolerance)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "transform"),
    # LookSAM evaluates within a `cond`, which is compiled where the base optimizer's step is not.
    [(name, eager) for name in [*METHODS, "decoupled_wsam"] if name != "looksam"]
    + [(name, jax.jit) for name in [*METHODS, "decoupled_wsam"]],
)
def test_zero_rho_is_the_base_optimizer_bit_for_bit(name, transform):
    make = decoupled if name == "decoupled_wsam" else functools.partial(build, name)

    def updates_of(tx):
        @transform
        def step(params, state, number):
            fn = functools.partial(_loss_of_step, step=number)
            value, grads = jax.value_and_grad(fn)(params)
            return tx.update(grads, state, params, value=value, value_fn=fn)

        params, seen = initial(), []
        state = tx.init(params)
        for number in range(4):
            updates, state = step(params, state, number)
            params = optax.apply_updates(params, updates)
            seen.append(updates)
        return seen

    base = optax.with_extra_args_support(optax.sgd(RATE, momentum=0.9))
    if name == "stable_sam":  # its ratio of norms is rounded
        assert_close(updates_of(make(0.0)), updates_of(base), rtol=1e-5, atol=1e-7)
        return
    assert_same(updates_of(make(0.0)), updates_of(base))


@every_method
def test_a_zero_gradient_gives_a_zero_update(make):
    # On LookSAM's second step nothing is evaluated, and tracked as NaN.
    tx = make(0.1, track=not of_looksam(make))
    params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    loss = lambda p: jnp.sum(p["w"] ** 2) + p["b"] ** 2
    state = tx.init(params)
    for _ in range(2):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
        assert_same(updates, jax.tree.map(jnp.zeros_like, params))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@every_method
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_does_not_outlive_its_step(make, bad):
    """As with dynamic loss scaling: a step overflows and is thrown away by `apply_if_finite`."""
    tx = make(0.1, track=True)
    params = initial()
    (params, state), _ = train_step(tx, (params, tx.init(params)), 0)
    grads = jax.grad(_loss_of_step)(params, step=1)
    broken = grads | {"out": grads["out"].at[0].set(bad)}
    fn = functools.partial(_loss_of_step, step=1)
    updates, after = tx.update(broken, state, params, value=fn(params), value_fn=fn)
    # No entry turns NaN that was not, and no perturbation is made from a bad gradient.
    if not np.isnan(bad):
        assert not any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(updates))
    if make is not decoupled and make.args[0] not in ("usam",):
        assert optax.tree.get(after, "perturbation_norm") in (0.0, pytest.approx(0.1, rel=1e-3))
    # The parts' own state is as finite as before.
    for name in ("ema", "adaptive_weight", "sharpness_ratio", "smoothed_grad_norm"):
        for leaf in jax.tree.leaves(optax.tree.get(after, name)):
            assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("usam", "looksam")])
def test_loss_scaled_float16_gradients_give_the_same_perturbation(name):
    scale = 2.0**12
    params = initial(jnp.float16)
    tx = METHODS[name](0.1, track=True)
    grads = jax.grad(_loss_of_step)(jax.tree.map(lambda x: x.astype(jnp.float32), params), step=0)
    points = []
    for factor in (1.0, scale):
        fn = lambda p: points.append(p) or p
        scaled = jax.tree.map(lambda g: (g * factor).astype(jnp.float16), grads)  # noqa: B023
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(scaled))
        tx.update(scaled, tx.init(params), params, grad_fn=fn)
    assert_close(points[0], points[1], rtol=0, atol=2e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), points[0], params)
    assert max(jax.tree.leaves(moved)) > 0.01


def test_a_float16_gradient_whose_norm_overflows():
    params = jnp.ones(1_000_000, jnp.float16)
    tx = samax.sam(100.0, track=True)
    _, state = tx.update(params * 1_000, tx.init(params), params, grad_fn=lambda p: p)
    assert float(state.metrics.clean_grad_norm) == pytest.approx(1e6, rel=1e-4)
    assert float(state.metrics.perturbation_norm) == pytest.approx(100.0, rel=0.05)


@pytest.mark.usefixtures("x64")
def test_relations_between_the_methods():
    params = initial(jnp.float64)

    def trained(method):
        tx = optax.chain(method, optax.sgd(RATE, momentum=0.9))
        return train(tx, params, transform=eager)[0]

    sam, sgd = trained(samax.sam(0.1)), trained(optax.with_extra_args_support(optax.identity()))
    assert_close(trained(samax.vasso(0.1, theta=1.0)), sam)
    assert_close(trained(samax.wsam(0.1, gamma=0.5)), sam)
    assert_close(trained(samax.wsam(0.1, gamma=0.0)), sgd)
    assert_close(trained(samax.gsam(0.1, alpha=0.0)), sam)
    assert_close(trained(samax.samar(0.1, chi=1.0)), sam)
    assert_close(trained(samax.samar(0.1, initial_weight=0.0)), sgd)
    with pytest.raises(AssertionError):
        assert_close(sam, sgd, rtol=1e-3)


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

    def directions(tx):
        state, points = tx.init(params), []
        for step in range(30):
            grads = jax.grad(_loss_of_step)(params, step=step)
            record = lambda p: points.append(p) or p
            _, state = tx.update(grads, state, params, grad_fn=record)
        flat = np.array([np.concatenate([np.ravel(x) for x in jax.tree.leaves(p)]) for p in points])
        return flat[10:].var(axis=0).sum()

    assert directions(samax.vasso(0.1, theta=0.2)) < 0.3 * directions(samax.sam(0.1))
