"""Descent parts: rules that make one direction out of the clean and the perturbed gradient.

Each is a transformation of the perturbed gradient that receives the clean one as the extra
argument `clean_grad`; it is the `descent` of `samax.sharpness_aware`. `optax.identity()` is SAM's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from samax._core.checks import (
    Scalar,
    ScalarOrSchedule,
    check_callable,
    check_scalar,
    check_schedule,
    check_transformation,
    require_clean_gradient,
)
from samax._core.numerics import at, norm, normalized, start_count, tree_wide_dtype, vdot

WeightRule: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


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
      ValueError: if `weight` is negative or not finite, or a schedule that is at some step.
    """
    check_schedule("weight", weight)

    def update(
        updates: optax.Updates,
        state: optax.ScaleByScheduleState,
        params: optax.Params | None = None,
        *,
        clean_grad: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        del params, extra_args
        clean = require_clean_gradient("weighted", clean_grad)
        direction = _interpolate(clean, updates, at(weight, state.count))
        return direction, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(start_count, update)


def threshold_rule(
    chi: Scalar = 1.1, gamma: Scalar = 0.1, delta: Scalar | None = None
) -> WeightRule:
    r"""The default rule of SAMAR's adaptive weight, before it is clipped to its bounds.

    $$ u(\lambda, r) = \begin{cases} \chi \lambda & r \ge 1 + \gamma \\
       \lambda / \chi & r \le 1 - \delta \\ \lambda & \text{otherwise} \end{cases} $$

    Args:
      chi: the factor, at least 1.
      gamma: how far the sharpness ratio must rise above 1 for the weight to grow, at least 0.
      delta: how far it must fall below 1 for the weight to shrink, in [0, 1]. The default
        `gamma / (1 + gamma)` makes a rise and the fall that undoes it cross their thresholds
        together; `delta = gamma` makes the weight drift upwards under noise.

    Returns:
      The function $u$.

    Raises:
      ValueError: if an argument is outside its range.
    """
    check_scalar("chi", chi, low=1.0)
    check_scalar("gamma", gamma)
    if delta is None:
        delta = gamma / (1.0 + gamma)
    check_scalar("delta", delta, high=1.0)

    def rule(weight: jax.Array, ratio: jax.Array) -> jax.Array:
        return jnp.where(
            ratio >= 1.0 + gamma,
            chi * weight,
            jnp.where(ratio <= 1.0 - delta, weight / chi, weight),
        )

    return rule


class AdaptiveWeightState(NamedTuple):
    """SAMAR's state.

    Attributes:
      adaptive_weight: lambda of the next step.
      sharpness_ratio: r of the last step, 1 before there is one.
      smoothed_grad_norm: the moving average of the clean gradient's norm, 0 before there is one.
    """

    adaptive_weight: jax.Array
    sharpness_ratio: jax.Array
    smoothed_grad_norm: jax.Array


def adaptive_weight(
    initial_weight: Scalar = 1.0,
    rule: WeightRule | None = None,
    *,
    bounds: tuple[Scalar, Scalar] | None = None,
    smoothing: Scalar = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs the sharpness with SAMAR's weight, which follows the sharpness of the landscape.

    $$ (g_k, \tilde g_k) \mapsto g_k + \lambda_k (\tilde g_k - g_k), \qquad
       \lambda_{k+1} = \mathrm{clip}(u(\lambda_k, r_k), \lambda_{\min}, \lambda_{\max}) $$

    $$ r_k = \frac{m_k}{m_{k-1}}, \quad r_0 = 1, \qquad
       m_k = \beta m_{k-1} + (1 - \beta) \lVert g_k \rVert, \quad m_0 = \lVert g_0 \rVert $$

    The ratio estimates that of successive sharpnesses $\rho \lVert g \rVert$: above 1 the region
    is sharper and the weight grows, below 1 it is flatter and the weight shrinks. A zero previous
    norm, or a norm that is not finite, carries no information and counts as ratio 1.

    Args:
      initial_weight: lambda of the first step, at least 0; 1 starts as SAM.
      rule: the function `u(weight, ratio) -> weight`; `threshold_rule()` if None.
      bounds: lambda's bounds, `(0.5, 2)` times the initial weight if None.
      smoothing: the decay beta of the norm's moving average, in [0, 1). With minibatch noise the
        raw ratio (0) carries almost no signal and the weight becomes a random walk between its
        bounds.

    Returns:
      A descent rule. Read its state with `optax.tree.get(state, "adaptive_weight")` and
      `optax.tree.get(state, "sharpness_ratio")`.

    Raises:
      ValueError: if an argument is outside its range, or the bounds do not hold the initial weight.
    """
    check_scalar("initial_weight", initial_weight)
    check_scalar("smoothing", smoothing, high=1.0, include_high=False)
    rule = threshold_rule() if rule is None else rule
    check_callable("rule", rule, "(weight, ratio) -> weight")
    lowest, highest = (0.5 * initial_weight, 2.0 * initial_weight) if bounds is None else bounds
    if not any(isinstance(x, jax.core.Tracer) for x in (initial_weight, lowest, highest)):
        check_scalar("bounds[1]", highest)
        low, high = np.asarray(lowest).item(), np.asarray(highest).item()
        check_scalar("bounds[0]", low, high=high)
        check_scalar("initial_weight", initial_weight, low=low, high=high)

    def init(params: optax.Params) -> AdaptiveWeightState:
        dtype = tree_wide_dtype(params)
        return AdaptiveWeightState(
            adaptive_weight=jnp.asarray(initial_weight, dtype),
            sharpness_ratio=jnp.ones((), dtype),
            smoothed_grad_norm=jnp.zeros((), dtype),
        )

    def update(
        updates: optax.Updates,
        state: AdaptiveWeightState,
        params: optax.Params | None = None,
        *,
        clean_grad: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaptiveWeightState]:
        del params, extra_args
        clean = require_clean_gradient("adaptive_weight", clean_grad)
        weight, _, previous = state
        current = norm(clean).astype(previous.dtype)
        started = previous > 0
        smoothed = jnp.where(started, smoothing * previous + (1.0 - smoothing) * current, current)
        smoothed = jnp.where(jnp.isfinite(current), smoothed, previous)
        ratio = jnp.where(started, smoothed / jnp.where(started, previous, 1.0), 1.0)
        next_weight = jnp.clip(rule(weight, ratio), lowest, highest)
        state = AdaptiveWeightState(
            adaptive_weight=next_weight.astype(weight.dtype),
            sharpness_ratio=ratio.astype(weight.dtype),
            smoothed_grad_norm=smoothed.astype(weight.dtype),
        )
        return _interpolate(clean, updates, weight), state

    return optax.GradientTransformationExtraArgs(init, update)


def surrogate_gap(alpha: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Lowers the perturbed loss and the surrogate gap between it and the clean one, as GSAM does.

    $$ (g, \tilde g) \mapsto \tilde g - \alpha_t \, g_\perp, \qquad
       g_\perp = g - \frac{\langle g, \tilde g \rangle}{\lVert \tilde g \rVert^2} \, \tilde g $$

    The component of the clean gradient orthogonal to the perturbed one is removed: to first order
    the perturbed loss does not change, and the gap shrinks. A zero perturbed gradient has no
    orthogonal component, and the direction is zero.

    Args:
      alpha: how much of the component is removed, at least 0, or a schedule; 0 is SAM.

    Returns:
      A descent rule.

    Raises:
      ValueError: if `alpha` is negative or not finite, or a schedule that is at some step.
    """
    check_schedule("alpha", alpha)

    def update(
        updates: optax.Updates,
        state: optax.ScaleByScheduleState,
        params: optax.Params | None = None,
        *,
        clean_grad: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        del params, extra_args
        clean = require_clean_gradient("surrogate_gap", clean_grad)
        unit = normalized(updates)
        # The perturbed gradient has no orthogonal component: that of the difference is the same,
        # loses no digits where the two gradients are close, and is exactly zero at rho = 0.
        difference = jax.tree.map(_difference, clean, updates)
        along = vdot(difference, unit)
        # The unit vector is zero where the perturbed gradient is zero or not finite.
        strength = jnp.where(norm(unit) > 0, at(alpha, state.count), 0.0)

        def remove(d: jax.Array, perturbed: jax.Array, u: jax.Array) -> jax.Array:
            orthogonal = d - along.astype(d.dtype) * u
            return perturbed + strength.astype(d.dtype) * orthogonal

        direction = jax.tree.map(remove, difference, updates, unit)
        return direction, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(start_count, update)


class DecoupledState(NamedTuple):
    """The state of the wrapped optimizer, and the number of updates for the schedules."""

    optimizer: optax.OptState
    step: jax.Array


def decoupled(
    optimizer: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    r"""Steps with the base optimizer on the clean gradient, and apart from it on the sharpness.

    $$ (g, \tilde g) \mapsto \mathrm{optimizer}(g) - \eta_t \lambda_t \, (\tilde g - g) $$

    The sharpness term stays out of the optimizer's momentum and preconditioner, as decoupled
    weight decay does. Unlike the other rules this one gives the final update of the parameters: no
    optimizer follows it in the chain.

    Args:
      optimizer: the base optimizer, learning rate included.
      learning_rate: the same learning rate, a number or a schedule, for the sharpness term.
      weight: the weight lambda of the sharpness, at least 0, or a schedule of it.

    Returns:
      A descent rule.

    Raises:
      ValueError: if `learning_rate` or `weight` is negative or not finite.
    """
    check_transformation("optimizer", optimizer)
    check_schedule("learning_rate", learning_rate)
    check_schedule("weight", weight)
    base = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> DecoupledState:
        return DecoupledState(optimizer=base.init(params), step=jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates,
        state: DecoupledState,
        params: optax.Params | None = None,
        *,
        clean_grad: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DecoupledState]:
        clean = require_clean_gradient("decoupled", clean_grad)
        updates_of_base, base_state = base.update(clean, state.optimizer, params, **extra_args)
        scale = at(learning_rate, state.step) * at(weight, state.step)
        updates = jax.tree.map(
            lambda u, g, p: u - (scale * _difference(g, p)).astype(u.dtype),
            updates_of_base,
            clean,
            updates,
        )
        return updates, DecoupledState(base_state, optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init, update)


def _interpolate(clean: optax.Updates, perturbed: optax.Updates, weight: jax.Array) -> Any:
    """`clean + weight (perturbed - clean)`."""
    return jax.tree.map(
        lambda g, p: g + (weight * _difference(g, p)).astype(g.dtype), clean, perturbed
    )


def _difference(clean: jax.Array, perturbed: jax.Array) -> jax.Array:
    """`perturbed - clean`, and zero, not NaN, where `clean` is not finite."""
    return jnp.where(jnp.isfinite(clean), perturbed - clean, 0.0)
