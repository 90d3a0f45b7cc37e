"""The universal class: the direction is the gradient of L + lambda rho^2 R, in constant memory."""

import dataclasses
import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax
from tests.marks import slow_unless

assert_trees_close = functools.partial(chex.assert_trees_all_close, rtol=1e-6)

# Random signs compile faster than normal draws, and most tests do not care.
signs = functools.partial(samax.Sampling, samax.rademacher)
normal = functools.partial(samax.Sampling, samax.gaussian)
INSTANCES = {
    "trace": samax.trace_sam(0.1, sampling=signs(2)),
    "frob": samax.frob_sam(0.1, lam=0.1, sampling=signs(2)),
    "det": samax.det_sam(0.5, sampling=signs(2)),
    "log det": samax.det_sam(0.5, log=True, sampling=signs(2)),
}


def loss_fn(params):
    quadratic = 0.5 * jnp.sum(jnp.array([1.0, 3.0, 10.0]) * params["w"] ** 2)
    return quadratic + jnp.cosh(params["b"]) + jnp.sin(params["w"][0] * params["b"])


def start(dtype=None):
    return {"w": jnp.array([1.0, -2.0, 0.5], dtype), "b": jnp.array(0.3, dtype)}


def step(tx, params, state, loss=loss_fn, **extra):
    value, grads = jax.value_and_grad(loss)(params)
    return tx.update(grads, state, params, **({"value": value, "value_fn": loss} | extra))


def run_once(tx, params, state=None, **options):
    """The update and the new state.

    Without jit, unless a test is about it: its operations are compiled once for all tests, a
    program once for each.
    """
    return step(tx, params, tx.init(params) if state is None else state, **options)


def run_recorded(method, params, **options):
    """The update of `method(distribution)`, of up to 8 samples, and what it was made from."""
    seen = []

    def sample(key, params):
        seen.append(samax.gaussian(key, params))
        return seen[-1]

    updates, _ = run_once(method(sample), params, **options)
    return updates, seen


def random_psi(components):
    mix = jax.random.normal(jax.random.key(5), (2, components))
    return lambda t: jnp.tanh(0.1 * mix[0] * t) + 0.05 * mix[1] * t**2


def random_phi(mean):
    weights = jnp.arange(1.0, 1.0 + mean.size)
    return jnp.sum(jnp.sin(weights * mean)) + jnp.prod(1 + mean) ** 2


