"""SAGM: lowers the loss, the perturbed loss and the gap between them."""

from typing import Any

import optax

from samax._core.ascent import Mask, perturb_only, scale_by, scale_to_norm
from samax._core.checks import refuse_optimizer
from samax._core.combinator import sharpness_aware
from samax._core.descent import weighted
from samax._core.hyperparameters import Scalar, ScalarOrSchedule


def scale_to_norm_less(
    rho: ScalarOrSchedule, alpha: ScalarOrSchedule, eps: Scalar = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""SAM's perturbation less a step of descent, SAGM's ascent.

    $$ g \mapsto \left(\frac{\rho}{\lVert g \rVert + \texttt{eps}} - \alpha\right) g $$

    Args:
      rho: the radius, at least 0, or a schedule of it; see `scale_by_rho`.
      alpha: the length of the step of descent, at least 0, or a schedule.
      eps: added to the norm; see `normalize`.

    Returns:
      A transformation whose state is that of its two parts.

    Raises:
      ValueError: if a number is negative or not finite; in `init`, if a schedule is at some step.
    """
    up, down = scale_to_norm(rho, eps), scale_by("alpha", alpha)

    def init(params: optax.Params) -> tuple[optax.OptState, optax.OptState]:
        return up.init(params), down.init(params)

    def update(
        updates: optax.Updates,
        state: tuple[optax.OptState, optax.OptState],
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, tuple[optax.OptState, optax.OptState]]:
        del extra_args
        ascent, up_state = up.update(updates, state[0], params)
        descent, down_state = down.update(updates, state[1], params)
        return optax.tree.sub(ascent, descent), (up_state, down_state)

    return optax.GradientTransformationExtraArgs(init, update)


@refuse_optimizer
def sagm(
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.001,
    *,
    eps: Scalar = 0.0,
    mask: Mask | None = None,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware gradient matching: both gradients, the perturbed one a little downhill.

    $$ \frac{g + \tilde g}{2}, \qquad
       \tilde g = \nabla L\left(w + \left(\frac{\rho}{\lVert g \rVert} - \alpha\right) g\right) $$

    The perturbation shrinks where gradients are long, and points downhill above
    $\lVert g \rVert = \rho / \alpha$. The scale of the loss enters it through alpha: under loss
    scaling by S pass `alpha / S`. With rho and alpha 0 it is the base optimizer.

    Args:
      rho: the perturbation radius, at least 0, or a schedule of it; 0.05 is the authors'.
      alpha: the length of the step of descent, at least 0, or a schedule; 0.001 is the authors'.
      eps: added to the norm; the authors' code has 1e-12, see `samax.normalize`.
      mask: which leaves are perturbed, with the norm over those alone; all are trained. None is all
        of them, otherwise see `samax.perturb_only`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      A transformation from the gradient to the mean of the two.

    Raises:
      ValueError: if `rho`, `alpha` or `eps` is negative or not finite.

    References:
      Wang et al., Sharpness-Aware Gradient Matching for Domain Generalization, 2023,
      [arXiv 2303.10353](https://arxiv.org/abs/2303.10353)

    Examples:
      >>> import optax, samax
      >>> tx = optax.chain(samax.sagm(rho=0.05, alpha=0.001), optax.adam(5e-5))
    """
    ascent = perturb_only(scale_to_norm_less(rho, alpha, eps), mask)
    return sharpness_aware(ascent, weighted(0.5), track=track)
