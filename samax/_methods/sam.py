"""SAM, and USAM: the same without the normalization."""

import optax

from samax._core.ascent import Mask, perturb_only, scale_by_rho, scale_to_norm
from samax._core.checks import refuse_optimizer
from samax._core.combinator import sharpness_aware
from samax._core.hyperparameters import Scalar, ScalarOrSchedule


@refuse_optimizer
def sam(
    rho: ScalarOrSchedule = 0.05,
    *,
    eps: Scalar = 0.0,
    mask: Mask | None = None,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization.

    $$ \tilde g = \nabla L\left(w + \rho \, \frac{g}{\lVert g \rVert}\right) $$

    With gradients accumulated by `optax.MultiSteps`, inside or around: `chain(sam, MultiSteps(base,
    k))` perturbs for each micro-batch on its own. `MultiSteps(chain(sam, base), k)` perturbs along
    the accumulated gradient but evaluates the function of the LAST call, which cannot be detected
    here: with one micro-batch's function it trains on that micro-batch alone, silently. Pass the
    whole batch's, or better a micro-batched `grad_fn` without `MultiSteps`, or accumulate around
    `samax.alternating(chain(sam, base))`, which needs no function.

    Args:
      rho: the perturbation radius, at least 0, or a schedule of it; 0.05 is the paper's for
        CIFAR-10 and ImageNet (0.1 for CIFAR-100), searched over 0.01 to 0.5.
      eps: added to the norm; see `samax.normalize`.
      mask: which leaves are perturbed, with the norm over those alone; all are trained. None is all
        of them, otherwise see `samax.perturb_only`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      A transformation from the gradient to the perturbed gradient.

    Raises:
      ValueError: if `rho` or `eps` is negative or not finite.

    References:
      Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, 2021,
      [arXiv 2010.01412](https://arxiv.org/abs/2010.01412)

    Examples:
      >>> import jax, jax.numpy as jnp, optax, samax
      >>> loss = lambda w: jnp.sum(w**2)
      >>> tx = optax.chain(samax.sam(rho=0.5), optax.sgd(0.1))
      >>> w = jnp.array([3.0, 4.0])
      >>> state = tx.init(w)
      >>> value, grads = jax.value_and_grad(loss)(w)
      >>> updates, state = tx.update(grads, state, w, value=value, value_fn=loss)
      >>> print(optax.apply_updates(w, updates))
      [2.34 3.12]
    """
    ascent = perturb_only(scale_to_norm(rho, eps), mask)
    return sharpness_aware(ascent, track=track)


@refuse_optimizer
def usam(
    rho: ScalarOrSchedule, *, mask: Mask | None = None, track: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Unnormalized SAM: the perturbation is proportional to the gradient.

    $$ \tilde g = \nabla L(w + \rho \, g) $$

    On a quadratic of smoothness beta it diverges for $\eta > 2 / (\beta + \rho \beta^2)$, where SAM
    converges up to $2 / \beta$. The scale of the loss enters the perturbation: under loss scaling
    by S pass `rho / S`.

    Args:
      rho: the factor, at least 0, in units of parameters per gradient, or a schedule of it. It has
        no default: it depends on the scale of the loss.
      mask: which leaves are perturbed, with the norm over those alone; all are trained. None is all
        of them, otherwise see `samax.perturb_only`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      A transformation from the gradient to the perturbed gradient.

    Raises:
      ValueError: if `rho` is negative or not finite.

    References:
      Andriushchenko and Flammarion, Towards Understanding Sharpness-Aware Minimization, 2022,
      [arXiv 2206.06232](https://arxiv.org/abs/2206.06232); Dai, Ahn and Sra, The Crucial Role of
      Normalization in Sharpness-Aware Minimization, 2023,
      [arXiv 2305.15287](https://arxiv.org/abs/2305.15287)

    Examples:
      >>> import optax, samax
      >>> tx = optax.chain(samax.usam(rho=0.05), optax.sgd(0.1))
    """
    return sharpness_aware(perturb_only(scale_by_rho(rho), mask), track=track)
