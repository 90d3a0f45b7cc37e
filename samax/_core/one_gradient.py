"""One gradient a step: the parameters outside are the perturbed ones."""

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import optax

from samax._core.checks import check_parameters, check_transformation
from samax._core.evaluation import check_inputs
from samax._core.numerics import all_finite, cast_like, copies, difference, displace, widen

Source: TypeAlias = Literal["gradient", "update", "momentum"]


class OneGradientState(NamedTuple):
    """The state between two updates.

    Attributes:
      params: the unperturbed parameters w, one copy.
      ascent: the state of the ascent.
      optimizer: the state of the optimizer.
    """

    params: optax.Params
    ascent: optax.OptState
    optimizer: optax.OptState

    def unperturbed(self, params: optax.Params) -> optax.Params:
        """What `samax.eval_params` returns."""
        del params
        return self.params


def one_gradient(
    optimizer: optax.GradientTransformation,
    ascent: optax.GradientTransformation,
    *,
    source: Source = "gradient",
    decay_perturbed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Perturbs along what is known from the last step, so that a step costs one gradient.

    $$ w_{t+1} = w_t + \mathrm{optimizer}(\tilde g_t; \, w_t), \qquad
       \tilde g_t = \nabla L(w_t + \epsilon_t), \qquad
       \epsilon_{t+1} = \mathrm{ascent}(\mathrm{source}_t), \quad \epsilon_0 = 0 $$

    The parameters outside ARE the perturbed ones, $w_t + \epsilon_t$, so that the gradient which
    the trainer computes there is the perturbed one: `update(grads, state, params)` needs no
    function, and this is one changed line under any trainer. Evaluate, and export, the parameters
    of `samax.eval_params(state, params)`. The state holds them, one copy, in their own dtype.

    The returned update leads from the old perturbed point to the new one, so nothing follows this
    in a chain, but what stands before it, or inside around the optimizer, is free: clipping before
    changes the source as well, inside the optimizer's step alone. `optax.MultiSteps` around it
    accumulates at one perturbed point; inside it, as the optimizer, the point moves with each
    micro-batch. As the parameters that count are in the state, those changed from outside (loaded,
    projected) need a new `init`.

    A gradient with a non-finite entry is not perturbed along: the optimizer sees it as it is, the
    ascent's state stays, and the next point is the unperturbed one.

    What rounding does: w moves as the base optimizer moves it and is never rounded to the perturbed
    point and back. The point outside is $w + \epsilon$ in the parameters' dtype, and where an entry
    changes by more than a factor of two, the trainer's own sum of parameters and updates rounds it
    once more, which moves the place where the gradient is taken by half a unit in its last place
    and adds up to nothing. With bfloat16 parameters a perturbation below half a unit in the last
    place of w vanishes, as everywhere: end the ascent with `samax.stochastic_rounding`.

    Args:
      optimizer: the base optimizer, learning rate included.
      ascent: any transformation, from the source to what is ADDED to the parameters, such as
        `samax.scale_to_norm(rho)`; `optax.scale(-1.0)` behind it turns its sign. With
        `samax.perturb_only` around it some leaves are perturbed, and all are trained.
      source: what the ascent is made from: the last `"gradient"`, taken at the perturbed point; the
        optimizer's `"update"`, which points downhill; or its `"momentum"`, the first moment as it
        is in its state (`trace` or `mu`), which points uphill.
      decay_perturbed: whether the optimizer is given the perturbed parameters, and so decays those,
        instead of the unperturbed ones.

    Returns:
      An optimizer.

    Raises:
      TypeError: if a part is not a transformation; in `init` and `update`, if a leaf is not a real
        floating-point array or masked from outside.
      ValueError: if the source is unknown; in `init`, if the optimizer's state holds no momentum
        of the parameters' tree, or several, and that is the source.

    Examples:
      Lazily spectral: the perturbation is along the last orthogonalized direction of Muon, uphill.

      >>> import jax, jax.numpy as jnp, optax, samax
      >>> ascent = optax.chain(optax.scale(-1.0), samax.scale_to_norm(0.05))
      >>> tx = samax.one_gradient(optax.contrib.muon(0.02), ascent, source="update")
      >>> w = jnp.ones((4, 4))
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jax.grad(lambda w: jnp.sum(w**2))(w), state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> print(f"{jnp.linalg.norm(w - samax.eval_params(state, w)):.3f}")
      0.050
    """
    check_transformation("optimizer", optimizer)
    check_transformation("ascent", ascent)
    if source not in get_args(Source):
        raise ValueError(
            f"source must be one of {', '.join(map(repr, get_args(Source)))}, got {source!r}."
        )
    base = optax.with_extra_args_support(optimizer)
    ascent = optax.with_extra_args_support(ascent)

    def init(params: optax.Params) -> OneGradientState:
        check_parameters("params", params)
        state = OneGradientState(
            params=copies(params), ascent=ascent.init(widen(params)), optimizer=base.init(params)
        )
        if source == "momentum":
            _momentum(state.optimizer, params)
        return state

    def update(
        updates: optax.Updates,
        state: OneGradientState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OneGradientState]:
        check_inputs(updates, params, extra_args)
        seen = params if decay_perturbed else state.params
        step, optimizer_state = base.update(updates, state.optimizer, seen, **extra_args)
        unperturbed = optax.apply_updates(state.params, step)
        direction = {
            "gradient": lambda: updates,
            "update": lambda: step,
            "momentum": lambda: _momentum(optimizer_state, params),
        }[source]()
        eps, ascent_state = ascent.update(widen(direction), state.ascent, unperturbed, **extra_args)
        finite = all_finite(widen(updates))
        point = optax.tree.where(finite, displace(unperturbed, eps), unperturbed)
        return cast_like(difference(point, params), params), OneGradientState(
            params=unperturbed,
            ascent=optax.tree.where(finite, ascent_state, state.ascent),
            optimizer=optimizer_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _momentum(state: optax.OptState, params: optax.Params) -> optax.Updates:
    """The one first moment of all parameters in an optimizer's state."""
    structure: Any = jax.tree.structure(params)
    found = [
        value
        for name in ("trace", "mu")
        for _, value in optax.tree.get_all_with_path(state, name)
        if jax.tree.structure(value) == structure
    ]
    if len(found) != 1:
        raise ValueError(
            "source='momentum' needs one first moment of all parameters in the optimizer's state, "
            f"a trace (optax.sgd with momentum) or a mu (optax.adam), and found {len(found)}; "
            "source='update' needs none."
        )
    return found[0]
