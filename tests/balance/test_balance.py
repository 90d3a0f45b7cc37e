"""Norm balancing: what it conserves, what it mimics, and how it composes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax
from benchmarks.models.toys import nop, steps_to_half, trajectories, tucker

TARGET = jnp.diag(jnp.array([0.5, 0.0, 0.0]))
GROUPS = {"x": "xy", "y": "xy"}


def loss_fn(p, target=TARGET):
    return jnp.sum((jnp.outer(p["x"], p["y"]) - target) ** 2)


def start():
    x = jnp.array([0.2, -0.1, 0.3])
    return {"x": x, "y": -3 * x}


def descend(tx, params, steps, loss=loss_fn):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0][0])(params)


def balance(params):
    return float(samax.balancedness(params, GROUPS)["xy"])


@pytest.mark.usefixtures("x64")
class TestTheory:
    def test_sgd_conserves_the_balance_as_eta_goes_to_zero(self):
        drifts = []
        for eta in (1e-2, 1e-3):
            end = descend(optax.with_extra_args_support(optax.sgd(eta)), start(), int(1 / eta))
            drifts.append(abs(balance(end) - balance(start())))
            assert samax.norm_deviation(end, GROUPS)["xy"] == pytest.approx(2 * balance(end) ** 2)
        assert drifts[0] / drifts[1] == pytest.approx(10, rel=0.2)

    def sam_rate(self, rho):
        """dB/dt along SAM's flow, exact up to the step's size."""
        params = start()
        grads = jax.grad(loss_fn)(params)
        norm = optax.tree.norm(grads)
        perturbed = jax.grad(loss_fn)(jax.tree.map(lambda w, g: w + rho * g / norm, params, grads))
        return float(perturbed["y"] @ params["y"] - perturbed["x"] @ params["x"])

    def test_the_first_order_law_of_the_balance(self):
        params = start()
        grads = jax.grad(loss_fn)(params)
        gamma_x, gamma_y = (float(jnp.sum(grads[name] ** 2)) for name in "xy")
        radii = np.array([1e-3, 2e-3, 4e-3, 8e-3])
        law = radii * (gamma_x - gamma_y) / np.sqrt(gamma_x + gamma_y)
        errors = np.abs([self.sam_rate(rho) for rho in radii] - law)
        assert np.polyfit(np.log(radii), np.log(errors), 1)[0] == pytest.approx(2.0, abs=0.05)

    def test_das_with_alpha_rho_changes_the_deviation_as_sam_does(self):
        eta, errors, radii = 1e-6, [], [1e-3, 2e-3, 4e-3]
        for rho in radii:
            das = samax.das(optax.sgd(eta), learning_rate=eta, alpha=rho, groups=GROUPS)
            sam = optax.chain(samax.sam(rho), optax.sgd(eta))
            sgd = optax.with_extra_args_support(optax.sgd(eta))
            change = {}
            for name, tx in {"das": das, "sam": sam, "sgd": sgd}.items():
                after = descend(tx, start(), 1)
                change[name] = float(samax.norm_deviation(after, GROUPS)["xy"])
            gap = change["das"] - change["sam"]
            assert abs(gap) < 0.1 * abs(change["sam"] - change["sgd"])
            errors.append(abs(gap) / eta)
        assert np.polyfit(np.log(radii), np.log(errors), 1)[0] == pytest.approx(2.0, abs=0.1)

    def test_the_law_of_the_deviation(self):
        """dQ/dt = 4 rho u K Cov, for SAM at first order and for DAS with alpha = rho."""
        eta, rho, params = 1e-7, 1e-3, start()
        grads = jax.grad(loss_fn)(params)
        u = optax.tree.norm(grads) ** -1
        covariance = samax.gradient_covariance(params, grads, GROUPS)["xy"]
        law = float(4 * rho * u * 2 * covariance)
        das = samax.das(optax.sgd(eta), learning_rate=eta, alpha=rho, groups=GROUPS)
        sgd = optax.with_extra_args_support(optax.sgd(eta))
        after, base = (
            samax.norm_deviation(descend(tx, params, 1), GROUPS)["xy"] for tx in (das, sgd)
        )
        assert float(after - base) / eta == pytest.approx(law, rel=1e-4)

    @pytest.mark.parametrize("method", [samax.nbar, samax.obar])
    def test_bar_on_the_noisy_toy(self, method):
        """METHODS.md 3, NOP: with noise both cut |B|, which SGD conserves."""
        noise = jnp.diag(jnp.array([1.0, 0.8, 0.5]))
        eta, steps = 1e-3, 3_000

        def run(tx):
            def step(carry, key):
                params, state = carry
                draw = TARGET + 1.0 * noise @ jax.random.normal(key, (3, 3))
                grads = jax.grad(loss_fn)(params, draw)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            keys = jax.random.split(jax.random.key(0), steps)
            return jax.lax.scan(step, (start(), tx.init(start())), keys)[0][0]

        plain = run(optax.sgd(eta))
        alpha = optax.linear_schedule(0.5, 0.0, steps)
        tx = method(optax.sgd(eta), learning_rate=eta, alpha=alpha, groups=GROUPS)
        assert abs(balance(plain)) == pytest.approx(abs(balance(start())), rel=0.05)
        assert abs(balance(run(tx))) < 0.7 * abs(balance(plain))


@pytest.mark.slow
class TestToys:
    """METHODS.md 5 over the whole time of its runs, in a tenth of the steps, ten times as large."""

    def test_the_half_times_of_sam_on_nop_respond_to_the_noise(self):
        toy = nop()._replace(learning_rate=1e-3, steps=3_000, levels=(0.5, 1.0, 2.0))
        run = trajectories(toy, "SAM", seeds=4, every=10)
        halves = np.median(steps_to_half(run.imbalance, 10), axis=1)
        np.testing.assert_allclose(halves, [2_560, 1_220, 610], rtol=0.03)

    def test_sgd_keeps_what_sam_cuts_on_nop(self):
        toy = nop()._replace(learning_rate=1e-3, steps=10_000, levels=(0.0, 0.5, 1.0, 2.0))
        start = 0.56
        sgd, sam = (
            trajectories(toy, method, seeds=2).imbalance[..., -1].mean(1)
            for method in ("SGD", "SAM")
        )
        # SGD's loss is of the order of its step size: of the squares of the gradients' norms.
        np.testing.assert_allclose(sgd[:2], start, rtol=0.02)
        np.testing.assert_allclose(sam[1:3], [0.112, 0.072], rtol=0.05)
        assert sam[0] > 1.05 * start
        assert sam[3] < 1e-4  # both cores are 0, which is no balance

    @pytest.mark.parametrize("case", ["large core", "small core"])
    def test_das_moves_the_norm_deviation_as_sam_does(self, case):
        norms = (2.4, 1.2, 0.4) if case == "large core" else (0.4, 2.4, 1.2)
        toy = tucker(**dict(zip("gab", norms, strict=True)))
        toy = toy._replace(learning_rate=1e-2, steps=5_000, levels=(0.5, 1.0))
        runs = {method: trajectories(toy, method, seeds=2) for method in toy.methods}
        sgd, sam, das = (run.imbalance.mean(1) for run in runs.values())
        covariance = runs["SAM"].covariance[..., toy.steps // 200 :].mean((1, 2))
        if case == "large core":
            assert np.all(covariance < 0)
            effect = (sgd - sam)[:, -1]
            assert np.all(effect > 0.5)
            assert np.all(np.abs(das - sam).max(1) < 0.06 * effect)
        else:  # here both raise it
            assert np.all(covariance > 0)
            for run in (sam, das):
                assert np.all(run[:, -1] > sgd[:, -1] + 0.05)
                assert np.all(run[:, -1] > run[:, 0])


@pytest.mark.parametrize("method", [samax.nbar, samax.obar, samax.das])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_what_is_outside_the_groups_and_zero_alpha_are_the_base_bit_for_bit(method, transform):
    params = start() | {"rest": jnp.array([1.0, -2.0])}
    groups = GROUPS | {"rest": None}
    loss = lambda p: loss_fn(p) + jnp.sum(jnp.cosh(p["rest"]))
    base = optax.sgd(0.1, momentum=0.9)
    grads = jax.grad(loss)(params)
    expected, _ = transform(base.update)(grads, base.init(params), params)
    tx = method(base, learning_rate=0.1, alpha=0.5, groups=groups)
    updates, _ = transform(tx.update)(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["rest"], expected["rest"])
    assert np.any(updates["x"] != expected["x"])
    tx = method(base, learning_rate=0.1, alpha=0.0, groups=groups)
    updates, _ = transform(tx.update)(grads, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


@pytest.mark.parametrize(
    ("method", "rates"), [(samax.nbar, [1.0, -1.0]), (samax.obar, [-1.0, 1.0]), (samax.das, [0, 0])]
)
def test_ties(method, rates):
    params, grads = {"x": jnp.ones(2), "y": -jnp.ones(2)}, {"x": jnp.ones(2), "y": jnp.ones(2)}
    tx = method(optax.sgd(0.0), learning_rate=1.0, alpha=0.1, groups=GROUPS, track=True)
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(state.rates["xy"], 0.1 * np.array(rates), rtol=1e-6)
    np.testing.assert_allclose(updates["x"], 0.1 * rates[0] * params["x"], rtol=1e-6)
    np.testing.assert_allclose(updates["y"], 0.1 * rates[1] * params["y"], rtol=1e-6)


@pytest.mark.parametrize("method", [samax.nbar, samax.obar, samax.das])
def test_zero_cores_and_zero_gradients(method):
    tx = method(optax.sgd(0.1), learning_rate=0.1, alpha=0.5, groups=GROUPS)
    zero = jnp.zeros(3)
    # LoRA's start: B is zero, so A has no gradient and B is moved by the base optimizer alone.
    params, grads = {"x": jnp.ones(3), "y": zero}, {"x": zero, "y": jnp.ones(3)}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["y"], -0.1)
    assert np.all(np.isfinite(updates["x"]))
    # A group without gradients is left alone.
    grads = {"x": zero, "y": zero}
    updates, _ = tx.update(grads, tx.init(params), params)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0.0), updates)


def test_the_bound_keeps_a_small_core_from_exploding():
    """METHODS.md 5: at step 0 of tensor completion the rate exceeds 90."""
    params = {"x": jnp.full(3, 1e-3), "y": jnp.ones(3)}
    grads = {"x": jnp.full(3, 10.0), "y": jnp.full(3, 0.01)}

    def growth(**options):
        tx = samax.das(optax.sgd(0.0), learning_rate=1.0, alpha=0.1, groups=GROUPS, **options)
        return float((tx.update(grads, tx.init(params), params)[0]["x"] / params["x"])[0])

    assert growth(bound=None) > 90
    assert growth() == pytest.approx(0.5)
    assert growth(bound=0.1) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"bound must be finite and lie in \(0, 1\)"):
        growth(bound=1.0)


@pytest.mark.parametrize("method", [samax.nbar, samax.obar, samax.das])
def test_stacked_layers_are_groups_of_their_own(method):
    keys = jax.random.split(jax.random.key(0), 4)
    layers = [
        {"lora_a": jax.random.normal(a, (4, 2)), "lora_b": jax.random.normal(b, (2, 3))}
        for a, b in (keys[:2], keys[2:])
    ]
    grads = jax.tree.map(jnp.cos, layers)
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    options = {"learning_rate": 0.1, "alpha": 0.5}
    alone = method(optax.sgd(0.1), groups=samax.lora_groups, **options)
    finder = functools.partial(samax.lora_groups, stacked=True)
    together = method(optax.sgd(0.1), groups=finder, **options)
    expected, _ = alone.update(grads, alone.init(layers), layers)
    updates, _ = together.update(stack(grads), together.init(stack(layers)), stack(layers))
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-5), updates, stack(expected))
    measured = samax.norm_deviation(stack(layers), finder)["lora_*"]
    each = samax.norm_deviation(layers, samax.lora_groups).values()
    np.testing.assert_allclose(measured, list(each), rtol=1e-5)


def test_it_composes():
    options = {"learning_rate": 0.05, "alpha": 0.1, "groups": GROUPS}
    das = samax.das(optax.adam(0.05), **options)
    # SAM outside, DAS inside: DAS sees the perturbed gradient.
    tx, params = optax.chain(samax.sam(0.1), das), start()
    grads = jax.grad(loss_fn)(params)
    norm = optax.tree.norm(grads)
    point = jax.tree.map(lambda w, g: w + 0.1 * g / norm, params, grads)
    expected, _ = das.update(jax.grad(loss_fn)(point), das.init(params), params)
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=loss_fn)
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-5), updates, expected)
    # Clipping outside: nBAR sees the clipped gradient, whose norms have the same order.
    nbar = samax.nbar(optax.adamw(0.05), **options)
    tx = optax.chain(optax.clip_by_global_norm(0.1), nbar)
    clipped = jax.tree.map(lambda g: 0.1 * g / norm, grads)
    expected, _ = nbar.update(clipped, nbar.init(params), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-5), updates, expected)
    # Two micro-batches: one scaling, by the mean gradient.
    tx = optax.MultiSteps(das, 2)
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(lambda g: 0.5 * g, grads), state, params)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0.0), updates)
    updates, state = tx.update(jax.tree.map(lambda g: 1.5 * g, grads), state, params)
    expected, _ = das.update(grads, das.init(params), params)
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-5), updates, expected)


def test_frozen_leaves_on_either_side():
    params = start() | {"frozen": jnp.ones(2)}
    kinds = {"x": "on", "y": "on", "frozen": "off"}
    options = {"learning_rate": 0.1, "alpha": 0.1}
    groups = GROUPS | {"frozen": None}

    def partition(base):
        return optax.multi_transform({"on": base, "off": optax.set_to_zero()}, kinds)

    around = samax.obar(partition(optax.sgd(0.1)), groups=groups, **options)
    within = partition(samax.obar(optax.sgd(0.1), groups=groups, **options))
    results = [tx.update(params, tx.init(params), params)[0] for tx in (around, within)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    np.testing.assert_array_equal(results[0]["frozen"], 0.0)


def test_sharded_factors_have_global_norms():
    devices = np.array(jax.devices())
    assert len(devices) == 4
    mesh = jax.sharding.Mesh(devices, "model")
    keys = jax.random.split(jax.random.key(0), 4)
    rank, size = 2, 4 * len(devices)
    params = {
        "lora_a": jax.random.normal(keys[0], (size, rank)),
        "lora_b": jax.random.normal(keys[1], (rank, size)),
    }
    grads = {
        "lora_a": jax.random.normal(keys[2], (size, rank)),
        "lora_b": jax.random.normal(keys[3], (rank, size)),
    }
    shardings = {
        "lora_a": jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model")),
        "lora_b": jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model")),
    }
    for method in (samax.nbar, samax.obar, samax.das):
        tx = method(optax.adam(0.1), learning_rate=0.1, alpha=0.5, groups=samax.lora_groups)
        expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        placed, placed_grads = jax.device_put((params, grads), (shardings, shardings))
        updates, _ = jax.jit(tx.update)(placed_grads, tx.init(placed), placed)
        for name in params:
            np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5)
            assert updates[name].sharding.is_equivalent_to(shardings[name], 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("method", [samax.nbar, samax.obar, samax.das])
def test_low_precision_factors_and_loss_scaling(method, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), start())
    grads = jax.grad(loss_fn)(start())
    tx = method(optax.sgd(0.0), learning_rate=1.0, alpha=0.1, groups=GROUPS, track=True)
    state = tx.init(params)
    rates = []
    for scale in (1.0, 2.0**10):
        scaled = optax.tree.cast(optax.tree.scale(scale, grads), dtype)
        _, after = tx.update(scaled, state, params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        rates.append(after.rates["xy"])
    if method is not samax.das:  # whose rate is proportional to the gradient's norm
        np.testing.assert_array_equal(*rates)
    assert np.all(np.isfinite(rates[0]))


def test_schedules_and_the_step_count():
    alpha = optax.linear_schedule(1.0, 0.0, 2)
    rate = optax.linear_schedule(0.1, 0.2, 2)
    tx = samax.obar(optax.sgd(0.0), learning_rate=rate, alpha=alpha, groups=GROUPS, track=True)
    state, params, seen = tx.init(start()), start(), []
    for _ in range(3):
        _, state = jax.jit(tx.update)(params, state, params)
        seen.append(float(np.abs(state.rates["xy"][0])))
    np.testing.assert_allclose(seen, [0.1, 0.075, 0.0], rtol=1e-6)
    assert state.count == 3


def test_measures_run_under_jit_and_refuse_what_they_cannot_measure():
    values = jax.jit(lambda p: samax.balancedness(p, GROUPS))(start())
    assert values["xy"] == pytest.approx(0.5 * (0.14 - 9 * 0.14))
    with pytest.raises(ValueError, match="has 3; use norm_deviation"):
        samax.balancedness(
            {"a": jnp.ones(1), "b": jnp.ones(1), "c": jnp.ones(1)}, {"a": 0, "b": 0, "c": 0}
        )
    with pytest.raises(ValueError, match="grads must be the same pytree"):
        samax.gradient_covariance(start(), {"x": jnp.ones(3)}, GROUPS)


def test_errors():
    with pytest.raises(ValueError, match="alpha"):
        samax.nbar(optax.sgd(0.1), learning_rate=0.1, alpha=-1.0, groups=GROUPS)
    with pytest.raises(ValueError, match="learning_rate"):
        samax.das(optax.sgd(0.1), learning_rate=-0.1, alpha=1.0, groups=GROUPS)
    with pytest.raises(TypeError, match="rule must be a function"):
        samax.balanced(optax.sgd(0.1), 1.0, learning_rate=0.1, alpha=1.0, groups=GROUPS)
    tx = samax.obar(optax.sgd(0.1), learning_rate=0.1, alpha=1.0, groups=GROUPS)
    state = tx.init(start())
    with pytest.raises(ValueError, match="balanced needs params"):
        tx.update(start(), state)
    with pytest.raises(TypeError, match="group 'xy' has a leaf of dtype int32"):
        tx.init({"x": jnp.ones(2, jnp.int32), "y": jnp.ones(2)})
