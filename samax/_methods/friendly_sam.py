"""Friendly SAM: the ascent leaves out what all batches have in common."""

import jax
import jax.numpy as jnp
import optax

from samax._core.ascent import Mask, perturb_only, scale_to_norm
from samax._core.checks import refuse_optimizer
from samax._core.combinator import sharpness_aware
from samax._core.hyperparameters import Scalar, ScalarOrSchedule, check_scalar
from samax._core.numerics import widen


def subtract_ema(sigma: Scalar = 1.0, decay: Scalar = 0.9) -> optax.GradientTransformation:
    r"""Subtracts the moving average of the gradients before, Friendly SAM's ascent.

    $$ r_t = g_t - \sigma m_{t-1}, \qquad m_t = \lambda m_{t-1} + (1 - \lambda) \, g_t, \qquad
       r_0 = m_0 = g_0 $$

    Args:
      sigma: how much of the average is subtracted, at least 0; 0 is SAM.
      decay: the decay of the average, in [0, 1).

    Returns:
      A transformation whose state holds the average in float32 or wider.

    Raises:
      ValueError: if `sigma` is negative or not finite, or `decay` outside [0, 1).
    """
    check_scalar("sigma", sigma)
    check_scalar("decay", decay, high=1.0, include_high=False)

    def init(params: optax.Params) -> optax.EmaState:
        return optax.EmaState(
            count=jnp.zeros((), jnp.int32), ema=optax.tree.zeros_like(widen(params))
        )

    def update(
        updates: optax.Updates, state: optax.EmaState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmaState]:
        del params
        first = state.count == 0

        def subtract(g: jax.Array, m: jax.Array) -> jax.Array:
            return jnp.where(first, g, g - sigma * m).astype(m.dtype)

        def average(g: jax.Array, m: jax.Array) -> jax.Array:
            return jnp.where(first, g, decay * m + (1.0 - decay) * g).astype(m.dtype)

        grads = widen(updates)
        residual = jax.tree.map(subtract, grads, state.ema)
        ema = jax.tree.map(average, grads, state.ema)
        return residual, optax.EmaState(count=optax.safe_increment(state.count), ema=ema)

    return optax.GradientTransformation(init, update)


@refuse_optimizer
def friendly_sam(
    rho: ScalarOrSchedule = 0.05,
    sigma: Scalar = 1.0,
    decay: Scalar = 0.9,
    *,
    eps: Scalar = 0.0,
    mask: Mask | None = None,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Friendly SAM: the ascent is along what is special to the batch, less the average gradient.

    $$ r_t = g_t - \sigma m_{t-1}, \quad m_t = \lambda m_{t-1} + (1 - \lambda) \, g_t, \qquad
       \tilde g = \nabla L\left(w + \rho \, \frac{r_t}{\lVert r_t \rVert}\right) $$

    and SAM in the first step. As in the authors' code the average is of the gradients, and the one
    subtracted is from before the step; some ports average r instead.

    Args:
      rho: the perturbation radius, at least 0, or a schedule of it.
      sigma: how much of the average is subtracted, at least 0; 0 is SAM, 1 the authors'.
      decay: $\lambda$, in [0, 1); 0.9 is the authors', with 0.6 for a ResNet-18 on CIFAR-100.
      eps: added to the norm; the authors' code has 1e-12, see `samax.normalize`.
      mask: which leaves are perturbed, with the norm over those alone; all are trained. None is all
        of them, otherwise see `samax.perturb_only`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      A transformation from the gradient to the perturbed gradient; its state is one copy of the
      parameters.

    Raises:
      ValueError: if `rho`, `sigma` or `eps` is negative or not finite, or `decay` outside [0, 1).

    References:
      Li et al., Friendly Sharpness-Aware Minimization, 2024,
      [arXiv 2403.12350](https://arxiv.org/abs/2403.12350)

    Examples:
      >>> import optax, samax
      >>> tx = optax.chain(samax.friendly_sam(rho=0.1), optax.sgd(0.1, momentum=0.9))
    """
    ascent = optax.chain(subtract_ema(sigma, decay), scale_to_norm(rho, eps))
    return sharpness_aware(perturb_only(ascent, mask), track=track)
