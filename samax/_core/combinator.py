"""The combinator: an ascent, a gradient at the perturbed point, a descent."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import (
    check_count,
    check_parameters,
    check_same_tree,
    check_transformation,
)
from samax._core.evaluation import check_inputs, evaluator
from samax._core.loop import UNROLLED_STEPS
from samax._core.numerics import (
    all_finite,
    cast_like,
    difference,
    displace,
    norm,
    tree_wide_dtype,
    vdot,
    widen,
)


class SharpnessMetrics(NamedTuple):
    """Scalars of the last update, in float32 or wider.

    Attributes:
      clean_loss: the loss at the parameters, from `value=`; NaN where that was not passed.
      perturbed_loss: the loss at the perturbed point; NaN where only `grad_fn` was passed.
      loss_gap: their difference, a first-order measure of sharpness.
      clean_grad_norm: the norm of the gradient that came in.
      perturbed_grad_norm: the norm of the gradient at the perturbed point.
      grad_cosine: the cosine between the two, 0 where one is zero.
      perturbation_norm: the norm of the perturbation as realized, `||fl(w + eps) - w||`. It falls
        short of rho where low-precision parameters round the perturbation away.
    """

    clean_loss: jax.Array
    perturbed_loss: jax.Array
    loss_gap: jax.Array
    clean_grad_norm: jax.Array
    perturbed_grad_norm: jax.Array
    grad_cosine: jax.Array
    perturbation_norm: jax.Array


class SharpnessAwareState(NamedTuple):
    """The states of the two parts, and the tracked scalars (empty unless tracked)."""

    ascent: optax.OptState
    descent: optax.OptState
    metrics: SharpnessMetrics | optax.EmptyState


def sharpness_aware(
    ascent: optax.GradientTransformation,
    descent: optax.GradientTransformation = optax.identity(),
    *,
    steps: int = 1,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by one made from the gradients here and at a perturbed point.

    $$ \epsilon = \mathrm{ascent}(g), \qquad \tilde g = \nabla L(w + \epsilon), \qquad
       \text{update} = \mathrm{descent}(\tilde g; \, g) $$

    The result is a gradient: clipping, weight decay and the base optimizer follow it in
    `optax.chain`. Its `update` evaluates the perturbed gradient and takes, besides the clean
    gradients, the state and the parameters, exactly one of

    - `value_fn(params, ...) -> loss`, a pure function, differentiated here;
    - `grad_fn(params, ...) -> grads`, a gradient pipeline of your own;
    - `value_and_grad_fn(params, ...) -> (loss, grads)`;

    and optionally `value`, the clean loss. The function receives those of `update`'s other extra
    arguments that it names: `value_fn=loss_fn, batch=batch` for a `loss_fn(params, batch)`. It sees
    the same batch and the same random keys as the clean pass, and what it would write to a model's
    state is discarded. All extra arguments go to the two parts too and are otherwise ignored, so
    that `optax.contrib.reduce_on_plateau` or a line search may stand in the same chain.

    With `steps=k` the ascent is repeated from the perturbed point, $w_{j+1} = w_j +
    \mathrm{ascent}(\nabla L(w_j))$, $w_0 = w$, at k gradients besides the clean one: with
    radius rho for each ascent the perturbed point lies within `k * rho`, so divide rho by k to stay
    within the ball of radius rho. The ascent's state moves once an update, with the clean gradient,
    so that schedules count training steps.

    Both parts work in float32 or wider whatever the gradients' dtype; the sum $w + \epsilon$ is
    formed there, rounded to the parameters' dtype, and the result has the dtype of the incoming
    gradients.

    A gradient with a non-finite entry is not perturbed: the states of both parts stay, and the
    gradient is evaluated at w and passed on as it is, for the base optimizer or
    `optax.apply_if_finite` to see. A NaN that a part makes of a finite gradient is not covered up.

    Args:
      ascent: any transformation; it maps the gradient to what is ADDED to the parameters.
      descent: any transformation of the perturbed gradient. As extra arguments it receives
        `clean_grad`; `perturbation`, as realized in the parameters' dtype; and where they are known
        `value`, the clean loss, and `perturbed_value`. The identity is SAM's; `samax.rule` makes
        one of a function.
      steps: how often the ascent is made, at least 1. Up to 8 the loop is unrolled, beyond it is a
        `lax` loop.
      track: whether the state keeps `SharpnessMetrics`, at the cost of a few reductions; read with
        `optax.tree.get(state, "perturbed_loss")`.

    Returns:
      A transformation to stand first in the chain, or after what the ascent should see too.

    Raises:
      ValueError: if `steps` is below 1; in `update`, if `params` or the function is missing, two
        functions are passed, or a pytree differs from the parameters'.
      TypeError: if a part is not a transformation; in `init` and `update`, if a leaf is not a real
        floating-point array or masked from outside, or a function returns an auxiliary output.

    Examples:
      SAM, composed from its parts:

      >>> import jax, jax.numpy as jnp, optax, samax
      >>> loss = lambda params: jnp.sum(params["w"] ** 2 * jnp.array([1.0, 10.0]))
      >>> sam = samax.sharpness_aware(samax.scale_to_norm(0.05), track=True)
      >>> tx = optax.chain(sam, optax.sgd(0.01))
      >>> params = {"w": jnp.array([1.0, 1.0])}
      >>> state = tx.init(params)
      >>> value, grads = jax.value_and_grad(loss)(params)
      >>> updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
      >>> params = optax.apply_updates(params, updates)
      >>> print(f"{optax.tree.get(state, 'loss_gap'):.3f}")
      1.030
    """
    check_transformation("ascent", ascent)
    check_transformation("descent", descent)
    check_count("steps", steps)
    ascent = optax.with_extra_args_support(ascent)
    descent = optax.with_extra_args_support(descent)

    def init(params: optax.Params) -> SharpnessAwareState:
        check_parameters("params", params)
        wide = widen(params)
        return SharpnessAwareState(
            ascent=ascent.init(wide),
            descent=descent.init(wide),
            metrics=untracked(SharpnessMetrics, params) if track else optax.EmptyState(),
        )

    def update(
        updates: optax.Updates,
        state: SharpnessAwareState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        evaluate = evaluator(extra_args)
        check_inputs(updates, params, extra_args)
        clean = widen(updates)
        finite = all_finite(clean)

        def ascend(grads: optax.Updates, point: optax.Params) -> tuple[optax.Params, Any]:
            eps, ascent_state = ascent.update(widen(grads), state.ascent, point, **extra_args)
            check_same_tree("the ascent's output", eps, point)
            return optax.tree.where(finite, displace(point, eps), point), ascent_state

        def ascend_again(_: int, point: optax.Params) -> optax.Params:
            return ascend(evaluate(point)[1], point)[0]

        point, ascent_state = ascend(clean, params)
        if steps <= UNROLLED_STEPS:
            for i in range(1, steps):
                point = ascend_again(i, point)
        else:
            point = jax.lax.fori_loop(1, steps, ascend_again, point)
        perturbed_value, grads = evaluate(point)
        perturbed, perturbation = widen(grads), difference(point, params)
        known = {} if perturbed_value is None else {"perturbed_value": perturbed_value}
        direction, descent_state = descent.update(
            perturbed,
            state.descent,
            params,
            **{**extra_args, **known, "clean_grad": clean, "perturbation": perturbation},
        )
        metrics = state.metrics
        if track:
            value = extra_args.get("value")
            measured = _measure(value, perturbed_value, clean, perturbed, perturbation)
            metrics = cast_like(measured, metrics)
        if direction is not perturbed:
            direction = optax.tree.where(finite, direction, perturbed)
        return cast_like(direction, updates), SharpnessAwareState(
            ascent=optax.tree.where(finite, ascent_state, state.ascent),
            descent=optax.tree.where(finite, descent_state, state.descent),
            metrics=metrics,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def untracked(metrics: Any, params: optax.Params) -> Any:
    """Metrics before the first update: NaN, an array each, since no buffer is donated twice."""
    dtype = tree_wide_dtype(params)
    return metrics(*(jnp.full((), jnp.nan, dtype) for _ in metrics._fields))


def _measure(
    value: jax.typing.ArrayLike | None,
    perturbed_value: jax.Array | None,
    clean: optax.Updates,
    perturbed: optax.Updates,
    perturbation: optax.Updates,
) -> SharpnessMetrics:
    clean_loss = jnp.asarray(jnp.nan if value is None else value)
    perturbed_loss = jnp.asarray(jnp.nan if perturbed_value is None else perturbed_value)
    clean_norm, perturbed_norm = norm(clean), norm(perturbed)
    scale = clean_norm * perturbed_norm
    cosine = vdot(clean, perturbed) / jnp.where(scale > 0, scale, 1.0)
    return SharpnessMetrics(
        clean_loss=clean_loss,
        perturbed_loss=perturbed_loss,
        loss_gap=perturbed_loss - clean_loss,
        clean_grad_norm=clean_norm,
        perturbed_grad_norm=perturbed_norm,
        grad_cosine=cosine,
        perturbation_norm=norm(perturbation),
    )
