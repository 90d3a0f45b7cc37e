"""What only the right methods do: the thresholds and rates of METHODS.md 5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.optimized]


@functools.partial(jax.jit, static_argnames=("loss", "method", "steps"))
def descend(loss, method, start, rho, eta, steps):
    """Gradient descent with a method's gradient; returns the final point and the last 100."""
    tx = optax.chain(method(rho), optax.sgd(eta))

    def step(carry, _):
        point, state = carry
        updates, state = tx.update(jax.grad(loss)(point), state, point, value_fn=loss)
        point = optax.apply_updates(point, updates)
        return (point, state), point

    (end, _), path = jax.lax.scan(step, (start, tx.init(start)), length=steps)
    return end, path[-100:]


SPECTRUM = np.linspace(1.0, 10.0, 10)
BETA = SPECTRUM.max()


def quadratic(w):
    return 0.5 * jnp.sum(SPECTRUM * w**2)


class TestQuadratic:
    """Section 4.1: USAM diverges above 2 / (beta + rho beta^2), SAM converges up to 2 / beta."""

    @pytest.mark.parametrize("rho", [0.01, 0.1, 0.5])
    def test_usams_threshold(self, rho):
        threshold = 2 / (BETA + rho * BETA**2)
        run = functools.partial(descend, quadratic, samax.usam, jnp.ones(10), rho, steps=3000)
        below, _ = run(eta=0.99 * threshold)
        above, _ = run(eta=1.01 * threshold)
        assert jnp.linalg.norm(below) < 1.0
        assert not jnp.linalg.norm(above) < 1e6

    @pytest.mark.parametrize("rho", [0.01, 0.1, 0.5])
    def test_sams_threshold_and_the_radius_of_its_tail(self, rho):
        eta = 0.99 * 2 / BETA
        end, tail = descend(quadratic, samax.sam, jnp.ones(10), rho, eta, steps=3000)
        assert jnp.linalg.norm(end) < jnp.sqrt(10.0) + 100 * rho
        radius = rho * eta * BETA / (2 - eta * BETA)
        np.testing.assert_allclose(jnp.linalg.norm(tail, axis=1), radius, rtol=1e-3)
        beyond, _ = descend(quadratic, samax.sam, jnp.ones(10), rho, 1.01 * 2 / BETA, steps=3000)
        assert jnp.linalg.norm(beyond) > 1e6


def test_scalar_factorization():
    """Section 4.2: USAM diverges where SAM reaches the origin, and SAM's gradient underflows."""
    loss = lambda p: 0.5 * (p[0] * p[1]) ** 2
    start = jnp.array([2.0, np.sqrt(2.0)])
    usam, _ = descend(loss, samax.usam, start, 0.5, 0.05, steps=5000)
    assert not np.all(np.isfinite(usam))
    sam, _ = descend(loss, samax.sam, start, 0.5, 0.05, steps=5000)
    assert loss(sam) < 1e-10


class TestSingleNeuron:
    """Section 4.3: where gradient descent, USAM and SAM stop on log cosh(x y)."""

    loss = staticmethod(lambda p: jnp.logaddexp(p[0] * p[1], -p[0] * p[1]) - jnp.log(2.0))
    start = np.array([4.0, 10.0])

    def test_gradient_descent_and_usam_stop(self):
        eta = 0.05
        plain, _ = descend(self.loss, samax.usam, self.start, 0.0, eta, steps=20_000)
        prediction = min(100.0 - 16.0, 2 / eta)
        assert abs(plain[1] ** 2 - prediction) < 2 * np.sqrt(prediction) * 2 * eta
        usam, _ = descend(self.loss, samax.usam, self.start, 0.05, eta, steps=20_000)
        assert 19.8 < usam[1] ** 2 < 20.0

    def test_sam_keeps_drifting(self):
        rho, eta, steps = 0.05, 0.05, 10_000
        early, _ = descend(self.loss, samax.sam, self.start, rho, eta, steps)
        late, _ = descend(self.loss, samax.sam, self.start, rho, eta, 2 * steps)
        rate = jnp.log(late[1] ** 2 / early[1] ** 2) / steps
        assert rate == pytest.approx(-2 * eta * rho**2, rel=0.06)


def test_the_explicit_bias():
    """SAM reaches the flattest minimum of (x y - 1)^2; gradient descent stays where it is."""
    loss = lambda p: (p[0] * p[1] - 1.0) ** 2
    trace = lambda p: 2 * jnp.sum(p**2)
    start = jnp.array([3.0, 1 / 3])
    assert trace(start) == pytest.approx(18.22, abs=0.01)
    plain, _ = descend(loss, samax.usam, start, 0.0, 0.01, steps=20_000)
    assert trace(plain) == pytest.approx(18.22, abs=0.01)
    sam, _ = descend(loss, samax.sam, start, 0.1, 0.01, steps=20_000)
    assert trace(sam) == pytest.approx(4.0, abs=0.05)


@pytest.mark.slow
def test_samars_rate():
    """The running mean of ||g||^2 falls as 1 / sqrt(K) with eta ~ 1 / sqrt(K)."""
    dimension, lengths, seeds = 20, [1_000, 3_000, 10_000, 30_000], 8
    curvature = jnp.linspace(0.5, 2.0, dimension)

    def mean_squared_gradient(key, length):
        eta = 1.0 / np.sqrt(length)
        tx = optax.chain(samax.samar(0.1 * eta), optax.sgd(eta))

        def step(carry, key):
            w, state = carry
            noise = jax.random.normal(key, (dimension,))
            loss = lambda w: 0.5 * jnp.sum(curvature * w**2) + noise @ w
            updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
            return (optax.apply_updates(w, updates), state), jnp.sum((curvature * w) ** 2)

        start = 3.0 * jnp.ones(dimension)
        keys = jax.random.split(key, length)
        _, squares = jax.lax.scan(step, (start, tx.init(start)), keys)
        return squares.mean()

    keys = jax.random.split(jax.random.key(0), seeds)
    means = [
        float(jax.jit(jax.vmap(functools.partial(mean_squared_gradient, length=k)))(keys).mean())
        for k in lengths
    ]
    slope = np.polyfit(np.log(lengths), np.log(means), 1)[0]
    assert -0.56 < slope < -0.44
