"""Descent parts: rules that make one direction out of the clean and the perturbed gradient.

Each is a transformation of the perturbed gradient, and the `descent` of `samax.sharpness_aware`. It
receives the clean gradient as the extra argument `clean_grad`, besides `perturbation`,
`perturbed_value` and `value` where they are known. `optax.identity()` is SAM's.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from samax._core.checks import check_callable, check_same_tree, require_clean_gradient
from samax._core.evaluation import named_arguments
from samax._core.hyperparameters import ScalarOrSchedule, scheduled


def weighted(weight: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Weighs the sharpness against the loss with a fixed or scheduled weight.

    $$ (g, \tilde g) \mapsto g + \lambda_t \, (\tilde g - g) $$

    The gradient of $L(w) + \lambda \, (L(w + \epsilon) - L(w))$ with $\epsilon$ held fixed: 0 is
    the base optimizer, 1 is SAM, above 1 sharpness counts more than in SAM.

    Args:
      weight: the weight lambda, at least 0, or a schedule of it.

    Returns:
      A descent rule.

    Raises:
      ValueError: if `weight` is negative or not finite; in `init`, if a schedule is at some step.
    """

    def weigh(
        weight: jax.typing.ArrayLike, clean: optax.Updates, perturbed: optax.Updates
    ) -> optax.Updates:
        return interpolate(clean, perturbed, weight)

    return scheduled_rule("weighted", "weight", weight, weigh)


def rule(fn: Callable[..., optax.Updates]) -> optax.GradientTransformationExtraArgs:
    r"""A descent of your own from a function of the two gradients.

    $$ (g, \tilde g) \mapsto \mathrm{fn}(g, \tilde g) $$

    Args:
      fn: `fn(clean, perturbed) -> direction`. Both are whole gradients, pytrees like the
        parameters in float32 or wider, so that norms and inner products can be global; leaf by leaf
        it is a `jax.tree.map`. Further arguments are passed by their names: `params`,
        `perturbation`, `perturbed_value`, `value`, and whatever else `update` was given.

    Returns:
      A descent rule without a state.

    Raises:
      TypeError: if `fn` is not a function; in `update`, if it fails on pytrees.
      ValueError: in `update`, if it names what is not known there, or its direction is another
        pytree than the gradient.

    Examples:
      StableSAM, the perturbed gradient at the length of the clean one:

      >>> import optax, samax
      >>> stable = samax.rule(lambda clean, perturbed: optax.tree.scale(
      ...     optax.tree.norm(clean) / optax.tree.norm(perturbed), perturbed))
      >>> tx = optax.chain(
      ...     samax.sharpness_aware(samax.scale_to_norm(0.05), stable), optax.sgd(0.1))
    """
    check_callable("fn", fn, "(clean, perturbed) -> direction")
    named = list(named_arguments(fn).values())[1:]  # besides `clean` and `perturbed`

    def update(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        clean_grad: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        clean = require_clean_gradient("rule", clean_grad)
        known = extra_args | {"params": params}
        for parameter in named:
            if parameter.name not in known and parameter.default is inspect.Parameter.empty:
                raise ValueError(
                    f"The rule's function names {parameter.name}, which is not known here: pass it "
                    f"to update, as in update(grads, state, params, {parameter.name}=..., ...)."
                )
        arguments = {p.name: known[p.name] for p in named if p.name in known}
        try:
            direction = fn(clean, updates, **arguments)
        except TypeError as error:
            if isinstance(updates, jax.Array):
                raise
            raise TypeError(
                f"The rule's function failed on whole gradients, pytrees ({error}). Arithmetic on "
                "them is jax.tree.map(lambda g, p: ..., clean, perturbed), or that of optax.tree."
            ) from error
        check_same_tree("the rule's direction", direction, updates)
        return direction, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scheduled_rule(
    name: str,
    parameter: str,
    value: ScalarOrSchedule,
    fn: Callable[[jax.typing.ArrayLike, optax.Updates, optax.Updates], optax.Updates],
) -> optax.GradientTransformationExtraArgs:
    """A descent with one hyper-parameter: `fn(value, clean, perturbed) -> direction`."""

    def apply(
        value: jax.typing.ArrayLike,
        updates: optax.Updates,
        /,  # extra arguments of `update` may have any name
        *,
        clean_grad: optax.Updates | None = None,
        **extra_args: Any,
    ) -> optax.Updates:
        del extra_args
        return fn(value, require_clean_gradient(name, clean_grad), updates)

    return scheduled(parameter, value, apply)


def interpolate(
    clean: optax.Updates, perturbed: optax.Updates, weight: jax.typing.ArrayLike
) -> optax.Updates:
    """`clean + weight (perturbed - clean)`."""
    return jax.tree.map(lambda g, p: g + (weight * (p - g)).astype(g.dtype), clean, perturbed)
