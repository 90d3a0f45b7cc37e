"""Functional SAM: the perturbed Jacobian with the clean derivative of the loss by the outputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import check_callable, check_scalar_loss


def functional_grad_fn(
    outputs_fn: Callable[..., Any], loss_fn: Callable[..., jax.Array], outputs: Any
) -> Callable[[optax.Params], optax.Updates]:
    r"""Makes the `grad_fn` of Functional SAM, which perturbs the function and not the loss.

    $$ w' \mapsto J(w')^\top \, \nabla_F L(F(w)) $$

    F is the model's output, and J its Jacobian. Handed to `samax.sam` or another method as
    `grad_fn`, which takes it at $w' = w + \epsilon$, it gives the Jacobian of the outputs there,
    with the derivative of the loss by the outputs of the CLEAN pass. SAM's gradient takes both at
    the perturbed point. It is made anew at each step, and costs what SAM costs, two gradients. With
    several ascent steps (`steps=`) the later ascents follow this gradient as well.

    Args:
      outputs_fn: `outputs_fn(params) -> outputs`, the model on the batch.
      loss_fn: `loss_fn(outputs) -> loss`, a scalar.
      outputs: F(w), those of the clean pass, such as the logits: a pytree of real floating-point
        arrays. The clean pass has them for its auxiliary output.

    Returns:
      A function from parameters to a gradient.

    Raises:
      TypeError: if one of the two is not a function, or the loss not a scalar; when called, if the
        outputs there are of another shape or dtype.

    References:
      Singh et al., 2025, [arXiv 2502.02407](https://arxiv.org/abs/2502.02407)

    Examples:
      >>> import jax, jax.numpy as jnp, optax, samax
      >>> x, y = jnp.array([[1.0, 2.0], [0.5, -1.0]]), jnp.array([1.0, 0.0])
      >>> outputs_fn = lambda w: jnp.tanh(x @ w)
      >>> loss_fn = lambda outputs: jnp.mean((outputs - y) ** 2)
      >>> def clean_pass(w):
      ...     outputs = outputs_fn(w)
      ...     return loss_fn(outputs), outputs
      >>> tx = optax.chain(samax.sam(rho=0.5), optax.sgd(0.1))
      >>> w = jnp.array([0.5, 0.5])
      >>> state = tx.init(w)
      >>> (value, outputs), grads = jax.value_and_grad(clean_pass, has_aux=True)(w)
      >>> grad_fn = samax.functional_grad_fn(outputs_fn, loss_fn, outputs)
      >>> updates, state = tx.update(grads, state, w, value=value, grad_fn=grad_fn)
    """
    check_callable("outputs_fn", outputs_fn, "of the parameters")
    check_callable("loss_fn", loss_fn, "of the outputs")

    def checked(outputs: Any) -> jax.Array:
        loss = loss_fn(outputs)
        check_scalar_loss("loss_fn(outputs)", loss)
        return loss

    slope = jax.grad(checked)(outputs)

    def grad_fn(params: optax.Params) -> optax.Updates:
        there, pull_back = jax.vjp(outputs_fn, params)
        got, wanted = (
            jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
            for tree in (there, outputs)
        )
        if got != wanted:
            raise TypeError(
                "outputs must be those of outputs_fn in the clean pass, of the same shapes and "
                f"dtypes: {wanted} were passed, and outputs_fn returns {got}."
            )
        (grads,) = pull_back(slope)
        return grads

    return grad_fn
