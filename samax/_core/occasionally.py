"""When the ascent is made: on some steps, at two gradients, and not on the others, at one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import check_transformation
from samax._core.combinator import SharpnessMetrics
from samax._core.evaluation import FUNCTIONS, check_inputs
from samax._core.numerics import all_finite, vdot, widen
from samax._core.policies import Policy


class OccasionallyState(NamedTuple):
    """The state of the policy and of the transformation, and what the last update did.

    Attributes:
      ascended: whether the last update ascended.
      policy: the state of the policy.
      transformation: the state of the transformation.
    """

    ascended: jax.Array
    policy: Any
    transformation: optax.OptState


def occasionally(
    transformation: optax.GradientTransformation, policy: Policy
) -> optax.GradientTransformationExtraArgs:
    r"""Ascends on some steps, and takes the clean gradient for the perturbed one on the others.

    $$ \text{update} = \begin{cases} \mathrm{descent}(\tilde g; \, g) & \text{where it ascends}
       \\ \mathrm{descent}(g; \, g) & \text{on a plain one} \end{cases} $$

    With a share p of the steps ascending a step costs 1 + p gradients. A plain step evaluates
    nothing; its direction is g, bit for bit, for `sam` and other methods whose descent makes g of g
    and g. Schedules and averages of the ascent, and of the descent, keep moving on it.

    Two forms, with one state:

    - The policy decides in the program, which then holds both kinds of step in a `lax.cond`. Under
      `vmap` that is a `select`, and both sides are paid. On CPU, XLA runs convolutions inside a
      `cond` about 22 times slower than outside.
    - `update(..., ascend=True)` or `ascend=False`, a Python bool: the host decides and compiles two
      programs, without a `cond`; a plain step then needs no function. The policy is not asked, and
      its state counts on.

    Read what the last update did with `optax.tree.get(state, "ascended")`. `SharpnessMetrics` of a
    plain step have NaN where nothing was evaluated, and a `perturbation_norm` of 0.

    A gradient with a non-finite entry does not ascend, and moves no state.

    Args:
      transformation: `samax.sam(rho)` or another method that evaluates gradients. On plain steps it
        is handed the clean gradient as the perturbed one; one that needs losses too, such as
        `samax.trace_sam`, needs `value=` there.
      policy: which steps ascend: `samax.from_step`, `samax.until_step`, `samax.every`,
        `samax.at_random`, `samax.where_steep`, or a `samax.Policy` of your own.

    Returns:
      A transformation.

    Raises:
      TypeError: if `transformation` or `policy` is none; in `update`, if `ascend` is no Python
        bool.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, samax
      >>> loss = lambda w: jnp.sum(w**2)
      >>> tx = optax.chain(samax.occasionally(samax.sam(0.5), samax.every(2)), optax.sgd(0.1))
      >>> w = jnp.array([3.0, 4.0])
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     _, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
      ...     print(optax.tree.get(state, "ascended"))
      True
      False
      >>> updates, state = tx.update(jax.grad(loss)(w), state, w, ascend=False)
      >>> print(updates)
      [-0.6 -0.8]
    """
    check_transformation("transformation", transformation)
    if not (hasattr(policy, "init") and hasattr(policy, "decide")):
        raise TypeError(
            "policy must be a samax.Policy, such as samax.every(2) or samax.from_step(1000), got "
            f"{policy!r}."
        )
    inner = optax.with_extra_args_support(transformation)

    def init(params: optax.Params) -> OccasionallyState:
        return OccasionallyState(
            ascended=jnp.zeros((), bool), policy=policy.init(), transformation=inner.init(params)
        )

    def update(
        updates: optax.Updates,
        state: OccasionallyState,
        params: optax.Params | None = None,
        *,
        ascend: bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OccasionallyState]:
        check_inputs(updates, params, extra_args)
        if not (ascend is None or isinstance(ascend, bool)):
            raise TypeError(
                "ascend must be a Python bool, known when the step is compiled (name it in "
                f"static_argnames), got {ascend!r}; a policy decides within the program."
            )
        clean = widen(updates)
        finite = all_finite(clean)
        decided, policy_state = policy.decide(state.policy, vdot(clean, clean))
        ascends = jnp.asarray(decided if ascend is None else ascend, bool) & finite

        def full(
            updates: optax.Updates, state: optax.OptState
        ) -> tuple[optax.Updates, optax.OptState]:
            return inner.update(updates, state, params, ascended=True, **extra_args)

        def plain(
            updates: optax.Updates, state: optax.OptState
        ) -> tuple[optax.Updates, optax.OptState]:
            known = {k: v for k, v in extra_args.items() if k not in FUNCTIONS}
            value = known.get("value")
            if value is None:
                known["grad_fn"] = lambda _: updates
            else:
                known["value_and_grad_fn"] = lambda _: (value, updates)
            direction, state = inner.update(updates, state, params, ascended=False, **known)
            return direction, _not_evaluated(state)

        if ascend is None:
            direction, kept = jax.lax.cond(ascends, full, plain, updates, state.transformation)
        else:
            direction, kept = (full if ascend else plain)(updates, state.transformation)
        return direction, OccasionallyState(
            ascended=ascends,
            policy=optax.tree.where(finite, policy_state, state.policy),
            transformation=kept,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _not_evaluated(state: optax.OptState) -> optax.OptState:
    """The state after a plain step, with what its metrics cannot know."""
    is_metrics = lambda node: isinstance(node, SharpnessMetrics)  # noqa: E731

    def corrected(node: Any) -> Any:
        if not is_metrics(node):
            return node
        unknown = jnp.full_like(node.perturbed_loss, jnp.nan)
        return node._replace(
            perturbed_loss=unknown,
            loss_gap=unknown,
            perturbed_grad_norm=unknown,
            grad_cosine=unknown,
            perturbation_norm=jnp.zeros_like(node.perturbation_norm),
        )

    return jax.tree.map(corrected, state, is_leaf=is_metrics)
