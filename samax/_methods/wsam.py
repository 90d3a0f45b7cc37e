"""WSAM: a weighted sharpness, coupled with the base optimizer or decoupled from it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samax._core.ascent import Mask, perturb_only, scale_to_norm
from samax._core.checks import check_transformation, refuse_optimizer
from samax._core.combinator import sharpness_aware
from samax._core.descent import weighted
from samax._core.hyperparameters import (
    Scalar,
    ScalarOrSchedule,
    at,
    check_scalar,
    check_schedule,
    probe_schedule,
)
from samax._core.numerics import all_finite, cast_like, widen
from samax._methods.sam import sam


class DecoupledState(NamedTuple):
    """The states of the two transformations, and the number of updates for the schedules."""

    sharpness: optax.OptState
    optimizer: optax.OptState
    count: jax.Array  # type: ignore[assignment] # as in Optax's states


def decoupled(
    sharpness: optax.GradientTransformation,
    optimizer: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    r"""Steps with the base optimizer on the clean gradient, and separately on the sharpness.

    $$ w \leftarrow w + \mathrm{optimizer}(g) - \eta_t \lambda_t \, (d - g) $$

    with d the direction of a sharpness-aware transformation, $\tilde g$ for SAM. The sharpness term
    stays out of the optimizer's momentum and preconditioner, as decoupled weight decay does. A
    gradient with a non-finite entry has no sharpness: the optimizer sees it as it is.

    Args:
      sharpness: `samax.sam(rho)` or another transformation from the gradient to a direction.
      optimizer: the base optimizer, learning rate included.
      learning_rate: the same learning rate, a number or a schedule, for the sharpness term.
      weight: the weight lambda of the sharpness, at least 0, or a schedule of it.

    Returns:
      An optimizer: its updates are final, nothing follows it in the chain.

    Raises:
      ValueError: if `learning_rate` or `weight` is negative or not finite; in `init`, if a schedule
        is at some step.

    Examples:
      ASAM with the sharpness kept out of Adam's moments:

      >>> import optax, samax
      >>> tx = samax.decoupled(samax.asam(0.5), optax.adam(1e-3), 1e-3, weight=1.0)
    """
    check_transformation("sharpness", sharpness)
    check_transformation("optimizer", optimizer)
    check_schedule("learning_rate", learning_rate)
    check_schedule("weight", weight)
    inner = optax.with_extra_args_support(sharpness)
    base = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> DecoupledState:
        probe_schedule("learning_rate", learning_rate)
        probe_schedule("weight", weight)
        return DecoupledState(
            inner.init(params), base.init(widen(params)), jnp.zeros((), jnp.int32)
        )

    def update(
        updates: optax.Updates,
        state: DecoupledState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DecoupledState]:
        clean = widen(updates)
        direction, inner_state = inner.update(clean, state.sharpness, params, **extra_args)
        step, base_state = base.update(clean, state.optimizer, params, **extra_args)
        scale = at(learning_rate, state.count) * at(weight, state.count)
        finite = all_finite(clean)
        step = jax.tree.map(
            lambda u, g, d: u - jnp.where(finite, (scale * (d - g)).astype(u.dtype), 0.0),
            step,
            clean,
            direction,
        )
        count = optax.safe_increment(state.count)
        return cast_like(step, updates), DecoupledState(inner_state, base_state, count)

    return optax.GradientTransformationExtraArgs(init, update)


@refuse_optimizer
def wsam(
    rho: ScalarOrSchedule = 0.05,
    gamma: Scalar = 0.9,
    *,
    eps: Scalar = 0.0,
    mask: Mask | None = None,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighted SAM, coupled: the base optimizer sees the weighted sum of both gradients.

    $$ g + \frac{\gamma}{1 - \gamma} \, (\tilde g - g), \qquad
       \tilde g = \nabla L\left(w + \rho \, \frac{g}{\lVert g \rVert}\right) $$

    The paper's algorithm keeps the sharpness out of the base optimizer's momentum and
    preconditioner: that is `decoupled_wsam`. With plain SGD the two are the same.

    Args:
      rho: the perturbation radius, at least 0, or a schedule of it.
      gamma: in [0, 1): 0 is the base optimizer, 1/2 is SAM, and 0.9, the authors' default, gives
        the sharpness nine times the weight of SAM's.
      eps: added to the norm; see `samax.normalize`.
      mask: which leaves are perturbed, with the norm over those alone; all are trained. None is all
        of them, otherwise see `samax.perturb_only`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      A transformation from the gradient to the weighted sum.

    Raises:
      ValueError: if `rho` or `eps` is negative or not finite, or `gamma` is outside [0, 1).

    References:
      Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization
      Term, 2023, [arXiv 2305.15817](https://arxiv.org/abs/2305.15817)

    Examples:
      >>> import optax, samax
      >>> tx = optax.chain(samax.wsam(rho=0.05, gamma=0.9), optax.adam(1e-3))
    """
    ascent = perturb_only(scale_to_norm(rho, eps), mask)
    return sharpness_aware(ascent, weighted(_odds(gamma)), track=track)


def decoupled_wsam(
    optimizer: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    *,
    rho: ScalarOrSchedule = 0.05,
    gamma: Scalar = 0.9,
    eps: Scalar = 0.0,
    mask: Mask | None = None,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighted SAM as the paper has it: the sharpness term stays out of the base optimizer.

    $$ w \leftarrow w + \mathrm{optimizer}(g)
       - \eta_t \, \frac{\gamma}{1 - \gamma} \, (\tilde g - g) $$

    Args:
      optimizer: the base optimizer, learning rate included; it sees the clean gradient.
      learning_rate: the same learning rate, a number or a schedule, for the sharpness term.
      rho: the perturbation radius, at least 0, or a schedule of it.
      gamma: in [0, 1); 0 is the base optimizer. See `wsam`.
      eps: added to the norm; see `samax.normalize`.
      mask: which leaves are perturbed, with the norm over those alone; all are trained. None is all
        of them, otherwise see `samax.perturb_only`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      An optimizer: its updates are final, nothing follows it in the chain.

    Raises:
      ValueError: if a number is negative or not finite, or `gamma` is outside [0, 1).

    References:
      Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization
      Term, 2023, [arXiv 2305.15817](https://arxiv.org/abs/2305.15817)

    Examples:
      >>> import optax, samax
      >>> rate = optax.cosine_decay_schedule(1e-3, 1000)
      >>> tx = samax.decoupled_wsam(optax.adam(rate), rate, rho=0.05, gamma=0.9)
    """
    sharpness = sam(rho, eps=eps, mask=mask, track=track)
    return decoupled(sharpness, optimizer, learning_rate, _odds(gamma))


def _odds(gamma: Scalar) -> Scalar:
    """The weight gamma / (1 - gamma) of WSAM."""
    check_scalar("gamma", gamma, high=1.0, include_high=False)
    return gamma / (1.0 - gamma)
