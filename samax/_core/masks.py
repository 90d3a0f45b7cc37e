"""Masks of what is scaled or perturbed, found by the names of the leaves."""

import re
from typing import Any

import jax
import numpy as np
import optax

# A layer's name with "norm" in it, or "bn", "ln", "gn" on its own or with a number or a suffix.
_NORMALIZATION = re.compile(r"norm|(?:^|_)(?:bn|ln|gn)(?:$|_|\d)", re.IGNORECASE)


def weights_only(params: optax.Params) -> Any:
    """A mask that is True for every leaf but the biases: those with "bias" in their path.

    ASAM's authors scale "weights" and not biases; the scales of normalization layers are weights
    to them.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "bias" not in jax.tree_util.keystr(path), params
    )


def normalization_only(params: optax.Params) -> Any:
    """A mask that is True for the scales and biases of normalization layers, SAM-ON's.

    A leaf is one of them if a layer in its path is named so (`BatchNorm_0`, `layer_norm`, `bn1`,
    `ln_f`), if it is called `scale` (Flax), or `weight` with at most one axis (Equinox, where
    layers of an `equinox.nn.Sequential` have numbers for names), or if it is the `bias` beside one
    of these two. For other names write a mask: it is a pytree of booleans like the parameters.

    SAM-ON perturbs these leaves alone, with the norm over them, and trains all. As they are few, it
    needs a far larger rho than SAM.

    Args:
      params: the parameters, or a pytree of their structure and shapes.

    Returns:
      A pytree of booleans.

    Raises:
      ValueError: if there is no such leaf: SAM would silently be the base optimizer.

    References:
      Mueller et al., 2023, [arXiv 2306.04226](https://arxiv.org/abs/2306.04226)

    Examples:
      >>> import jax.numpy as jnp, optax, samax
      >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)},
      ...           "LayerNorm_0": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
      >>> print(samax.normalization_only(params)["Dense_0"])
      {'bias': False, 'kernel': False}
      >>> print(samax.normalization_only(params)["LayerNorm_0"])
      {'bias': True, 'scale': True}
      >>> tx = optax.chain(samax.sam(rho=0.5, mask=samax.normalization_only), optax.sgd(0.1))
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = [path_names(path) for path, _ in flat]
    scales = {
        names[:-1]
        for names, (_, leaf) in zip(paths, flat, strict=True)
        if names and (names[-1] == "scale" or (names[-1] == "weight" and np.ndim(leaf) <= 1))
    }
    marks = [
        any(_NORMALIZATION.search(name) for name in names[:-1])
        or (names[:-1] in scales and names[-1] in ("scale", "weight", "bias"))
        for names in paths
    ]
    if not any(marks):
        seen = ", ".join("/".join(names) for names in paths) or "none"
        raise ValueError(
            "normalization_only finds no scale or bias of a normalization layer; pass a mask of "
            f"your own, a pytree of booleans like the parameters. The paths are: {seen}."
        )
    return jax.tree.unflatten(structure, marks)


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a path as strings.

    Flax NNX ends paths in `.value` in `init`, where leaves are variables, and not in `update`.
    """
    names = tuple(re.sub(r"^[\[.']+|[\]']+$", "", jax.tree_util.keystr((key,))) for key in path)
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names
