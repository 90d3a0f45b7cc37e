"""Spectra of curvature operators against dense Hessians, and against each other at 1e5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from samax import flatness

# Each size of a vector and each number of Lanczos steps is compiled anew: the small problems share
# them.
SIZE, FEW = 28, 6


def network(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["first"]["w"] + params["first"]["b"])
    return hidden @ params["second"]


def cross_entropy(logits, batch):
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=1)
    return -jnp.mean(chosen)


def loss_fn(params, batch):
    return cross_entropy(network(params, batch), batch)


def problem(inputs=3, width=4, classes=3, sizes=(7, 7, 2)):
    """Parameters, and batches of different sizes."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "first": {
            "w": jax.random.normal(keys[0], (inputs, width)) / inputs**0.5,
            "b": jnp.zeros(width),
        },
        "second": 2 * jax.random.normal(keys[1], (width, classes)) / width**0.5,
    }
    x = np.asarray(jax.random.normal(keys[2], (sum(sizes), inputs)))
    y = np.asarray(jax.random.randint(keys[3], (sum(sizes),), 0, classes))
    ends = np.cumsum(sizes)[:-1]
    parts = zip(np.split(x, ends), np.split(y, ends), strict=True)
    return params, [{"x": a, "y": b} for a, b in parts]


def whole(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def dense(function, params):
    vector, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda v: function(unravel(v))))(vector))


@pytest.fixture(scope="module")
def small():
    """Parameters, the operator of the Hessian, and the dense one."""
    params, batches = problem()
    matrix = dense(lambda p: loss_fn(p, whole(batches)), params)
    assert len(matrix) == SIZE
    return params, flatness.hessian_operator(loss_fn, params, batches), matrix


def flat_product(operator, params):
    unravel = ravel_pytree(params)[1]
    return lambda v: ravel_pytree(operator(unravel(v)))[0]


class TestOperators:
    def test_the_hessian_over_batches_is_that_of_all_the_data(self, small):
        params, operator, matrix = small
        product = flat_product(operator, params)
        for seed in range(3):
            v = np.random.default_rng(seed).normal(size=len(matrix)).astype(np.float32)
            np.testing.assert_allclose(product(v), matrix @ v, rtol=1e-3, atol=1e-4)

    def test_gauss_newton(self, small):
        params, _, matrix = small
        batches = problem()[1]
        data = whole(batches)
        operator = flatness.gauss_newton_operator(network, cross_entropy, params, batches)
        product = flat_product(operator, params)
        vector, unravel = ravel_pytree(params)
        model = lambda v: jnp.ravel(network(unravel(v), data))
        jacobian = np.asarray(jax.jacobian(model)(vector))
        outer = dense(lambda y: cross_entropy(y.reshape(-1, 3), data), model(vector))
        expected = jacobian.T @ outer @ jacobian
        for seed in range(3):
            v = np.random.default_rng(seed).normal(size=len(matrix)).astype(np.float32)
            np.testing.assert_allclose(product(v), expected @ v, rtol=1e-3, atol=1e-4)
            assert v @ np.asarray(product(v)) > 0
        assert np.linalg.eigvalsh(matrix).min() < -1e-3

    def test_the_adaptive_form(self, small):
        params, operator, matrix = small
        product = flat_product(flatness.scaled_operator(operator, params, t0=0.1), params)
        sizes = np.abs(ravel_pytree(params)[0]) + 0.1
        v = np.random.default_rng(0).normal(size=len(matrix)).astype(np.float32)
        expected = sizes * (matrix @ (sizes * v))
        np.testing.assert_allclose(product(v), expected, rtol=1e-3, atol=1e-4)

    def test_only_one_batch_is_compiled_and_held(self):
        params, batches = problem()
        traces = []

        def counted(params, batch):
            traces.append(None)
            return loss_fn(params, batch)

        operator = flatness.hessian_operator(counted, params, batches[:2])
        flatness.top_eigenpairs(operator, params, num_products=FEW)
        assert len(traces) == 1