@pytest.mark.usefixtures("x64")
class TestDirection:
    def expected(self, phi, log_mean, psi, samples, rho, lam):
        """The gradient of the objective by automatic differentiation, the samples held fixed."""

        def objective(params):
            move = lambda v: jax.tree.map(lambda w, x: w + rho * x, params, v)
            gaps = jnp.stack([(loss_fn(move(v)) - loss_fn(params)) / rho**2 for v in samples])
            mean = jax.vmap(psi)(gaps)
            mean = jnp.log(jnp.exp(mean).mean(axis=0)) if log_mean else mean.mean(axis=0)
            return loss_fn(params) + lam * rho**2 * phi(mean)

        return jax.grad(objective)(start(jnp.float64))

    @pytest.mark.parametrize("antithetic", [False, True])
    @pytest.mark.parametrize("log_mean", [False, True])
    @pytest.mark.parametrize("components", slow_unless([3], [1, 2, 3]))
    def test_it_is_the_gradient_of_the_objective(self, components, log_mean, antithetic):
        psi, rho, lam = random_psi(components), 0.3, 0.7
        method = lambda distribution: samax.universal_sam(
            random_phi,
            samax.LogMeanExp(psi) if log_mean else psi,
            samax.Sampling(distribution, 4, antithetic=antithetic),
            rho=rho,
            lam=lam,
        )
        updates, samples = run_recorded(method, start(jnp.float64))
        if antithetic:
            samples[1::2] = [jax.tree.map(jnp.negative, v) for v in samples[1::2]]
        expected = self.expected(random_phi, log_mean, psi, samples, rho, lam)
        assert_trees_close(updates, expected, rtol=1e-9)
        assert not np.allclose(expected["w"], jax.grad(loss_fn)(start(jnp.float64))["w"], rtol=1e-3)

    def test_scalars_tuples_and_arrays_are_psis(self):
        options = {"sampling": normal(4), "rho": 0.3}
        phi = lambda t: t[1] - t[0] ** 2
        as_tuple = samax.universal_sam(phi, lambda t: (t, t**2), **options)
        as_array = samax.universal_sam(phi, lambda t: jnp.stack([t, t**2]), **options)
        assert_trees_close(run_once(as_tuple, start())[0], run_once(as_array, start())[0])
        named = samax.universal_sam(jnp.exp, jnp.sin, **options)
        one = samax.universal_sam(
            lambda t: jnp.exp(t[0]), lambda t: jnp.sin(t).reshape(1), **options
        )
        assert_trees_close(run_once(named, start())[0], run_once(one, start())[0])

    @pytest.mark.parametrize("unbiased", [True, False])
    def test_the_frobenius_direction_is_the_covariance_of_losses_and_gradients(self, unbiased):
        params, rho, lam = start(jnp.float64), 0.2, 0.3
        method = lambda distribution: samax.frob_sam(
            rho, lam=lam, unbiased=unbiased, sampling=samax.Sampling(distribution, 5)
        )
        updates, samples = run_recorded(method, params)
        evaluate = jax.value_and_grad(loss_fn)
        points = [jax.tree.map(lambda w, x: w + rho * x, params, v) for v in samples]
        losses, grads = zip(*map(evaluate, points), strict=True)
        losses, grads = np.array(losses), np.stack([g["w"] for g in grads])
        covariance = (losses - losses.mean()) @ (grads - grads.mean(axis=0)) / (5 - unbiased)
        expected = jax.grad(loss_fn)(params)["w"] + lam / rho**2 * covariance
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-9)

    def test_the_determinants_forms_are_the_papers(self):
        """exp(-2 log mean) of the recipe against 1 / t^2 as it is written."""
        options = {"rho": 0.5, "sampling": samax.Sampling(samax.cube(1.0), 4)}
        plain = samax.universal_sam(lambda t: 1 / t**2, lambda t: jnp.exp(-t / 2), **options)
        updates, _ = run_once(samax.det_sam(**options), start())
        assert_trees_close(updates, run_once(plain, start())[0], rtol=1e-10)
        plain = samax.universal_sam(lambda t: -2 * jnp.log(t), lambda t: jnp.exp(-t / 2), **options)
        updates, _ = run_once(samax.det_sam(log=True, **options), start())
        assert_trees_close(updates, run_once(plain, start())[0], rtol=1e-10)


def streamed(antithetic, **options):
    sampling = samax.Sampling(samax.cube(2.0), 12, antithetic=antithetic, **options)
    return samax.frob_sam(0.3, lam=0.2, sampling=sampling, track=True)


@functools.cache
def looped(antithetic):
    """What one sample after the other gives."""
    updates, state = run_once(streamed(antithetic), start())
    return updates, state.metrics


