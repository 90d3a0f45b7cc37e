"""Ascent parts: transformations that turn the clean gradient into the perturbation `eps`.

Each is an ordinary Optax transformation, to be chained with any other one and handed to
`samax.sharpness_aware` as its `ascent`. Mind the sign: `eps` is ADDED to the parameters, so an
ascent keeps the sign of the gradient. `sharpness_aware` hands over gradients in float32 or wider.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import check_mask, check_transformation
from samax._core.hyperparameters import ScalarOrSchedule, check_scalar, scheduled
from samax._core.keys import Key, check_key, next_key, start_key
from samax._core.numerics import normalized, widen

# A pytree of booleans like the parameters, or a function from them to one.
Mask: TypeAlias = Any | Callable[[optax.Params], Any]


def normalize(eps: jax.typing.ArrayLike = 0.0) -> optax.GradientTransformation:
    r"""Divides by the global l2 norm, the step that tells SAM from USAM.

    $$ g \mapsto \frac{g}{\lVert g \rVert + \texttt{eps}} $$

    The norm is over all leaves, accumulated in float32 or wider, and safe from underflow and
    overflow. A zero gradient gives zero, never NaN.

    Args:
      eps: added to the norm. The formula of the papers has none (0, the default); published code
        has 1e-12 (davda54/sam), 1e-16 (ASAM's authors) or 1e-7 (VaSSO's authors).

    Returns:
      A stateless transformation.

    Raises:
      ValueError: if `eps` is negative or not finite.

    Examples:
      >>> import jax.numpy as jnp, samax
      >>> grads, part = {"w": jnp.array([3.0, 4.0])}, samax.normalize()
      >>> unit, _ = part.update(grads, part.init(grads))
      >>> print(unit["w"])
      [0.6 0.8]
    """
    check_scalar("eps", eps)
    return optax.stateless(lambda updates, params: normalized(widen(updates), eps))


def scale_by_rho(rho: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies by the perturbation radius, a number or a schedule.

    $$ g \mapsto \rho_t \, g $$

    After `normalize` this makes SAM's perturbation, of norm `rho`; on its own USAM's, of norm
    `rho * ||g||`.

    Args:
      rho: the radius, at least 0, or a schedule of it over the training steps. `init` looks at a
        schedule over the first 2,000 steps and sparsely up to step 1e7; should it be negative
        where it was not looked at, 0 is used.

    Returns:
      A transformation; with a schedule its state is the step count, and empty with a number.

    Raises:
      ValueError: if `rho` is negative or not finite; in `init`, if a schedule is at some step.

    Examples:
      A radius that follows a learning rate between two bounds, kept from going negative while the
      learning rate warms up:

      >>> import jax.numpy as jnp, optax, samax
      >>> rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 100, 1000, 0.01)
      >>> rho = lambda step: jnp.maximum(0.0, 0.02 + 0.03 * (rate(step) - 0.01) / 0.09)
      >>> tx = optax.chain(samax.sam(rho), optax.sgd(rate))
    """
    return scale_by("rho", rho)


