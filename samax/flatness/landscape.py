"""The loss along lines and over planes through some parameters; `plots` has their figures."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import check_callable, check_parameters, check_same_tree
from samax._core.keys import typed_key
from samax._core.numerics import displace, widen
from samax.distributions import gaussian
from samax.flatness.operators import Batches, mean_over
from samax.flatness.perturbations import Progress


def filter_normalized(direction: Any, params: optax.Params) -> Any:
    r"""Gives each filter of a direction the norm of the parameters' filter.

    $$ d_{l, j} \leftarrow \frac{d_{l, j}}{\lVert d_{l, j} \rVert} \, \lVert w_{l, j} \rVert $$

    A filter is what makes one output: one entry of a kernel's last axis, in JAX's layouts (in, out)
    and (height, width, in, out). Leaves of less than two axes, biases and the scales of
    normalization, are left out of the direction (zero), as in the paper. Landscapes of networks
    with different weight scales can then be compared.

    Args:
      direction: a pytree like the parameters.
      params: w.

    Returns:
      The direction, in float32 or wider.

    Raises:
      ValueError: if `direction` is another pytree than `params`.

    References:
      Li et al., Visualizing the Loss Landscape of Neural Nets, 2018,
      [arXiv 1712.09913](https://arxiv.org/abs/1712.09913)
    """
    check_same_tree("direction", direction, params)

    def rescale(d: jax.Array, w: jax.Array) -> jax.Array:
        if d.ndim < 2:
            return jnp.zeros_like(d)
        axes = tuple(range(d.ndim - 1))
        own, wanted = (jnp.linalg.norm(x.reshape(-1, x.shape[-1]), axis=0) for x in (d, w))
        return d * jnp.expand_dims(wanted / jnp.where(own > 0, own, 1.0), axes)

    return jax.tree.map(rescale, widen(direction), widen(params))


def random_direction(key: jax.Array | int, params: optax.Params) -> Any:
    """A filter-normalized Gaussian direction; see `samax.flatness.filter_normalized`.

    Args:
      key: a seed or a key.
      params: w.

    Returns:
      A pytree like the parameters, in float32 or wider.
    """
    return filter_normalized(gaussian(typed_key(key), params), params)


def loss_line(
    loss_fn: Callable[..., jax.Array],
    params: optax.Params,
    direction: Any,
    distances: jax.typing.ArrayLike,
    batches: Batches | None = None,
    *,
    progress: Progress | None = None,
) -> jax.Array:
    r"""The loss along a line: $L(w + a \, d)$ for each distance a.

    Args:
      loss_fn: `loss_fn(params, batch) -> loss`, the mean over the batch; or `loss_fn(params)`
        without `batches`.
      params: w.
      direction: d, such as `samax.flatness.random_direction(key, params)` or an eigenvector of the
        Hessian from `samax.flatness.top_eigenpairs`.
      distances: a, of shape (n,).
      batches: the data set, an iterable of pytrees of arrays with a leading axis of examples, gone
        through once.
      progress: called with the numbers of points done and in all, within a batch.

    Returns:
      The losses, of shape (n,).

    Raises:
      ValueError: if `direction` is another pytree than `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from samax import flatness
      >>> print(flatness.loss_line(jnp.sum, jnp.zeros(2), jnp.ones(2), [-1.0, 0.0, 1.0]))
      [-2.  0.  2.]
    """
    distances = jnp.asarray(distances)
    still = optax.tree.zeros_like(direction)
    points = jnp.stack([distances, jnp.zeros_like(distances)], axis=-1)
    return _losses(loss_fn, params, (direction, still), points, batches, progress)


def loss_surface(
    loss_fn: Callable[..., jax.Array],
    params: optax.Params,
    directions: tuple[Any, Any],
    x: jax.typing.ArrayLike,
    y: jax.typing.ArrayLike,
    batches: Batches | None = None,
    *,
    progress: Progress | None = None,
) -> jax.Array:
    r"""The loss over a plane: $L(w + x \, d_1 + y \, d_2)$ for each pair of x and y.

    Args:
      loss_fn: `loss_fn(params, batch) -> loss`, the mean over the batch; or `loss_fn(params)`
        without `batches`.
      params: w.
      directions: d_1 and d_2, pytrees like the parameters; see `samax.flatness.loss_line`.
      x: distances along d_1, of shape (n,).
      y: distances along d_2, of shape (m,).
      batches: the data set; see `samax.flatness.loss_line`.
      progress: called with the numbers of points done and in all, within a batch.

    Returns:
      The losses, of shape (m, n): y goes down the rows, as matplotlib's contours have it.

    Raises:
      ValueError: if a direction is another pytree than `params`.
    """
    points = jnp.stack(jnp.meshgrid(jnp.asarray(x), jnp.asarray(y)), axis=-1)
    return _losses(loss_fn, params, directions, points, batches, progress)


def _losses(
    loss_fn: Callable[..., jax.Array],
    params: optax.Params,
    directions: tuple[Any, Any],
    points: jax.Array,
    batches: Batches | None,
    progress: Progress | None,
) -> jax.Array:
    """The losses at points of shape (..., 2): all points for a batch before the next is loaded."""
    check_callable("loss_fn", loss_fn, "of the parameters and a batch")
    check_parameters("params", params)
    for direction in directions:
        check_same_tree("direction", direction, params)
    first, second = widen(directions)

    @jax.jit
    def loss_at(point: jax.Array, *batch: Any) -> jax.Array:
        eps = jax.tree.map(lambda d, e: point[0] * d + point[1] * e, first, second)
        return loss_fn(displace(params, eps), *batch)

    flat = points.reshape(-1, 2)

    def losses(*batch: Any) -> jax.Array:
        values = []
        for i, point in enumerate(flat):
            values.append(loss_at(point, *batch))
            if progress is not None:
                progress(i + 1, len(flat))
        return jnp.stack(values)

    return mean_over(batches, losses).reshape(points.shape[:-1])