class TestStreaming:
    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({"unroll": 5}, marks=pytest.mark.slow),
            pytest.param({"unroll": 12}, marks=pytest.mark.slow),
            {"batch_size": 4},
            pytest.param({"batch_size": 4, "unroll": 1}, marks=pytest.mark.slow),
            pytest.param({"batch_size": 12}, marks=pytest.mark.slow),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("antithetic", [False, True])
    def test_how_the_samples_are_evaluated_does_not_matter(self, options, antithetic):
        expected, metrics = looped(antithetic)
        updates, state = run_once(streamed(antithetic, **options), start())
        assert_trees_close(updates, expected, rtol=2e-5)
        assert_trees_close(state.metrics, metrics, rtol=2e-5)

    @pytest.mark.optimized
    @pytest.mark.slow
    @pytest.mark.parametrize("method", [samax.trace_sam, samax.frob_sam])
    def test_memory_does_not_grow_with_the_samples(self, method):
        params = jax.random.normal(jax.random.key(0), (2, 32, 32)) / 6
        data = jax.random.normal(jax.random.key(1), (4096, 32))

        def loss(params):
            hidden = data
            for weights in params:
                hidden = jnp.tanh(hidden @ weights)
            return jnp.mean(hidden**2)

        def temporary_bytes(num_samples, **options):
            tx = method(0.1, sampling=signs(num_samples, **options))
            program = jax.jit(lambda p, s: step(tx, p, s, loss=loss))
            compiled = program.lower(params, tx.init(params)).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        one = temporary_bytes(2 if method is samax.frob_sam else 1)
        assert temporary_bytes(64) == pytest.approx(one, rel=0.02)
        # Without a loop too, where nothing but `_after` keeps the samples apart.
        assert temporary_bytes(8) == pytest.approx(one, rel=0.02)
        assert temporary_bytes(8, batch_size=4) > 2 * one

    def test_up_to_eight_evaluations_are_unrolled(self):
        def program(**options):
            tx = samax.trace_sam(0.1, sampling=normal(**options))
            return str(jax.make_jaxpr(lambda p: step(tx, p, tx.init(p)))(start()))

        assert "scan[" not in program(num_samples=8)
        assert "scan[" not in program(num_samples=64, batch_size=8)
        assert "scan[" not in program(num_samples=12, unroll=12)
        assert "scan[" in program(num_samples=9)
        assert "scan[" in program(num_samples=8, unroll=4)
        assert len(program(num_samples=100)) < 1.02 * len(program(num_samples=9))

    def test_it_costs_n_and_one_gradients(self):
        calls = []

        def value_and_grad_fn(params):
            calls.append(None)
            return jax.value_and_grad(loss_fn)(params)

        tx = samax.trace_sam(0.1, sampling=normal(5))
        updates, _ = run_once(tx, start(), value_fn=None, value_and_grad_fn=value_and_grad_fn)
        assert len(calls) == 5
        assert_trees_close(updates, run_once(tx, start())[0])
        # Without the clean loss it is evaluated.
        without, _ = run_once(tx, start(), value=None)
        assert_trees_close(updates, without)


class TestKeys:
    @pytest.mark.parametrize("name", INSTANCES)
    def test_a_key_gives_one_series_of_different_samples(self, name):
        tx, params = INSTANCES[name], start()
        first, state = run_once(tx, params)
        again, _ = run_once(tx, params)
        assert_trees_close(first, again, rtol=0)
        second, _ = run_once(tx, params, state)
        assert np.any(second["w"] != first["w"])

    def test_seeds_raw_and_typed_keys_are_one(self):
        method = lambda key: samax.trace_sam(0.1, sampling=normal(key=key))
        keys = [7, np.int64(7), jax.random.PRNGKey(7), jax.random.key(7)]
        results = [run_once(method(key), start()) for key in keys]
        for updates, _ in results:
            assert_trees_close(updates, results[0][0], rtol=0)
        other, _ = run_once(method(8), start())
        assert np.any(other["w"] != results[0][0]["w"])
        kinds = [state.rng_key.dtype for _, state in results]
        assert kinds[:3] == [jnp.uint32] * 3
        assert jnp.issubdtype(kinds[3], jax.dtypes.prng_key)

    def test_typed_keys_of_another_implementation(self):
        for key in (jax.random.key(0, impl="rbg"), jax.random.key(0, impl="unsafe_rbg")):
            tx = samax.trace_sam(0.1, sampling=normal(key=key))
            _, state = run_once(tx, start())
            assert jax.random.key_impl(state.rng_key) == jax.random.key_impl(key)

    def test_the_default_state_survives_arithmetic_on_its_leaves(self):
        """Why raw is the default: what EMAs and samplers of states do with every leaf."""
        half = lambda state: jax.tree.map(lambda leaf: leaf * 1, state)
        half(samax.trace_sam(0.1).init(start()))
        typed = samax.trace_sam(0.1, sampling=normal(key=jax.random.key(0)))
        with pytest.raises(TypeError):
            half(typed.init(start()))

    @pytest.mark.parametrize("key", ["0", 0.5, True, None, np.zeros(2)], ids=str)
    def test_what_is_no_key(self, key):
        with pytest.raises(TypeError, match="key must be an integer seed or a key"):
            normal(key=key)
        with pytest.raises(TypeError, match="array of keys of shape"):
            normal(key=jax.random.split(jax.random.key(0), 3))


