"""ASAM: the neighbourhood scales with the parameters."""

import jax
import jax.numpy as jnp
import optax

from samax._core.ascent import Mask, normalize, perturb_only, scale_by_rho
from samax._core.checks import check_mask, refuse_optimizer
from samax._core.combinator import sharpness_aware
from samax._core.hyperparameters import Scalar, ScalarOrSchedule, check_scalar
from samax._core.numerics import widen


def scale_by_abs_params(t0: jax.typing.ArrayLike = 0.0) -> optax.GradientTransformation:
    r"""Multiplies elementwise by the size of the parameters, ASAM's operator.

    $$ g \mapsto T_w \, g, \qquad T_w = |w| + t_0 $$

    ASAM's perturbation is this part, `normalize`, this part again, and `scale_by_rho`. Wrap it in
    `optax.masked(..., mask)` to scale some leaves only, T = 1 for the others.

    Args:
      t0: added to `|w|`, at least 0, so that parameters near zero are perturbed too.

    Returns:
      A stateless transformation that needs `params`.

    Raises:
      ValueError: if `t0` is negative or not finite, or if `update` gets no `params`.
    """
    check_scalar("t0", t0)

    def scale(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        if params is None:
            raise ValueError("scale_by_abs_params needs params: pass them to update.")
        return jax.tree.map(
            lambda g, w: (g * (jnp.abs(w) + t0)).astype(g.dtype), updates, widen(params)
        )

    return optax.stateless(scale)


@refuse_optimizer
def asam(
    rho: ScalarOrSchedule = 0.5,
    *,
    t0: Scalar = 0.01,
    scaled: Mask | None = None,
    eps: Scalar = 0.0,
    mask: Mask | None = None,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: the neighbourhood scales with the parameters, so rescaling has no effect.

    $$ \tilde g = \nabla L\left(w + \rho \, \frac{T_w^2 g}{\lVert T_w g \rVert}\right), \qquad
       T_w = |w| + t_0 $$

    Two forms are in use, and the best rho differs severalfold between them, so say which one:
    every leaf is scaled (the default, and `t0=0` is davda54/sam's `adaptive=True`), or weights only
    and T = 1 for the biases, as in the authors' code (`scaled=samax.weights_only`). All leaves are
    perturbed in both.

    Args:
      rho: the radius relative to the parameters, at least 0, or a schedule of it; 0.5 is the
        paper's for CIFAR-10 (1.0 for CIFAR-100).
      t0: added to `|w|`; 0.01 is the authors'.
      scaled: which leaves are scaled: a pytree of booleans, or a function from parameters to one.
        None scales all of them.
      eps: added to the norm; see `samax.normalize`.
      mask: which leaves are perturbed, with the norm over those alone; all are trained. None is all
        of them, otherwise see `samax.perturb_only`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      A transformation from the gradient to the perturbed gradient.

    Raises:
      ValueError: if `rho`, `t0` or `eps` is negative or not finite.

    References:
      Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
      Neural Networks, 2021, [arXiv 2102.11600](https://arxiv.org/abs/2102.11600)

    Examples:
      >>> import optax, samax
      >>> tx = optax.chain(samax.asam(rho=0.5, scaled=samax.weights_only), optax.sgd(0.1))
    """
    scale: optax.GradientTransformation = scale_by_abs_params(t0)
    if scaled is not None:
        check_mask("scaled", scaled)
        scale = optax.masked(scale, scaled)
    ascent = optax.chain(scale, normalize(eps), scale, scale_by_rho(rho))
    return sharpness_aware(perturb_only(ascent, mask), track=track)
