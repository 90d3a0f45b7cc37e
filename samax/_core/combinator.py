"""The combinator: an ascent, a gradient at the perturbed point, a descent."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import (
    check_callable,
    check_count,
    check_parameters,
    check_same_tree,
    check_scalar_loss,
    check_transformation,
)
from samax._core.numerics import cast_like, norm, tree_wide_dtype, vdot, widen

# XLA runs convolutions inside loops about 22 times slower than outside on CPU, so short loops are
# unrolled; longer ones stay loops, so that the program stops growing.
UNROLLED_STEPS = 8

Evaluate: TypeAlias = Callable[[optax.Params], tuple[jax.Array | None, optax.Updates]]


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


class SharpnessAware(optax.GradientTransformationExtraArgs):
    """What `sharpness_aware` returns: a transformation that also shows the halves of its update.

    `samax.alternating` runs them in two calls.

    Attributes:
      ascend: `(grads, state, params, **extra) -> (point, state)`.
      descend: `(perturbed_grads, state, params, *, point, clean_grad, **extra) -> (direction,
        state)`.
      reads_clean_grad: `(params) -> bool`, whether `descend` does anything with the clean gradient.
      steps: how often `update` ascends.
    """

    ascend: Callable[..., tuple[optax.Params, "SharpnessAwareState"]]
    descend: Callable[..., tuple[optax.Updates, "SharpnessAwareState"]]
    reads_clean_grad: Callable[[optax.Params], bool]
    steps: int


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
) -> SharpnessAware:
    r"""Replaces the gradient by one made from the gradients here and at a perturbed point.

    $$ \epsilon = \mathrm{ascent}(g), \qquad \tilde g = \nabla L(w + \epsilon), \qquad
       \text{update} = \mathrm{descent}(\tilde g; \, g) $$

    The result is a gradient: clipping, weight decay and the base optimizer follow it in
    `optax.chain`. Its `update` evaluates the perturbed gradient and takes, besides the clean
    gradients, the state and the parameters, exactly one of

    - `value_fn(params) -> loss`, a pure function, differentiated here;
    - `grad_fn(params) -> grads`, a gradient pipeline of one's own;
    - `value_and_grad_fn(params) -> (loss, grads)`;

    and optionally `value`, the clean loss. They see the same batch and the same random keys as the
    clean pass, and what they would write to a model's state is discarded. Unknown extra arguments
    go to the two parts and are otherwise ignored, so that `optax.contrib.reduce_on_plateau` or a
    line search may stand in the same chain.

    With `steps=k` the ascent is repeated from the perturbed point, $w_{j+1} = w_j +
    \mathrm{ascent}(\nabla L(w_j))$, $w_0 = w$, at k gradients besides the clean one: with
    radius rho for each ascent the perturbed point lies within `k * rho`, so divide rho by k to stay
    within the ball of radius rho. The ascent's state moves once an update, with the clean gradient,
    so that schedules count training steps.

    Both parts work in float32 or wider whatever the gradients' dtype; the sum $w + \epsilon$ is
    formed there, rounded to the parameters' dtype, and the result has the dtype of the incoming
    gradients. Entries of $\epsilon$ that are not finite count as zero.

    Args:
      ascent: any transformation; it maps the gradient to what is ADDED to the parameters.
      descent: any transformation of the perturbed gradient; it receives the clean one as the extra
        argument `clean_grad`. The identity is SAM's.
      steps: how often the ascent is made, at least 1. Up to 8 the loop is unrolled, beyond it is a
        `lax` loop.
      track: whether the state keeps `SharpnessMetrics`, at the cost of a few reductions; read with
        `optax.tree.get(state, "perturbed_loss")`.

    Returns:
      A transformation to stand first in the chain, or behind what the ascent shall see too.

    Raises:
      ValueError: if `steps` is below 1; in `update`, if `params` or the function is missing, two
        functions are passed, or a pytree differs from the parameters'.
      TypeError: if a part is no transformation; in `init` and `update`, if a leaf is no real
        floating-point array or masked from outside, or a function returns an auxiliary output.

    Examples:
      SAM, composed from its parts:

      >>> import jax, jax.numpy as jnp, optax, samax
      >>> loss = lambda params: jnp.sum(params["w"] ** 2 * jnp.array([1.0, 10.0]))
      >>> sam = samax.sharpness_aware(
      ...     optax.chain(samax.normalize(), samax.scale_by_rho(0.05)), track=True)
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
        dtype = tree_wide_dtype(params)
        return SharpnessAwareState(
            ascent=ascent.init(wide),
            descent=descent.init(wide),
            # An array each: two of one buffer could not be donated.
            metrics=SharpnessMetrics(*(jnp.full((), jnp.nan, dtype) for _ in range(7)))
            if track
            else optax.EmptyState(),
        )

    def ascend(
        grads: optax.Updates, state: SharpnessAwareState, params: optax.Params, **extra_args: Any
    ) -> tuple[optax.Params, SharpnessAwareState]:
        eps, ascent_state = ascent.update(widen(grads), state.ascent, params, **extra_args)
        check_same_tree("the ascent's output", eps, params)
        return displace(params, eps), state._replace(ascent=ascent_state)

    def descend(
        perturbed: optax.Updates,
        state: SharpnessAwareState,
        params: optax.Params,
        *,
        point: optax.Params,
        clean_grad: optax.Updates,
        perturbed_value: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        clean, perturbed = widen(clean_grad), widen(perturbed)
        direction, descent_state = descent.update(
            perturbed, state.descent, params, clean_grad=clean, **extra_args
        )
        metrics = state.metrics
        if track:
            displacement = optax.tree.sub(widen(point), widen(params))
            measured = _measure(
                extra_args.get("value"), perturbed_value, clean, perturbed, displacement
            )
            metrics = cast_like(measured, metrics)
        return direction, state._replace(descent=descent_state, metrics=metrics)

    def update(
        updates: optax.Updates,
        state: SharpnessAwareState,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        value_fn: Callable[[optax.Params], jax.Array] | None = None,
        grad_fn: Callable[[optax.Params], optax.Updates] | None = None,
        value_and_grad_fn: Callable[[optax.Params], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        functions = {
            "value_fn": value_fn,
            "grad_fn": grad_fn,
            "value_and_grad_fn": value_and_grad_fn,
        }
        passed = {name: fn for name, fn in functions.items() if fn is not None}
        evaluate = evaluator(passed)
        check_inputs(updates, params, value)
        if value is not None:
            extra_args["value"] = value
        extra_args |= passed

        def ascend_again(_: int, point: optax.Params) -> optax.Params:
            return ascend(evaluate(point)[1], state, point, **extra_args)[0]

        point, ascended = ascend(updates, state, params, **extra_args)
        if steps <= UNROLLED_STEPS:
            for i in range(1, steps):
                point = ascend_again(i, point)
        else:
            point = jax.lax.fori_loop(1, steps, ascend_again, point)
        perturbed_value, perturbed = evaluate(point)
        direction, state = descend(
            perturbed,
            ascended,
            params,
            point=point,
            clean_grad=updates,
            perturbed_value=perturbed_value,
            **extra_args,
        )
        return cast_like(direction, updates), state

    def reads_clean_grad(params: optax.Params) -> bool:
        def run(params: optax.Params, clean: optax.Updates) -> Any:
            return descent.update(params, descent.init(params), params, clean_grad=clean)

        wide = widen(params)
        jaxpr = jax.make_jaxpr(run)(wide, wide).jaxpr
        read = {id(x) for equation in jaxpr.eqns for x in equation.invars}
        read |= {id(x) for x in jaxpr.outvars}
        return track or any(id(x) in read for x in jaxpr.invars[len(jax.tree.leaves(wide)) :])

    transformation = SharpnessAware(init, update)
    transformation.ascend, transformation.descend = ascend, descend
    transformation.reads_clean_grad, transformation.steps = reads_clean_grad, steps
    return transformation


def check_inputs(updates: optax.Updates, params: optax.Params | None, value: Any) -> None:
    """Raises unless `update` got parameters, gradients of their tree and a scalar loss, if any."""
    if params is None:
        raise ValueError(
            "samax needs params: call update(grads, state, params, value_fn=value_fn)."
        )
    check_parameters("params", params)
    check_parameters("updates", updates)
    check_same_tree("updates", updates, params)
    if value is not None:
        check_scalar_loss("value", value)


def evaluator(passed: dict[str, Callable[[optax.Params], Any]]) -> Evaluate:
    """The one evaluation function that was passed, as params -> (loss or None, gradients)."""
    if len(passed) != 1:
        raise ValueError(
            "samax needs exactly one of value_fn, grad_fn and value_and_grad_fn to evaluate the "
            f"perturbed gradient, got {' and '.join(passed) or 'none'}: call update(grads, state, "
            "params, value=loss, value_fn=value_fn). An optimizer wrapper that passes no extra "
            "arguments on (flax.training.TrainState.apply_gradients) cannot hold it."
        )
    ((name, fn),) = passed.items()
    check_callable(name, fn, "of the parameters")

    def scalar_loss(params: optax.Params) -> jax.Array:
        loss = fn(params)
        check_scalar_loss(f"{name}(params)", loss)
        return loss

    def evaluate(params: optax.Params) -> tuple[jax.Array | None, optax.Updates]:
        if name == "value_fn":
            return jax.value_and_grad(scalar_loss)(params)
        result = fn(params)
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


def displace(params: optax.Params, eps: optax.Updates) -> optax.Params:
    """`params + eps`, summed in float32 or wider; entries of `eps` that are not finite are zero."""
    moved = jax.tree.map(
        lambda w, e: w + jnp.where(jnp.isfinite(e), e, 0.0), widen(params), widen(eps)
    )
    return cast_like(moved, params)


def _measure(
    value: jax.typing.ArrayLike | None,
    perturbed_value: jax.Array | None,
    clean: optax.Updates,
    perturbed: optax.Updates,
    displacement: optax.Updates,
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
        perturbation_norm=norm(displacement),
    )
