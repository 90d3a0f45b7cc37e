"""Keras 3 on JAX: a custom `train_step` with the stateless API, where the gradient line changes."""

import os

import jax
import numpy as np
import optax
import pytest

import samax

os.environ["KERAS_BACKEND"] = "jax"
keras = pytest.importorskip("keras", reason="Keras is not installed")
# What it deprecates is its own to repair.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")


def make(rho):
    class Model(keras.Model):
        def compute_loss_and_updates(self, trainable, non_trainable, metrics, x, y):
            prediction, non_trainable = self.stateless_call(
                trainable, non_trainable, x, training=True
            )
            loss = self.compute_loss(x, y, prediction)
            return loss, (prediction, non_trainable)

        def train_step(self, state, data):
            trainable, non_trainable, optimizer_variables, metrics = state
            x, y = data
            grad_fn = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
            if rho is not None:
                grad_fn = samax.value_and_grad(
                    self.compute_loss_and_updates, samax.sam(rho), has_aux=True
                )
            (loss, (_, non_trainable)), grads = grad_fn(trainable, non_trainable, metrics, x, y)
            trainable, optimizer_variables = self.optimizer.stateless_apply(
                optimizer_variables, grads, trainable
            )
            return {"loss": loss}, (trainable, non_trainable, optimizer_variables, metrics)

    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = keras.layers.BatchNormalization()(keras.layers.Dense(8, activation="tanh")(inputs))
    model = Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    return model


X = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
Y = np.sin(X).sum(axis=1, keepdims=True)


def trained(rho):
    model = make(rho)
    start = [np.asarray(w) for w in model.get_weights()]
    error = lambda: float(np.mean((np.asarray(model(X, training=True)) - Y) ** 2))
    errors = [error()]
    model.fit(X, Y, batch_size=32, epochs=3, verbose=0, shuffle=False)
    return start, model.get_weights(), [*errors, error()]


def test_sam_in_a_custom_train_step():
    start, plain, _ = trained(None)
    again, zero, _ = trained(0.0)
    for left, right in zip([*start, *plain], [*again, *zero], strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
    _, perturbed, errors = trained(0.1)
    assert errors[-1] < errors[0]
    assert max(np.abs(a - b).max() for a, b in zip(plain, perturbed, strict=True)) > 1e-4


def test_keras_gradients_are_what_optax_takes():
    """The pytree of Keras' trainable variables is a list, which every method takes."""
    model = make(None)
    params = [v.value for v in model.trainable_variables]
    tx = optax.chain(samax.samar(0.1), optax.sgd(0.1))
    assert jax.tree.structure(tx.init(params)) is not None
