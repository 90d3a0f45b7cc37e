"""The universal class: (phi, psi, mu)-sharpness, and the regularizer that minimizes it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import check_callable, check_count, check_parameters, check_same_tree
from samax._core.combinator import untracked
from samax._core.compat import vary_over, varying_axes
from samax._core.evaluation import check_inputs, evaluator
from samax._core.hyperparameters import ScalarOrSchedule, at, check_schedule, probe_schedule
from samax._core.keys import Key, check_key, next_key, start_key
from samax._core.loop import UNROLLED_STEPS, draw, spread, stream
from samax._core.numerics import (
    all_finite,
    cast_like,
    displace,
    norm,
    tree_wide_dtype,
    widen,
)
from samax._universal.averages import Accumulator, LogMeanExp, Phi, Psi, Totals
from samax.distributions import Sampler


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

    step: jax.Array
    rng_key: jax.Array
    metrics: UniversalMetrics | optax.EmptyState


class _Sums(NamedTuple):
    totals: Totals
    loss: jax.Array
    distance: jax.Array


def universal_sam(
    phi: Phi,
    psi: Psi | LogMeanExp,
    measure: Sampler,
    *,
    rho: ScalarOrSchedule,
    lam: ScalarOrSchedule = 1.0,
    num_samples: int = 1,
    batch_size: int = 1,
    antithetic: bool = False,
    key: Key = 0,
    unroll: int | None = None,
    sharding: jax.sharding.NamedSharding | None = None,
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
      measure: mu, a function `(key, params) -> v`: `samax.gaussian`, `samax.sphere`,
        `samax.rademacher`, `samax.cube(half_width)`, one of these scaled by the parameters, or
        one's own.
      rho: how far the samples go, at least 0, or a schedule of it. 0 leaves the gradient as it is.
      lam: lambda, the weight of the regularizer, at least 0, or a schedule of it. 0 leaves the
        gradient as it is.
      num_samples: n, at least 1.
      batch_size: how many samples are evaluated at once, by `jax.vmap`; it divides n.
      antithetic: whether samples come in pairs v and -v; n is then even. Odd orders in rho cancel,
        the noise of the gradient's own term $g^\top v / \rho$ in D among them.
      key: a seed or a key. The state keeps a typed key if one was passed, and raw key data (a
        uint32 array) otherwise. The default is raw: a typed key in an optimizer's state breaks
        code that does arithmetic on its leaves, and serializers that know NumPy's dtypes alone.
      unroll: how many evaluations (of `batch_size` samples) the body of the loop holds; None is
        all of them up to 8, without any loop, and 1 beyond. XLA on CPU runs convolutions in loops
        about 22 times slower than outside.
      sharding: under `jit`, how the `batch_size` samples that are evaluated at once are laid out
        over devices, as in `NamedSharding(mesh, PartitionSpec("samples"))`: n samples on d devices
        are n / d evaluations on each, of its own samples on the batch that it holds, and the sums
        are all-reduced. The samples are the same as without.
      track: whether the state keeps `UniversalMetrics`; read with
        `optax.tree.get(state, "sharpness")`.

    Returns:
      A transformation from the gradient to the regularized one.

    Raises:
      ValueError: if a number is outside its range, or `update` gets no parameters or only a
        `grad_fn`.
      TypeError: if a function is none, or `key` is neither a seed nor a key.

    References:
      Tahmasebi et al., A Universal Class of Sharpness-Aware Minimization Algorithms, 2024,
      [arXiv 2406.03682](https://arxiv.org/abs/2406.03682)

    Examples:
      A measure of one's own. For $v \sim N(0, I)$ the third cumulant of $\frac12 v^\top H v$ is
      $\mathrm{tr} H^3$, the sum of the cubed eigenvalues:

      >>> import jax, jax.numpy as jnp, optax, samax
      >>> cubed_eigenvalues = samax.universal_sam(
      ...     phi=lambda t: t[2] - 3 * t[0] * t[1] + 2 * t[0] ** 3,
      ...     psi=lambda t: (t, t**2, t**3),
      ...     measure=samax.gaussian,
      ...     rho=0.1, num_samples=100_000, batch_size=10_000, track=True)
      >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 2.0]) * w**2)
      >>> w = jnp.zeros(2)
      >>> _, state = cubed_eigenvalues.update(
      ...     jax.grad(loss)(w), cubed_eigenvalues.init(w), w, value=loss(w), value_fn=loss)
      >>> print(f"{optax.tree.get(state, 'sharpness'):.0f}")  # 1 + 8
      9
    """
    check_callable("phi", phi, "of psi's mean")
    check_callable("psi", psi.exponent if isinstance(psi, LogMeanExp) else psi, "of a number")
    check_callable("measure", measure, "(key, params) -> sample")
    check_schedule("rho", rho)
    check_schedule("lam", lam)
    visits = _visits(num_samples, batch_size, antithetic, sharding)
    unroll = (visits if visits <= UNROLLED_STEPS else 1) if unroll is None else unroll
    check_count("unroll", unroll)
    check_key("key", key)

    def init(params: optax.Params) -> UniversalState:
        check_parameters("params", params)
        probe_schedule("rho", rho)
        probe_schedule("lam", lam)
        return UniversalState(
            step=jnp.zeros((), jnp.int32),
            rng_key=start_key(key),
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
        radius, strength = (at(number, state.step).astype(dtype) for number in (rho, lam))
        accumulator = Accumulator(psi, dtype)

        def look(key: jax.Array, sign: jax.Array) -> tuple[jax.Array, optax.Updates, jax.Array]:
            direction = measure(key, params)
            check_same_tree("the measure's sample", direction, params)
            point = displace(params, jax.tree.map(lambda v: sign * radius * v, widen(direction)))
            perturbed_loss, grads = evaluate(point)
            distance = norm(optax.tree.sub(widen(point), widen(params))) if track else jnp.zeros(())
            difference = optax.tree.sub(widen(grads), clean)
            return jnp.asarray(perturbed_loss, dtype), difference, distance.astype(dtype)

        def visit(sums: _Sums, draws: tuple[jax.Array, jax.Array]) -> tuple[_Sums, None]:
            if batch_size == 1:
                only = look(draws[0][0], draws[1][0])
                losses, differences, distances = jax.tree.map(lambda x: x[None], only)
            else:
                losses, differences, distances = jax.vmap(look)(*spread(draws, sharding))
            totals = accumulator.add(sums.totals, (losses - loss) / radius**2, differences)
            return _Sums(totals, sums.loss + losses.sum(), sums.distance + distances.sum()), None

        following, key = next_key(state.rng_key)
        draws = draw(key, (visits, batch_size), antithetic, dtype)
        start = _Sums(accumulator.start(clean), jnp.zeros((), dtype), jnp.zeros((), dtype))
        sums, _ = stream(visit, vary_over(varying_axes(updates, params), start), draws, unroll)
        sharpness, slope = accumulator.regularizer(phi, sums.totals, num_samples)
        # Where nothing is to be added, nothing is: rho = 0 has no D, and a gradient with a
        # non-finite entry passes as it is.
        regularized = (radius > 0) & (strength > 0) & all_finite(clean)
        direction = jax.tree.map(
            lambda g, s: jnp.where(regularized, g + (strength * s).astype(g.dtype), g), clean, slope
        )
        measured = _measure(loss, sums, num_samples, clean, sharpness, slope) if track else None
        state = UniversalState(
            step=optax.safe_increment(state.step),
            rng_key=following,
            metrics=cast_like(measured, state.metrics) if track else state.metrics,
        )
        return cast_like(direction, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _measure(
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


def _visits(
    num_samples: int,
    batch_size: int,
    antithetic: bool,
    sharding: jax.sharding.NamedSharding | None,
) -> int:
    """How often `batch_size` samples are evaluated."""
    check_count("num_samples", num_samples)
    check_count("batch_size", batch_size)
    if num_samples % batch_size:
        raise ValueError(f"batch_size must divide num_samples, {num_samples}, got {batch_size}.")
    if antithetic and num_samples % 2:
        raise ValueError(f"num_samples must be even if antithetic, got {num_samples}.")
    if sharding is not None:
        try:
            sharding.shard_shape((batch_size,))
        except ValueError as error:
            raise ValueError(
                f"sharding must divide the {batch_size} samples that are evaluated at once, "
                f"batch_size: {error}"
            ) from None
    return num_samples // batch_size
