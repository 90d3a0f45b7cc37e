"""The universal class: (phi, psi, mu)-sharpness, and the regularizer that minimizes it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import check_callable, check_parameters, check_same_tree
from samax._core.combinator import untracked
from samax._core.compat import vary_over, varying_axes
from samax._core.evaluation import check_inputs, evaluator
from samax._core.hyperparameters import ScalarOrSchedule, at, check_schedule, probe_schedule
from samax._core.keys import next_key, start_key
from samax._core.numerics import (
    all_finite,
    cast_like,
    difference,
    displace,
    norm,
    tree_wide_dtype,
    widen,
)
from samax._universal.averages import LogMeanExp, Phi, Psi, average_of, regularizer
from samax._universal.sampling import Sampling, accumulate, check_sampling, draw


class UniversalMetrics(NamedTuple):
    """Scalars of the last update, in float32 or wider.

    Attributes:
      clean_loss: the loss at the parameters.
      perturbed_loss: the mean loss over the samples.
      loss_gap: their difference.
      clean_grad_norm: the norm of the gradient that came in.
      sharpness: the regularizer R, an estimate of the sharpness S.
      sharpness_grad_norm: the norm of the gradient of `rho^2 R`, before it is multiplied by lambda.
      perturbation_norm: the mean norm of the perturbations as realized, `||fl(w + rho v) - w||`.
    """

    clean_loss: jax.Array
    perturbed_loss: jax.Array
    loss_gap: jax.Array
    clean_grad_norm: jax.Array
    sharpness: jax.Array
    sharpness_grad_norm: jax.Array
    perturbation_norm: jax.Array


class UniversalState(NamedTuple):
    """The number of updates for schedules, the key of the next samples, and the tracked scalars."""

    count: jax.Array  # type: ignore[assignment]  # Optax's name, and a method's of tuples
    rng_key: jax.Array
    metrics: UniversalMetrics | optax.EmptyState


class _Sums(NamedTuple):
    totals: Any  # those of the average
    loss: jax.Array
    distance: jax.Array


def universal_sam(
    phi: Phi,
    psi: Psi | LogMeanExp,
    sampling: Sampling,
    *,
    rho: ScalarOrSchedule,
    lam: ScalarOrSchedule = 1.0,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Minimizes the loss and any function of its Hessian's quadratic forms.

    The sharpness and, for samples $v_1, \dots, v_n \sim \mu$, its estimate without a Hessian:

    $$ S(w) = \phi\Big(\mathbb{E}_{v \sim \mu} \, \psi\big(\tfrac12 v^\top H(w) v\big)\Big), \quad
       R(w) = \phi\Big(\frac1n \sum_i \psi(D_i)\Big), \quad
       D_i = \frac{L(w + \rho v_i) - L(w)}{\rho^2} $$

    At a stationary point $R \to S$ as $\rho \to 0$ (for a mu of mean zero, or `antithetic`). The
    result is the gradient of $L + \lambda \rho^2 R$ with the samples held fixed,

    $$ g + \lambda \sum_i c_i \, \big(\nabla L(w + \rho v_i) - g\big), \qquad
       c_i = \frac{\partial}{\partial D_i} \, \phi\Big(\frac1n \sum_j \psi(D_j)\Big), $$

    whose $c_i$ are found by automatic differentiation of phi and psi. It costs n + 1 gradients.
    The samples are streamed, so that activations are held for `batch_size` of them at a time,
    whatever n. On top come the sample, the perturbed point, its gradient and m accumulators. As
    compiled for CPU that was 1.1 times a plain gradient's temporary memory where activations made
    up most of it, and 4 (m = n = 1) to 9 times the parameters (m = 2, a loop) where those did.

    `update` takes `value_fn` or `value_and_grad_fn` as `samax.sharpness_aware` does, with the same
    meaning, and `value`, the clean loss, without which it evaluates the loss once more. A `grad_fn`
    has no losses to make D of. With low-precision losses D, a small difference divided by
    $\rho^2$, is mostly rounding: return the loss in float32.

    Args:
      phi: a differentiable function from the mean of psi to one number.
      psi: a differentiable function of one number, to one number or m of them (an array or a
        tuple; phi receives the same), or a `LogMeanExp`.
      sampling: the samples: mu, their number n, and how they are evaluated.
      rho: how far the samples go, at least 0, or a schedule of it. 0 leaves the gradient as it is.
      lam: lambda, the weight of the regularizer, at least 0, or a schedule of it. 0 leaves the
        gradient as it is.
      track: whether the state keeps `UniversalMetrics`; read with
        `optax.tree.get(state, "sharpness")`.

    Returns:
      A transformation from the gradient to the regularized one.

    Raises:
      ValueError: if a number is outside its range, or `update` gets no parameters or only a
        `grad_fn`.
      TypeError: if phi or psi is not a function, or `sampling` not a `Sampling`.

    References:
      Tahmasebi et al., A Universal Class of Sharpness-Aware Minimization Algorithms, 2024,
      [arXiv 2406.03682](https://arxiv.org/abs/2406.03682)

    Examples:
      A sharpness of your own. For $v \sim N(0, I)$ the third cumulant of $\frac12 v^\top H v$ is
      $\mathrm{tr} H^3$, the sum of the cubed eigenvalues:

      >>> import jax, jax.numpy as jnp, optax, samax
      >>> cubed_eigenvalues = samax.universal_sam(
      ...     phi=lambda t: t[2] - 3 * t[0] * t[1] + 2 * t[0] ** 3,
      ...     psi=lambda t: (t, t**2, t**3),
      ...     sampling=samax.Sampling(samax.gaussian, 100_000, batch_size=10_000),
      ...     rho=0.1, track=True)
      >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 2.0]) * w**2)
      >>> w = jnp.zeros(2)
      >>> _, state = cubed_eigenvalues.update(
      ...     jax.grad(loss)(w), cubed_eigenvalues.init(w), w, value=loss(w), value_fn=loss)
      >>> print(f"{optax.tree.get(state, 'sharpness'):.0f}")  # 1 + 8
      9
    """
    check_callable("phi", phi, "of psi's mean")
    check_callable("psi", psi.exponent if isinstance(psi, LogMeanExp) else psi, "of a number")
    check_sampling(sampling)
    check_schedule("rho", rho)
    check_schedule("lam", lam)

    def init(params: optax.Params) -> UniversalState:
        check_parameters("params", params)
        probe_schedule("rho", rho)
        probe_schedule("lam", lam)
        return UniversalState(
            count=jnp.zeros((), jnp.int32),
            rng_key=start_key(sampling.key),
            metrics=untracked(UniversalMetrics, params) if track else optax.EmptyState(),
        )

    def update(
        updates: optax.Updates,
        state: UniversalState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, UniversalState]:
        if extra_args.get("grad_fn") is not None:
            raise ValueError(
                "universal_sam needs the losses at the perturbed points, and grad_fn returns none: "
                "pass value_fn or value_and_grad_fn."
            )
        evaluate = evaluator(extra_args)
        check_inputs(updates, params, extra_args)
        value = extra_args.get("value")
        if value is None:  # under jit the gradient that comes with it is not computed
            value = evaluate(params)[0]
        dtype = tree_wide_dtype(params)
        clean, loss = widen(updates), jnp.asarray(value, dtype)
        radius, strength = (at(number, state.count).astype(dtype) for number in (rho, lam))
        average = average_of(psi, dtype)

        def look(key: jax.Array, sign: jax.Array) -> tuple[jax.Array, optax.Updates, jax.Array]:
            direction = sampling.distribution(key, params)
            check_same_tree("the distribution's sample", direction, params)
            point = displace(params, jax.tree.map(lambda v: sign * radius * v, widen(direction)))
            perturbed_loss, grads = evaluate(point)
            distance = norm(difference(point, params)) if track else jnp.zeros(())
            change = difference(grads, clean)
            return jnp.asarray(perturbed_loss, dtype), change, distance.astype(dtype)

        def add(sums: _Sums, seen: tuple[jax.Array, optax.Updates, jax.Array]) -> _Sums:
            losses, differences, distances = seen
            totals = average.add(sums.totals, (losses - loss) / radius**2, differences)
            return _Sums(totals, sums.loss + losses.sum(), sums.distance + distances.sum())

        following, key = next_key(state.rng_key)
        draws = draw(sampling, key, dtype)
        start = _Sums(average.start(clean), jnp.zeros((), dtype), jnp.zeros((), dtype))
        start = vary_over(varying_axes(updates, params), start)
        sums = accumulate(sampling, look, add, start, draws)
        sharpness, slope = regularizer(phi, average, sums.totals, sampling.num_samples)
        # Where nothing is to be added, nothing is: rho = 0 has no D, and a gradient with a
        # non-finite entry passes as it is.
        regularized = (radius > 0) & (strength > 0) & all_finite(clean)
        direction = jax.tree.map(lambda g, s: g + (strength * s).astype(g.dtype), clean, slope)
        direction = optax.tree.where(regularized, direction, clean)
        metrics = state.metrics
        if track:
            tracked = _metrics(loss, sums, sampling.num_samples, clean, sharpness, slope)
            metrics = cast_like(tracked, metrics)
        state = UniversalState(optax.safe_increment(state.count), following, metrics)
        return cast_like(direction, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _metrics(
    loss: jax.Array,
    sums: _Sums,
    num_samples: int,
    clean: optax.Updates,
    sharpness: jax.Array,
    slope: optax.Updates,
) -> UniversalMetrics:
    return UniversalMetrics(
        clean_loss=loss,
        perturbed_loss=sums.loss / num_samples,
        loss_gap=sums.loss / num_samples - loss,
        clean_grad_norm=norm(clean),
        sharpness=sharpness,
        sharpness_grad_norm=norm(slope),
        perturbation_norm=sums.distance / num_samples,
    )
