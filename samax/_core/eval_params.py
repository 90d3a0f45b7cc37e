"""The parameters to evaluate, where those outside may be perturbed ones."""

import jax
import optax

from samax._core.alternating import AlternatingState
from samax._core.one_gradient import OneGradientState


def eval_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """The unperturbed parameters, where `samax.alternating` or `samax.one_gradient` perturbs them.

    Args:
      state: the optimizer's state, with that of one of the two somewhere in it.
      params: the parameters outside.

    Returns:
      Those to evaluate, and to export, the model with, a pytree like `params`: for
      `samax.one_gradient`, and `samax.stale_sam` and `samax.msam` which are made with it, always
      those of the state; for `samax.alternating` those from before the first call in between two
      calls, and `params` after the second.

    Raises:
      ValueError: if the state holds none of them, or several.
    """
    kinds = (AlternatingState, OneGradientState)
    is_ours = lambda node: isinstance(node, kinds)  # noqa: E731
    found = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(leaf)]
    if len(found) != 1:
        raise ValueError(
            "eval_params needs the state of one samax.alternating or samax.one_gradient, and found "
            f"{len(found)} in it."
        )
    leaves = jax.tree.leaves(found[0].unperturbed(params))
    # In the containers of `params`: NNX keeps a state's arrays in others.
    return jax.tree.unflatten(jax.tree.structure(params), leaves)
