"""In the structure of Optax's CIFAR-10 ResNet example: a Linen ResNet with batch statistics."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn


class ResNetBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        norm = lambda: nn.BatchNorm(use_running_average=not train, momentum=0.9)
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), use_bias=False)(x)))
        y = norm()(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = ResNetBlock(4)(x, train)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


net = ResNet()
solver = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))


def loss_and_stats(params, batch_stats, images, labels):
    logits, mutated = net.apply(
        {"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"]
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, mutated["batch_stats"]


@jax.jit
def train_step(params, batch_stats, opt_state, images, labels):
    value_and_grad = jax.value_and_grad(loss_and_stats, has_aux=True)
    (loss, batch_stats), grads = value_and_grad(params, batch_stats, images, labels)
    updates, opt_state = solver.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), batch_stats, opt_state, loss


def main(images, labels, steps):
    variables = net.init(jax.random.key(0), images[:1], train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]
    opt_state, losses = solver.init(params), []
    for _ in range(steps):
        params, batch_stats, opt_state, loss = train_step(
            params, batch_stats, opt_state, images, labels
        )
        losses.append(float(loss))
    return losses, {"params": params, "batch_stats": batch_stats}
