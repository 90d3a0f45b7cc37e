"""In the structure of Flax Linen's MNIST example: a TrainState, gradients from `apply_model`."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(features=4, kernel_size=(3, 3))(x))
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(features=16)(x))
        return nn.Dense(features=10)(x)


@jax.jit
def apply_model(state, images, labels):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        one_hot = jax.nn.one_hot(labels, 10)
        loss = jnp.mean(optax.softmax_cross_entropy(logits=logits, labels=one_hot))
        return loss, logits

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, logits), grads = grad_fn(state.params)
    accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
    return grads, loss, accuracy


@jax.jit
def update_model(state, grads):
    return state.apply_gradients(grads=grads)


def main(images, labels, steps):
    cnn = CNN()
    params = cnn.init(jax.random.key(0), images[:1])["params"]
    tx = optax.sgd(0.1, 0.9)
    state = train_state.TrainState.create(apply_fn=cnn.apply, params=params, tx=tx)
    losses = []
    for _ in range(steps):
        grads, loss, _ = apply_model(state, images, labels)
        state = update_model(state, grads)
        losses.append(float(loss))
    return losses, state.params