class TestSmall:
    def test_top_eigenpairs(self, small):
        params, operator, matrix = small
        values, vectors = np.linalg.eigh(matrix)
        pairs = flatness.top_eigenpairs(operator, params, 3, num_products=SIZE)
        np.testing.assert_allclose(pairs.values, values[::-1][:3], rtol=1e-4)
        assert np.all(pairs.residuals < 1e-3)
        for i in range(3):
            found = ravel_pytree(jax.tree.map(lambda x, i=i: x[i], pairs.vectors))[0]
            assert abs(found @ vectors[:, -1 - i]) == pytest.approx(1.0, abs=1e-3)
        smallest = flatness.top_eigenpairs(
            lambda v: jax.tree.map(jnp.negative, operator(v)), params, num_products=SIZE
        )
        assert -smallest.values[0] == pytest.approx(values[0], rel=1e-2)

    def test_residuals_say_how_good_few_products_are(self, small):
        params, operator, matrix = small
        pairs = flatness.top_eigenpairs(operator, params, 2, num_products=FEW)
        for i in range(2):
            v = np.asarray(ravel_pytree(jax.tree.map(lambda x, i=i: x[i], pairs.vectors))[0])
            residual = np.linalg.norm(matrix @ v - pairs.values[i] * v)
            assert pairs.residuals[i] == pytest.approx(residual, rel=1e-2, abs=1e-5)

    @pytest.mark.parametrize("name", ["trace", "frobenius_norm", "log_determinant"])
    def test_estimates(self, small, name):
        params, operator, matrix = small
        values = np.linalg.eigvalsh(matrix)
        options, expected = {
            "trace": ({}, values.sum()),
            "frobenius_norm": ({}, np.sqrt(np.sum(values**2))),
            "log_determinant": ({"shift": 5.0, "num_products": FEW}, np.log(values + 5).sum()),
        }[name]
        result = getattr(flatness, name)(operator, params, num_samples=30, **options)
        assert abs(result.value - expected) < 4 * result.standard_error
        assert 0 < result.standard_error < 0.3 * abs(expected)

    def test_the_standard_error_is_that_of_repeated_estimates(self):
        matrix = np.random.default_rng(0).normal(size=(SIZE, SIZE)).astype(np.float32)
        matrix = matrix + matrix.T
        results = [
            flatness.trace(lambda v: matrix @ v, jnp.zeros(SIZE), num_samples=20, key=seed)
            for seed in range(40)
        ]
        spread = np.std([result.value for result in results])
        claimed = np.mean([result.standard_error for result in results])
        assert claimed == pytest.approx(spread, rel=0.35)

    def test_spectral_density(self, small):
        """Of a diagonal matrix: random signs then weigh all eigenvalues alike, without variance."""
        params, _, matrix = small
        values = np.linalg.eigvalsh(matrix)
        diagonal = ravel_pytree(params)[1](jnp.asarray(values))
        operator = lambda v: jax.tree.map(jnp.multiply, diagonal, v)
        width = 0.1
        found = flatness.spectral_density(
            operator, params, num_samples=2, num_products=SIZE, width=width
        )
        assert jnp.trapezoid(found.density, found.grid) == pytest.approx(1.0, abs=0.01)
        assert jnp.sum(found.weights) == pytest.approx(1.0, abs=1e-4)
        bells = np.exp(-0.5 * ((np.asarray(found.grid)[:, None] - values) / width) ** 2)
        expected = bells.mean(axis=1) / (width * np.sqrt(2 * np.pi))
        assert np.trapezoid(np.abs(found.density - expected), found.grid) < 1e-3

    def test_it_is_a_function_of_the_key_and_tells_its_progress(self, small):
        params, operator, _ = small
        told = []
        run = lambda key: flatness.log_determinant(
            operator,
            params,
            5.0,
            num_samples=2,
            num_products=FEW,
            key=key,
            progress=lambda *done: told.append(done),
        )
        assert run(0) == run(jax.random.key(0))
        assert run(0).value != run(1).value
        assert told[: 2 * FEW] == [(i, 2 * FEW) for i in range(1, 2 * FEW + 1)]

    def test_operators_that_lanczos_exhausts(self):
        """A zero Hessian, the identity, a low rank: NaN in a naive Lanczos."""
        params = {"a": jnp.ones(3), "b": jnp.ones(())}  # 4: the norm of random signs is exact
        for scale in (0.0, 2.0):
            operator = lambda v, scale=scale: jax.tree.map(lambda x: scale * x, v)
            pairs = flatness.top_eigenpairs(operator, params, 1)
            assert pairs.values[0] == pytest.approx(scale)
            assert pairs.residuals[0] == 0
            density = flatness.spectral_density(operator, params, num_samples=2)
            np.testing.assert_allclose(density.nodes, scale)
            assert np.all(np.isfinite(density.density))
            value = flatness.log_determinant(operator, params, 1.0, num_samples=2).value
            assert value == pytest.approx(4 * np.log(1 + scale), rel=1e-5)
        rank_one = lambda v: jnp.ones(SIZE) * jnp.sum(v)
        pairs = flatness.top_eigenpairs(rank_one, jnp.zeros(SIZE), 2)
        np.testing.assert_allclose(pairs.values, [SIZE, 0.0], atol=1e-3)

    def test_what_is_refused(self, small):
        params, operator, _ = small
        with pytest.raises(ValueError, match="shift must exceed"):
            flatness.log_determinant(operator, params, 1e-4, num_samples=1, num_products=SIZE)
        with pytest.raises(ValueError, match="num_products must be at least 3, got 2"):
            flatness.top_eigenpairs(operator, params, 3, num_products=2)
        with pytest.raises(TypeError, match="operator must be a function"):
            flatness.trace(np.eye(3), params)
        with pytest.raises(TypeError, match="params has a leaf of dtype int32"):
            flatness.hessian_operator(loss_fn, {"w": jnp.ones(2, jnp.int32)})


