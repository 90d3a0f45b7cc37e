"""The evaluation function of a Flax NNX model, whose calls change the model."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def value_fn(
    model: nnx.Module,
    loss_fn: Callable[..., Any],
    *args: Any,
    wrt: nnx.filterlib.Filter = nnx.Param,
    has_aux: bool = False,
) -> Callable[[Any], jax.Array]:
    """Makes a pure `value_fn(params) -> loss` from a model and a loss that may change it.

    The model is copied here, random keys and batch statistics included, so call this BEFORE the
    clean pass: the perturbed pass then draws the clean pass's dropout masks. Whatever the perturbed
    pass writes to the model (batch statistics, key counts) is dropped, so that the statistics move
    once a step, with the clean pass.

    Args:
      model: the model, in the mode (`model.train()`) of the clean pass.
      loss_fn: the function of the clean pass, `loss_fn(model, *args) -> loss`.
      *args: its further arguments, such as the batch.
      wrt: which variables are trained; the same filter as that of the optimizer and of `nnx.grad`.
      has_aux: whether `loss_fn` returns a pair `(loss, aux)`; `aux` is dropped.

    Returns:
      A function of the state that `nnx.state(model, wrt)` holds.

    Examples:
      >>> import jax.numpy as jnp, optax, samax, samax.flax
      >>> from flax import nnx
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.linear = nnx.Linear(2, 1, rngs=rngs)
      ...         self.dropout = nnx.Dropout(0.5, rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.linear(self.dropout(x))
      >>> def loss_fn(model, x, y):
      ...     return jnp.mean((model(x) - y) ** 2)
      >>> model = Model(nnx.Rngs(0))
      >>> tx = optax.chain(samax.sam(rho=0.05), optax.sgd(0.1))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x, y):
      ...     value_fn = samax.flax.value_fn(model, loss_fn, x, y)
      ...     value, grads = nnx.value_and_grad(loss_fn)(model, x, y)
      ...     optimizer.update(model, grads, value=value, value_fn=value_fn)
      ...     return value
      >>> value = train_step(model, optimizer, jnp.ones((8, 2)), jnp.ones((8, 1)))
    """
    graphdef, *states = nnx.split(model, wrt, ...)
    # New variables around the same arrays: the clean pass assigns to the model's own.
    rest = jax.tree.map(lambda leaf: leaf, states[1])

    def evaluate(params: Any) -> jax.Array:
        result = loss_fn(nnx.merge(graphdef, params, rest, copy=True), *args)
        return result[0] if has_aux else result

    return evaluate
