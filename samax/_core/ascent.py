"""Ascent parts: transformations that turn the clean gradient into the perturbation `eps`.

Each is an ordinary Optax transformation, to be chained with any other one and handed to
`samax.sharpness_aware` as its `ascent`. Mind the sign: `eps` is ADDED to the parameters, so an
ascent keeps the sign of the gradient. `sharpness_aware` hands over gradients in float32 or wider.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import ScalarOrSchedule, check_scalar, check_schedule, check_transformation
from samax._core.keys import typed_key
from samax._core.numerics import all_finite, normalized, start_count, widen


def normalize(eps: jax.typing.ArrayLike = 0.0) -> optax.GradientTransformation:
    r"""Divides by the global l2 norm, the step that tells SAM from USAM.

    $$ g \mapsto \frac{g}{\lVert g \rVert + \texttt{eps}} $$

    The norm is over all leaves, accumulated in float32 or wider, and safe from underflow and
    overflow. A zero gradient gives zero, never NaN, and so does one with a non-finite entry: the
    base optimizer then sees the bad gradient as it is.

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


def scale_by_rho(rho: ScalarOrSchedule) -> optax.GradientTransformation:
    r"""Multiplies by the perturbation radius, a number or a schedule.

    $$ g \mapsto \rho_t \, g $$

    After `normalize` this makes SAM's perturbation, of norm `rho`; on its own USAM's, of norm
    `rho * ||g||`.

    Args:
      rho: the radius, at least 0, or a schedule of it over the training steps. A schedule is
        looked at when the transformation is built, over the first 2,000 steps and sparsely up to
        step 1e7; should it be negative where it was not looked at, 0 is used.

    Returns:
      A transformation with the step count as its state.

    Raises:
      ValueError: if `rho` is negative or not finite, or a schedule that is at some step.

    Examples:
      A radius that follows a learning rate between two bounds, kept from going negative while the
      learning rate warms up:

      >>> import jax.numpy as jnp, optax, samax
      >>> rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 100, 1000, 0.01)
      >>> rho = lambda step: jnp.maximum(0.0, 0.02 + 0.03 * (rate(step) - 0.01) / 0.09)
      >>> ascent = optax.chain(samax.normalize(), samax.scale_by_rho(rho))
    """
    check_schedule("rho", rho)

    def update(
        updates: optax.Updates,
        state: optax.ScaleByScheduleState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        del params
        radius = jnp.maximum(rho(state.count), 0.0) if callable(rho) else rho
        updates = jax.tree.map(lambda g: (g * radius).astype(g.dtype), updates)
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(start_count, update)


def scale_by_abs_params(t0: jax.typing.ArrayLike = 0.0) -> optax.GradientTransformation:
    r"""Multiplies elementwise by the size of the parameters, ASAM's operator.

    $$ g \mapsto T_w \, g, \qquad T_w = |w| + t_0 $$

    ASAM's perturbation is this part, `normalize`, this part again, and `scale_by_rho`. Wrap it in
    `optax.masked(..., mask)` to scale some leaves only, T = 1 for the others.

    Args:
      t0: added to `|w|`, at least 0, so that parameters near zero are perturbed too.

    Returns:
      A stateless transformation that needs `params`.

    Raises:
      ValueError: if `t0` is negative or not finite, or if `update` gets no `params`.
    """
    check_scalar("t0", t0)

    def scale(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        if params is None:
            raise ValueError("scale_by_abs_params needs params: pass them to update.")
        return jax.tree.map(
            lambda g, w: (g * (jnp.abs(w) + t0)).astype(g.dtype), updates, widen(params)
        )

    return optax.stateless(scale)


def gradient_ema(theta: jax.typing.ArrayLike) -> optax.GradientTransformation:
    r"""Replaces the gradient by its exponential moving average, VaSSO's variance suppression.

    $$ d_0 = g_0, \qquad d_t = (1 - \theta) \, d_{t-1} + \theta \, g_t $$

    The average starts at the first gradient, so it needs no bias correction (which is what
    `optax.ema` would apply). A gradient with a non-finite entry leaves it as it is.

    Args:
      theta: the weight of the new gradient, in (0, 1]; 1 gives SAM.

    Returns:
      A transformation whose state holds the average in float32 or wider.

    Raises:
      ValueError: if `theta` is outside (0, 1].
    """
    check_scalar("theta", theta, high=1.0, include_low=False)

    def init(params: optax.Params) -> optax.EmaState:
        ema = jax.tree.map(jnp.zeros_like, widen(params))
        return optax.EmaState(count=jnp.zeros((), jnp.int32), ema=ema)

    def update(
        updates: optax.Updates, state: optax.EmaState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmaState]:
        del params
        updates = widen(updates)
        usable = all_finite(updates)
        first = state.count == 0

        def average(g: jax.Array, d: jax.Array) -> jax.Array:
            moved = jnp.where(first, g, (1.0 - theta) * d + theta * g)
            return jnp.where(usable, moved, d).astype(d.dtype)

        ema = jax.tree.map(average, updates, state.ema)
        count = jnp.where(usable, optax.safe_increment(state.count), state.count)
        return ema, optax.EmaState(count=count, ema=ema)

    return optax.GradientTransformation(init, update)


def perturb_only(
    ascent: optax.GradientTransformation, mask: Any | Callable[[optax.Params], Any]
) -> optax.GradientTransformationExtraArgs:
    r"""Perturbs the leaves that `mask` marks and leaves the others where they are.

    The ascent sees the marked leaves alone, so its norm is over them alone: $\lVert \epsilon
    \rVert = \rho$ over the perturbed subset, and $\epsilon = 0$ elsewhere. All leaves are trained.

    Args:
      ascent: any ascent.
      mask: a pytree of booleans like the parameters (or a prefix of it), or a function that makes
        one from a pytree of the parameters' structure and shapes.

    Returns:
      The masked ascent.

    Examples:
      SAM that perturbs the LoRA factors alone:

      >>> import jax, optax, samax
      >>> ascent = optax.chain(samax.normalize(), samax.scale_by_rho(0.05))
      >>> is_lora = lambda params: jax.tree_util.tree_map_with_path(
      ...     lambda path, _: "lora" in jax.tree_util.keystr(path), params)
      >>> tx = samax.sharpness_aware(samax.perturb_only(ascent, is_lora))
    """
    check_transformation("ascent", ascent)

    def labels(params: optax.Params) -> Any:
        marked = mask(params) if callable(mask) else mask
        return jax.tree.map(lambda perturbed: "perturbed" if perturbed else "fixed", marked)

    return optax.partition({"perturbed": ascent, "fixed": optax.set_to_zero()}, labels)


def weights_only(params: optax.Params) -> Any:
    """A mask that is True for every leaf but the biases: those with "bias" in their path.

    ASAM's authors scale "weights" and not biases; the scales of normalization layers are weights
    to them.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "bias" not in jax.tree_util.keystr(path), params
    )


class StochasticRoundingState(NamedTuple):
    """The key of the next draw, as raw key data, which checkpoints and tree maps can handle."""

    rng_key: jax.Array


def stochastic_rounding(key: jax.Array | int) -> optax.GradientTransformation:
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

    Examples:
      >>> import optax, samax
      >>> ascent = optax.chain(
      ...     samax.normalize(), samax.scale_by_rho(0.05), samax.stochastic_rounding(0))
    """
    typed = typed_key(key)
    implementation = jax.random.key_impl(typed)

    def init(params: optax.Params) -> StochasticRoundingState:
        del params
        return StochasticRoundingState(rng_key=jax.random.key_data(typed))

    def update(
        updates: optax.Updates, state: StochasticRoundingState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, StochasticRoundingState]:
        if params is None:
            raise ValueError("stochastic_rounding needs params: pass them to update.")
        current = jax.random.wrap_key_data(state.rng_key, impl=implementation)
        following, draw = jax.random.split(current)
        eps, structure = jax.tree.flatten(updates)
        rounded = [
            _round_stochastically(jax.random.fold_in(draw, i), e, w)
            for i, (e, w) in enumerate(zip(eps, jax.tree.leaves(params), strict=True))
        ]
        state = StochasticRoundingState(rng_key=jax.random.key_data(following))
        return jax.tree.unflatten(structure, rounded), state

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
