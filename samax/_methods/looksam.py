"""LookSAM: the steps between two ascents reuse what the last one found."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samax._core.ascent import Mask, perturb_only, scale_to_norm
from samax._core.checks import refuse_optimizer, require_clean_gradient
from samax._core.combinator import sharpness_aware
from samax._core.hyperparameters import Scalar, ScalarOrSchedule, check_scalar
from samax._core.numerics import max_abs, norm, normalized, orthogonal, widen
from samax._core.occasionally import occasionally
from samax._core.policies import every


class ReuseState(NamedTuple):
    """The unit direction that is reused, zero before there is one."""

    direction: optax.Updates


def reuse_orthogonal(alpha: Scalar) -> optax.GradientTransformationExtraArgs:
    r"""Keeps what an ascent adds to the gradient, and adds it on the plain steps, as LookSAM does.

    $$ \text{ascended:} \quad (g, \tilde g) \mapsto \tilde g, \qquad
       v = \mathrm{unit}\left(\tilde g - \frac{\langle \tilde g, g \rangle}{\lVert g \rVert^2} \, g
       \right) \qquad\quad
       \text{plain:} \quad g \mapsto g + \alpha \lVert g \rVert \, v $$

    Inner products and norms are over all leaves.

    Args:
      alpha: the length of what is added, in units of the gradient's, at least 0.

    Returns:
      A descent rule, for a transformation inside `samax.occasionally`, which tells it `ascended`;
      its state is one copy of the parameters, in float32 or wider.

    Raises:
      ValueError: if `alpha` is negative or not finite.
    """
    check_scalar("alpha", alpha)

    def init(params: optax.Params) -> ReuseState:
        return ReuseState(optax.tree.zeros_like(widen(params)))

    def update(
        updates: optax.Updates,
        state: ReuseState,
        params: optax.Params | None = None,
        *,
        clean_grad: optax.Updates | None = None,
        perturbation: optax.Updates | None = None,
        ascended: bool = True,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ReuseState]:
        del params, extra_args
        clean = require_clean_gradient("reuse_orthogonal", clean_grad)
        if not ascended:
            length = alpha * norm(clean)
            return jax.tree.map(
                lambda g, v: g + (length * v).astype(g.dtype), clean, state.direction
            ), state
        unit = normalized(clean)
        # The clean gradient has no orthogonal component, so that of the difference is the same.
        found = normalized(orthogonal(optax.tree.sub(updates, clean), unit))
        # At rho = 0 it is rounding alone, which must not be made a unit vector.
        moved = True if perturbation is None else max_abs(perturbation) != 0
        kept = jax.tree.map(lambda v: jnp.where(moved, v, 0.0), found)
        return updates, ReuseState(kept)

    return optax.GradientTransformationExtraArgs(init, update)


@refuse_optimizer
def looksam(
    rho: ScalarOrSchedule = 0.05,
    k: int = 5,
    alpha: Scalar = 0.7,
    *,
    eps: Scalar = 0.0,
    mask: Mask | None = None,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: SAM every k-th step, and its direction reused on the steps between.

    $$ \tilde g = \nabla L\left(w + \rho \, \frac{g}{\lVert g \rVert}\right) \quad
       \text{where } t \bmod k = 0, \qquad\quad g + \alpha \lVert g \rVert \, v \quad
       \text{in between} $$

    with v the unit vector of the part of the last $\tilde g$ that is orthogonal to its g. Inner
    products and norms are over all leaves; ports with those of each tensor are another method. The
    steps between cost one gradient: see `samax.occasionally`, whose `ascend=` it takes too.

    Args:
      rho: the perturbation radius, at least 0, or a schedule of it.
      k: the period, at least 1; 1 is SAM. 5 is the paper's.
      alpha: the length of what is added between, in units of the gradient's, at least 0; 0.7 is the
        paper's for vision transformers, and small data need about 0.3.
      eps: added to the norm; see `samax.normalize`.
      mask: which leaves are perturbed, with the norm over those alone; all are trained. None is all
        of them, otherwise see `samax.perturb_only`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      A transformation from the gradient to LookSAM's direction; its state is one copy of the
      parameters.

    Raises:
      ValueError: if `rho`, `alpha` or `eps` is negative or not finite, or `k` below 1.

    References:
      Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, 2022,
      [arXiv 2203.02714](https://arxiv.org/abs/2203.02714)

    Examples:
      >>> import optax, samax
      >>> tx = optax.chain(samax.looksam(rho=0.1, k=5, alpha=0.7), optax.sgd(0.1, momentum=0.9))
    """
    ascent = perturb_only(scale_to_norm(rho, eps), mask)
    return occasionally(sharpness_aware(ascent, reuse_orthogonal(alpha), track=track), every(k))
