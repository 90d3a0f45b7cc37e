"""In the structure of Optax's `contrib/sam` example: one call a step, a gradient function."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from optax import contrib


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(16)(x.reshape((x.shape[0], -1))))
        return nn.Dense(10)(x)


def main(images, labels, steps):
    net = MLP()
    params = net.init(jax.random.key(0), images[:1])

    def loss_fn(params):
        logits = net.apply(params, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    lr, rho = 0.1, 0.05
    opt = optax.sgd(lr, momentum=0.9)
    adv_opt = optax.chain(contrib.normalize(), optax.sgd(rho))
    sam_opt = contrib.sam(opt, adv_opt, sync_period=2, opaque_mode=True)
    grad_fn = lambda params, i: jax.grad(loss_fn)(params)
    opt_state = sam_opt.init(params)

    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = sam_opt.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for _ in range(steps):
        params, opt_state, loss = step(params, opt_state)
        losses.append(float(loss))
    return losses, params
