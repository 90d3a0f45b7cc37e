"""Instances of the universal class: the trace, the Frobenius norm, the determinant.

Their defaults are those of the authors' released code, which differ from the paper's constants; the
docstrings say how. All are in `samax.universal_sam`'s notation, and cost n + 1 gradients.
"""

import jax.numpy as jnp
import optax

from samax._core.checks import check_count
from samax._core.hyperparameters import ScalarOrSchedule
from samax._universal.averages import LogMeanExp
from samax._universal.combinator import universal_sam
from samax._universal.sampling import Sampling, check_sampling
from samax.distributions import cube, gaussian


def trace_sam(
    rho: ScalarOrSchedule = 0.01,
    *,
    lam: ScalarOrSchedule = 1.0,
    sampling: Sampling | None = None,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Minimizes the trace of the Hessian.

    $$ R(w) = \frac1n \sum_i D_i, \qquad S = \tfrac12 \mathbb{E}\, v^\top H v $$

    So $\psi(t) = \phi(t) = t$, and the direction is $(1 - \lambda) g + \lambda \, \frac1n \sum_i
    \nabla L(w + \rho v_i)$: with the default lambda of 1 the mean of the perturbed gradients. $S =
    \mathrm{tr} H / 2$ for `samax.gaussian` and `samax.rademacher`, and $\mathrm{tr} H / 2d$ for
    `samax.sphere`, d the number of parameters. The paper has the sphere; the authors' sampler draws
    from it without the scaling that would put it there, so their rho and lambda belong to
    $N(0, I)$. On the sphere the same perturbations have $\rho \sqrt d$ in place of $\rho$.

    Args:
      rho: how far the samples go, at least 0, or a schedule of it; 0.01 is the authors'.
      lam: the weight of the regularizer, at least 0, or a schedule of it; 1 is the authors'.
      sampling: the samples; None is `Sampling(samax.gaussian)`, one of $N(0, I)$ as the authors'.
        Pairs v and -v (`antithetic`) remove the noise of order rho.
      track: whether the state keeps `UniversalMetrics`.

    Returns:
      A transformation from the gradient to the regularized one.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Tahmasebi et al., A Universal Class of Sharpness-Aware Minimization Algorithms, 2024,
      [arXiv 2406.03682](https://arxiv.org/abs/2406.03682)

    Examples:
      >>> import optax, samax
      >>> tx = optax.chain(samax.trace_sam(rho=0.01), optax.sgd(0.1, momentum=0.9))
    """
    return universal_sam(
        phi=lambda t: t,
        psi=lambda t: t,
        sampling=Sampling(gaussian) if sampling is None else sampling,
        rho=rho,
        lam=lam,
        track=track,
    )


def frob_sam(
    rho: ScalarOrSchedule = 0.005,
    *,
    lam: ScalarOrSchedule = 0.005,
    sampling: Sampling | None = None,
    unbiased: bool = True,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Minimizes the Frobenius norm of the Hessian.

    $$ R(w) = \tfrac12 \mathrm{Var}_i(D_i), \qquad
       S = \tfrac12 \mathrm{Var}\big(\tfrac12 v^\top H v\big) = \tfrac14 \lVert H \rVert_F^2
       \quad (v \sim N(0, I)) $$

    So $\psi(t) = (t, t^2)$ and $\phi = \frac12 (t_2 - t_1^2)$ times $n / (n - 1)$ if unbiased. The
    half is the authors' code's and cancels the 2 of the square's derivative: the direction is $g +
    \frac{\lambda}{\rho^2} \, \mathrm{Cov}_i(L_i, g_i)$. The paper's measure $t_2 - t_1^2$, of
    value $\frac12 \lVert H \rVert_F^2$, is this one with twice the lambda.

    Away from a stationary point the variance of D is that of $g^\top v / \rho$ in the first place,
    $\lVert g \rVert^2 / \rho^2$: the direction then penalizes the gradient's norm, by lambda over
    rho squared. `antithetic` pairs do not change that. So near a minimum gradient descent needs
    $\eta (h + \lambda h^2) < 2$ for each eigenvalue h.

    Args:
      rho: how far the samples go, at least 0, or a schedule of it; 0.005 is the authors'.
      lam: the weight of the regularizer, at least 0, or a schedule of it; 0.005 is the authors'.
      sampling: the samples, at least 2; None is `Sampling(samax.gaussian, num_samples=2)`, as the
        authors'. The Frobenius norm is `samax.gaussian`'s.
      unbiased: whether the variance is divided by n - 1 as in the authors' code, or by n as in the
        paper's formula. For n = 2 the latter halves the regularizer.
      track: whether the state keeps `UniversalMetrics`.

    Returns:
      A transformation from the gradient to the regularized one.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Tahmasebi et al., A Universal Class of Sharpness-Aware Minimization Algorithms, 2024,
      [arXiv 2406.03682](https://arxiv.org/abs/2406.03682)

    Examples:
      >>> import optax, samax
      >>> tx = optax.chain(samax.frob_sam(rho=0.005, lam=0.005), optax.sgd(0.1, momentum=0.9))
    """
    sampling = Sampling(gaussian, num_samples=2) if sampling is None else sampling
    check_sampling(sampling)
    num_samples = check_count("num_samples", sampling.num_samples, 2)
    correction = num_samples / (num_samples - 1) if unbiased else 1.0
    return universal_sam(
        phi=lambda t: 0.5 * correction * (t[1] - t[0] ** 2),
        psi=lambda t: (t, t**2),
        sampling=sampling,
        rho=rho,
        lam=lam,
        track=track,
    )


def det_sam(
    rho: ScalarOrSchedule = 1.0,
    *,
    lam: ScalarOrSchedule = 1.0,
    log: bool = False,
    sampling: Sampling | None = None,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Minimizes the determinant of the Hessian, or its logarithm.

    $$ R(w) = \Big(\frac1n \sum_i e^{-D_i / 2}\Big)^{-2} \qquad \text{or} \qquad
       \log R(w) = -2 \log \frac1n \sum_i e^{-D_i / 2} $$

    With Lebesgue's measure, $\psi(t) = e^{-t}$ and $\phi(t) = (2 \pi)^d / t^2$ the sharpness is
    $\det H$ for a positive definite H. In practice mu is uniform on a cube of half-width h, the
    constants $(2 \pi)^d$ and $(2h)^{2d}$ go into lambda, and the authors' code has $\psi(t) =
    e^{-t / 2}$, which is the determinant of $H / 2$. The cube stands for the whole space only if
    h is several times $H^{-1/2}$: with the authors' h = 0.01 and n = 1 the regularizer is close to
    $1 + \frac1n \sum_i D_i$, a trace. With `samax.gaussian` the same integral is $\det(I + H / 2)$.

    The determinant of a volume-preserving reparametrization is that of the original, $\det(A^\top
    H A) = \det H$ for $|\det A| = 1$. On a manifold of minima it is 0 everywhere, so it
    discriminates none of them.

    Both forms are computed from the logarithm of the mean. Where D is large R itself overflows all
    the same (its exponent is about D); the log form does not.

    Args:
      rho: how far the samples go, at least 0, or a schedule of it; 1 is the authors'.
      lam: the weight of the regularizer, at least 0, or a schedule of it; 1 is the authors'. With a
        distribution wider than theirs and few samples gradient descent diverges unless it is small.
      log: whether the regularizer is log R; for n = 1 that is `trace_sam` with the same samples.
      sampling: the samples; None is `Sampling(samax.cube(0.01))`, one of the authors' cube.
      track: whether the state keeps `UniversalMetrics`.

    Returns:
      A transformation from the gradient to the regularized one.

    Raises:
      ValueError: if a number is outside its range.

    References:
      Tahmasebi et al., A Universal Class of Sharpness-Aware Minimization Algorithms, 2024,
      [arXiv 2406.03682](https://arxiv.org/abs/2406.03682)

    Examples:
      >>> import optax, samax
      >>> sampling = samax.Sampling(samax.cube(0.01), num_samples=4)
      >>> tx = optax.chain(samax.det_sam(log=True, sampling=sampling), optax.sgd(0.1))
    """
    return universal_sam(
        phi=(lambda log_mean: -2 * log_mean) if log else (lambda log_mean: jnp.exp(-2 * log_mean)),
        psi=LogMeanExp(lambda t: -t / 2),
        sampling=Sampling(cube(0.01)) if sampling is None else sampling,
        rho=rho,
        lam=lam,
        track=track,
    )
