"""Argument checks: one clear error that names the argument, the value and the fix."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

P = ParamSpec("P")
R = TypeVar("R")


def check_count(name: str, value: int, low: int = 1) -> int:
    """Returns `value` if it is a Python int of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(
            f"{name} must be a Python int, got {value!r}; under optax.inject_hyperparams name it "
            "in static_args."
        )
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}.")
    return int(value)


def check_callable(name: str, value: object, signature: str) -> None:
    """Raises a `TypeError` unless `value` can be called."""
    if not callable(value):
        raise TypeError(
            f"{name} must be a function {signature}, got {value!r} of type {type(value).__name__}; "
            "optax.inject_hyperparams calls functions as schedules: name it in static_args there."
        )


def check_transformation(name: str, value: object) -> None:
    """Raises a `TypeError` unless `value` is an Optax transformation (not its factory)."""
    if not _is_transformation(value):
        raise TypeError(
            f"{name} must be an Optax gradient transformation, got {value!r}; "
            "call the factory first, as in samax.normalize()."
        )


def check_mask(name: str, mask: Any) -> None:
    """Raises a `TypeError` unless a mask is a function or a pytree of booleans, not one alone."""
    if callable(mask):
        return
    for leaf in jax.tree.leaves(mask):
        if leaf is mask or not isinstance(leaf, (bool, np.bool_)):
            raise TypeError(
                f"{name} must be a pytree of Python booleans like the parameters, or a function "
                f"from them to one, got {leaf!r}; optax.inject_hyperparams calls functions as "
                "schedules: name it in static_args there."
            )


def refuse_optimizer(recipe: Callable[P, R]) -> Callable[P, R]:
    """Makes `sam(optimizer, rho=...)`, as others have it, an error that shows the chain."""

    @functools.wraps(recipe)
    def build(*args: P.args, **kwargs: P.kwargs) -> R:
        if args and _is_transformation(args[0]):
            name = recipe.__name__
            raise TypeError(
                f"{name} takes no optimizer: it gives a gradient, which the optimizer follows, as "
                f"in optax.chain(samax.{name}(rho=0.05), optimizer)."
            )
        return recipe(*args, **kwargs)

    return build


def check_parameters(name: str, tree: Any) -> None:
    """Raises unless all leaves of `tree` are real floating-point arrays, none masked."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked):
        if is_masked(leaf):
            raise TypeError(
                f"{name} holds an optax.MaskedNode at {_show(path)}: a sharpness-aware "
                "transformation inside optax.masked, optax.partition or multi_transform sees only "
                "a part of the tree, while the loss needs all of it. Put it outside, first in "
                "optax.chain, and choose what is perturbed: samax.sam(rho, mask=mask), or "
                "samax.perturb_only(ascent, mask)."
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name} has a leaf of dtype {dtype} at {_show(path)}; only real floating-point "
                "leaves can be trained. Filter the others out (equinox.is_inexact_array, "
                "nnx.Param) before init and update."
            )


def check_same_tree(name: str, tree: Any, params: Any) -> None:
    """Raises a `ValueError` unless `tree` has the structure and the shapes of `params`."""
    got: Any = jax.tree.structure(tree)
    if got != jax.tree.structure(params):
        paths = {_show(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
        wanted = {_show(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        differences = sorted(wanted ^ paths)[:3] or ["the types of its containers"]
        raise ValueError(
            f"{name} must be the same pytree as params; they differ in {', '.join(differences)}. "
            f"Got {_summary(tree)}, params are {_summary(params)}."
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(params), strict=True)
    for (path, leaf), wanted_leaf in pairs:
        if jnp.shape(leaf) != jnp.shape(wanted_leaf):
            raise ValueError(
                f"{name} has shape {jnp.shape(leaf)} at {_show(path)} where params have "
                f"{jnp.shape(wanted_leaf)}."
            )


def check_scalar_loss(name: str, value: Any) -> None:
    """Raises a `TypeError` unless `value` is one real number, such as a loss."""
    fix = (
        "Auxiliary output belongs to the clean pass, which is yours: drop it here, as in "
        "lambda params: loss_fn(params)[0]."
    )
    if isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a scalar loss, got a {type(value).__name__}. {fix}")
    if not _is_array(value) or jnp.shape(value) != ():
        got = f"shape {jnp.shape(value)}" if _is_array(value) else f"a {type(value).__name__}"
        raise TypeError(f"{name} must be a scalar loss, got {got}; reduce it, as in loss.mean().")


def require_clean_gradient(rule: str, clean_grad: optax.Updates | None) -> optax.Updates:
    """Returns the clean gradient that a descent rule needs."""
    if clean_grad is None:
        raise ValueError(
            f"{rule} needs the clean gradient: use it as the descent of "
            "samax.sharpness_aware(ascent, descent), or pass clean_grad= to update."
        )
    return clean_grad


def is_masked(leaf: object) -> bool:
    """Whether a leaf is one that `optax.masked` hides."""
    return isinstance(leaf, optax.MaskedNode)


def _is_transformation(value: object) -> bool:
    return hasattr(value, "init") and hasattr(value, "update")


def _is_array(value: object) -> bool:
    return isinstance(value, (jax.Array, np.ndarray, np.generic, float, int))


def _show(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path) or "the root"


def _summary(tree: Any) -> str:
    text = str(jax.tree.structure(tree))
    return text if len(text) <= 200 else text[:197] + "..."
