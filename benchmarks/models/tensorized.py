"""Convolutions and linear layers whose weight is a product of small cores.

The weight is reconstructed from its cores at every call, and the dense operation follows. Its
channels are factorized, as in Tensor-Ring networks (Wang et al. 2018, arXiv 1802.09052): a
convolution's kernel is a tensor of shape ``(i_1, i_2, i_3, size * size, o_1, o_2, o_3)``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import samax

CORE_GROUPS = samax.groups_by_path(r"(?P<group>.*)/core_\d+$")
"""Labels the cores of each tensorized layer as one group, for norm balancing and its measures."""

_AXES, _BONDS = "abcdefghijklm", "ABCDEFGHIJKLMN"


class Layout(NamedTuple):
    """How cores make a tensor."""

    shapes: tuple[tuple[int, ...], ...]  # The cores' shapes
    # The ``einsum`` indices of each core: lower case an axis of the tensor, upper case a bond,
    # which is summed over.
    terms: tuple[str, ...]
    products: int  # The number of products that are summed in each entry of the tensor


def _canonical(dims: Sequence[int], rank: int) -> Layout:
    shapes = tuple((dim, rank) for dim in dims)
    return Layout(shapes, tuple(axis + "A" for axis in _AXES[: len(dims)]), rank)


def _chain(dims: Sequence[int], rank: int, *, closed: bool) -> Layout:
    """A ring, or a train: a ring that is cut, whose ends are bonds of rank 1."""
    last, end = len(dims) - 1, rank if closed else 1
    shapes = tuple(
        (end if k == 0 else rank, dim, end if k == last else rank) for k, dim in enumerate(dims)
    )
    bonds = _BONDS[: len(dims)] + (_BONDS[0] if closed else _BONDS[len(dims)])
    terms = tuple(bonds[k] + _AXES[k] + bonds[k + 1] for k in range(len(dims)))
    return Layout(shapes, terms, rank ** (len(dims) if closed else last))


FORMATS: dict[str, Callable[[Sequence[int], int], Layout]] = {
    "cp": _canonical,
    "tr": functools.partial(_chain, closed=True),
    "tt": functools.partial(_chain, closed=False),
}
"""CP (factor matrices), Tensor-Ring, and Tensor-Train."""


def factorize(features: int) -> tuple[int, ...]:
    """Splits a number of channels into three factors of the least sum, largest first.

    The sum is what the cores' size is proportional to. 16 is 4 x 2 x 2, 32 is 4 x 4 x 2 and 64 is
    4 x 4 x 4, as in Tensor-Ring ResNets. Factors of 1 are left out.
    """
    divisors = [n for n in range(1, features + 1) if features % n == 0]
    triples = (
        (features // (b * c), b, c)
        for c in divisors
        for b in divisors
        if c <= b and features % (b * c) == 0 and b <= features // (b * c)
    )
    return tuple(factor for factor in min(triples, key=sum) if factor > 1) or (1,)


class TensorProduct(nnx.Module):
    r"""A tensor that is the product of its cores, ``core_0``, ``core_1``, ...

    With all entries of the K cores independent and normal with standard deviation s, an entry of
    the tensor is a sum of n uncorrelated products of K numbers, and its variance $n s^{2K}$:

    $$ n_{CP} = r, \qquad n_{TR} = r^K, \qquad n_{TT} = r^{K-1}, \qquad
       s = (\mathrm{variance} / n)^{1/2K} $$
    """

    def __init__(
        self, dims: Sequence[int], *, format: str, rank: int, variance: float, rngs: nnx.Rngs
    ):
        """Draws the cores of a tensor with these axes, whose entries have this variance.

        Raises:
            ValueError: If ``format`` is unknown, or ``rank``, the size of the bonds, is below 1.
        """
        if format not in FORMATS:
            raise ValueError(f"format={format!r}: choose one of {', '.join(FORMATS)}")
        if rank < 1:
            raise ValueError(f"rank={rank}: pass the size of the bonds, 1 or more")
        layout = FORMATS[format](dims, rank)
        std = (variance / layout.products) ** (1 / (2 * len(dims)))
        for k, shape in enumerate(layout.shapes):
            setattr(self, f"core_{k}", nnx.Param(std * jax.random.normal(rngs.params(), shape)))
        self.terms = layout.terms

    def __call__(self, order: Sequence[int] | None = None) -> jax.Array:
        """Returns the tensor, float32, with its axes in the given order."""
        cores = [getattr(self, f"core_{k}")[...] for k in range(len(self.terms))]
        axes = range(len(cores)) if order is None else order
        # opt_einsum finds the cheapest order: in-factors, out-factors, and then the two.
        return jnp.einsum(f"{','.join(self.terms)}->{''.join(_AXES[k] for k in axes)}", *cores)


class TensorizedConv(nnx.Module):
    """A convolution without bias whose kernel is a product of cores.

    ``functools.partial(TensorizedConv, format=..., rank=...)`` is called as ``layers.conv`` is.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int = 3,
        stride: int = 1,
        *,
        format: str,
        rank: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """Draws the cores such that the kernel has the variance of ``layers.conv``'s.

        The channels are factorized by ``factorize``; the padding is ``size // 2``, and the kernel
        is reconstructed in float32.

        Raises:
            ValueError: If ``format`` or ``rank`` is invalid.
        """
        inputs, outputs = factorize(in_features), factorize(out_features)
        self.kernel = TensorProduct(
            (*inputs, size * size, *outputs),
            format=format,
            rank=rank,
            variance=2 / (size * size * out_features),  # Kaiming, by fan-out
            rngs=rngs,
        )
        self.shape = (size, size, in_features, out_features)
        axes = list(range(len(inputs) + 1 + len(outputs)))
        self.order = (axes.pop(len(inputs)), *axes)  # the kernel's own axis first
        self.stride = stride
        self.dtype = dtype

    def dense_kernel(self) -> jax.Array:
        """Returns the reconstructed kernel, ``(size, size, in_features, out_features)``."""
        return self.kernel(self.order).reshape(self.shape)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves ``(N, H, W, C)`` inputs with the reconstructed kernel."""
        return jax.lax.conv_general_dilated(
            inputs.astype(self.dtype),
            self.dense_kernel().astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=[(self.shape[0] // 2,) * 2] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class TensorizedLinear(nnx.Module):
    """A linear layer with bias whose weight is a product of cores.

    ``functools.partial(TensorizedLinear, format=..., rank=...)`` is called as ``nnx.Linear`` is.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        format: str,
        rank: int,
        rngs: nnx.Rngs,
    ):
        """Draws the cores such that the weight has the variance of ``nnx.Linear``'s.

        The inputs are factorized by ``factorize``, the outputs not at all, since these are classes.

        Raises:
            ValueError: If ``format`` or ``rank`` is invalid.
        """
        variance = 1 / in_features  # LeCun
        self.kernel = TensorProduct(
            (*factorize(in_features), out_features),
            format=format,
            rank=rank,
            variance=variance,
            rngs=rngs,
        )
        self.bias = nnx.Param(jnp.zeros(out_features))
        self.shape = (in_features, out_features)

    def dense_kernel(self) -> jax.Array:
        """Returns the reconstructed weight, ``(in_features, out_features)``."""
        return self.kernel().reshape(self.shape)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps ``(..., in_features)`` to ``(..., out_features)``."""
        return inputs @ self.dense_kernel() + self.bias[...]
