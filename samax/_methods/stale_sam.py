"""Stale SAM: the perturbation is along the gradient of the step before."""

import optax

from samax._core.ascent import Mask, perturb_only, scale_to_norm
from samax._core.hyperparameters import Scalar, ScalarOrSchedule
from samax._core.one_gradient import one_gradient


def stale_sam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    *,
    eps: Scalar = 0.0,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM at one gradient a step: the perturbation is along the last perturbed gradient (S2-SAM).

    $$ w_{t+1} = w_t + \mathrm{optimizer}(\tilde g_t), \qquad
       \tilde g_t = \nabla L(w_t + \epsilon_t), \qquad
       \epsilon_{t+1} = \rho \, \frac{\tilde g_t}{\lVert \tilde g_t \rVert}, \quad \epsilon_0 = 0 $$

    One changed line under any trainer, with no function at `update`: the parameters outside are the
    perturbed ones, see `samax.one_gradient`, and those of `samax.eval_params(state, params)` are
    the ones to evaluate. With small batches the last gradient is of another batch than the next:
    the perturbation is then partly random.

    Args:
      optimizer: the base optimizer, learning rate included. It decays the unperturbed parameters.
      rho: the perturbation radius, at least 0, or a schedule of it; 0.05 is SAM's.
      eps: added to the norm; the authors' code has 1e-12, see `samax.normalize`.
      mask: which leaves are perturbed, with the norm over those alone; all are trained. None is all
        of them, otherwise see `samax.perturb_only`.

    Returns:
      An optimizer; its state is one copy of the parameters more than the base optimizer's.

    Raises:
      TypeError: if `optimizer` is not a transformation.
      ValueError: if `rho` or `eps` is negative or not finite.

    References:
      Ji et al. (S2-SAM), NeurIPS 2024

    Examples:
      >>> import jax, jax.numpy as jnp, optax, samax
      >>> tx = samax.stale_sam(optax.sgd(0.1), rho=0.5)
      >>> w = jnp.array([3.0, 4.0])
      >>> state = tx.init(w)
      >>> updates, state = tx.update(jax.grad(lambda w: jnp.sum(w**2))(w), state, w)
      >>> w = optax.apply_updates(w, updates)  # perturbed
      >>> print(samax.eval_params(state, w))
      [2.4 3.2]
    """
    return one_gradient(optimizer, perturb_only(scale_to_norm(rho, eps), mask))
