"""VaSSO: the ascent follows a moving average of the gradients."""

import jax
import jax.numpy as jnp
import optax

from samax._core.ascent import Mask, perturb_only, scale_to_norm
from samax._core.checks import refuse_optimizer
from samax._core.combinator import sharpness_aware
from samax._core.hyperparameters import Scalar, ScalarOrSchedule, check_scalar
from samax._core.numerics import widen


def gradient_ema(theta: jax.typing.ArrayLike) -> optax.GradientTransformation:
    r"""Replaces the gradient by its exponential moving average, VaSSO's variance suppression.

    $$ d_0 = g_0, \qquad d_t = (1 - \theta) \, d_{t-1} + \theta \, g_t $$

    The average starts at the first gradient, so it needs no bias correction (which is what
    `optax.ema` would apply).

    Args:
      theta: the weight of the new gradient, in (0, 1]; 1 gives SAM.

    Returns:
      A transformation whose state holds the average in float32 or wider.

    Raises:
      ValueError: if `theta` is outside (0, 1].
    """
    check_scalar("theta", theta, high=1.0, include_low=False)

    def init(params: optax.Params) -> optax.EmaState:
        return optax.EmaState(
            count=jnp.zeros((), jnp.int32), ema=optax.tree.zeros_like(widen(params))
        )

    def update(
        updates: optax.Updates, state: optax.EmaState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmaState]:
        del params
        first = state.count == 0

        def average(g: jax.Array, d: jax.Array) -> jax.Array:
            return jnp.where(first, g, (1.0 - theta) * d + theta * g).astype(d.dtype)

        ema = jax.tree.map(average, widen(updates), state.ema)
        return ema, optax.EmaState(count=optax.safe_increment(state.count), ema=ema)

    return optax.GradientTransformation(init, update)


@refuse_optimizer
def vasso(
    rho: ScalarOrSchedule = 0.05,
    theta: Scalar = 0.9,
    *,
    eps: Scalar = 0.0,
    mask: Mask | None = None,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Variance-suppressed SAM: the ascent follows a moving average of the gradients.

    $$ d_0 = g_0, \quad d_t = (1 - \theta) \, d_{t-1} + \theta \, g_t, \qquad
       \tilde g = \nabla L\left(w + \rho \, \frac{d_t}{\lVert d_t \rVert}\right) $$

    Args:
      rho: the perturbation radius, at least 0, or a schedule of it.
      theta: the weight of the new gradient, in (0, 1]; 1 is SAM, smaller values suppress more
        variance. 0.9 is what the authors' published command uses.
      eps: added to the norm; the authors' code has 1e-7, see `samax.normalize`.
      mask: which leaves are perturbed, with the norm over those alone; all are trained. None is all
        of them, otherwise see `samax.perturb_only`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      A transformation from the gradient to the perturbed gradient; its state is one copy of the
      parameters.

    Raises:
      ValueError: if `rho` or `eps` is negative or not finite, or `theta` is outside (0, 1].

    References:
      Li and Giannakis, Enhancing Sharpness-Aware Optimization Through Variance Suppression, 2023,
      [arXiv 2309.15639](https://arxiv.org/abs/2309.15639)

    Examples:
      >>> import optax, samax
      >>> tx = optax.chain(samax.vasso(rho=0.05, theta=0.4), optax.adam(1e-3))
    """
    ascent = optax.chain(gradient_ema(theta), scale_to_norm(rho, eps))
    return sharpness_aware(perturb_only(ascent, mask), track=track)
