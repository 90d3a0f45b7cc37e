"""The evaluation contract: which function `update` was given, and what it is called with.

A part of samax that evaluates takes, among the extra arguments of `update`, exactly one of

- `value_fn(params, ...) -> loss`, a pure function, differentiated here;
- `grad_fn(params, ...) -> grads`, a gradient pipeline of your own;
- `value_and_grad_fn(params, ...) -> (loss, grads)`;

and calls it with those of the other extra arguments that it names, as Optax's line searches do.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import optax

from samax._core.checks import (
    check_callable,
    check_parameters,
    check_same_tree,
    check_scalar_loss,
)

Evaluate: TypeAlias = Callable[[optax.Params], tuple[jax.Array | None, optax.Updates]]

FUNCTIONS = ("value_fn", "grad_fn", "value_and_grad_fn")


def evaluator(extra_args: Mapping[str, Any]) -> Evaluate:
    """The one function among `update`'s extra arguments, as params -> (loss or None, gradients)."""
    name, fn = _the_function(extra_args)
    call = _bound(name, fn, extra_args)

    def loss_fn(params: optax.Params) -> jax.Array:
        loss = call(params)
        check_scalar_loss("value_fn(params)", loss)
        return loss

    def evaluate(params: optax.Params) -> tuple[jax.Array | None, optax.Updates]:
        if name == "value_fn":
            return jax.value_and_grad(loss_fn)(params)
        result = call(params)
        if name == "grad_fn":
            value, grads = None, result
        else:
            if not (isinstance(result, tuple) and len(result) == 2):
                raise TypeError(
                    "value_and_grad_fn(params) must be a pair (loss, grads), got "
                    f"{type(result).__name__}."
                )
            value, grads = result
            check_scalar_loss("the first part of value_and_grad_fn(params)", value)
        check_same_tree(f"the gradient that {name} returns", grads, params)
        return value, grads

    return evaluate


def named_arguments(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function by name, without the first, which takes the model's."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # some built-in functions have no signature
        return {}
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if parameters and parameters[0].kind not in starred:
        del parameters[0]
    return {p.name: p for p in parameters if p.kind not in starred}


def check_inputs(
    updates: optax.Updates, params: optax.Params | None, extra_args: Mapping[str, Any]
) -> None:
    """Raises unless `update` got parameters, gradients of their tree and a scalar loss, if any."""
    if params is None:
        raise ValueError(
            "samax needs params: call update(grads, state, params, value_fn=value_fn)."
        )
    check_parameters("params", params)
    check_parameters("updates", updates)
    check_same_tree("updates", updates, params)
    if extra_args.get("value") is not None:
        check_scalar_loss("value", extra_args["value"])


def _the_function(extra_args: Mapping[str, Any]) -> tuple[str, Callable[..., Any]]:
    passed = [name for name in FUNCTIONS if extra_args.get(name) is not None]
    if len(passed) != 1:
        raise ValueError(
            "samax needs exactly one of value_fn, grad_fn and value_and_grad_fn to evaluate the "
            f"perturbed gradient, got {' and '.join(passed) or 'none'}: call update(grads, state, "
            "params, value=loss, value_fn=loss_fn, batch=batch). A trainer that hands on gradients "
            "alone (flax.training.TrainState.apply_gradients) takes them from "
            "samax.value_and_grad(loss_fn, samax.sam(rho)) instead of jax.value_and_grad(loss_fn), "
            "or steps in two calls with samax.alternating(chain)."
        )
    (name,) = passed
    check_callable(name, extra_args[name], "of the parameters")
    return name, extra_args[name]


def _bound(
    name: str, fn: Callable[..., Any], extra_args: Mapping[str, Any]
) -> Callable[[optax.Params], Any]:
    """`fn` as a function of the parameters alone."""
    named = named_arguments(fn)
    # The contract's own arguments are the caller's words to samax, not to the function.
    given = {k: v for k, v in extra_args.items() if k in named and k not in (*FUNCTIONS, "value")}
    missing = [
        p.name
        for p in named.values()
        if p.default is inspect.Parameter.empty and p.name not in given
    ]
    if missing:
        arguments = ", ".join(f"{argument}={argument}" for argument in missing)
        raise TypeError(
            f"{name} needs {' and '.join(missing)} besides the parameters: pass what it names to "
            f"update, as in update(grads, state, params, {name}={name}, {arguments}), or close "
            "over it."
        )
    by_position = [
        given.pop(p.name)
        for p in named.values()
        if p.kind is inspect.Parameter.POSITIONAL_ONLY and p.name in given
    ]

    def call(params: optax.Params) -> Any:
        try:
            return fn(params, *by_position, **given)
        except (AttributeError, TypeError) as error:
            of_nnx = type(params).__module__.startswith("flax.")
            if not of_nnx or getattr(fn, "__module__", None) == "samax.flax":
                raise
            raise TypeError(
                f"{name} failed on the parameters, a {type(params).__name__} of Flax NNX, not a "
                "model. If it is a function of the model, pass "
                "value_fn=samax.flax.value_fn(model, loss_fn, ...), made before the clean pass."
            ) from error

    return call
