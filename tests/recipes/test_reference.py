"""Methods without a golden file, against an independent version in NumPy, on noisy quadratics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax

pytestmark = pytest.mark.usefixtures("x64")

STEPS, RATE, RHO = 10, 0.05, 0.2
RNG = np.random.default_rng(0)
HALF = RNG.normal(size=(6, 6))
CURVATURE = HALF @ HALF.T / 6 + 0.1 * np.eye(6)
START = RNG.normal(size=6)
NOISE = RNG.normal(size=(STEPS, 6))


def gradient(w, step):
    return CURVATURE @ w + NOISE[step]


class Sgd:
    def __init__(self, momentum):
        self.momentum, self.velocity = momentum, np.zeros(6)

    def __call__(self, direction):
        self.velocity = self.momentum * self.velocity + direction
        return -RATE * self.velocity


class Adam:
    def __init__(self):
        self.step, self.first, self.second = 0, np.zeros(6), np.zeros(6)

    def __call__(self, direction):
        self.step += 1
        self.first = 0.9 * self.first + 0.1 * direction
        self.second = 0.999 * self.second + 0.001 * direction**2
        first = self.first / (1 - 0.9**self.step)
        second = self.second / (1 - 0.999**self.step)
        return -RATE * first / (np.sqrt(second) + 1e-8)


BASES = {
    "sgd": (lambda: Sgd(0.0), optax.sgd(RATE)),
    "momentum": (lambda: Sgd(0.9), optax.sgd(RATE, momentum=0.9)),
    "adam": (Adam, optax.adam(RATE)),
}
every_base = pytest.mark.parametrize("base", BASES)


def reference(base, direction):
    """The path of `base` along `direction(clean gradient, perturbed gradient)`."""
    optimizer, w, path = BASES[base][0](), START.copy(), []
    for step in range(STEPS):
        clean = gradient(w, step)
        perturbed = gradient(w + RHO * clean / np.linalg.norm(clean), step)
        w = w + optimizer(direction(clean, perturbed))
        path.append(w)
    return np.array(path)


def trained(tx):
    curvature, noise = jnp.array(CURVATURE), jnp.array(NOISE)

    def step(carry, n):
        w, state = carry
        loss = lambda w: 0.5 * w @ curvature @ w + noise[n] @ w
        updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
        return (optax.apply_updates(w, updates), state), optax.apply_updates(w, updates)

    start = jnp.array(START)
    return jax.lax.scan(step, (start, tx.init(start)), jnp.arange(STEPS))[1]


@every_base
@pytest.mark.parametrize("gamma", [0.3, 0.9])
def test_coupled_wsam(base, gamma):
    weight = gamma / (1 - gamma)
    expected = reference(base, lambda g, p: weight * p + (1 - weight) * g)
    path = trained(optax.chain(samax.wsam(RHO, gamma), BASES[base][1]))
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-9)


@every_base
@pytest.mark.parametrize("smoothing", [0.0, 0.9])
@pytest.mark.parametrize("delta", [None, 0.02])
def test_samar(base, smoothing, delta):
    chi, gamma, weights = 1.3, 0.03, []
    lower = gamma / (1 + gamma) if delta is None else delta
    state = {"weight": 1.0, "average": None}

    def direction(clean, perturbed):
        weight, norm = state["weight"], np.sqrt(np.sum(clean**2))
        result = clean + weight * (perturbed - clean)
        ratio = 1.0
        if state["average"] is None:
            state["average"] = norm
        else:
            average = smoothing * state["average"] + (1 - smoothing) * norm
            ratio, state["average"] = average / state["average"], average
        if ratio >= 1 + gamma:
            weight *= chi
        elif ratio <= 1 - lower:
            weight /= chi
        state["weight"] = min(max(weight, 0.5), 2.0)
        weights.append(state["weight"])
        return result

    expected = reference(base, direction)
    samar = samax.samar(RHO, chi=chi, gamma=gamma, delta=delta, smoothing=smoothing)
    path = trained(optax.chain(samar, BASES[base][1]))
    assert len(set(weights)) > 2  # the weight moves on this path
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-9)


@every_base
def test_decoupled_wsam(base):
    """The golden cases have gamma up to 0.9; here also with a scheduled learning rate."""
    gamma, weight = 0.7, 0.7 / 0.3
    optimizer, w, expected = BASES[base][0](), START.copy(), []
    for step in range(STEPS):
        clean = gradient(w, step)
        perturbed = gradient(w + RHO * clean / np.linalg.norm(clean), step)
        rate = RATE * (1 - step / STEPS)
        w = w + optimizer(clean) * (1 - step / STEPS) - rate * weight * (perturbed - clean)
        expected.append(w)
    # optax.linear_schedule divides the integer count in float32.
    schedule = lambda n: RATE * jnp.maximum(0.0, 1 - n.astype(jnp.float64) / STEPS)
    optimizers = {
        "sgd": optax.sgd(schedule),
        "momentum": optax.sgd(schedule, momentum=0.9),
        "adam": optax.adam(schedule),
    }
    path = trained(samax.decoupled_wsam(optimizers[base], schedule, rho=RHO, gamma=gamma))
    np.testing.assert_allclose(path, np.array(expected), rtol=0, atol=1e-9)