class TestTransforms:
    @pytest.mark.parametrize(
        ("method", "key"),
        [(samax.trace_sam, 0), (samax.frob_sam, "typed"), (samax.det_sam, 0)],
    )
    def test_jit_and_scan_with_a_constant_state(self, method, key):
        key = jax.random.key(0) if key == "typed" else key
        rho = optax.linear_schedule(0.1, 0.05, 10)
        count = 2 if method is samax.frob_sam else 1
        universal = method(rho, lam=1e-2, sampling=signs(count, key=key), track=True)
        tx, params = optax.chain(universal, optax.sgd(0.01)), start()

        def train_step(carry, _):
            params, state = carry
            updates, state = step(tx, params, state)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, tx.init(params))
        looped, _ = jax.jit(lambda c: jax.lax.scan(train_step, c, length=3))(carry)
        for _ in range(3):
            before = jax.tree.map(lambda x: (x.shape, x.dtype), carry)
            carry, _ = train_step(carry, None)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), carry) == before
        assert_trees_close(looped[0], carry[0], rtol=1e-5)
        assert loss_fn(carry[0]) < loss_fn(params)

    def test_vmap_over_seeds_radii_and_weights(self):
        @jax.jit
        def updates(key, rho, lam):
            tx = samax.frob_sam(rho, lam=lam, sampling=signs(2, key=key))
            return step(tx, start(), tx.init(start()))[0]

        seeds, rho, lam = jnp.arange(3), jnp.array([0.1, 0.2, 0.3]), jnp.array([0.1, 0.0, 1.0])
        keys = jax.vmap(jax.random.key)(seeds)
        together = jax.vmap(updates)(keys, rho, lam)
        for i in range(3):
            alone = updates(keys[i], rho[i], lam[i])
            assert_trees_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-5)

    def test_injected_hyperparameters(self):
        tx = optax.inject_hyperparams(samax.frob_sam)(rho=0.1, lam=0.2)
        updates, _ = run_once(tx, start())
        assert_trees_close(updates, run_once(samax.frob_sam(0.1, lam=0.2), start())[0])

    @pytest.mark.parametrize("method", [samax.trace_sam, samax.frob_sam, samax.det_sam])
    def test_injected_hyperparameters_under_jit(self, method):
        """No `static_args`: what is no number is no schedule either."""
        options = {"lam": 0.2, "sampling": signs(2)}
        tx = optax.inject_hyperparams(method)(rho=0.1, track=True, **options)
        update = jax.jit(functools.partial(step, tx))
        state = tx.init(start())
        for rho in (0.1, 0.3):
            state.hyperparams["rho"] = jnp.asarray(rho)
            updates, after = update(start(), state)
            expected, _ = run_once(method(rho, **options), start())
            assert_trees_close(updates, expected, rtol=1e-5)
            assert np.isfinite(optax.tree.get(after, "sharpness"))

    def test_injected_functions_are_named_in_static_args(self):
        identity = lambda t: t
        inject = functools.partial(optax.inject_hyperparams, samax.universal_sam)
        tx = inject()(identity, identity, signs(2), rho=0.1)
        with pytest.raises(TypeError, match=r"phi must be .*inject_hyperparams.*in static_args"):
            tx.init(start())
        tx = inject(static_args="phi")(identity, identity, signs(2), rho=0.1)
        with pytest.raises(TypeError, match=r"psi must be .*in static_args"):
            tx.init(start())
        tx = inject(static_args=("phi", "psi"))(identity, identity, signs(2), rho=0.1)
        expected, _ = run_once(samax.trace_sam(0.1, sampling=signs(2)), start())
        assert_trees_close(run_once(tx, start())[0], expected)


