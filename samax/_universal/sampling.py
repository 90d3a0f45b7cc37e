"""How a sharpness is sampled: which perturbations, how many, and how they are evaluated."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from samax._core.checks import check_callable, check_count
from samax._core.keys import Key, check_key
from samax._core.loop import default_unroll, stream
from samax.distributions import Distribution

Carry = TypeVar("Carry")


@dataclasses.dataclass(frozen=True)
class Sampling:
    r"""The samples $v_1, \dots, v_n \sim \mu$ of an update, and how they are evaluated.

    The samples are streamed, so that activations are held for `batch_size` of them at a time,
    whatever n. All but `distribution`, `num_samples`, `antithetic` and `key` leaves the numbers as
    they are, but for rounding.

    Attributes:
      distribution: mu, a function `(key, params) -> v`: `samax.gaussian`, `samax.sphere`,
        `samax.rademacher`, `samax.cube(half_width)`, one of these scaled by the parameters, or
        your own.
      num_samples: n, at least 1; the noise falls as $1 / \sqrt n$.
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

    Raises:
      ValueError: if a number is outside its range, or `sharding` does not divide `batch_size`.
      TypeError: if `distribution` is not a function, or `key` is neither a seed nor a key.

    Examples:
      >>> import optax, samax
      >>> sampling = samax.Sampling(samax.sphere, num_samples=8, antithetic=True)
      >>> tx = optax.chain(samax.trace_sam(0.01, sampling=sampling), optax.sgd(0.1))
    """

    distribution: Distribution
    num_samples: int = 1
    _: dataclasses.KW_ONLY
    batch_size: int = 1
    antithetic: bool = False
    key: Key = 0
    unroll: int | None = None
    sharding: jax.sharding.NamedSharding | None = None

    def __post_init__(self) -> None:
        """Checks the arguments; nothing is computed."""
        check_callable("distribution", self.distribution, "(key, params) -> sample")
        check_count("num_samples", self.num_samples)
        check_count("batch_size", self.batch_size)
        if self.num_samples % self.batch_size:
            raise ValueError(
                f"batch_size must divide num_samples, {self.num_samples}, got {self.batch_size}."
            )
        if self.antithetic and self.num_samples % 2:
            raise ValueError(f"num_samples must be even if antithetic, got {self.num_samples}.")
        if self.unroll is not None:
            check_count("unroll", self.unroll)
        if self.sharding is not None:
            try:
                self.sharding.shard_shape((self.batch_size,))
            except ValueError as error:
                raise ValueError(
                    f"sharding must divide the {self.batch_size} samples that are evaluated at "
                    f"once, batch_size: {error}"
                ) from None
        check_key("key", self.key)


def check_sampling(value: object) -> None:
    """Raises a `TypeError` unless `value` is a `Sampling`."""
    if not isinstance(value, Sampling):
        raise TypeError(
            f"sampling must be a samax.Sampling, got {value!r} of type {type(value).__name__}; "
            "write samax.Sampling(samax.gaussian, num_samples=8)."
        )


def draw(sampling: Sampling, key: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Each sample's key and sign, of a shape (visits, samples a visit)."""
    shape = (sampling.num_samples // sampling.batch_size, sampling.batch_size)
    if not sampling.antithetic:
        return jax.random.split(key, shape), jnp.ones(shape, dtype)
    places = jnp.arange(math.prod(shape)).reshape(shape)
    keys = jax.random.split(key, places.size // 2)[places // 2]
    return keys, (1 - 2 * (places % 2)).astype(dtype)


def accumulate(
    sampling: Sampling,
    look: Callable[[jax.Array, jax.Array], Any],
    add: Callable[[Carry, Any], Carry],
    start: Carry,
    draws: tuple[jax.Array, jax.Array],
) -> Carry:
    """What `add(sums, seen)` makes of `start`, one visit of `batch_size` samples after the other.

    `look(key, sign)` sees one sample, and `seen` is what it returns for those of a visit, stacked.
    """

    def visit(sums: Carry, draws: tuple[jax.Array, jax.Array]) -> tuple[Carry, None]:
        if sampling.batch_size == 1:  # not every function can be mapped: ordered callbacks cannot
            only = look(draws[0][0], draws[1][0])
            seen = jax.tree.map(lambda x: x[None], only)
        else:
            seen = jax.vmap(look)(*_spread(draws, sampling.sharding))
        return add(sums, seen), None

    visits = len(draws[0])
    unroll = default_unroll(visits) if sampling.unroll is None else sampling.unroll
    return stream(visit, start, draws, unroll)[0]


def _spread(
    draws: tuple[jax.Array, jax.Array], sharding: jax.sharding.NamedSharding | None
) -> tuple[jax.Array, jax.Array]:
    """Gives each device its share of the draws that are evaluated at once."""
    if sharding is None:
        return draws
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    place = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
    keys, signs = draws
    # As raw data: JAX 0.6 counts the axes of typed keys wrongly where it lays them out.
    data = place(jax.random.key_data(keys), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys)), place(signs, sharding)
