"""Measures of the balance of the cores of a group."""

from typing import Any

import jax
import jax.numpy as jnp

from samax._balance.groups import Groups, find_groups
from samax._core.checks import check_same_tree


def balancedness(params: Any, groups: Groups) -> dict[str, jax.Array]:
    r"""Half the difference of the squared norms of the two cores of each group.

    $$ B = \frac{\lVert x \rVert^2 - \lVert y \rVert^2}{2} $$

    Gradient flow conserves it, and SAM drives it towards zero.

    Args:
      params: the parameters.
      groups: the groups, each of two cores; see `samax.balanced`.

    Returns:
      By the group's label a scalar, or an array of shape (layers,) for stacked layers; x is the
      core that comes first in the pytree.

    Raises:
      ValueError: if a group has not two cores.

    Examples:
      >>> import jax.numpy as jnp, samax
      >>> params = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 1))}
      >>> print(samax.balancedness(params, samax.lora_groups)["lora_*"])
      2.0
    """
    result = {}
    for name, squares in _squares(params, params, groups).items():
        if len(squares) != 2:
            raise ValueError(
                f"balancedness is of two cores, and the group {name!r} has {len(squares)}; use "
                "norm_deviation."
            )
        result[name] = (squares[0] - squares[1]) / 2
    return result


def norm_deviation(params: Any, groups: Groups) -> dict[str, jax.Array]:
    r"""How far the squared norms of the cores of each group are from their mean.

    $$ Q = \sum_k \Big(\lVert G_k \rVert^2 - \frac{1}{K} \sum_j \lVert G_j \rVert^2\Big)^2 $$

    For two cores it is twice the square of the balancedness. Gradient flow conserves it.

    Args:
      params: the parameters.
      groups: the groups; see `samax.balanced`.

    Returns:
      By the group's label a scalar, or an array of shape (layers,) for stacked layers.

    Examples:
      >>> import jax.numpy as jnp, samax
      >>> params = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 1))}
      >>> print(samax.norm_deviation(params, samax.lora_groups)["lora_*"])
      8.0
    """
    return {
        name: jnp.sum((squares - squares.mean(axis=0)) ** 2, axis=0)
        for name, squares in _squares(params, params, groups).items()
    }


def gradient_covariance(params: Any, grads: Any, groups: Groups) -> dict[str, jax.Array]:
    r"""The covariance over a group's cores of the squared norms of cores and gradients.

    $$ \mathrm{Cov}\big(\lVert G_k \rVert^2, \lVert g_k \rVert^2\big) $$

    The population covariance. Its sign is that of the change of the norm deviation under SAM:
    $dQ/dt = 4 \rho u K \, \mathrm{Cov}$ to first order in rho, with $u = (\sum_k \lVert g_k
    \rVert^2)^{-1/2}$.

    Args:
      params: the parameters.
      grads: their gradients.
      groups: the groups; see `samax.balanced`.

    Returns:
      By the group's label a scalar, or an array of shape (layers,) for stacked layers.

    Raises:
      ValueError: if `grads` is another pytree than `params`.

    Examples:
      >>> import jax.numpy as jnp, samax
      >>> params = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 1))}
      >>> print(samax.gradient_covariance(params, params, samax.lora_groups)["lora_*"])
      4.0
    """
    check_same_tree("grads", grads, params)
    cores, gammas = _squares(params, params, groups), _squares(grads, params, groups)
    return {
        name: jnp.mean(
            (cores[name] - cores[name].mean(axis=0)) * (gammas[name] - gammas[name].mean(axis=0)),
            axis=0,
        )
        for name in cores
    }


def _squares(tree: Any, params: Any, groups: Groups) -> dict[str, jax.Array]:
    """Squared norms of the leaves of `tree` by the groups of `params`, of shape (K,) or (K, L)."""
    leaves = jax.tree.leaves(tree)
    return {group.name: group.squared_norms(leaves) for group in find_groups(groups, params)}
