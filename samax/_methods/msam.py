"""MSAM: the perturbation is against the momentum."""

import optax

from samax._core.ascent import Mask, perturb_only, scale_to_norm
from samax._core.hyperparameters import Scalar, ScalarOrSchedule
from samax._core.one_gradient import one_gradient


def msam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    *,
    decay_perturbed: bool = False,
    eps: Scalar = 0.0,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: one gradient a step, perturbed along the coming step of the momentum.

    $$ w_{t+1} = w_t + \mathrm{optimizer}(\tilde g_t), \qquad
       \tilde g_t = \nabla L(w_t + \epsilon_t), \qquad
       \epsilon_{t+1} = - \rho \, \frac{v_{t+1}}{\lVert v_{t+1} \rVert}, \quad \epsilon_0 = 0 $$

    v is the optimizer's own momentum: the buffer of `optax.sgd(rate, momentum=0.9)`, or the first
    moment of `optax.adam` and its kin as it is in the state, without bias correction or
    preconditioner. The sign is minus, downhill, where `stale_sam`'s is plus.

    One changed line under any trainer, with no function at `update`: the parameters outside are the
    perturbed ones, see `samax.one_gradient`, and those of `samax.eval_params(state, params)` are
    the ones to evaluate.

    Args:
      optimizer: the base optimizer, learning rate included, with one momentum of all parameters.
      rho: the perturbation radius, at least 0, or a schedule of it. The authors' commands have 3,
        and the defaults of their classes are 0.3 to 1.
      decay_perturbed: whether weight decay is of the perturbed parameters, as in the authors' SGD,
        where it so shapes the momentum and the perturbation too: that is this with
        `optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum))`. By default, and
        in the authors' AdamW, it is of the unperturbed ones.
      eps: added to the norm; the authors' code has 1e-12, see `samax.normalize`.
      mask: which leaves are perturbed, with the norm over those alone; all are trained. None is all
        of them, otherwise see `samax.perturb_only`.

    Returns:
      An optimizer; its state is one copy of the parameters more than the base optimizer's.

    Raises:
      TypeError: if `optimizer` is not a transformation.
      ValueError: if `rho` or `eps` is negative or not finite; in `init`, if the optimizer has no
        momentum of all parameters, or several.

    References:
      Becker et al., Momentum-SAM: Sharpness Aware Minimization without Computational Overhead,
      2024, [arXiv 2401.12033](https://arxiv.org/abs/2401.12033)

    Examples:
      >>> import optax, samax
      >>> tx = samax.msam(optax.sgd(0.1, momentum=0.9), rho=3.0)
    """
    against = optax.chain(scale_to_norm(rho, eps), optax.scale(-1.0))
    return one_gradient(
        optimizer,
        perturb_only(against, mask),
        source="momentum",
        decay_perturbed=decay_perturbed,
    )
