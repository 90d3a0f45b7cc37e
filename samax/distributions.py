r"""Distributions mu of perturbations: which directions v a sharpness looks along.

A distribution is any function `(key, params) -> v`, with v a pytree like the parameters, in float32
or wider. It may depend on the parameters: the invariances of mu are those of the sharpness made
from it, so that `scaled_by_params(gaussian)` makes any of them blind to rescaling of the
parameters.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from samax._core.checks import check_callable
from samax._core.hyperparameters import Scalar, check_scalar
from samax._core.numerics import norm, normalized, tree_wide_dtype, widen

Distribution: TypeAlias = Callable[[jax.Array, optax.Params], optax.Updates]


def gaussian(key: jax.Array, params: optax.Params) -> optax.Updates:
    r"""The standard normal distribution: $v \sim N(0, I)$.

    Args:
      key: a typed key.
      params: the parameters.

    Returns:
      A sample, a pytree like the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, samax
      >>> v = samax.gaussian(jax.random.key(0), {"w": jnp.zeros((3, 2))})
      >>> print(v["w"].shape)
      (3, 2)
    """
    return _independent(jax.random.normal, key, params)


def sphere(key: jax.Array, params: optax.Params) -> optax.Updates:
    r"""The uniform distribution on the unit sphere: $v = z / \lVert z \rVert$, $z \sim N(0, I)$.

    The norm is over all leaves, so that $\mathbb{E}\, v v^\top = I / d$ for d parameters in all.

    Args:
      key: a typed key.
      params: the parameters.

    Returns:
      A sample, a pytree like the parameters, of norm 1.
    """
    return normalized(gaussian(key, params))


def rademacher(key: jax.Array, params: optax.Params) -> optax.Updates:
    r"""Independent signs: each $v_i$ is 1 or -1.

    The same mean and covariance as `gaussian` has, and estimates of a trace vary less.

    Args:
      key: a typed key.
      params: the parameters.

    Returns:
      A sample, a pytree like the parameters.
    """
    return _independent(jax.random.rademacher, key, params)


def cube(half_width: Scalar) -> Distribution:
    r"""The uniform distribution on a cube: Lebesgue's measure on $[-h, h]^d$, made a probability.

    Args:
      half_width: h, above 0.

    Returns:
      A distribution.

    Raises:
      ValueError: if `half_width` is not positive and finite.

    Examples:
      >>> import jax, jax.numpy as jnp, samax
      >>> v = samax.cube(0.01)(jax.random.key(0), jnp.zeros(1000))
      >>> print(bool(jnp.all(jnp.abs(v) <= 0.01)))
      True
    """
    check_scalar("half_width", half_width, include_low=False)

    def sample(key: jax.Array, params: optax.Params) -> optax.Updates:
        signed = _independent(functools.partial(jax.random.uniform, minval=-1.0), key, params)
        return jax.tree.map(lambda v: (v * half_width).astype(v.dtype), signed)

    return sample


def scaled_by_params(distribution: Distribution, t0: Scalar = 0.0) -> Distribution:
    r"""Scales samples elementwise by the size of the parameters: $v = (|w| + t_0) \, z$.

    With $t_0 = 0$ any sharpness becomes invariant under rescaling of the parameters, one by one.

    Args:
      distribution: that of z, symmetric for the invariance under changes of sign too.
      t0: added to `|w|`, at least 0, so that parameters near zero are perturbed too.

    Returns:
      A distribution.

    Raises:
      ValueError: if `t0` is negative or not finite.
    """
    check_callable("distribution", distribution, "(key, params) -> sample")
    check_scalar("t0", t0)

    def sample(key: jax.Array, params: optax.Params) -> optax.Updates:
        return jax.tree.map(
            lambda z, w: (z * (jnp.abs(w) + t0)).astype(z.dtype),
            distribution(key, params),
            widen(params),
        )

    return sample


def scaled_by_layer(distribution: Distribution) -> Distribution:
    r"""Scales samples leaf by leaf by the root mean square of the parameters there.

    $$ v_l = \frac{\lVert w_l \rVert}{\sqrt{d_l}} \, z_l $$

    With $z \sim N(0, I)$ each leaf is perturbed in proportion to its norm, $\mathbb{E} \lVert v_l
    \rVert^2 = \lVert w_l \rVert^2$, so that any sharpness becomes invariant under rescaling of the
    leaves. A leaf of zeros, such as a bias at the start, is not perturbed.

    Args:
      distribution: that of z.

    Returns:
      A distribution.
    """
    check_callable("distribution", distribution, "(key, params) -> sample")

    def sample(key: jax.Array, params: optax.Params) -> optax.Updates:
        return jax.tree.map(
            lambda z, w: (z * (norm(w) / max(w.size, 1) ** 0.5)).astype(z.dtype),
            distribution(key, params),
            widen(params),
        )

    return sample


def scaled_by_filter(distribution: Distribution, axis: int = -1) -> Distribution:
    r"""Scales samples filter by filter by the norm of the parameters there.

    $$ v_{l, j} = \lVert w_{l, j} \rVert \, z_{l, j} $$

    A filter is what makes one output, and a leaf of less than two axes is one filter. With $z \sim
    N(0, I)$ and a rho of $\gamma$ an entry's perturbation is $N(0, (\gamma \lVert w_{l, j}
    \rVert)^2)$, as random weight perturbation has it: the norm itself, where `scaled_by_layer` has
    the root mean square. A filter of zeros is not perturbed.

    Args:
      distribution: that of z.
      axis: the axis of the outputs: -1, the last, in the layouts (in, out) and (height, width, in,
        out) of Flax; 0, the first, in (out, in, ...) of Equinox.

    Returns:
      A distribution.

    Raises:
      ValueError: if `axis` is neither -1 nor 0.

    References:
      [arXiv 2211.11489](https://arxiv.org/abs/2211.11489)

    Examples:
      >>> import jax, jax.numpy as jnp, samax
      >>> w = jnp.array([[3.0, 0.0], [4.0, 1.0]])  # filters of norm 5 and 1
      >>> v = samax.scaled_by_filter(samax.rademacher)(jax.random.key(0), w)
      >>> print(jnp.abs(v))
      [[5. 1.]
       [5. 1.]]
    """
    check_callable("distribution", distribution, "(key, params) -> sample")
    if axis not in (-1, 0):
        raise ValueError(
            f"axis must be -1, outputs last as in Flax, or 0, outputs first as in Equinox, got "
            f"{axis!r}."
        )

    def scale(z: jax.Array, w: jax.Array) -> jax.Array:
        within = tuple(range(w.ndim))  # the axes of a filter
        if w.ndim > 1:
            within = within[1:] if axis == 0 else within[:-1]
        sizes = jnp.sqrt(jnp.sum(w**2, axis=within, keepdims=True))
        return (z * sizes).astype(z.dtype)

    return lambda key, params: jax.tree.map(scale, distribution(key, params), widen(params))


def _independent(
    draw: Callable[..., jax.Array], key: jax.Array, params: optax.Params
) -> optax.Updates:
    """Draws every entry on its own.

    One draw for all leaves: XLA on CPU takes about a second to compile each, that is 76 s for the
    normal draws of 60 leaves, against 2 s for one.
    """
    leaves, structure = jax.tree.flatten(widen(params))
    ends = np.cumsum([leaf.size for leaf in leaves], dtype=int)
    vector = draw(key, (int(ends[-1]) if leaves else 0,), tree_wide_dtype(params))
    parts = jnp.split(vector, ends[:-1])
    draws = [
        part.reshape(leaf.shape).astype(leaf.dtype)
        for part, leaf in zip(parts, leaves, strict=bool(leaves))
    ]
    return jax.tree.unflatten(structure, draws)
