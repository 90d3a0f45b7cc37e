"""Which leaves form a group: the cores whose product is what the loss sees.

A finder maps the parameters to a pytree of labels of the same structure: leaves with equal labels
are the cores of one group, and None is outside any. Labels are made from paths, so they are the
same in `init` and `update`. A pytree of labels may be written by hand in a finder's place.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from samax._core.checks import is_masked
from samax._core.masks import path_names
from samax._core.numerics import widen

Groups: TypeAlias = Any  # a pytree of labels, or a function from parameters to one

# A leaf whose path has one of these components is a LoRA factor; the letter says which.
#   flax.nnx   lora_a, lora_b; lora/lora_a, lora/lora_b    qwix, tunix  kernel_lora_a, w_lora_b
#   Keras 3    lora_kernel_a, lora_embeddings_b            PEFT         lora_A, lora_B
#   FLoRA      lora_a, lora_g, lora_b
_FACTOR = re.compile(r"(?P<stem>(?:.*_)?lora(?:_.*)?_)(?P<core>[agb])", re.IGNORECASE)
# gemma: a component `lora` with the factors `a` and `b` below it.
_LETTER = re.compile(r"(?P<stem>)(?P<core>[agb])", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Stacked:
    """The label of a group whose cores are stacked over layers along their leading axis.

    Norms are then per layer: each slice of the cores is a group of its own.
    """

    label: Hashable


def lora_groups(params: Any, *, stacked: bool = False) -> Any:
    """Labels the factors of every LoRA layer, `A` and `B` (and FLoRA's `G`), as one group a layer.

    Found by their names: `lora_a` and `lora_b` of flax.nnx, alone or under `lora`; `kernel_lora_a`,
    `w_lora_a` and the like of qwix and tunix; `lora_kernel_a` of Keras 3; `lora/a` of gemma;
    `lora_A` of PEFT; with a third core `lora_g` those of FLoRA.

    Args:
      params: the parameters.
      stacked: whether layers are stacked along the leading axis of every factor; pass
        `functools.partial(lora_groups, stacked=True)` as the finder.

    Returns:
      A pytree of labels like `params`.

    Raises:
      ValueError: if there is no factor, or one is alone in its layer; the paths are listed.

    Examples:
      >>> import jax.numpy as jnp, samax
      >>> params = {"query": {"kernel": jnp.ones((4, 4)), "lora_a": jnp.ones((4, 2)),
      ...                     "lora_b": jnp.zeros((2, 4))}}
      >>> samax.lora_groups(params)["query"]
      {'kernel': None, 'lora_a': 'query/lora_*', 'lora_b': 'query/lora_*'}
    """
    return _label(params, _lora_layer, "LoRA factor (lora_a, lora_b, ...)", stacked)


def groups_by_path(pattern: str, *, stacked: bool = False) -> Callable[[Any], Any]:
    r"""Makes a finder that groups the leaves whose path matches a regular expression.

    A leaf's path is its keys joined by "/", such as "layers/0/core_1".

    Args:
      pattern: searched for in the path. Its named part `group` is the label: leaves that agree in
        it are the cores of one group.
      stacked: whether layers are stacked along the leading axis of every core.

    Returns:
      A finder: parameters to labels.

    Raises:
      ValueError: if `pattern` is not a regular expression or has no part named `group`; at a call,
        if no leaf matches, or one is alone in its group.

    Examples:
      >>> import jax.numpy as jnp, samax
      >>> find = samax.groups_by_path(r"(?P<group>layer\d+)/core")
      >>> find({"layer0": {"core1": jnp.ones(2), "core2": jnp.ones(2), "bias": jnp.ones(1)}})
      {'layer0': {'bias': None, 'core1': 'layer0', 'core2': 'layer0'}}
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}.") from None
    if "group" not in expression.groupindex:
        raise ValueError(
            f"pattern {pattern!r} must name the part that tells groups apart, as in "
            r"r'(?P<group>layer\d+)/core'."
        )

    def layer(names: tuple[str, ...]) -> str | None:
        match = expression.search("/".join(names))
        return match.group("group") if match else None

    return lambda params: _label(params, layer, f"path with {pattern!r}", stacked)


