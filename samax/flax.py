"""Flax NNX, whose models change when they are called: SAM in one line, and the pure loss."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax
from flax import nnx

from samax._core.checks import check_callable, check_transformation
from samax._core.value_and_grad import stateless_direction, with_checked_output

Argnum: TypeAlias = int | nnx.DiffState


def value_and_grad(
    loss_fn: Callable[..., Any],
    method: optax.GradientTransformation,
    *,
    argnums: Argnum | tuple[Argnum, ...] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    r"""`nnx.value_and_grad(loss_fn)` with a sharpness-aware direction in place of the gradient.

    $$ (L(w), \, \nabla L(w)) \; \to \; (L(w), \, d), \qquad
       d = \nabla L\left(w + \rho \, \frac{g}{\lVert g \rVert}\right) \text{ for SAM} $$

    The one line to change in a training step. The clean pass is that of `nnx.value_and_grad`: it
    moves batch statistics, random counts and metrics, once, and gives the value and the auxiliary
    output. The second pass sees copies of all arguments as they were before, at the perturbed
    parameters: it draws the same dropout masks, and what it writes is dropped.

    Args:
      loss_fn: `loss_fn(model, *args, **kwargs) -> loss`, or a pair `(loss, aux)`. Models, `rngs`,
        metrics objects and batches may stand in any place, shared ones too.
      method: `samax.sam(0.05)` or another method that keeps no state between steps; see
        `samax.value_and_grad`.
      argnums: as in `nnx.value_and_grad`: which positional arguments are differentiated, each a
        number or `nnx.DiffState(number, filter)`, such as `nnx.DiffState(0, nnx.LoRAParam)`.
      has_aux: whether `loss_fn` returns a pair `(loss, aux)`.

    Returns:
      A function of the arguments of `loss_fn`, to `(loss, direction)`, or to `((loss, aux),
      direction)`.

    Raises:
      TypeError: if `loss_fn` is not a function or `method` not a transformation; when called, if
        what the loss returns and `has_aux` do not agree.
      ValueError: when called, if the method keeps a state.

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
      >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x, y):
      ...     loss, grads = samax.flax.value_and_grad(loss_fn, samax.sam(0.05))(model, x, y)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> loss = train_step(model, optimizer, jnp.ones((8, 2)), jnp.ones((8, 1)))
    """
    check_callable("loss_fn", loss_fn, "of the model")
    check_transformation("method", method)
    checked = with_checked_output(loss_fn, has_aux)
    several = isinstance(argnums, tuple)
    chosen: tuple[Argnum, ...] = argnums if isinstance(argnums, tuple) else (argnums,)
    wanted = [
        (a.argnum, a.filter) if isinstance(a, nnx.DiffState) else (a, nnx.Param) for a in chosen
    ]

    def evaluate(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        before = nnx.clone((args, kwargs))
        # NNX wants positions: the keyword arguments, which may hold objects too, are the last one.
        positional = lambda *args: checked(*args[:-1], **args[-1])  # noqa: E731
        clean_pass = nnx.value_and_grad(positional, argnums=argnums, has_aux=has_aux)
        value, grads = clean_pass(*args, kwargs)

        def loss_at(params: Any) -> Any:
            copies, options = nnx.clone(before)
            moved = list(copies)
            for (place, _), param in zip(wanted, params if several else (params,), strict=True):
                if _is_object(moved[place]):
                    nnx.update(moved[place], param)
                else:
                    moved[place] = param
            return loss_fn(*moved, **options)

        states = [
            nnx.state(args[place], trained) if _is_object(args[place]) else args[place]
            for place, trained in wanted
        ]
        params = tuple(states) if several else states[0]
        return value, stateless_direction(method, value, grads, params, loss_at, has_aux)

    return evaluate


def value_fn(
    model: nnx.Module,
    loss_fn: Callable[..., Any],
    *args: Any,
    has_aux: bool = False,
    **kwargs: Any,
) -> Callable[[Any], jax.Array]:
    """Makes a pure `value_fn(params) -> loss` from a model and a loss that may change it.

    For the full form, `optimizer.update(model, grads, value=value, value_fn=value_fn)`. The model
    and all other arguments are copied here, random keys, batch statistics and metrics included, so
    call this BEFORE the clean pass: the perturbed pass then draws the clean pass's dropout masks.
    Whatever the perturbed pass writes is dropped, so that the statistics move once a step, with the
    clean pass.

    Args:
      model: the model, in the mode (`model.train()`) of the clean pass.
      loss_fn: the function of the clean pass, `loss_fn(model, *args, **kwargs) -> loss`.
      *args: its further arguments, such as `rngs` and the batch.
      has_aux: whether `loss_fn` returns a pair `(loss, aux)`; `aux` is dropped.
      **kwargs: its keyword arguments.

    Returns:
      A function of the state that the optimizer holds, `nnx.state(model, wrt)` whatever its `wrt`.

    Raises:
      TypeError: if `loss_fn` is not a function; when called, if what the loss returns and `has_aux`
        do not agree.

    Examples:
      >>> import jax.numpy as jnp, optax, samax, samax.flax
      >>> from flax import nnx
      >>> def loss_fn(model, x, y):
      ...     return jnp.mean((model(x) - y) ** 2)
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = optax.chain(samax.vasso(rho=0.05), optax.sgd(0.1))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x, y):
      ...     value_fn = samax.flax.value_fn(model, loss_fn, x, y)
      ...     value, grads = nnx.value_and_grad(loss_fn)(model, x, y)
      ...     optimizer.update(model, grads, value=value, value_fn=value_fn)
      ...     return value
      >>> value = train_step(model, optimizer, jnp.ones((8, 2)), jnp.ones((8, 1)))
    """
    check_callable("loss_fn", loss_fn, "of the model, as in value_fn(model, loss_fn, x, y)")
    checked = with_checked_output(loss_fn, has_aux)
    before = nnx.clone((model, args, kwargs))

    def evaluate(params: Any) -> jax.Array:
        copy, arguments, options = nnx.clone(before)
        nnx.update(copy, params)
        result = checked(copy, *arguments, **options)
        return result[0] if has_aux else result

    return evaluate


def _is_object(argument: Any) -> bool:
    """Whether an argument is a model, and no pytree of arrays."""
    return isinstance(argument, nnx.Module)
