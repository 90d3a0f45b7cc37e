"""The gradient line: a method's direction in place of the gradient, under any trainer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from samax._core.checks import check_callable, check_transformation


def value_and_grad(
    loss_fn: Callable[..., Any],
    method: optax.GradientTransformation,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    r"""`jax.value_and_grad(loss_fn)` with a sharpness-aware direction in place of the gradient.

    $$ (L(w), \, \nabla L(w)) \; \to \; (L(w), \, d), \qquad
       d = \nabla L\left(w + \rho \, \frac{g}{\lVert g \rVert}\right) \text{ for SAM} $$

    The one line to change where a trainer takes gradients: Flax's `TrainState`,
    `optax.MultiSteps`, a loop of your own. Value and auxiliary output are those of the clean pass.
    All arguments, random keys among them, are passed to both passes, which so draw the same dropout
    masks. Clipping, weight decay and the base optimizer are the trainer's, as before. The price is
    a second gradient. For a Flax NNX model, which changes when it is called, use
    `samax.flax.value_and_grad`.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs) -> loss`, or a pair `(loss, aux)`.
      method: `samax.sam(0.05)` or another method that keeps no state between steps: `usam`, `asam`,
        `wsam` and `gsam` with numbers for their hyper-parameters, or a composition of your own.
        Without the optimizer, which stays where it is.
      argnums: which of the positional arguments are the parameters; of several the perturbation is
        one, with the norm over all.
      has_aux: whether `loss_fn` returns a pair `(loss, aux)`.

    Returns:
      A function of the arguments of `loss_fn`, to `(loss, direction)`, or to `((loss, aux),
      direction)`.

    Raises:
      TypeError: if `loss_fn` is not a function or `method` not a transformation; when called, if
        what the loss returns and `has_aux` do not agree, or the parameters are a Flax NNX model.
      ValueError: when called, if the method keeps a state, as VaSSO, SAMAR, a scheduled rho and
        `track=True` do.

    Examples:
      >>> import jax, jax.numpy as jnp, samax
      >>> loss_fn = lambda w, x: jnp.sum((w * x) ** 2)
      >>> value, grads = samax.value_and_grad(loss_fn, samax.sam(rho=0.5))(jnp.array([3.0, 4.0]), 1)
      >>> print(value, grads)
      25.0 [6.6 8.8]
    """
    check_callable("loss_fn", loss_fn, "of the parameters")
    check_transformation("method", method)
    checked = with_checked_output(loss_fn, has_aux)
    several = isinstance(argnums, tuple)
    places: tuple[int, ...] = argnums if isinstance(argnums, tuple) else (argnums,)

    def evaluate(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for place in places:
            if place < len(args):  # otherwise JAX says what is missing
                _refuse_nnx(args[place])
        value, grads = jax.value_and_grad(checked, argnums, has_aux)(*args, **kwargs)

        def loss_at(params: Any) -> Any:
            moved = list(args)
            for place, param in zip(places, params if several else (params,), strict=True):
                moved[place] = param
            return loss_fn(*moved, **kwargs)

        params = tuple(args[place] for place in places) if several else args[places[0]]
        return value, stateless_direction(method, value, grads, params, loss_at, has_aux)

    return evaluate


def with_checked_output(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """The loss, refusing an auxiliary output that nobody asked for, and a missing one."""

    @functools.wraps(loss_fn)
    def loss(*args: Any, **kwargs: Any) -> Any:
        result = loss_fn(*args, **kwargs)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                "with has_aux=True loss_fn must return a pair (loss, aux), and returns something "
                "else: return both, or drop has_aux=True."
            )
        if not has_aux and isinstance(result, tuple):
            raise TypeError(
                "loss_fn must return a scalar loss, got a tuple: for a pair (loss, aux) pass "
                "has_aux=True."
            )
        return result

    return loss


def _refuse_nnx(params: Any) -> None:
    if any(kind.__module__.startswith("flax.nnx.module") for kind in type(params).__mro__):
        raise TypeError(
            "value_and_grad takes pytrees of arrays, got the Flax NNX model "
            f"{type(params).__name__}, which changes when it is called: use "
            "samax.flax.value_and_grad(loss_fn, method)."
        )


def stateless_direction(
    method: optax.GradientTransformation,
    value: Any,
    grads: optax.Updates,
    params: optax.Params,
    loss_at: Callable[[optax.Params], Any],
    has_aux: bool,
) -> optax.Updates:
    """The direction of a method that keeps nothing from one step to the next.

    `value` is that of the clean pass, and `loss_at(params)` the same at other parameters.
    """
    loss = (lambda result: result[0]) if has_aux else (lambda result: result)
    state = method.init(params)
    if jax.tree.leaves(state):
        raise ValueError(
            "value_and_grad has no place for a state, and this method keeps one between steps (a "
            "moving average, an adaptive weight, a schedule, a random key or tracked metrics): use "
            "the full form, tx = optax.chain(method, optimizer) and tx.update(grads, state, "
            "params, value=value, value_fn=loss_fn, batch=batch)."
        )
    return optax.with_extra_args_support(method).update(
        grads, state, params, value=loss(value), value_fn=lambda params: loss(loss_at(params))
    )[0]