def _lora_layer(names: tuple[str, ...]) -> str | None:
    for i, name in enumerate(names):
        match = _FACTOR.fullmatch(name)
        if match is None and i and names[i - 1].lower() == "lora":
            match = _LETTER.fullmatch(name)
        if match is not None:
            return "/".join((*names[:i], f"{match['stem']}*", *names[i + 1 :]))
    return None


def _label(
    params: Any, layer: Callable[[tuple[str, ...]], str | None], wanted: str, stacked: bool
) -> Any:
    structure: Any
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = [path_names(path) for path, _ in leaves]
    labels = [layer(names) for names in paths]
    members = defaultdict(list)
    for names, label in zip(paths, labels, strict=True):
        if label is not None:
            members[label].append("/".join(names))
    if not members:
        seen = ", ".join("/".join(names) for names in paths) or "none"
        raise ValueError(f"No leaf is a {wanted}. The paths are: {seen}.")
    alone = [cores[0] for cores in members.values() if len(cores) == 1]
    if alone:
        found = "; ".join(f"{label} holds {', '.join(cores)}" for label, cores in members.items())
        raise ValueError(
            f"A group needs at least two cores, and these are alone: {', '.join(alone)}. {found}."
        )
    return structure.unflatten(
        [Stacked(label) if stacked and label is not None else label for label in labels]
    )


@dataclasses.dataclass(frozen=True)
class Group:
    """The cores of one group, by their places among the leaves of the parameters.

    Attributes:
      name: the label as a string, for logs and plots.
      places: where its K cores stand among the leaves.
      stacked: whether the cores are stacked over layers, each a group of its own.
    """

    name: str
    places: tuple[int, ...]
    stacked: bool

    def members(self, leaves: list[Any]) -> list[Any]:
        """Those of the leaves that are this group's."""
        return [leaves[place] for place in self.places]

    def squared_norms(self, leaves: list[Any]) -> jax.Array:
        """The squared Frobenius norms, of shape (K,) or (K, layers), in float32 or wider."""
        return jnp.stack([_squared_norm(x, self.stacked) for x in widen(self.members(leaves))])

    def scaled(self, leaves: list[Any], factors: jax.Array) -> list[jax.Array]:
        """The cores times their factors, of shape (K,) or (K, layers), in float32 or wider."""
        return [
            (factor.reshape(factor.shape + (1,) * (core.ndim - factor.ndim)) * core).astype(
                core.dtype
            )
            for factor, core in zip(factors, widen(self.members(leaves)), strict=True)
        ]


def find_groups(groups: Groups, params: Any) -> list[Group]:
    """The groups of `params`.

    What `optax.masked` hides from an optimizer holds no leaf, whatever its label.
    """
    labels = groups(params) if callable(groups) else groups
    structure: Any
    leaves, structure = jax.tree.flatten(params, is_leaf=is_masked)
    try:
        flat = structure.flatten_up_to(labels)
    except ValueError as error:
        raise ValueError(
            f"groups must be a pytree of labels like the parameters: {error}"
        ) from None
    seen = [label for label, leaf in zip(flat, leaves, strict=True) if not is_masked(leaf)]
    places = defaultdict(list)
    for place, label in enumerate(seen):
        if label is not None:
            places[label].append(place)
    if not places:
        raise ValueError("groups labels no leaf: every label is None.")
    for label, cores in places.items():
        if len(cores) == 1:
            raise ValueError(f"groups has one core alone in the group {label!r}; two are needed.")
    return [
        Group(
            name=str(label.label if isinstance(label, Stacked) else label),
            places=tuple(cores),
            stacked=isinstance(label, Stacked),
        )
        for label, cores in places.items()
    ]


def _squared_norm(x: jax.Array, stacked: bool) -> jax.Array:
    """The squared Frobenius norm, of each slice along the leading axis where layers are stacked.

    Rows first, in a sum of their own: one long sum is a chain of additions that wait for one
    another, and with small cores that was most of what a rule costs on CPU.
    """
    squares = x * x
    if squares.ndim > 1 + stacked:
        squares = jax.lax.optimization_barrier(jnp.sum(squares, axis=-1))
    return jnp.sum(squares, axis=tuple(range(1, squares.ndim)) if stacked else None)