class TestNumerics:
    @pytest.mark.parametrize("name", INSTANCES)
    def test_low_precision(self, name):
        dtype = jnp.bfloat16
        loss = lambda p: loss_fn(jax.tree.map(lambda x: x.astype(jnp.float32), p))
        tx, params = INSTANCES[name], start(dtype)
        updates, state = run_once(tx, params, loss=loss)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
        single = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        expected, _ = run_once(tx, single)
        # The perturbed points are rounded, which a small radius does not forgive.
        scale = float(optax.tree.norm(expected))
        assert_trees_close(
            jax.tree.map(lambda x: x.astype(jnp.float32), updates),
            expected,
            rtol=0.0,
            atol=0.1 * scale,
        )

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("name", INSTANCES)
    def test_float64(self, name):
        updates, state = run_once(INSTANCES[name], start(jnp.float64))
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float64)}
        assert optax.tree.get(state, "count").dtype == jnp.int32

    @pytest.mark.parametrize("name", INSTANCES)
    def test_a_zero_gradient(self, name):
        """At a stationary point the regularizer alone moves, and nothing is NaN."""
        params, flat = {"w": jnp.zeros(3), "b": jnp.zeros(())}, lambda p: 0.0 * p["w"].sum()
        for loss in (loss_fn, flat):
            updates, _ = run_once(INSTANCES[name], params, loss=loss)
            assert np.all(np.isfinite(np.append(updates["w"], updates["b"])))
        np.testing.assert_array_equal(updates["w"], 0.0)

    @pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
    @pytest.mark.parametrize("method", [samax.trace_sam, samax.frob_sam, samax.det_sam])
    def test_zero_rho_and_zero_lambda_are_the_base_bit_for_bit(self, method, transform):
        grads = jax.grad(loss_fn)(start())
        for options in ({"rho": 0.0}, {"rho": 0.1, "lam": 0.0}):
            tx = method(**options)
            state = tx.init(start())
            update = transform(functools.partial(tx.update, value_fn=loss_fn))
            updates, _ = update(grads, state, start())
            assert_trees_close(updates, grads, rtol=0)

    @pytest.mark.parametrize("size", [1e4, -1e4])
    def test_the_log_form_does_not_overflow(self, size):
        """D of +-1e4: exp(-D / 2) is inf or 0 in float32, and in float64."""
        loss = lambda p: size * jnp.sum(p**2) / 2 + jnp.sum(p)
        params, options = jnp.zeros(3), {"rho": 1.0, "lam": 0.1, "sampling": signs(16)}
        log, _ = run_once(samax.det_sam(log=True, **options), params, loss=loss)
        assert np.all(np.isfinite(log))
        assert np.all(np.abs(log) < 1e4)
        naive = samax.universal_sam(lambda t: -2 * jnp.log(t), lambda t: jnp.exp(-t / 2), **options)
        assert not np.all(np.isfinite(run_once(naive, params, loss=loss)[0]))

    def test_the_log_form_weighs_by_a_softmax(self):
        """Sum_i softmax(-D / 2)_i (g_i - g), however large D is, in either order of the samples."""
        loss = lambda p: jnp.sum(jnp.array([1e3, -2e3]) * p**2)
        method = lambda distribution: samax.det_sam(
            1.0, lam=1.0, log=True, sampling=samax.Sampling(distribution, 6)
        )
        updates, samples = run_recorded(method, jnp.zeros(2), loss=loss)
        gaps = jnp.stack([loss(v) for v in samples])
        grads = jnp.stack([jax.grad(loss)(v) for v in samples])
        np.testing.assert_allclose(updates, jax.nn.softmax(-gaps / 2) @ grads, rtol=1e-4)

    def test_tracked_scalars(self):
        params, rho = start(), 0.2
        sampling = samax.Sampling(samax.sphere, num_samples=8, batch_size=4)
        tx = samax.trace_sam(rho, sampling=sampling, track=True)
        updates, state = run_once(tx, params)
        get = lambda name: float(optax.tree.get(state, name))
        assert get("clean_loss") == pytest.approx(float(loss_fn(params)))
        assert get("loss_gap") == pytest.approx(get("perturbed_loss") - get("clean_loss"), rel=1e-3)
        assert get("sharpness") == pytest.approx(get("loss_gap") / rho**2, rel=1e-3)
        assert get("perturbation_norm") == pytest.approx(rho, rel=1e-5)
        grads = jax.grad(loss_fn)(params)
        assert get("clean_grad_norm") == pytest.approx(float(optax.tree.norm(grads)))
        added = optax.tree.norm(optax.tree.sub(updates, grads))
        assert get("sharpness_grad_norm") == pytest.approx(float(added), rel=1e-3)


def test_it_composes():
    """SAM's own chain: clipping, decay, momentum; and beside what else takes a value."""
    params = start()
    for tx in (
        optax.chain(
            samax.frob_sam(sampling=signs(2)), optax.clip_by_global_norm(1.0), optax.adamw(0.05)
        ),
        optax.chain(
            samax.trace_sam(sampling=signs()), optax.sgd(0.05), optax.contrib.reduce_on_plateau()
        ),
        optax.apply_if_finite(optax.chain(samax.det_sam(), optax.sgd(0.05)), 2),
    ):
        update = jax.jit(functools.partial(step, tx))
        state, point = tx.init(params), params
        for _ in range(10):
            updates, state = update(point, state)
            point = optax.apply_updates(point, updates)
        assert loss_fn(point) < 0.7 * loss_fn(params)


