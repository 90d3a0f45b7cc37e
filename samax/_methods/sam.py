"""The named methods: recipes of a few lines over the parts.

Each gives a gradient: put it first in `optax.chain`, before clipping, weight decay and the base
optimizer (`decoupled_wsam` alone holds the base optimizer). What `update` takes is described at
`samax.sharpness_aware`. Other combinations are made from the parts in the same few lines.
"""

from typing import Any

import optax

from samax._core.checks import Scalar, ScalarOrSchedule, check_scalar
from samax._core.ascent import gradient_ema, normalize, scale_by_abs_params, scale_by_rho
from samax._core.descent import (
    WeightRule,
    adaptive_weight,
    decoupled,
    surrogate_gap,
    threshold_rule,
    weighted,
)
from samax._core.combinator import sharpness_aware


def sam(
    rho: ScalarOrSchedule = 0.05, *, eps: Scalar = 0.0, track: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization.

    $$ \tilde g = \nabla L\left(w + \rho \, \frac{g}{\lVert g \rVert}\right) $$

    With gradients accumulated by `optax.MultiSteps`, inside or around: `chain(sam, MultiSteps(base,
    k))` perturbs for each micro-batch on its own. `MultiSteps(chain(sam, base), k)` perturbs along
    the accumulated gradient but evaluates the function of the LAST call, which cannot be detected
    here: with one micro-batch's function it trains on that micro-batch alone, silently. Pass the
    whole batch's, or better a micro-batched `grad_fn` without `MultiSteps`, or accumulate around
    `samax.alternating(sam, base)`, which needs no function.

    Args:
      rho: the perturbation radius, at least 0, or a schedule of it; 0.05 is the paper's for
        CIFAR-10 and ImageNet (0.1 for CIFAR-100), searched over 0.01 to 0.5.
      eps: added to the norm; see `samax.normalize`.
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
    ascent = optax.chain(normalize(eps), scale_by_rho(rho))
    return sharpness_aware(ascent, track=track)


def usam(rho: ScalarOrSchedule, *, track: bool = False) -> optax.GradientTransformationExtraArgs:
    r"""Unnormalized SAM: the perturbation is proportional to the gradient.

    $$ \tilde g = \nabla L(w + \rho \, g) $$

    On a quadratic of smoothness beta it diverges for $\eta > 2 / (\beta + \rho \beta^2)$, where SAM
    converges up to $2 / \beta$. The scale of the loss enters the perturbation: under loss scaling
    by S pass `rho / S`.

    Args:
      rho: the factor, at least 0, in units of parameters per gradient, or a schedule of it. It has
        no default: it depends on the scale of the loss.
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
    return sharpness_aware(scale_by_rho(rho), track=track)


def asam(
    rho: ScalarOrSchedule = 0.5,
    *,
    t0: Scalar = 0.01,
    mask: Any = None,
    eps: Scalar = 0.0,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: the neighbourhood scales with the parameters, and so does not see rescaling.

    $$ \tilde g = \nabla L\left(w + \rho \, \frac{T_w^2 g}{\lVert T_w g \rVert}\right), \qquad
       T_w = |w| + t_0 $$

    Two forms are in use, and the best rho differs severalfold between them, so say which one:
    every leaf is scaled (the default, and `t0=0` is davda54/sam's `adaptive=True`), or weights only
    and T = 1 for the biases, as in the authors' code (`mask=samax.weights_only`). All leaves are
    perturbed in both.

    Args:
      rho: the radius relative to the parameters, at least 0, or a schedule of it; 0.5 is the
        paper's for CIFAR-10 (1.0 for CIFAR-100).
      t0: added to `|w|`; 0.01 is the authors'.
      mask: which leaves are scaled: a pytree of booleans, or a function from parameters to one.
        None scales all of them.
      eps: added to the norm; see `samax.normalize`.
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
      >>> tx = optax.chain(samax.asam(rho=0.5, mask=samax.weights_only), optax.sgd(0.1))
    """
    scale: optax.GradientTransformation = scale_by_abs_params(t0)
    if mask is not None:
        scale = optax.masked(scale, mask)
    ascent = optax.chain(scale, normalize(eps), scale, scale_by_rho(rho))
    return sharpness_aware(ascent, track=track)


def vasso(
    rho: ScalarOrSchedule = 0.05,
    theta: Scalar = 0.9,
    *,
    eps: Scalar = 0.0,
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
    ascent = optax.chain(gradient_ema(theta), normalize(eps), scale_by_rho(rho))
    return sharpness_aware(ascent, track=track)


def wsam(
    rho: ScalarOrSchedule = 0.05,
    gamma: Scalar = 0.9,
    *,
    eps: Scalar = 0.0,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighted SAM, coupled: the base optimizer sees the weighted sum of both gradients.

    $$ g + \frac{\gamma}{1 - \gamma} \, (\tilde g - g), \qquad
       \tilde g = \nabla L\left(w + \rho \, \frac{g}{\lVert g \rVert}\right) $$

    The paper's algorithm keeps the sharpness out of the base optimizer's momentum and
    preconditioner: that is `decoupled_wsam`. With plain SGD the two are the same.

    Args:
      rho: the perturbation radius, at least 0, or a schedule of it.
      gamma: in [0, 1): 0 is the base optimizer, 1/2 is SAM, and 0.9, the authors' default, gives
        the sharpness nine times the weight of SAM's.
      eps: added to the norm; see `samax.normalize`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      A transformation from the gradient to the weighted sum.

    Raises:
      ValueError: if `rho` or `eps` is negative or not finite, or `gamma` is outside [0, 1).

    References:
      Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization
      Term, 2023, [arXiv 2305.15817](https://arxiv.org/abs/2305.15817)

    Examples:
      >>> import optax, samax
      >>> tx = optax.chain(samax.wsam(rho=0.05, gamma=0.9), optax.adam(1e-3))
    """
    ascent = optax.chain(normalize(eps), scale_by_rho(rho))
    return sharpness_aware(ascent, weighted(_odds(gamma)), track=track)


def decoupled_wsam(
    optimizer: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    *,
    rho: ScalarOrSchedule = 0.05,
    gamma: Scalar = 0.9,
    eps: Scalar = 0.0,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighted SAM as the paper has it: the sharpness term stays out of the base optimizer.

    $$ w \leftarrow w + \mathrm{optimizer}(g)
       - \eta_t \, \frac{\gamma}{1 - \gamma} \, (\tilde g - g) $$

    Args:
      optimizer: the base optimizer, learning rate included; it sees the clean gradient.
      learning_rate: the same learning rate, a number or a schedule, for the sharpness term.
      rho: the perturbation radius, at least 0, or a schedule of it.
      gamma: in [0, 1); 0 is the base optimizer. See `wsam`.
      eps: added to the norm; see `samax.normalize`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      An optimizer: its updates are final, nothing follows it in the chain.

    Raises:
      ValueError: if a number is negative or not finite, or `gamma` is outside [0, 1).

    References:
      Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization
      Term, 2023, [arXiv 2305.15817](https://arxiv.org/abs/2305.15817)

    Examples:
      >>> import optax, samax
      >>> rate = optax.cosine_decay_schedule(1e-3, 1000)
      >>> tx = samax.decoupled_wsam(optax.adam(rate), rate, rho=0.05, gamma=0.9)
    """
    ascent = optax.chain(normalize(eps), scale_by_rho(rho))
    descent = decoupled(optimizer, learning_rate, _odds(gamma))
    return sharpness_aware(ascent, descent, track=track)


def gsam(
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.2,
    *,
    eps: Scalar = 0.0,
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
    ascent = optax.chain(normalize(eps), scale_by_rho(rho))
    return sharpness_aware(ascent, surrogate_gap(alpha), track=track)


def samar(
    rho: ScalarOrSchedule = 0.05,
    *,
    initial_weight: Scalar = 1.0,
    chi: Scalar = 1.1,
    gamma: Scalar = 0.1,
    delta: Scalar | None = None,
    bounds: tuple[Scalar, Scalar] | None = None,
    smoothing: Scalar = 0.9,
    rule: WeightRule | None = None,
    eps: Scalar = 0.0,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization with adaptive regularization.

    $$ g_k + \lambda_k \, (\tilde g_k - g_k), \qquad
       \tilde g_k = \nabla L\left(w_k + \rho \, \frac{g_k}{\lVert g_k \rVert}\right) $$

    The weight $\lambda_k$ of the sharpness grows where the landscape becomes sharper and shrinks
    where it becomes flatter, told by the ratio of successive gradient norms; see
    `samax.adaptive_weight` for the update and `samax.threshold_rule` for the rule.

    The rule is this library's reading of the paper: its summary names three hyper-parameters, chi,
    gamma and delta, and no closed rule. Pass `rule` for another one. With the default smoothing the
    ratio rarely leaves 1 by as much as the default gamma, and lambda then stays where it starts:
    lower gamma (0.01 to 0.02 in this library's CIFAR-10 benchmark) for a weight that moves.

    Args:
      rho: the perturbation radius, at least 0, or a schedule of it.
      initial_weight: lambda of the first step, at least 0; 1 starts as SAM.
      chi: the factor by which lambda grows and shrinks, at least 1.
      gamma: how far the ratio must rise above 1 for lambda to grow, at least 0.
      delta: how far it must fall below 1 for lambda to shrink, in [0, 1]; None is
        `gamma / (1 + gamma)`.
      bounds: lambda's bounds; None is `(0.5, 2)` times the initial weight.
      smoothing: the decay of the gradient norm's moving average, in [0, 1); 0 is the raw ratio.
      rule: a function `(weight, ratio) -> weight` in place of the default one, which alone uses
        chi, gamma and delta. Under `optax.inject_hyperparams` name it in `static_args`.
      eps: added to the norm; see `samax.normalize`.
      track: whether to keep `SharpnessMetrics` in the state.

    Returns:
      A transformation from the gradient to the weighted sum. Read lambda and the ratio with
      `optax.tree.get(state, "adaptive_weight")` and `optax.tree.get(state, "sharpness_ratio")`.

    Raises:
      ValueError: if an argument is outside its range.

    References:
      Zou, Deng and Sun, Sharpness-Aware Minimization with Adaptive Regularization, 2024,
      [arXiv 2412.16854](https://arxiv.org/abs/2412.16854)

    Examples:
      >>> import jax.numpy as jnp, optax, samax
      >>> tx = optax.chain(samax.samar(rho=0.05), optax.sgd(0.1, momentum=0.9))
      >>> state = tx.init(jnp.zeros(3))
      >>> print(optax.tree.get(state, "adaptive_weight"))
      1.0
    """
    if rule is None:
        rule = threshold_rule(chi, gamma, delta)
    ascent = optax.chain(normalize(eps), scale_by_rho(rho))
    descent = adaptive_weight(initial_weight, rule, bounds=bounds, smoothing=smoothing)
    return sharpness_aware(ascent, descent, track=track)


def _odds(gamma: Scalar) -> Scalar:
    """The weight gamma / (1 - gamma) of WSAM."""
    check_scalar("gamma", gamma, high=1.0, include_high=False)
    return gamma / (1.0 - gamma)
