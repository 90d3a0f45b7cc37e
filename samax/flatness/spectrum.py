"""The spectrum of a curvature operator: Lanczos, Hutchinson, stochastic Lanczos quadrature.

The operators are those of `hessian_operator`, `gauss_newton_operator` and `scaled_operator`, or any
symmetric linear function of pytrees. Nothing here is random but for the key. All costs are in
products with the operator, each about two gradients over its data.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from samax._core.checks import check_callable, check_count, check_parameters
from samax._core.hyperparameters import Scalar, check_scalar
from samax._core.keys import typed_key
from samax._core.numerics import widen
from samax.flatness.lanczos import lanczos
from samax.flatness.operators import Operator
from samax.flatness.perturbations import Estimate, Progress, estimate


class Eigenpairs(NamedTuple):
    """The largest eigenvalues, in descending order.

    Attributes:
      values: of shape (k,).
      vectors: of norm 1; a pytree like the parameters with a leading axis of length k.
      residuals: `||H v - value v||` as Lanczos' recursion has it, of shape (k,): within it of each
        value is an eigenvalue, up to rounding.
    """

    values: jax.Array
    vectors: Any
    residuals: jax.Array


class Spectrum(NamedTuple):
    """A spectral density, `integral density = 1`.

    Attributes:
      grid: eigenvalues, of shape (n,).
      density: the density there, of shape (n,).
      nodes: the Ritz values that it is made of, of shape (num_samples * steps,).
      weights: their weights, of sum 1.
    """

    grid: jax.Array
    density: jax.Array
    nodes: jax.Array
    weights: jax.Array


def top_eigenpairs(
    operator: Operator,
    params: optax.Params,
    k: int = 1,
    *,
    num_products: int | None = None,
    key: jax.Array | int = 0,
    progress: Progress | None = None,
) -> Eigenpairs:
    r"""The k algebraically largest eigenvalues and their eigenvectors, by Lanczos' algorithm.

    With full reorthogonalization, which needs memory for `num_products` vectors. For the smallest
    ones pass `lambda v: jax.tree.map(jnp.negative, operator(v))`.

    Args:
      operator: H.
      params: the parameters, or any pytree of their shapes.
      k: how many.
      num_products: Lanczos steps, at least k; None is `2 k + 28`. Few enough for the largest
        eigenvalues of a network; `residuals` tell.
      key: a seed or a key for the first vector.
      progress: called with the numbers of products done and, at most, in all.

    Returns:
      The eigenpairs; fewer than k if the operator has not as many.

    Raises:
      ValueError: if `k` or `num_products` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from samax import flatness
      >>> product = flatness.hessian_operator(lambda w: w @ w + w[0] ** 2, jnp.ones(5))
      >>> pairs = flatness.top_eigenpairs(product, jnp.ones(5))
      >>> print(f"{pairs.values[0]:.3f}")
      4.000
    """
    flat, vector, unravel = _flatten(operator, params)
    check_count("k", k)
    num_products = 2 * k + 28 if num_products is None else num_products
    num_products = min(check_count("num_products", num_products, k), vector.size)
    product = _counted(flat, progress, num_products)
    start = jax.random.normal(typed_key(key), vector.shape, vector.dtype)
    basis, matrix, remainder = lanczos(product, start, num_products)
    values, ritz = jnp.linalg.eigh(matrix)
    order = jnp.arange(len(values))[::-1][:k]
    vectors = jax.vmap(unravel)(jnp.matmul(ritz[:, order].T, basis, precision="highest"))
    return Eigenpairs(values[order], vectors, remainder * jnp.abs(ritz[-1, order]))


def trace(
    operator: Operator,
    params: optax.Params,
    *,
    num_samples: int = 32,
    key: jax.Array | int = 0,
    progress: Progress | None = None,
) -> Estimate:
    r"""The trace, by Hutchinson's estimator: $\mathrm{tr} H = \mathbb{E} \, v^\top H v$.

    With random signs v its standard deviation is $\sqrt{2 \sum_{i \ne j} H_{ij}^2}$ a sample.

    Args:
      operator: H.
      params: the parameters, or any pytree of their shapes.
      num_samples: n; each costs a product.
      key: a seed or a key.
      progress: called with the numbers of products done and in all.

    Returns:
      The mean and its standard error.

    Raises:
      ValueError: if `num_samples` is below 1.
    """
    return _monte_carlo(lambda v, hv: v @ hv, operator, params, num_samples, key, progress)


def frobenius_norm(
    operator: Operator,
    params: optax.Params,
    *,
    num_samples: int = 32,
    key: jax.Array | int = 0,
    progress: Progress | None = None,
) -> Estimate:
    r"""The Frobenius norm: $\lVert H \rVert_F^2 = \mathbb{E} \lVert H v \rVert^2$.

    Args:
      operator: H.
      params: the parameters, or any pytree of their shapes.
      num_samples: n; each costs a product.
      key: a seed or a key.
      progress: called with the numbers of products done and in all.

    Returns:
      The root of the mean, and its standard error to first order.

    Raises:
      ValueError: if `num_samples` is below 1.
    """
    squared = _monte_carlo(lambda v, hv: hv @ hv, operator, params, num_samples, key, progress)
    root = jnp.sqrt(squared.value)
    return Estimate(root, squared.standard_error / jnp.where(root > 0, 2 * root, 1.0))


def log_determinant(
    operator: Operator,
    params: optax.Params,
    shift: Scalar,
    *,
    num_samples: int = 8,
    num_products: int = 30,
    key: jax.Array | int = 0,
    progress: Progress | None = None,
) -> Estimate:
    r"""$\log \det (H + c I)$, by stochastic Lanczos quadrature of $\mathrm{tr} \log (H + c I)$.

    Args:
      operator: H.
      params: the parameters, or any pytree of their shapes.
      shift: c, above minus the smallest eigenvalue; eigenvalues that are zero make up most of a
        network's spectrum, and each adds log c.
      num_samples: n.
      num_products: Lanczos steps a sample; the whole costs n times as many products.
      key: a seed or a key.
      progress: called with the numbers of products done and, at most, in all.

    Returns:
      The mean and its standard error.

    Raises:
      ValueError: if H + c I has been seen not to be positive definite.
    """
    check_scalar("shift", shift, low=-jnp.inf)
    size, draws = ravel_pytree(params)[0].size, []
    for nodes, weights in _quadratures(operator, params, num_samples, num_products, key, progress):
        if not jnp.all(nodes + shift > 0):
            raise ValueError(
                f"shift must exceed {-float(nodes.min()):.6g}, minus the smallest eigenvalue seen, "
                f"got {shift}; or use samax.flatness.gauss_newton_operator, which has no negative "
                "ones."
            )
        draws.append(size * jnp.sum(weights * jnp.log(nodes + shift)))
    return estimate(jnp.stack(draws))


def spectral_density(
    operator: Operator,
    params: optax.Params,
    *,
    num_samples: int = 8,
    num_products: int = 30,
    num_points: int = 500,
    width: Scalar | None = None,
    key: jax.Array | int = 0,
    progress: Progress | None = None,
) -> Spectrum:
    r"""The density of the eigenvalues, smoothed by a Gaussian.

    $$ p(t) = \frac1d \sum_i N(t; \lambda_i, \sigma^2) $$

    By stochastic Lanczos quadrature: the Ritz values of each sample stand for the eigenvalues.

    Args:
      operator: H.
      params: the parameters, or any pytree of their shapes.
      num_samples: n.
      num_products: Lanczos steps a sample; the whole costs n times as many products.
      num_points: of the grid, from 5 widths below the smallest Ritz value to 5 above the largest.
      width: sigma, above 0; None is 1 % of the range of the Ritz values.
      key: a seed or a key.
      progress: called with the numbers of products done and, at most, in all.

    Returns:
      The density on a grid, and the quadrature's nodes and weights.

    Raises:
      ValueError: if a number is out of range.

    References:
      Ghorbani, Krishnan and Xiao, An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density, 2019, [arXiv 1901.10159](https://arxiv.org/abs/1901.10159)
    """
    check_count("num_points", num_points, 2)
    quadratures = _quadratures(operator, params, num_samples, num_products, key, progress)
    nodes, weights = (jnp.concatenate(parts) for parts in zip(*quadratures, strict=True))
    weights = weights / num_samples
    if width is None:
        reach = nodes.max() - nodes.min()
        width = jnp.where(reach > 0, reach, jnp.maximum(jnp.abs(nodes.max()), 1.0)) / 100
    width = check_scalar("width", width, include_low=False)
    grid = jnp.linspace(nodes.min() - 5 * width, nodes.max() + 5 * width, num_points)
    bells = jax.scipy.stats.norm.pdf(grid[:, None], nodes, width)
    return Spectrum(grid, bells @ weights, nodes, weights)


def _quadratures(
    operator: Operator,
    params: optax.Params,
    num_samples: int,
    num_products: int,
    key: jax.Array | int,
    progress: Progress | None,
) -> list[tuple[jax.Array, jax.Array]]:
    """For each sample v the Ritz values, and weights with which they stand for `v^T f(H) v / d`."""
    flat, vector, _ = _flatten(operator, params)
    check_count("num_samples", num_samples)
    num_products = min(check_count("num_products", num_products), vector.size)
    product = _counted(flat, progress, num_samples * num_products)
    quadratures = []
    for sample_key in jax.random.split(typed_key(key), num_samples):
        start = jax.random.rademacher(sample_key, vector.shape, vector.dtype)
        _, matrix, _ = lanczos(product, start, num_products)
        nodes, ritz = jnp.linalg.eigh(matrix)
        quadratures.append((nodes, ritz[0] ** 2))
    return quadratures


def _monte_carlo(
    integrand: Callable[[jax.Array, jax.Array], jax.Array],
    operator: Operator,
    params: optax.Params,
    num_samples: int,
    key: jax.Array | int,
    progress: Progress | None,
) -> Estimate:
    """The mean of `integrand(v, H v)` over random signs, one at a time to keep the memory small."""
    flat, vector, _ = _flatten(operator, params)
    check_count("num_samples", num_samples)
    product = _counted(flat, progress, num_samples)
    draws = []
    for sample_key in jax.random.split(typed_key(key), num_samples):
        v = jax.random.rademacher(sample_key, vector.shape, vector.dtype)
        draws.append(integrand(v, product(v)))
    return estimate(jnp.stack(draws))


def _flatten(
    operator: Operator, params: optax.Params
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array, Callable[[jax.Array], Any]]:
    """The operator on flat vectors, the flat parameters, and the way back to a pytree."""
    check_callable("operator", operator, "of a pytree like the parameters")
    check_parameters("params", params)
    vector, unravel = ravel_pytree(widen(params))

    def flat(direction: jax.Array) -> jax.Array:
        return ravel_pytree(operator(unravel(direction)))[0].astype(direction.dtype)

    return flat, vector, unravel


def _counted(
    product: Callable[[jax.Array], jax.Array], progress: Progress | None, total: int
) -> Callable[[jax.Array], jax.Array]:
    """The product, telling `progress` how many are done."""
    done = 0

    def multiply(vector: jax.Array) -> jax.Array:
        nonlocal done
        result = jax.block_until_ready(product(vector))
        done += 1
        if progress is not None:
            progress(done, total)
        return result

    return multiply