def scale_by(name: str, factor: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies by a hyper-parameter, a number or a schedule, of that name."""

    def scale(factor: jax.typing.ArrayLike, updates: optax.Updates, /, **_: Any) -> optax.Updates:
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates)

    return scheduled(name, factor, scale)


def scale_to_norm(
    rho: ScalarOrSchedule, eps: jax.typing.ArrayLike = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Scales to the norm rho: SAM's perturbation, `normalize` and then `scale_by_rho`.

    $$ g \mapsto \rho_t \, \frac{g}{\lVert g \rVert + \texttt{eps}} $$

    Args:
      rho: the radius, at least 0, or a schedule of it; see `scale_by_rho`.
      eps: added to the norm; see `normalize`.

    Returns:
      A transformation; with a schedule its state is the step count, and empty with a number.

    Raises:
      ValueError: if `rho` or `eps` is negative or not finite; in `init`, if a schedule is at some
        step.

    Examples:
      >>> import jax.numpy as jnp, samax
      >>> grads, ascent = {"w": jnp.array([3.0, 4.0])}, samax.scale_to_norm(0.5)
      >>> eps, _ = ascent.update(grads, ascent.init(grads))
      >>> print(eps["w"])
      [0.3 0.4]
    """
    return optax.chain(normalize(eps), scale_by_rho(rho))


def perturb_only(
    ascent: optax.GradientTransformation, mask: Mask | None
) -> optax.GradientTransformationExtraArgs:
    r"""Perturbs the leaves that `mask` marks and leaves the others where they are.

    The ascent sees the marked leaves alone, so its norm is over them alone: $\lVert \epsilon
    \rVert = \rho$ over the perturbed subset, and $\epsilon = 0$ elsewhere. All leaves are trained.

    Args:
      ascent: any ascent.
      mask: a pytree of booleans like the parameters (or a prefix of it), or a function that makes
        one from a pytree of the parameters' structure and shapes. None marks all leaves.

    Returns:
      The masked ascent.

    Raises:
      TypeError: if `ascent` is not a transformation, or `mask` neither a function nor of booleans.

    Examples:
      An ascent by Adam's direction that perturbs the LoRA factors alone (the methods have it as an
      argument, `samax.sam(0.05, mask=is_lora)`):

      >>> import jax, optax, samax
      >>> ascent = optax.chain(optax.scale_by_adam(), samax.scale_to_norm(0.05))
      >>> is_lora = lambda params: jax.tree_util.tree_map_with_path(
      ...     lambda path, _: "lora" in jax.tree_util.keystr(path), params)
      >>> tx = samax.sharpness_aware(samax.perturb_only(ascent, is_lora))
    """
    check_transformation("ascent", ascent)
    if mask is None:
        return optax.with_extra_args_support(ascent)
    check_mask("mask", mask)

    def labels(params: optax.Params) -> Any:
        marked = mask(params) if callable(mask) else mask
        return jax.tree.map(lambda perturbed: "perturbed" if perturbed else "fixed", marked)

    return optax.partition({"perturbed": ascent, "fixed": optax.set_to_zero()}, labels)


class StochasticRoundingState(NamedTuple):
    """The key of the next draw: a typed key if one was passed, and raw key data otherwise."""

    rng_key: jax.Array


def stochastic_rounding(key: Key) -> optax.GradientTransformation:
    r"""Makes the perturbed point of low-precision parameters right on average.

    With bfloat16 or float16 parameters a perturbation below half a unit in the last place vanishes
    when $w + \epsilon$ is rounded, and SAM silently becomes the base optimizer. This part, the
    last of an ascent, replaces $\epsilon$ by the difference between $w$ and one of the two
    representable neighbours of $w + \epsilon$, drawn so that its mean is $\epsilon$:

    $$ \epsilon \mapsto \mathrm{SR}(w + \epsilon) - w, \qquad
       \mathbb{E} \, \mathrm{SR}(w + \epsilon) = w + \epsilon $$

    The rounding adds noise: the norm of the realized perturbation exceeds rho. Float32 parameters
    with bfloat16 compute need none of this and are the better choice where they fit. Leaves in
    float32 or wider pass as they are.

    Args:
      key: a JAX key, or a seed, for the draws; the state holds its successor.

    Returns:
      A transformation that needs `params`.

    Raises:
      TypeError: if `key` is neither a seed nor one key.

    Examples:
      >>> import optax, samax
      >>> ascent = optax.chain(samax.scale_to_norm(0.05), samax.stochastic_rounding(0))
    """
    check_key("key", key)

    def init(params: optax.Params) -> StochasticRoundingState:
        del params
        return StochasticRoundingState(rng_key=start_key(key))

    def update(
        updates: optax.Updates, state: StochasticRoundingState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, StochasticRoundingState]:
        if params is None:
            raise ValueError("stochastic_rounding needs params: pass them to update.")
        following, draw = next_key(state.rng_key)
        eps, structure = jax.tree.flatten(updates)
        rounded = [
            _round_stochastically(jax.random.fold_in(draw, i), e, w)
            for i, (e, w) in enumerate(zip(eps, jax.tree.leaves(params), strict=True))
        ]
        return jax.tree.unflatten(structure, rounded), StochasticRoundingState(following)

    return optax.GradientTransformation(init, update)


def _round_stochastically(key: jax.Array, eps: jax.Array, param: jax.Array) -> jax.Array:
    """`SR(param + eps) - param`, with SR in the dtype of `param`."""
    if jnp.finfo(param.dtype).bits >= jnp.finfo(jnp.float32).bits:
        return eps
    target = param.astype(jnp.float32) + eps.astype(jnp.float32)
    nearest = target.astype(param.dtype)
    error = target - nearest.astype(jnp.float32)
    away = jnp.where(error > 0, jnp.inf, -jnp.inf).astype(param.dtype)
    other = jnp.nextafter(nearest, away)
    spacing = other.astype(jnp.float32) - nearest.astype(jnp.float32)
    # A representable target has no error; an infinite one stays where it is.
    chance = jnp.where((error != 0) & jnp.isfinite(spacing), error / spacing, 0.0)
    chosen = jnp.where(jax.random.uniform(key, param.shape) < chance, other, nearest)
    return (chosen.astype(jnp.float32) - param.astype(jnp.float32)).astype(eps.dtype)