def make(**options):
    fields = {field.name for field in dataclasses.fields(samax.Sampling)} & options.keys()
    sampling = {"distribution": samax.gaussian} | {name: options.pop(name) for name in fields}
    arguments = {"phi": jnp.sin, "psi": jnp.cos, "rho": 0.1}
    return samax.universal_sam(sampling=samax.Sampling(**sampling), **(arguments | options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, "rho must be finite"),
        ({"lam": -1.0}, ValueError, "lam must be finite"),
        ({"rho": lambda step: 0.1 - step}, ValueError, "The schedule rho must stay finite"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_samples": 2.0}, TypeError, "num_samples must be a Python int"),
        ({"num_samples": 6, "batch_size": 4}, ValueError, "must divide num_samples, 6, got 4"),
        ({"num_samples": 3, "antithetic": True}, ValueError, "must be even if antithetic, got 3"),
        ({"unroll": 0}, ValueError, "unroll must be at least 1"),
        ({"phi": 1.0}, TypeError, "phi must be a function"),
        ({"psi": samax.LogMeanExp(2.0)}, TypeError, "psi must be a function"),
        ({"distribution": "gaussian"}, TypeError, "distribution must be a function"),
    ],
)
def test_arguments(options, error, message):
    with pytest.raises(error, match=message):
        make(**options).init(start())
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        samax.frob_sam(sampling=normal(1))
    for method in (samax.trace_sam, samax.frob_sam, samax.det_sam):
        with pytest.raises(TypeError, match=r"sampling must be a samax.Sampling, got <function"):
            method(sampling=samax.gaussian)


def test_the_defaults_of_the_methods_are_the_authors():
    cube = samax.Sampling(samax.cube(0.01))
    for method, sampling in (
        (samax.trace_sam, normal()),
        (samax.frob_sam, normal(2)),
        (samax.det_sam, cube),
    ):
        expected, _ = run_once(method(sampling=sampling), start())
        assert_trees_close(run_once(method(), start())[0], expected, rtol=0)


def test_a_sampling_is_built_without_jax():
    """In a fresh process: neither arrays nor devices are there afterwards."""
    program = """if True:
        import numpy as np, samax
        from jax._src import xla_bridge
        samax.Sampling(samax.cube(0.1), 8, batch_size=4, antithetic=True, key=np.int64(3))
        samax.Sampling(samax.gaussian, key=np.zeros(2, np.uint32))
        samax.trace_sam(0.1), samax.frob_sam(0.1), samax.det_sam(0.1)
        assert not xla_bridge.backends_are_initialized()
    """
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("options", "extra", "error", "message"),
    [
        ({}, {"value_fn": None}, ValueError, "exactly one of value_fn"),
        ({}, {"value_fn": None, "grad_fn": jax.grad(loss_fn)}, ValueError, "grad_fn returns none"),
        ({}, {"value_and_grad_fn": jax.value_and_grad(loss_fn)}, ValueError, "exactly one"),
        ({}, {"value": jnp.zeros(2)}, TypeError, "value must be a scalar loss"),
        ({}, {"value_fn": lambda p: (p["b"], 1)}, TypeError, "must be a scalar loss"),
        ({"phi": lambda t: t * jnp.ones(2)}, {}, TypeError, r"phi\(mean\) must be a scalar"),
        (
            {"distribution": lambda key, p: p["w"]},
            {},
            ValueError,
            "the distribution's sample must be",
        ),
    ],
)
def test_evaluations(options, extra, error, message):
    with pytest.raises(error, match=message):
        step(make(**options), start(), make().init(start()), **extra)


def test_missing_parameters():
    tx = make()
    with pytest.raises(ValueError, match="samax needs params"):
        tx.update(start(), tx.init(start()), value_fn=loss_fn)
    with pytest.raises(TypeError, match="params has a leaf of dtype int32"):
        tx.init({"w": jnp.ones(2, jnp.int32)})
