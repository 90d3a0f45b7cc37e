"""What the universal class recovers, minimizes and leaves invariant: METHODS.md 2 and 5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.optimized, pytest.mark.slow]

HESSIAN = np.array([[2.0, 0.5], [0.5, 1.5]])
EIGENVALUES = np.linalg.eigvalsh(HESSIAN)
COUNT = 400_000


def many(distribution, num_samples=COUNT):
    """How a sharpness is measured closely."""
    return {
        "sampling": samax.Sampling(distribution, num_samples, batch_size=COUNT),
        "track": True,
    }


def quadratic(w, hessian=HESSIAN):
    return 0.5 * w @ jnp.asarray(hessian) @ w


def sharpnesses(tx, loss, points, *arguments):
    """R at each of the points, of a loss with one of the arguments each.

    Without jit, as one batch: its operations are compiled once for all tests.
    """

    def measured(point, *argument):
        value_fn = lambda w: loss(w, *argument)
        value, grads = jax.value_and_grad(value_fn)(point)
        _, state = tx.update(grads, tx.init(point), point, value=value, value_fn=value_fn)
        return optax.tree.get(state, "sharpness")

    return [float(measured(*each)) for each in zip(points, *arguments, strict=True)]


def sharpness(tx):
    """R at the minimum of the quadratic."""
    return sharpnesses(tx, quadratic, [jnp.zeros(2)])[0]


class TestRecovery:
    """Functions of the Hessian by Monte Carlo, within 2 %."""

    @pytest.mark.parametrize("distribution", [samax.gaussian, samax.rademacher, samax.sphere])
    def test_trace(self, distribution):
        share = 2 if distribution is samax.sphere else 1
        value = sharpness(samax.trace_sam(0.1, **many(distribution)))
        assert value == pytest.approx(np.trace(HESSIAN) / 2 / share, rel=0.02)

    @pytest.mark.parametrize("unbiased", [True, False])
    def test_frobenius_norm(self, unbiased):
        value = sharpness(samax.frob_sam(0.1, unbiased=unbiased, **many(samax.gaussian)))
        assert value == pytest.approx(np.sum(HESSIAN**2) / 4, rel=0.02)

    def test_the_bias_of_the_variance(self):
        """Of two samples the biased variance is half the unbiased one."""
        pair = functools.partial(samax.frob_sam, 0.1, track=True)  # n = 2
        ratio = sharpness(pair(unbiased=False)) / sharpness(pair())
        assert ratio == pytest.approx(0.5, rel=1e-6)

    def determinant(self, distribution):
        """The mean of exp(-v^T H v / 2), whose inverse square is a determinant."""
        tx = samax.universal_sam(
            lambda log_mean: jnp.exp(-2 * log_mean),
            samax.LogMeanExp(lambda t: -t),
            rho=0.1,
            **many(distribution),
        )
        return sharpness(tx)

    def test_determinant_by_lebesgues_measure(self):
        half_width, d = 5.0, 2
        constant = (2 * np.pi) ** d / (2 * half_width) ** (2 * d)
        value = constant * self.determinant(samax.cube(half_width))
        assert value == pytest.approx(np.prod(EIGENVALUES), rel=0.02)

    def test_the_authors_determinant_is_that_of_half_the_hessian(self):
        tx = samax.det_sam(0.1, **many(samax.cube(7.0)))
        constant = (2 * np.pi) ** 2 / 14.0**4
        assert constant * sharpness(tx) == pytest.approx(np.prod(EIGENVALUES / 2), rel=0.02)
        log = samax.det_sam(0.1, log=True, **many(samax.cube(7.0)))
        assert sharpness(log) == pytest.approx(np.log(sharpness(tx)), rel=1e-6)

    def test_with_a_gaussian_it_is_another_determinant(self):
        value = self.determinant(samax.gaussian)
        assert value == pytest.approx(np.prod(1 + EIGENVALUES), rel=0.02)
        assert value != pytest.approx(np.prod(EIGENVALUES), rel=0.5)

    def test_a_sharpness_of_ones_own(self):
        """The third cumulant of v^T H v / 2 is the sum of the cubed eigenvalues."""
        tx = samax.universal_sam(
            phi=lambda t: t[2] - 3 * t[0] * t[1] + 2 * t[0] ** 3,
            psi=lambda t: (t, t**2, t**3),
            rho=0.1,
            **many(samax.gaussian, 4_000_000),
        )
        assert sharpness(tx) == pytest.approx(np.sum(EIGENVALUES**3), rel=0.02)


@pytest.mark.parametrize("method", [samax.trace_sam, samax.frob_sam, samax.det_sam])
def test_the_regularizer_tends_to_the_sharpness_as_rho_squared(method):
    """At a stationary point of a loss with third and fourth derivatives, the samples held fixed."""
    loss = lambda w, higher: quadratic(w) + higher * (jnp.sum(w**3) / 3 + jnp.sum(w) ** 4 / 4)
    radii = jnp.array([0.01, 0.02, 0.04, 0.08])

    def value(rho, higher):
        sampling = samax.Sampling(samax.gaussian, 1000, batch_size=1000, antithetic=True)
        tx = method(rho, sampling=sampling, track=True)
        value_fn, point = lambda w: loss(w, higher), jnp.zeros(2)
        _, state = tx.update(point, tx.init(point), point, value=0.0, value_fn=value_fn)
        return optax.tree.get(state, "sharpness")

    limit = value(0.01, 0.0)
    errors = [abs(float(value(rho, 1.0) - limit)) for rho in radii]
    assert np.polyfit(np.log(radii), np.log(errors), 1)[0] == pytest.approx(2.0, abs=0.05)


def descend(tx, loss, start, steps):
    def step(carry, _):
        point, state = carry
        value, grads = jax.value_and_grad(loss)(point)
        updates, state = tx.update(grads, state, point, value=value, value_fn=loss)
        point = optax.apply_updates(point, updates)
        return (point, state), point

    return jax.lax.scan(step, (start, tx.init(start)), length=steps)[1]


class TestExplicitBias:
    """(xy - 1)^2 from (3, 1/3): tr H is 18.22 there and at least 4 on the manifold of minima."""

    loss = staticmethod(lambda p: (p[0] * p[1] - 1.0) ** 2)

    def final_trace(self, method, eta=0.01, steps=10_000):
        start = jnp.array([3.0, 1 / 3])
        path = jax.jit(
            lambda: descend(optax.chain(method, optax.sgd(eta)), self.loss, start, steps)
        )()
        return np.mean(2 * np.sum(path[-1000:] ** 2, axis=1))

    def test_gradient_descent_stays(self):
        assert self.final_trace(samax.trace_sam(0.1, lam=0.0), steps=100) == pytest.approx(
            18.22, abs=0.01
        )

    def test_trace_sam_reaches_the_flattest_minimum(self):
        sampling = samax.Sampling(samax.gaussian, 2, batch_size=2, antithetic=True)
        tx = samax.trace_sam(0.1, sampling=sampling)
        assert self.final_trace(tx, eta=0.03) == pytest.approx(4.0, abs=0.1)

    def test_frob_sam_reaches_it(self):
        sampling = samax.Sampling(samax.gaussian, 4, batch_size=4)
        tx = samax.frob_sam(0.05, lam=1.0, sampling=sampling)
        assert self.final_trace(tx, eta=0.008) == pytest.approx(4.0, abs=0.1)

    def test_det_sam_reaches_it_with_a_small_lambda_and_many_samples(self):
        sampling = samax.Sampling(samax.gaussian, 32, batch_size=32, antithetic=True)
        tx = samax.det_sam(0.1, lam=0.4, sampling=sampling)
        assert self.final_trace(tx, steps=50_000) == pytest.approx(4.0, abs=0.15)

    def test_det_sam_overflows_with_a_large_lambda_and_few_where_its_log_does_not(self):
        options = {"lam": 2.0, "sampling": samax.Sampling(samax.gaussian, 4, batch_size=4)}
        assert np.isnan(self.final_trace(samax.det_sam(0.1, **options)))
        assert np.isfinite(self.final_trace(samax.det_sam(0.1, log=True, **options)))


def test_frob_sams_threshold():
    """On a quadratic of curvature h it needs eta (h + lambda h^2) < 2."""

    @jax.jit
    def end(curvature, factor):
        threshold = 2 / (curvature + curvature**2)
        loss = lambda w: 0.5 * curvature * jnp.sum(w**2)
        sampling = samax.Sampling(samax.gaussian, 512, batch_size=512)
        tx = samax.frob_sam(0.01, lam=1.0, sampling=sampling)
        path = descend(optax.chain(tx, optax.sgd(factor * threshold)), loss, jnp.ones(1), 300)
        return jnp.abs(path[-1, 0])

    for curvature in (2.0, 4.0):
        assert end(curvature, 0.7) < 0.1
        assert not end(curvature, 1.3) < 1e3


class TestInvariance:
    volume_preserving = np.array([[3.0, 1.0], [0.5, 0.5]])  # of determinant 1

    def values(self, method, matrix):
        """R of L and of L(A w), with the constants of Lebesgue's measure left out of both."""
        composed = matrix.T @ HESSIAN @ matrix
        return sharpnesses(method, quadratic, 2 * [jnp.zeros(2)], [HESSIAN, composed])

    def test_the_determinant_is_blind_to_what_preserves_volume(self):
        det = samax.det_sam(0.1, **many(samax.cube(12.0)))
        here, there = self.values(det, self.volume_preserving)
        assert there == pytest.approx(here, rel=0.05)
        here, there = self.values(det, 1.5 * self.volume_preserving)
        assert there == pytest.approx(1.5**4 * here, rel=0.05)

    @pytest.mark.parametrize("method", [samax.trace_sam, samax.frob_sam])
    def test_trace_and_frobenius_norm_are_not(self, method):
        here, there = self.values(method(0.1, **many(samax.gaussian)), self.volume_preserving)
        assert there > 2 * here
        rotation = np.array([[0.6, -0.8], [0.8, 0.6]])
        here, there = self.values(method(0.1, **many(samax.gaussian)), rotation)
        assert there == pytest.approx(here, rel=0.02)

    def test_the_determinant_is_zero_on_the_manifold_of_minima(self):
        hessian = jax.jit(jax.hessian(lambda p: (p[0] * p[1] - 1.0) ** 2))
        for x in (0.5, 1.0, 3.0):
            on, off = hessian(jnp.array([x, 1 / x])), hessian(jnp.array([x, 2 / x]))
            assert jnp.linalg.det(on) == pytest.approx(0.0, abs=1e-9)
            assert abs(jnp.linalg.det(off)) > 1.0

    @pytest.mark.parametrize("method", [samax.trace_sam, samax.frob_sam, samax.det_sam])
    def test_a_mu_that_scales_with_the_parameters_is_blind_to_their_scale(self, method):
        """(x, y) -> (c x, y / c) leaves the loss and, with v = w z, every sharpness as they are."""
        loss = lambda p: (p[0] * p[1] - 1.0) ** 2
        here, there = jnp.array([1.0, 1.2]), jnp.array([4.0, 0.3])

        def both(distribution):
            sampling = samax.Sampling(distribution, 64, batch_size=64)
            tx = method(0.1, sampling=sampling, track=True)
            return sharpnesses(tx, loss, [here, there])

        first, second = both(samax.scaled_by_params(samax.gaussian))
        assert second == pytest.approx(first, rel=1e-9)
        first, second = both(samax.gaussian)
        assert second > 1.5 * first
