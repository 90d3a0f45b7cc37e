"""LoRA by qwix on a Flax NNX model: the adapters are perturbed and trained, in one changed line."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import samax
import samax.flax

qwix = pytest.importorskip("qwix", reason="qwix is not installed")
# What it deprecates is its own to repair.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")

X = jax.random.normal(jax.random.key(0), (16, 4))
Y = jnp.sin(X).sum(axis=1, keepdims=True)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.first(x)))


def adapted():
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=4.0)
    return qwix.apply_lora_to_model(Network(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1))


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def step(rho):
    model = adapted()
    adapters = nnx.DiffState(0, nnx.LoRAParam)
    value, grads = samax.flax.value_and_grad(loss_fn, samax.sam(rho), argnums=adapters)(model, X, Y)
    plain, expected = nnx.value_and_grad(loss_fn, argnums=adapters)(adapted(), X, Y)
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    return model, grads, expected


def test_rho_zero_is_the_gradient_of_the_adapters():
    _, grads, expected = step(0.0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), grads, expected
    )


def test_sam_and_balancing_train_the_adapters():
    model, grads, expected = step(0.1)
    gaps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), grads, expected)
    assert max(jax.tree.leaves(gaps)) > 1e-5
    params = nnx.state(model, nnx.LoRAParam)
    assert samax.balancedness(params, samax.lora_groups)
    tx = samax.obar(optax.sgd(0.1), learning_rate=0.1, alpha=0.5, groups=samax.lora_groups)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    before = float(loss_fn(model, X, Y))
    for _ in range(3):
        adapters = nnx.DiffState(0, nnx.LoRAParam)
        grad_fn = samax.flax.value_and_grad(loss_fn, samax.sam(0.01), argnums=adapters)
        optimizer.update(model, grad_fn(model, X, Y)[1])
    assert float(loss_fn(model, X, Y)) < before
