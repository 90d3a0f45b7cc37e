"""GSAM: lowers the perturbed loss, and its gap to the clean one."""

import jax
import jax.numpy as jnp
import optax

from samax._core.ascent import Mask, perturb_only, scale_to_norm
from samax._core.checks import refuse_optimizer
from samax._core.combinator import sharpness_aware
from samax._core.descent import scheduled_rule
from samax._core.hyperparameters import Scalar, ScalarOrSchedule
from samax._core.numerics import norm, normalized, orthogonal


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
      ValueError: if `alpha` is negative or not finite; in `init`, if a schedule is at some step.
    """

    def remove(
        alpha: jax.typing.ArrayLike, clean: optax.Updates, perturbed: optax.Updates
    ) -> optax.Updates:
        unit = normalized(perturbed)
        # The perturbed gradient has no orthogonal component: that of the difference is the same,
        # loses no digits where the two gradients are close, and is exactly zero at rho = 0.
        removed = orthogonal(optax.tree.sub(perturbed, clean), unit)
        strength = jnp.where(norm(unit) > 0, alpha, 0.0)  # a zero gradient has no direction
        return jax.tree.map(lambda p, r: p + strength.astype(r.dtype) * r, perturbed, removed)

    return scheduled_rule("surrogate_gap", "alpha", alpha, remove)


@refuse_optimizer
def gsam(
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.2,
    *,
    eps: Scalar = 0.0,
    mask: Mask | None = None,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Surrogate-gap-guided SAM: lowers the perturbed loss and its gap to the clean one.

    $$ \tilde g - \alpha \, \left(g - \frac{\langle g, \tilde g \rangle}{\lVert \tilde g \rVert^2}
       \, \tilde g\right), \qquad
       \tilde g = \nabla L\left(w + \rho \, \frac{g}{\lVert g \rVert}\right) $$

    The paper lets rho follow the learning rate between two bounds; the example of
    `samax.scale_by_rho` writes that schedule.

    Args:
      rho: the perturbation radius, at least 0, or a schedule of it.
      alpha: how much of the orthogonal component is removed, at least 0, or a schedule; 0 is SAM,
        0.2 is what the authors' CIFAR-10 example uses.
      eps: added to the norm; see `samax.normalize`.
      mask: which leaves are perturbed, with the norm over those alone; all are trained. None is all
        of them, otherwise see `samax.perturb_only`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      A transformation from the gradient to GSAM's direction.

    Raises:
      ValueError: if `rho`, `alpha` or `eps` is negative or not finite.

    References:
      Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, 2022,
      [arXiv 2203.08065](https://arxiv.org/abs/2203.08065)

    Examples:
      >>> import optax, samax
      >>> tx = optax.chain(samax.gsam(rho=0.05, alpha=0.2), optax.sgd(0.1, momentum=0.9))
    """
    ascent = perturb_only(scale_to_norm(rho, eps), mask)
    return sharpness_aware(ascent, surrogate_gap(alpha), track=track)