class TestLayerRescaling:
    """(c W1, W2 / c) is the same ReLU network: only the adaptive measures see it so."""

    @pytest.mark.parametrize("adaptive", [pytest.param(True, marks=pytest.mark.slow), False])
    def test_spectra(self, adaptive):
        params, batches = problem(inputs=4)
        model = lambda p, batch: jnp.maximum(batch["x"] @ p["first"]["w"], 0.0) @ p["second"]
        loss = lambda p, batch: cross_entropy(model(p, batch), batch)
        params = {"first": {"w": params["first"]["w"]}, "second": params["second"]}
        rescaled = {"first": {"w": 5 * params["first"]["w"]}, "second": params["second"] / 5}

        def measured(params):
            operator = flatness.hessian_operator(loss, params, batches)
            operator = flatness.scaled_operator(operator, params) if adaptive else operator
            top = flatness.top_eigenpairs(operator, params, num_products=SIZE).values[0]
            trace = flatness.trace(operator, params, num_samples=10).value
            norm = flatness.frobenius_norm(operator, params, num_samples=10).value
            shifted = flatness.log_determinant(
                operator, params, 100.0, num_samples=2, num_products=FEW
            )
            return np.array([top, trace, norm, shifted.value])

        here, there = measured(params), measured(rescaled)
        if adaptive:
            np.testing.assert_allclose(there, here, rtol=5e-3)
        else:
            assert np.all(there[:3] > 1.5 * here[:3])
            assert there[3] > here[3] + 0.01


@pytest.mark.slow
def test_the_measures_agree_at_a_hundred_thousand_parameters():
    params, batches = problem(inputs=100, width=900, classes=10, sizes=(32, 32))
    size = ravel_pytree(params)[0].size
    assert size > 1e5 - 1000
    operator = flatness.hessian_operator(loss_fn, params, batches)
    options = {"num_products": 10}
    pairs = flatness.top_eigenpairs(operator, params, 2, **options)
    vector, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], pairs.vectors))
    product = ravel_pytree(operator(unravel(vector)))[0]
    assert vector @ product == pytest.approx(float(pairs.values[0]), rel=1e-3)
    residual = jnp.linalg.norm(product - pairs.values[0] * vector)
    assert residual < pairs.residuals[0] + 1e-3 * pairs.values[0]

    trace = flatness.trace(operator, params, num_samples=8, key=1)
    norm = flatness.frobenius_norm(operator, params, num_samples=8, key=2)
    density = flatness.spectral_density(operator, params, num_samples=3, key=3, **options)
    moment = lambda power: size * float(jnp.sum(density.weights * density.nodes**power))
    assert moment(1) == pytest.approx(float(trace.value), abs=6 * float(trace.standard_error))
    spread = 2 * float(norm.value * norm.standard_error)
    assert moment(2) == pytest.approx(float(norm.value**2), abs=6 * spread)
    assert density.nodes.max() == pytest.approx(float(pairs.values[0]), rel=0.05)
    # log(1 + h / c) is h / c to first order.
    large = 1e3 * float(pairs.values[0])
    logdet = flatness.log_determinant(operator, params, large, num_samples=3, key=3, **options)
    excess = float(logdet.value) - size * np.log(large)
    assert excess == pytest.approx(moment(1) / large, abs=2.0)
