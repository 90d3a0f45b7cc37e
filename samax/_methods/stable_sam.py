"""StableSAM: the perturbed gradient at the length of the clean one."""

import jax
import jax.numpy as jnp
import optax

from samax._core.ascent import Mask, perturb_only, scale_to_norm
from samax._core.checks import refuse_optimizer
from samax._core.combinator import sharpness_aware
from samax._core.descent import rule
from samax._core.hyperparameters import Scalar, ScalarOrSchedule, check_scalar
from samax._core.numerics import max_abs, safe_norm


def match_clean_norm(eps: Scalar = 0.0) -> optax.GradientTransformationExtraArgs:
    r"""Gives the perturbed gradient the length of the clean one.

    $$ (g, \tilde g) \mapsto \frac{\lVert g \rVert}{\lVert \tilde g \rVert + \texttt{eps}} \,
       \tilde g $$

    The norms are over all leaves. A zero perturbed gradient has no direction and stays zero, and a
    gradient that was not perturbed is left as it is, bit for bit.

    Args:
      eps: added to the norm, at least 0.

    Returns:
      A descent rule.

    Raises:
      ValueError: if `eps` is negative or not finite.
    """
    check_scalar("eps", eps)

    def match(
        clean: optax.Updates, perturbed: optax.Updates, perturbation: optax.Updates | None = None
    ) -> optax.Updates:
        length = safe_norm(perturbed)
        ratio = jnp.where(
            length == 0, 0.0, safe_norm(clean) / jnp.where(length == 0, 1.0, length + eps)
        )
        # Where nothing was perturbed the gradients are the same; but their norms, compiled apart,
        # may differ in the last digit, and a product with 1 be fused with what follows.
        still = False if perturbation is None else max_abs(perturbation) == 0
        return jax.tree.map(lambda p: jnp.where(still, p, p * ratio.astype(p.dtype)), perturbed)

    return rule(match)


@refuse_optimizer
def stable_sam(
    rho: ScalarOrSchedule = 0.05,
    *,
    eps: Scalar = 0.0,
    mask: Mask | None = None,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""StableSAM: steps along the perturbed gradient as far as along the clean one.

    $$ \frac{\lVert g \rVert}{\lVert \tilde g \rVert} \, \tilde g, \qquad
       \tilde g = \nabla L\left(w + \rho \, \frac{g}{\lVert g \rVert}\right) $$

    Its stability is that of the base optimizer: near a minimum the steps shrink with g, where SAM's
    stay as long as the gradient at distance rho is. The form without normalization of the ascent is
    `samax.sharpness_aware(samax.scale_by_rho(rho), samax.match_clean_norm())`.

    Args:
      rho: the perturbation radius, at least 0, or a schedule of it.
      eps: added to both norms that are divided by; the authors' code has 1e-12.
      mask: which leaves are perturbed, with the norm over those alone; all are trained. None is all
        of them, otherwise see `samax.perturb_only`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      A transformation from the gradient to StableSAM's direction.

    Raises:
      ValueError: if `rho` or `eps` is negative or not finite.

    References:
      Tan et al., Stabilizing Sharpness-aware Minimization Through A Simple Renormalization
      Strategy, 2024, [arXiv 2401.07250](https://arxiv.org/abs/2401.07250)

    Examples:
      >>> import optax, samax
      >>> tx = optax.chain(samax.stable_sam(rho=0.1), optax.sgd(0.1))
    """
    ascent = perturb_only(scale_to_norm(rho, eps), mask)
    return sharpness_aware(ascent, match_clean_norm(eps), track=track)
