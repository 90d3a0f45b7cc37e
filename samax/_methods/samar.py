"""SAMAR: the weight of the sharpness adapts to the landscape."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from samax._core.ascent import Mask, perturb_only, scale_to_norm
from samax._core.checks import check_callable, refuse_optimizer, require_clean_gradient
from samax._core.combinator import sharpness_aware
from samax._core.descent import interpolate
from samax._core.hyperparameters import Scalar, ScalarOrSchedule, check_scalar
from samax._core.numerics import norm, tree_wide_dtype

WeightRule: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


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
    norm carries no information and counts as ratio 1.

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
        ratio = jnp.where(started, smoothed / jnp.where(started, previous, 1.0), 1.0)
        next_weight = jnp.clip(rule(weight, ratio), lowest, highest)
        state = AdaptiveWeightState(
            adaptive_weight=next_weight.astype(weight.dtype),
            sharpness_ratio=ratio.astype(weight.dtype),
            smoothed_grad_norm=smoothed.astype(weight.dtype),
        )
        return interpolate(clean, updates, weight), state

    return optax.GradientTransformationExtraArgs(init, update)


@refuse_optimizer
def samar(
    rho: ScalarOrSchedule = 0.05,
    *,
    initial_weight: Scalar = 1.0,
    chi: Scalar = 1.1,
    gamma: Scalar = 0.1,
    delta: Scalar | None = None,
    bounds: tuple[Scalar, Scalar] | None = None,
    smoothing: Scalar = 0.9,
    rule: WeightRule | None = None,
    eps: Scalar = 0.0,
    mask: Mask | None = None,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization with adaptive regularization.

    $$ g_k + \lambda_k \, (\tilde g_k - g_k), \qquad
       \tilde g_k = \nabla L\left(w_k + \rho \, \frac{g_k}{\lVert g_k \rVert}\right) $$

    The weight $\lambda_k$ of the sharpness grows where the landscape becomes sharper and shrinks
    where it becomes flatter, told by the ratio of successive gradient norms; see
    `samax.adaptive_weight` for the update and `samax.threshold_rule` for the rule.

    The rule is this library's reading of the paper: its summary names three hyper-parameters, chi,
    gamma and delta, and no closed rule. Pass `rule` for another one. With the default smoothing the
    ratio rarely leaves 1 by as much as the default gamma, and lambda then stays where it starts:
    lower gamma (0.01 to 0.02 in this library's CIFAR-10 benchmark) for a weight that moves.

    Args:
      rho: the perturbation radius, at least 0, or a schedule of it.
      initial_weight: lambda of the first step, at least 0; 1 starts as SAM.
      chi: the factor by which lambda grows and shrinks, at least 1.
      gamma: how far the ratio must rise above 1 for lambda to grow, at least 0.
      delta: how far it must fall below 1 for lambda to shrink, in [0, 1]; None is
        `gamma / (1 + gamma)`.
      bounds: lambda's bounds; None is `(0.5, 2)` times the initial weight.
      smoothing: the decay of the gradient norm's moving average, in [0, 1); 0 is the raw ratio.
      rule: a function `(weight, ratio) -> weight` in place of the default one, which alone uses
        chi, gamma and delta. Under `optax.inject_hyperparams` name it in `static_args`.
      eps: added to the norm; see `samax.normalize`.
      mask: which leaves are perturbed, with the norm over those alone; all are trained. None is all
        of them, otherwise see `samax.perturb_only`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      A transformation from the gradient to the weighted sum. Read lambda and the ratio with
      `optax.tree.get(state, "adaptive_weight")` and `optax.tree.get(state, "sharpness_ratio")`.

    Raises:
      ValueError: if an argument is outside its range.

    References:
      Zou, Deng and Sun, Sharpness-Aware Minimization with Adaptive Regularization, 2024,
      [arXiv 2412.16854](https://arxiv.org/abs/2412.16854)

    Examples:
      >>> import jax.numpy as jnp, optax, samax
      >>> tx = optax.chain(samax.samar(rho=0.05), optax.sgd(0.1, momentum=0.9))
      >>> state = tx.init(jnp.zeros(3))
      >>> print(optax.tree.get(state, "adaptive_weight"))
      1.0
    """
    if rule is None:
        rule = threshold_rule(chi, gamma, delta)
    ascent = perturb_only(scale_to_norm(rho, eps), mask)
    descent = adaptive_weight(initial_weight, rule, bounds=bounds, smoothing=smoothing)
    return sharpness_aware(ascent, descent, track=track)
