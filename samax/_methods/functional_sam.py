"""Functional SAM: the perturbed Jacobian with the clean derivative of the loss by the outputs."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from samax._core.checks import check_callable, check_scalar_loss


def functional_grad_fn(
    outputs_fn: Callable[[optax.Params], Any],
    loss_fn: Callable[[Any], jax.Array],
    params: optax.Params,
) -> Callable[[optax.Params], optax.Updates]:
    r"""Makes the `grad_fn` of Functional SAM, which perturbs the function and not the loss.

    $$ w' \mapsto J(w')^\top \, \nabla_F L(F(w)) $$

    F is the model's output, and J its Jacobian. Handed to `samax.sam` or another method as
    `grad_fn`, which takes it at $w' = w + \epsilon$, it gives the Jacobian of the outputs there,
    with the derivative of the loss by the outputs of the CLEAN pass. SAM's gradient takes both at
    the perturbed point.

    Make it anew at each step, within the step that is compiled: XLA then shares the clean pass with
    that of the gradient, so that the cost is SAM's, two gradients. With several ascent steps
    (`steps=`) the later ascents follow this gradient as well.

    Args:
      outputs_fn: `outputs_fn(params) -> outputs`, the model on the batch; a pytree of real
        floating-point arrays, such as the logits.
      loss_fn: `loss_fn(outputs) -> loss`, a scalar.
      params: w, the parameters of the clean pass.

    Returns:
      A function from parameters to a gradient.

    Raises:
      TypeError: if one of the two is no function, or the loss no scalar.

    References:
      Singh et al., 2025, [arXiv 2502.02407](https://arxiv.org/abs/2502.02407)

    Examples:
      >>> import jax, jax.numpy as jnp, optax, samax
      >>> x, y = jnp.array([[1.0, 2.0], [0.5, -1.0]]), jnp.array([1.0, 0.0])
      >>> outputs_fn = lambda w: jnp.tanh(x @ w)
      >>> loss_fn = lambda outputs: jnp.mean((outputs - y) ** 2)
      >>> tx = optax.chain(samax.sam(rho=0.5), optax.sgd(0.1))
      >>> w = jnp.array([0.5, 0.5])
      >>> state = tx.init(w)
      >>> grads = jax.grad(lambda w: loss_fn(outputs_fn(w)))(w)
      >>> grad_fn = samax.functional_grad_fn(outputs_fn, loss_fn, w)
      >>> updates, state = tx.update(grads, state, w, grad_fn=grad_fn)
    """
    check_callable("outputs_fn", outputs_fn, "of the parameters")
    check_callable("loss_fn", loss_fn, "of the outputs")

    def checked(outputs: Any) -> jax.Array:
        loss = loss_fn(outputs)
        check_scalar_loss("loss_fn(outputs)", loss)
        return loss

    outputs = outputs_fn(params)
    slope = jax.grad(checked)(outputs)

    def grad_fn(point: optax.Params) -> optax.Updates:
        (grads,) = jax.vjp(outputs_fn, point)[1](slope)
        return grads

    return grad_fn
