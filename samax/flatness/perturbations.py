"""Sharpness of the loss around some parameters: at worst, on average, and batch by batch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import check_callable, check_count, check_parameters
from samax._core.hyperparameters import Scalar, check_scalar
from samax._core.keys import typed_key
from samax._core.numerics import displace, norm, normalized, widen
from samax.distributions import gaussian, sphere
from samax.flatness.operators import Batches, mean_loss, mean_loss_and_grad, mean_over

Progress = Callable[[int, int], None]


class Estimate(NamedTuple):
    """A mean over random draws.

    Attributes:
      value: the estimate.
      standard_error: its standard deviation; NaN for a single draw.
    """

    value: jax.Array
    standard_error: jax.Array


def worst_case_sharpness(
    loss_fn: Callable[..., jax.Array],
    params: optax.Params,
    batches: Batches | None = None,
    *,
    rho: Scalar,
    steps: int = 10,
    adaptive: bool = False,
    t0: Scalar = 0.0,
    key: jax.Array | int | None = None,
    progress: Progress | None = None,
) -> jax.Array:
    r"""How much the loss can rise within a ball.

    $$ \max_{\lVert T_w^{-1} \epsilon \rVert \le \rho} L(w + \epsilon) - L(w) $$

    T is 1, or $|w| + t_0$ for the adaptive form, ASAM's. Found by k normalized gradient ascent
    steps, of length $\rho / \sqrt k$ in $T_w^{-1} \epsilon$ and each projected onto the ball; the
    largest rise on the way counts, so that it is a lower bound, and never negative. One step is
    SAM's perturbation. It costs `steps + 1` gradients over the data.

    Args:
      loss_fn: `loss_fn(params, batch) -> loss`, the mean over the batch; or `loss_fn(params)`
        without `batches`.
      params: w.
      batches: the data set, an iterable of pytrees of arrays with a leading axis of examples; it
        is gone through at each step.
      rho: the radius, at least 0; for the adaptive form relative to the parameters.
      steps: k, at least 1.
      adaptive: whether the ball is ASAM's, whose sharpness does not change when the parameters are
        rescaled without effect on the loss (with `t0=0`).
      t0: added to `|w|` in the adaptive form.
      key: where to start: None at w, otherwise at a random point of the sphere of radius rho, for
        a w that is stationary, whose gradient shows no way up.
      progress: called with the numbers of gradients done and in all.

    Returns:
      The sharpness, a scalar on the device.

    Raises:
      ValueError: if `rho` or `t0` is negative or not finite, or `steps` below 1.

    References:
      Foret et al., 2021, [arXiv 2010.01412](https://arxiv.org/abs/2010.01412); Kwon et al., 2021,
      [arXiv 2102.11600](https://arxiv.org/abs/2102.11600)

    Examples:
      >>> import jax.numpy as jnp
      >>> from samax import flatness
      >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 4.0]) * w**2)
      >>> sharpness = flatness.worst_case_sharpness(loss, jnp.array([0.0, 1e-3]), rho=1.0)
      >>> print(f"{sharpness:.3f}")  # 4 rho^2 / 2, and 0.004 for the slope
      2.004
    """
    check_parameters("params", params)
    check_scalar("rho", rho)
    check_scalar("t0", t0)
    check_count("steps", steps)
    evaluate = mean_loss_and_grad(loss_fn, batches)
    sizes = jax.tree.map(lambda w: jnp.abs(w) + t0 if adaptive else jnp.ones_like(w), widen(params))
    length = rho / steps**0.5

    @jax.jit
    def place(relative: optax.Updates) -> optax.Params:
        return displace(params, jax.tree.map(jnp.multiply, sizes, relative))

    @jax.jit
    def climb(relative: optax.Updates, grads: optax.Updates) -> optax.Updates:
        slope = normalized(jax.tree.map(jnp.multiply, sizes, widen(grads)))
        further = jax.tree.map(lambda e, s: e + (length * s).astype(e.dtype), relative, slope)
        reach = norm(further)
        shrink = jnp.where(reach > rho, rho / reach, 1.0)
        return jax.tree.map(lambda e: e * shrink.astype(e.dtype), further)

    relative = optax.tree.zeros_like(sizes)
    clean, grads = evaluate(place(relative))
    largest = clean
    if key is not None:
        relative = optax.tree.scale(rho, sphere(typed_key(key), params))
        largest, grads = evaluate(place(relative))
        largest = jnp.maximum(clean, largest)
    for done in range(1, steps + 1):
        if progress is not None:
            progress(done, steps + 1)
        relative = climb(relative, grads)
        value, grads = evaluate(place(relative))
        largest = jnp.maximum(largest, value)
    if progress is not None:
        progress(steps + 1, steps + 1)
    return largest - clean


def average_case_sharpness(
    loss_fn: Callable[..., jax.Array],
    params: optax.Params,
    batches: Batches | None = None,
    *,
    rho: Scalar,
    distribution: Callable[[jax.Array, optax.Params], optax.Updates] = gaussian,
    num_samples: int = 32,
    key: jax.Array | int = 0,
    progress: Progress | None = None,
) -> Estimate:
    r"""How much the loss rises on average under random perturbations.

    $$ \mathbb{E}_{v \sim \mu} \, L(w + \rho v) - L(w) $$

    About $\rho^2 \, \mathrm{tr} H / 2$ at a minimum with the default distribution, $N(0, I)$. The
    adaptive form is `distribution=samax.scaled_by_params(samax.gaussian)`. It costs
    `num_samples + 1` forward passes over the data.

    Args:
      loss_fn: `loss_fn(params, batch) -> loss`, the mean over the batch; or `loss_fn(params)`
        without `batches`.
      params: w.
      batches: the data set; see `samax.flatness.worst_case_sharpness`.
      rho: the scale of the perturbations, at least 0.
      distribution: mu, a function `(key, params) -> v`.
      num_samples: the number of perturbations.
      key: a seed or a key; the result is a function of it.
      progress: called with the numbers of forward passes done and in all.

    Returns:
      The mean and its standard error.

    Raises:
      ValueError: if `rho` is negative or not finite, or `num_samples` below 1.
    """
    check_parameters("params", params)
    check_scalar("rho", rho)
    check_count("num_samples", num_samples)
    check_callable("distribution", distribution, "(key, params) -> sample")
    loss = mean_loss(loss_fn, batches)

    @jax.jit
    def place(key: jax.Array) -> optax.Params:
        eps = jax.tree.map(lambda v: rho * v, widen(distribution(key, params)))
        return displace(params, eps)

    clean, rises = loss(params), []
    for i, sample_key in enumerate(jax.random.split(typed_key(key), num_samples)):
        rises.append(loss(place(sample_key)) - clean)
        if progress is not None:
            progress(i + 2, num_samples + 1)
    return estimate(jnp.stack(rises))


def worst_case_m_sharpness(
    loss_fn: Callable[..., jax.Array],
    params: optax.Params,
    batches: Batches,
    *,
    rho: Scalar,
    steps: int = 1,
    adaptive: bool = False,
    t0: Scalar = 0.0,
) -> jax.Array:
    r"""The mean over batches of m examples of the worst-case sharpness on each of them.

    $$ \frac{1}{|\mathcal{B}|} \sum_{B \in \mathcal{B}} \max_{\lVert \epsilon \rVert \le \rho}
       L_B(w + \epsilon) - L_B(w), \qquad |B| = m $$

    What SAM with batches of m minimizes. It is at least the worst-case sharpness over the whole
    data, and grows as m falls. The size of the batches is m; it costs `steps + 1` gradients over
    the data.

    Args:
      loss_fn: `loss_fn(params, batch) -> loss`, the mean over the batch.
      params: w.
      batches: the data in batches of m examples.
      rho: the radius, at least 0.
      steps: normalized ascent steps; 1 is SAM's.
      adaptive: whether the ball is ASAM's; see `samax.flatness.worst_case_sharpness`.
      t0: added to `|w|` in the adaptive form.

    Returns:
      The sharpness, a scalar on the device.

    Raises:
      ValueError: if `rho` or `t0` is negative or not finite, or `steps` below 1.

    References:
      Foret et al., 2021, section 4.1, [arXiv 2010.01412](https://arxiv.org/abs/2010.01412)
    """
    compiled = jax.jit(
        lambda params, batch: worst_case_sharpness(
            lambda p: loss_fn(p, batch), params, rho=rho, steps=steps, adaptive=adaptive, t0=t0
        )
    )
    return mean_over(batches, lambda batch: compiled(params, batch))


def estimate(draws: jax.Array) -> Estimate:
    """The mean of independent draws, of shape (n, ...), and its standard error."""
    error = jnp.std(draws, axis=0, ddof=1) if len(draws) > 1 else jnp.full(draws.shape[1:], jnp.nan)
    return Estimate(draws.mean(axis=0), error / len(draws) ** 0.5)
